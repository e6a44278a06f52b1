// What kernels share that go by a head's slots, side by side: rows of strided tensors, tokens turned so
// that a dimension is a row, their products, and the order of positions.
//
// Slots that hold equal tokens must score equal to the last bit, wherever they lie, for the older is
// to go: so sums run over a head's dimensions in one order for all slots, side by side, and slots
// are padded to whole vectors rather than left to a loop of another kind.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "lanes.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <vector>

namespace {

using at::Tensor;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kTiny = std::numeric_limits<float>::min();
constexpr int32_t kLast = std::numeric_limits<int32_t>::max();

// One row a head of a tensor [B, H, ...], of which only the last dimension is side by side.
template <typename T>
struct Rows {
  Tensor kept;
  T* data;
  int64_t heads, batch_stride, head_stride, stride;

  explicit Rows(const Tensor& given)
      : kept(given.size(-1) == 1 || given.stride(-1) == 1 ? given : given.contiguous()),
        data(static_cast<T*>(kept.data_ptr())),
        heads(kept.size(1)),
        batch_stride(kept.stride(0)),
        head_stride(kept.stride(1)),
        stride(kept.stride(2)) {}

  T* operator[](int64_t at) const {
    return data + at / heads * batch_stride + at % heads * head_stride;
  }
};

template <typename Go>
void each_head(const Tensor& by_slot, int64_t grain, const Go& go) {
  at::parallel_for(0, by_slot.size(0) * by_slot.size(1), grain, go);
}

template <typename Go>
void by_dtype(const Tensor& tensor, const Go& go) {
  switch (tensor.scalar_type()) {
    case at::kFloat: go(float{}); break;
    case at::kBFloat16: go(at::BFloat16{}); break;
    case at::kHalf: go(at::Half{}); break;
    default: TORCH_CHECK(false, "no kernel for ", tensor.scalar_type());
  }
}

// A token in float32, padded with zeros.
template <typename T>
inline void copy(const T* token, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = static_cast<float>(token[d]);
  std::fill(out + dim, out + padded(dim), 0.0f);
}

// A head's tokens [slots, dim], one row a dimension: [dim, slots]; both are padded.
void turn(const float* tokens, int64_t slots, int64_t dim, float* out) {
  const int64_t across = padded(slots), wide = padded(dim);
  for (int64_t s = 0; s < across; s += kLanes)
    for (int64_t d = 0; d < wide; d += kLanes)
      turn_block(tokens + s * wide + d, wide, out + d * across + s, across);
}

// Calls go(how many) for a number from 1 to kMost that is known when it is compiled.
template <int64_t kMost, typename Go>
inline void with_count(int64_t count, const Go& go) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost - 1>(count, go);
  }
  go(std::integral_constant<int64_t, kMost>{});
}

// out = sum over i < count of other[i * stride] * rows[i], rows of `width` numbers, whole vectors.
// So many vectors at once that each sum need not wait for the one before.
void product(
    const float* other, int64_t stride, const float* rows, int64_t count, int64_t width, float* out) {
  constexpr int64_t kAtOnce = 8;
  for (int64_t j = 0; j < width; j += kAtOnce * kLanes)
    with_count<kAtOnce>((width - j) / kLanes, [&](auto vectors) {
      Lanes sums[vectors] = {};
      for (int64_t i = 0; i < count; ++i)
        for (int64_t v = 0; v < vectors; ++v)
          sums[v] = fused(other[i * stride], lanes<Lanes>(rows + i * width + j + v * kLanes), sums[v]);
      for (int64_t v = 0; v < vectors; ++v) lanes<Lanes>(out + j + v * kLanes) = sums[v];
    });
}

