// Numbers side by side: vectors as wide as this processor's, and sums whose order and rounding are written
// down, rather than left to a compiler.
//
// Equal tokens must score equal to the last bit wherever they lie, and a row of a product must not
// depend on its neighbours. A compiler that may fuse a product and a sum does so in one loop and not in
// the next (for some processors it avoids chains of them), so it may not (-ffp-contract=off), and what
// is fused says so.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
constexpr bool kWide = kLanes == 16;  // and twice as many of them fit into registers

using Lanes = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(4), may_alias));

template <typename Vector, typename T>
inline Vector& lanes(T* at) {
  return *reinterpret_cast<Vector*>(at);
}
template <typename Vector, typename T>
inline const Vector& lanes(const T* at) {
  return *reinterpret_cast<const Vector*>(at);
}

inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// a * b + c, rounded once where the processor has that.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline Lanes fused(Lanes a, Lanes b, Lanes c) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  Lanes sum;
  for (int64_t i = 0; i < kLanes; ++i) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return sum;
#else
  return a * b + c;
#endif
}

inline Lanes fused(float a, Lanes b, Lanes c) { return fused(Lanes{} + a, b, c); }

// Numbers of any type, in float32.
template <typename T>
inline Lanes load(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return lanes<Lanes>(from);
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {  // the upper half of a float32
    using Halves = uint16_t __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
    using Bits = uint32_t __attribute__((vector_size(kLanes * 4)));
    return (Lanes)(__builtin_convertvector(lanes<Halves>(from), Bits) << 16);
  } else {
#if defined(__AVX512F__)
    return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    return (Lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Lanes found;
    for (int64_t i = 0; i < kLanes; ++i) found[i] = static_cast<float>(from[i]);
    return found;
#endif
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KVPOLICY_SHUFFLES 1
#endif
#endif

#if !defined(KVPOLICY_SHUFFLES)
#define KVPOLICY_PICK(at) \
  Lanes found; \
  for (int64_t i = 0; i < kLanes; ++i) { \
    const int64_t from = at; \
    found[i] = from < kLanes ? a[from] : b[from - kLanes]; \
  } \
  return found
inline Lanes evens(Lanes a, Lanes b) { KVPOLICY_PICK(2 * i); }
inline Lanes odds(Lanes a, Lanes b) { KVPOLICY_PICK(2 * i + 1); }
inline Lanes lower(Lanes a, Lanes b) { KVPOLICY_PICK(i / 2 + i % 2 * kLanes); }
inline Lanes upper(Lanes a, Lanes b) { KVPOLICY_PICK(i / 2 + kLanes / 2 + i % 2 * kLanes); }
#else
#if defined(__AVX512F__)
#define KVPOLICY_EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define KVPOLICY_ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define KVPOLICY_LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define KVPOLICY_UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
#define KVPOLICY_EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define KVPOLICY_ODDS 1, 3, 5, 7, 9, 11, 13, 15
#define KVPOLICY_LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define KVPOLICY_UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define KVPOLICY_EVENS 0, 2, 4, 6
#define KVPOLICY_ODDS 1, 3, 5, 7
#define KVPOLICY_LOWER 0, 4, 1, 5
#define KVPOLICY_UPPER 2, 6, 3, 7
#endif
// Of two vectors: every other number, or halves interleaved.
inline Lanes evens(Lanes a, Lanes b) { return __builtin_shufflevector(a, b, KVPOLICY_EVENS); }
inline Lanes odds(Lanes a, Lanes b) { return __builtin_shufflevector(a, b, KVPOLICY_ODDS); }
inline Lanes lower(Lanes a, Lanes b) { return __builtin_shufflevector(a, b, KVPOLICY_LOWER); }
inline Lanes upper(Lanes a, Lanes b) { return __builtin_shufflevector(a, b, KVPOLICY_UPPER); }
#endif

// The sum of each of some vectors, by neighbours, and neighbours of those: the same order for any
// number of vectors, which are lost.
template <int64_t kCount>
inline void sums_of(Lanes* vectors, float* sums) {
  static_assert(kCount <= kLanes && (kCount & (kCount - 1)) == 0);
  const auto halved = [](Lanes a, Lanes b) { return evens(a, b) + odds(a, b); };
  for (int64_t left = kCount; left > 1; left /= 2)
    for (int64_t i = 0; i < left / 2; ++i)
      vectors[i] = halved(vectors[2 * i], vectors[2 * i + 1]);
  for (int64_t left = kLanes / kCount; left > 1; left /= 2)
    vectors[0] = halved(vectors[0], vectors[0]);
  for (int64_t i = 0; i < kCount; ++i) sums[i] = vectors[0][i];
}

// A square of numbers, turned: each round interleaves the upper half of its rows with the lower.
inline void turn_block(const float* rows, int64_t stride, float* out, int64_t out_stride) {
  Lanes a[kLanes], b[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) a[i] = lanes<Lanes>(rows + i * stride);
  for (int64_t round = 1; round < kLanes; round *= 2) {
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      b[2 * i] = lower(a[i], a[i + kLanes / 2]);
      b[2 * i + 1] = upper(a[i], a[i + kLanes / 2]);
    }
    for (int64_t i = 0; i < kLanes; ++i) a[i] = b[i];
  }
  for (int64_t i = 0; i < kLanes; ++i) lanes<Lanes>(out + i * out_stride) = a[i];
}

}  // namespace