// Ask for a part of a head's tokens ahead of time: part `at` of `parts`.
template <typename T>
inline void ask_ahead(
    const T* tokens, int64_t stride, int64_t slots, int64_t dim, int64_t at, int64_t parts) {
  for (int64_t s = slots * at / parts; s < slots * (at + 1) / parts; ++s)
    for (int64_t byte = 0; byte < dim * static_cast<int64_t>(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(tokens + s * stride) + byte);
}

// How manieth each token of a head is in the order of positions: one bit a position tells, so nothing
// is sorted.
struct Order {
  std::vector<uint64_t> bits;
  std::vector<int32_t> before, place;  // place: of each slot; meaningless where it is empty

  // How many slots hold a token.
  int32_t find(const int32_t* position, int64_t slots) {
    int32_t low = kLast, high = -1;
    for (int64_t s = 0; s < slots; ++s) {
      low = position[s] >= 0 && position[s] < low ? position[s] : low;
      high = position[s] > high ? position[s] : high;
    }
    place.resize(slots);
    if (high < 0) return 0;
    bits.assign((high - low) / 64 + 1, 0);
    before.resize(bits.size());
    for (int64_t s = 0; s < slots; ++s)
      if (position[s] >= 0) bits[(position[s] - low) / 64] |= uint64_t{1} << (position[s] - low) % 64;
    int32_t held = 0;
    for (size_t word = 0; word < bits.size(); ++word) {
      before[word] = held;
      held += std::popcount(bits[word]);
    }
    for (int64_t s = 0; s < slots; ++s) {
      if (position[s] < 0) continue;
      const int32_t bit = position[s] - low;
      const uint64_t lower = (uint64_t{1} << bit % 64) - 1;
      place[s] = before[bit / 64] + std::popcount(bits[bit / 64] & lower);
    }
    return held;
  }
};

// A head's numbers in the order of positions, none of them negative, and what those beside each come to;
// beyond either end there is zero. Neighbours are added side by side for all tokens, from the oldest on.
struct Neighbours {
  int64_t kernel;
  std::vector<float> room;

  Neighbours(int64_t slots, int64_t kernel) : kernel(kernel), room(slots + 2 * (kernel / 2)) {}

  float& operator[](int64_t place) { return room[kernel / 2 + place]; }

  void mean(int64_t held, float* out) {
    beside(held, out, [](float sum, float next) { return sum + next; });
#pragma omp simd
    for (int64_t i = 0; i < held; ++i) out[i] /= static_cast<float>(kernel);
  }

  void largest(int64_t held, float* out) {  // NaN stays NaN
    beside(held, out, [](float most, float next) { return next > most || next != next ? next : most; });
  }

 private:
  template <typename Take>
  void beside(int64_t held, float* out, const Take& take) {
    std::fill_n(room.begin() + kernel / 2 + held, kernel / 2, 0.0f);
    std::fill(out, out + held, 0.0f);
    for (int64_t k = 0; k < kernel; ++k) {
      const float* shifted = room.data() + k;
#pragma omp simd
      for (int64_t i = 0; i < held; ++i) out[i] = take(out[i], shifted[i]);
    }
  }
};

// The slot with the lowest worth, and of equals the one with the lowest position. Nothing equals NaN;
// where it got this far after all, slot 0 is at least a slot.
template <typename T>
int64_t lowest_of(const T* worth, const int32_t* position, int64_t slots) {
  T least = worth[0];
#pragma omp simd reduction(min : least)
  for (int64_t s = 0; s < slots; ++s) least = worth[s] < least ? worth[s] : least;
  int32_t oldest = kLast;
#pragma omp simd reduction(min : oldest)
  for (int64_t s = 0; s < slots; ++s) {
    const int32_t here = worth[s] == least ? position[s] : kLast;
    oldest = here < oldest ? here : oldest;
  }
  int32_t slot = kLast;
#pragma omp simd reduction(min : slot)
  for (int32_t s = 0; s < static_cast<int32_t>(slots); ++s) {
    const int32_t here = worth[s] == least && position[s] == oldest ? s : kLast;
    slot = here < slot ? here : slot;
  }
  return slot == kLast ? 0 : slot;
}

}  // namespace
