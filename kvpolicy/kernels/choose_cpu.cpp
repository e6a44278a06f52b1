// What decisions cost on a CPU: ranking slots, and the scores that compare many numbers. Each of
// these is written in torch's own operators where it is called, which decides the same; there, a few
// thousand numbers go by a dozen times, and calling costs more than counting. Built by
// kvpolicy/kernels/native.py.
//
// Slots that hold equal tokens must score equal to the last bit, wherever they lie, for the older is
// to go: so sums run over a head's dimensions in one order for all slots, side by side, and slots
// are padded to whole vectors rather than left to a loop of another kind.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
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

// Slots side by side: sixteen, on processors with narrower vectors as several of them.
constexpr int64_t kLanes = 16;
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

inline int64_t padded(int64_t slots) { return (slots + kLanes - 1) / kLanes * kLanes; }

// Sixteen rows of sixteen numbers, turned: each round interleaves the upper half with the lower.
inline void turn_block(const float* rows, int64_t stride, float* out, int64_t out_stride) {
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  Lanes a[kLanes], b[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) a[i] = lanes<Lanes>(rows + i * stride);
  for (int64_t round = 0; round < 4; ++round) {
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      const Lanes x = a[i], y = a[i + kLanes / 2];
      b[2 * i] = __builtin_shufflevector(
          x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      b[2 * i + 1] = __builtin_shufflevector(
          x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    for (int64_t i = 0; i < kLanes; ++i) a[i] = b[i];
  }
  for (int64_t i = 0; i < kLanes; ++i) lanes<Lanes>(out + i * out_stride) = a[i];
#else
  for (int64_t d = 0; d < kLanes; ++d)
    for (int64_t i = 0; i < kLanes; ++i) out[d * out_stride + i] = rows[i * stride + d];
#endif
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

// -- ranking ----------------------------------------------------------------------------------------

// The slot with the lowest worth, and of equals the one with the lowest position.
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
  return slot;
}

// An integer that orders like these numbers: see kvpolicy.ranking.sortable.
inline int64_t sortable(float worth) {
  worth += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &worth, sizeof bits);
  return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
}
inline int64_t sortable(int32_t worth) { return worth; }

template <typename T>
struct Scale;  // Numbers as kvpolicy.ranking has them.

template <>
struct Scale<float> {
  // Beyond the roof all is the same; what is protected stands above.
  static constexpr float roof = std::numeric_limits<float>::max() / 4;
  static constexpr float lift = 2.5f * roof, empty = -kInf, pinned = kInf;
  static float level(float worth) {
    const float least = worth < -roof ? -roof : worth;  // NaN stays NaN
    return least > roof ? roof : least;
  }
};

template <>
struct Scale<int32_t> {
  static constexpr int32_t lift = 1 << 30, empty = -1, pinned = kLast;
  static int32_t level(int32_t worth) { return worth; }
};

// Slots, worst first, and whether all that was ranked is a number.
template <typename T>
std::tuple<Tensor, bool> rank(
    const Tensor& score, const std::optional<Tensor>& protect, const Tensor& positions,
    const std::optional<Tensor>& pinned, int64_t prefix, int64_t count) {
  const int64_t slots = score.size(2);
  TORCH_CHECK(count <= slots, "rank: ", count, " of ", slots, " slots");
  Tensor chosen = at::empty({score.size(0), score.size(1), count}, score.options().dtype(at::kLong));
  int64_t* out = chosen.mutable_data_ptr<int64_t>();
  const Rows<T> scores(score);
  const Rows<int32_t> position(positions);
  std::optional<Rows<uint8_t>> held;
  std::optional<Rows<bool>> prefixes;
  if (protect) held.emplace(protect->expand_as(score));
  if (pinned) prefixes.emplace(pinned->expand_as(score));
  std::atomic<bool> numbers{true};
  using S = Scale<T>;
  each_head(score, 32, [&](int64_t first, int64_t last) {
    std::vector<T> room(slots);
    T* worth = room.data();
    std::vector<std::pair<int64_t, int64_t>> keys(count > 1 ? slots : 0);
    for (int64_t at = first; at < last; ++at) {
      const T* given = scores[at];
      const int32_t* where = position[at];
      if (held) {
        const uint8_t* lifted = (*held)[at];
#pragma omp simd
        for (int64_t s = 0; s < slots; ++s)
          worth[s] = S::level(given[s]) + static_cast<T>(lifted[s]) * S::lift;
      } else {
#pragma omp simd
        for (int64_t s = 0; s < slots; ++s) worth[s] = S::level(given[s]);
      }
      if (prefixes) {
        const bool* fixed = (*prefixes)[at];
        for (int64_t s = 0; s < slots; ++s) {
          if (fixed[s]) worth[s] = S::pinned;
          if (where[s] < 0) worth[s] = S::empty;
        }
      } else {
        std::fill(worth, worth + std::min(prefix, slots), S::pinned);
      }
      int32_t strange = 0;
#pragma omp simd reduction(+ : strange)
      for (int64_t s = 0; s < slots; ++s) strange += worth[s] != worth[s];
      if (strange) {
        numbers = false;
        std::fill(out + at * count, out + (at + 1) * count, 0);
        continue;
      }
      if (count == 1) {
        out[at] = lowest_of(worth, where, slots);
        continue;
      }
      for (int64_t s = 0; s < slots; ++s)
        keys[s] = {(sortable(worth[s]) << 32) + where[s], s};
      std::partial_sort(keys.begin(), keys.begin() + count, keys.end());
      for (int64_t i = 0; i < count; ++i) out[at * count + i] = keys[i].second;
    }
  });
  return {chosen, numbers};
}

std::tuple<Tensor, bool> lowest(
    const Tensor& score, const std::optional<Tensor>& protect, const Tensor& positions,
    const std::optional<Tensor>& pinned, int64_t prefix, int64_t count) {
  if (score.scalar_type() == at::kInt)
    return rank<int32_t>(score, protect, positions, pinned, prefix, count);
  return rank<float>(score, protect, positions, pinned, prefix, count);
}

// -- the order of positions ---------------------------------------------------------------------------

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

// Each token's mass pooled with its neighbours' in that order; tokens from position `newest` on count
// as zero, and empty slots get zero.
Tensor pool(const Tensor& mass, const Tensor& positions, int64_t newest, int64_t kernel, bool mean) {
  const int64_t slots = mass.size(2);
  Tensor pooled = at::empty(mass.sizes(), mass.options());
  float* out = pooled.mutable_data_ptr<float>();
  const Rows<float> masses(mass);
  const Rows<int32_t> position(positions);
  each_head(mass, 16, [&](int64_t first, int64_t last) {
    Order order;
    std::vector<float> row(slots), result(slots);
    for (int64_t at = first; at < last; ++at) {
      const float* given = masses[at];
      const int32_t* where = position[at];
      const int32_t held = order.find(where, slots);
      for (int64_t s = 0; s < slots; ++s)
        if (where[s] >= 0) row[order.place[s]] = where[s] >= newest ? 0.0f : given[s];
      for (int32_t i = 0; i < held; ++i) {
        const int64_t from = std::max<int64_t>(i - kernel / 2, 0);
        const int64_t to = std::min<int64_t>(i + kernel / 2 + 1, held);
        float sum = 0, most = 0;  // masses are not negative
        for (int64_t j = from; j < to; ++j) {
          sum += row[j];
          most = row[j] > most || row[j] != row[j] ? row[j] : most;  // NaN stays NaN
        }
        result[i] = mean ? sum / static_cast<float>(kernel) : most;
      }
      for (int64_t s = 0; s < slots; ++s)
        out[at * slots + s] = where[s] >= 0 ? result[order.place[s]] : 0.0f;
    }
  });
  return pooled;
}

// -- keys that say the same ---------------------------------------------------------------------------

constexpr int64_t kTileRows = 6, kTileVectors = 4;
constexpr Ints kCount = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// tile[r][j] = key (row + r) . key (column + j), for kVectors * kLanes columns.
template <int64_t kVectors>
void multiply(const float* keys, int64_t dim, int64_t across, int64_t row, int64_t column, float* tile) {
  Lanes sums[kTileRows][kVectors] = {};
  for (int64_t d = 0; d < dim; ++d) {
    const float* here = keys + d * across;
    Lanes right[kVectors];
    for (int64_t v = 0; v < kVectors; ++v)
      right[v] = lanes<Lanes>(here + column + v * kLanes);
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] += here[row + r] * right[v];
  }
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t v = 0; v < kVectors; ++v)
      lanes<Lanes>(tile + (r * kTileVectors + v) * kLanes) = sums[r][v];
}

template <int64_t kVectors>
inline void product_of(
    const float* other, int64_t stride, const float* rows, int64_t count, int64_t width, float* out) {
  Lanes sums[kVectors] = {};
  for (int64_t i = 0; i < count; ++i)
    for (int64_t v = 0; v < kVectors; ++v)
      sums[v] += other[i * stride] * lanes<Lanes>(rows + i * width + v * kLanes);
  for (int64_t v = 0; v < kVectors; ++v) lanes<Lanes>(out + v * kLanes) = sums[v];
}

// out = sum over i < count of other[i * stride] * rows[i], rows of `width` numbers, whole vectors.
void product(
    const float* other, int64_t stride, const float* rows, int64_t count, int64_t width, float* out) {
  int64_t j = 0;
  for (; j + kTileVectors * kLanes <= width; j += kTileVectors * kLanes)
    product_of<kTileVectors>(other, stride, rows + j, count, width, out + j);
  switch ((width - j) / kLanes) {
    case 3: product_of<3>(other, stride, rows + j, count, width, out + j); break;
    case 2: product_of<2>(other, stride, rows + j, count, width, out + j); break;
    case 1: product_of<1>(other, stride, rows + j, count, width, out + j); break;
    default: break;
  }
}

// Ask for a part of a head's tokens ahead of time: part `at` of `parts`.
template <typename T>
inline void ask_ahead(
    const T* tokens, int64_t stride, int64_t slots, int64_t dim, int64_t at, int64_t parts) {
  for (int64_t s = slots * at / parts; s < slots * (at + 1) / parts; ++s)
    for (int64_t byte = 0; byte < dim * static_cast<int64_t>(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(tokens + s * stride) + byte);
}

// Sum of each key's cosines with the others, where each token leaves out the newest of those that are
// like it: see kvpolicy.policies.rkv.
//
// A sum of products with all keys is a product with their sum; only whether two keys are alike takes
// a product a pair. Tokens stand in a row, the newest first, and each pair is looked at once: the
// older one takes the newer one if it has found none so far, for rows go by from new to old; the newer
// one the older one if there is none before itself.
template <typename T>
void add_cosines(const Tensor& key, const Tensor& positions, const Tensor& out, float similar, Tensor& total) {
  const int64_t slots = key.size(2), dim = key.size(3), across = padded(slots), wide = padded(dim);
  const Rows<T> keys(key);
  const Rows<int32_t> position(positions);
  const Rows<bool> outs(out);
  float* totals = total.mutable_data_ptr<float>();
  const int64_t all = total.size(0) * total.size(1);
  each_head(total, 1, [&](int64_t first, int64_t last) {
    std::vector<float> room((2 * wide + 4) * across + wide + kLanes);
    float* turned = room.data();  // [dim, across]; a tile's last rows may lie behind the last
    float* copied = turned + wide * across + kLanes;
    float* own = copied + wide * across;
    float* sum = own + across;
    float* found = sum + across;  // cosine with the newest that is like a token
    float* unit = found + across;  // one over a key's length
    float* together = unit + across;
    std::vector<int32_t> like(across);  // which that is; -1 for none
    Order order;
    alignas(64) float tile[kTileRows * kTileVectors * kLanes];
    alignas(64) int32_t some[kTileVectors * kLanes];  // of a row's, which are like it
    for (int64_t at = first; at < last; ++at) {
      const int32_t* where = position[at];
      const bool* left_out = outs[at];
      const int64_t held = order.find(where, slots), width = padded(held);
      if (held == 0) {
        std::fill(totals + at * slots, totals + (at + 1) * slots, 0.0f);
        continue;
      }
      std::fill(unit, unit + width, 0.0f);
      for (int64_t s = 0; s < slots; ++s) {
        if (where[s] < 0) continue;
        const int64_t row = held - 1 - order.place[s];
        copy(keys[at] + s * keys.stride, dim, copied + row * wide);
        unit[row] = left_out[s] ? 0.0f : 1.0f;  // what is out has no length, and is like none
      }
      std::fill(copied + held * wide, copied + width * wide, 0.0f);
      turn(copied, held, dim, turned);
      for (int64_t j = 0; j < width; j += kLanes) {
        Lanes square{};
        for (int64_t d = 0; d < dim; ++d) {
          const Lanes row = lanes<Lanes>(turned + d * width + j);
          square += row * row;
        }
        lanes<Lanes>(own + j) = square;
      }
      for (int64_t j = 0; j < width; ++j) {
        const float length = std::sqrt(own[j]);
        unit[j] /= length < 1e-8f ? 1e-8f : length;  // NaN stays NaN
      }
      std::fill(own, own + width, 0.0f);
      for (int64_t d = 0; d < dim; ++d) {
        Lanes sums{};
        for (int64_t j = 0; j < width; j += kLanes) {
          Lanes& row = lanes<Lanes>(turned + d * width + j);
          row *= lanes<Lanes>(unit + j);
          lanes<Lanes>(own + j) += row * row;
          sums += row;
        }
        together[d] = 0;
        for (int64_t lane = 0; lane < kLanes; ++lane) together[d] += sums[lane];
      }
      product(together, 1, turned, dim, width, sum);
      for (int64_t j = 0; j < width; ++j) sum[j] -= own[j];
      const T* next = keys[std::min(at + 1, all - 1)];
      std::fill(found, found + width, 0.0f);
      std::fill(like.begin(), like.end(), -1);
      for (int64_t row = 0; row < held; row += kTileRows) {
        const int64_t rows = std::min(kTileRows, held - row);
        ask_ahead(next, keys.stride, slots, dim, row / kTileRows, (held - 1) / kTileRows + 1);
        for (int64_t column = row / kLanes * kLanes; column < width;) {
          const int64_t left = (width - column) / kLanes;
          const int64_t tiles = (left + kTileVectors - 1) / kTileVectors;
          const int64_t vectors = (left + tiles - 1) / tiles, columns = vectors * kLanes;
          switch (vectors) {
            case 4: multiply<4>(turned, dim, width, row, column, tile); break;
            case 3: multiply<3>(turned, dim, width, row, column, tile); break;
            case 2: multiply<2>(turned, dim, width, row, column, tile); break;
            default: multiply<1>(turned, dim, width, row, column, tile);
          }
          // Most tiles hold no two that are alike.
          for (int64_t r = 0; r < rows; ++r)
            if (row + r >= column && row + r < column + columns)
              tile[r * kTileVectors * kLanes + row + r - column] = -2.0f;
          Ints met{};
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t j = 0; j < columns; j += kLanes)
              met |= lanes<Lanes>(tile + r * kTileVectors * kLanes + j) > similar;
          int32_t meets = 0;
          for (int64_t lane = 0; lane < kLanes; ++lane) meets |= met[lane];
          for (int64_t r = 0; meets && r < rows; ++r) {
            const float* cosine = tile + r * kTileVectors * kLanes;
            const int32_t newer = static_cast<int32_t>(row + r);
            const int32_t end = static_cast<int32_t>(std::min(column + columns, held));
            const int32_t begin = std::max(newer + 1, static_cast<int32_t>(column));
            // A token counts as like itself, with a cosine of 0, where that is enough to be alike.
            bool search = like[newer] < 0 && similar >= 0;
            int32_t any = 0;
            for (int64_t j = 0; j < columns; j += kLanes) {
              const Ints place = kCount + static_cast<int32_t>(column + j);
              const Ints alike = (lanes<Lanes>(cosine + j) > similar) & (place > newer);
              const Ints takes = alike & (lanes<Ints>(like.data() + column + j) < 0);
              lanes<Lanes>(found + column + j) =
                  takes ? lanes<Lanes>(cosine + j) : lanes<Lanes>(found + column + j);
              lanes<Ints>(like.data() + column + j) =
                  takes ? Ints{} + newer : lanes<Ints>(like.data() + column + j);
              lanes<Ints>(some + j) = alike;
            }
            if (search) {
              for (int64_t j = 0; j < columns; ++j) any |= some[j];
              for (int32_t j = begin; any && j < end && search; ++j) {
                if (!some[j - column]) continue;
                like[newer] = j;
                found[newer] = cosine[j - column];
                search = false;
              }
            }
          }
          column += columns;
        }
      }
      for (int64_t i = 0; i < held; ++i)
        if (like[i] >= 0) sum[like[i]] -= found[i];
      for (int64_t s = 0; s < slots; ++s)
        totals[at * slots + s] = where[s] >= 0 ? sum[held - 1 - order.place[s]] : 0.0f;
    }
  });
}

Tensor cosines(const Tensor& keys, const Tensor& positions, const Tensor& out, double similar) {
  Tensor total = at::empty(positions.sizes(), positions.options().dtype(at::kFloat));
  by_dtype(keys, [&](auto zero) {
    add_cosines<decltype(zero)>(keys, positions, out, static_cast<float>(similar), total);
  });
  return total;
}

// The scores of kvpolicy.policies.rkv, from the sums of cosines: a token's share of the mass on tokens
// before position `newest`, the largest among its neighbours', less a softmax of mean cosines.
Tensor not_redundant(
    const Tensor& cosine, const Tensor& mass, const Tensor& positions, const Tensor& out, int64_t newest,
    int64_t kernel, double importance) {
  const int64_t slots = mass.size(2);
  Tensor worth = at::empty(mass.sizes(), mass.options());
  float* worths = worth.mutable_data_ptr<float>();
  const Rows<float> cosines(cosine), masses(mass);
  const Rows<int32_t> position(positions);
  const Rows<bool> outs(out);
  const float part = static_cast<float>(importance), rest = static_cast<float>(1 - importance);
  each_head(worth, 16, [&](int64_t first, int64_t last) {
    Order order;
    std::vector<float> row(slots), alike(slots);
    for (int64_t at = first; at < last; ++at) {
      const float *given = masses[at], *sums = cosines[at];
      const int32_t* where = position[at];
      const bool* left_out = outs[at];
      float* score = worths + at * slots;
      const int32_t held = order.find(where, slots);
      float total = 0, count = 0, most = -kInf, all = 0;
      for (int64_t s = 0; s < slots; ++s) {
        total += where[s] >= 0 && where[s] < newest ? given[s] : 0.0f;
        count += left_out[s] ? 0.0f : 1.0f;
      }
      total = total < kTiny ? kTiny : total;
      count = count < 1 ? 1.0f : count;
      for (int64_t s = 0; s < slots; ++s) {
        if (where[s] >= 0) row[order.place[s]] = where[s] < newest ? given[s] / total : 0.0f;
        alike[s] = sums[s] / count;
        most = !left_out[s] && alike[s] > most ? alike[s] : most;
      }
      for (int64_t s = 0; s < slots; ++s) {
        alike[s] = left_out[s] ? 0.0f : std::exp(alike[s] - most);  // NaN makes all of them NaN
        all += alike[s];
      }
      const float share = all == 0 ? 0.0f : 1 / all;
      for (int64_t s = 0; s < slots; ++s) {
        float largest = 0;
        if (where[s] >= 0) {
          const int64_t middle = order.place[s];
          const int64_t to = std::min<int64_t>(middle + kernel / 2 + 1, held);
          for (int64_t i = std::max<int64_t>(middle - kernel / 2, 0); i < to; ++i)
            largest = row[i] > largest || row[i] != row[i] ? row[i] : largest;
        }
        score[s] = part * largest - rest * (alike[s] * share);
      }
    }
  });
  return worth;
}

// -- what changes least -------------------------------------------------------------------------------

// What coming lines read from one head's values: see kvpolicy.parts.least_change, whose formulas these
// are. Only the rows of the matrix of changes are made that belong to a token which goes.
struct Foreseen {
  int64_t lines, slots, dim, across, wide;
  std::vector<float> room;
  float *values, *copied, *mass, *along, *cost, *added, *read, *mean;
  std::vector<float> own;       // |read|^2
  std::vector<int32_t> places;  // positions, none behind the last slot

  Foreseen(int64_t lines, int64_t slots, int64_t dim)
      : lines(lines), slots(slots), dim(dim), across(padded(slots)), wide(padded(dim)),
        room((2 * wide + 2 * lines + 2) * across + (lines + 3) * wide), own(lines),
        places(across, kLast) {
    values = room.data();             // [dim, across], centred, the largest is 1
    copied = values + wide * across;  // [across, dim], the same
    mass = copied + wide * across;    // [lines, across]
    along = mass + lines * across;    // [lines, across]
    cost = along + lines * across;
    added = cost + across;
    read = added + across;      // [lines, dim]
    mean = read + lines * wide;  // and two rows for the least and the largest
  }

  template <typename T>
  void look(
      const T* tokens, const T* next, int64_t stride, const float* masses, int64_t mass_stride) {
    for (int64_t s = 0; s < slots; ++s) copy(tokens + s * stride, dim, copied + s * wide);
    std::fill(copied + slots * wide, copied + across * wide, 0.0f);
    float *least = mean + wide, *most = least + wide;
    std::fill(mean, mean + wide, 0.0f);
    std::memcpy(least, copied, wide * sizeof(float));
    std::memcpy(most, copied, wide * sizeof(float));
    for (int64_t s = 0; s < slots; ++s)
#pragma omp simd
      for (int64_t d = 0; d < wide; ++d) {
        const float value = copied[s * wide + d];
        mean[d] += value;
        least[d] = value < least[d] ? value : least[d];
        most[d] = value > most[d] ? value : most[d];
      }
    float largest = kTiny;
#pragma omp simd reduction(max : largest)
    for (int64_t d = 0; d < wide; ++d) {
      mean[d] /= static_cast<float>(slots);
      const float reach = std::max(most[d] - mean[d], mean[d] - least[d]);
      largest = reach > largest ? reach : largest;
    }
    const float unit = 1.0f / largest;
    for (int64_t s = 0; s < slots; ++s)
#pragma omp simd
      for (int64_t d = 0; d < wide; ++d) copied[s * wide + d] = (copied[s * wide + d] - mean[d]) * unit;
    turn(copied, slots, dim, values);
    for (int64_t w = 0; w < lines; ++w) {
      ask_ahead(next, stride, slots, dim, w, lines);
      float *row = mass + w * across, *reads = read + w * wide;
      std::memcpy(row, masses + w * mass_stride, slots * sizeof(float));
      std::fill(row + slots, row + across, 0.0f);
      float total = 0, square = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t s = 0; s < across; ++s) total += row[s];
      product(row, 1, copied, slots, wide, reads);
      const float share = 1.0f / (total < kTiny ? kTiny : total);
#pragma omp simd reduction(+ : square)
      for (int64_t d = 0; d < wide; ++d) {
        reads[d] *= share;
        square += reads[d] * reads[d];
      }
      own[w] = square;
      product(reads, 1, values, dim, across, along + w * across);
    }
  }

  // The change if a token goes alone.
  void alone(float* out) const {
    float* square = added;
    std::fill(square, square + across, 0.0f);
    for (int64_t d = 0; d < dim; ++d)
#pragma omp simd
      for (int64_t s = 0; s < across; ++s) square[s] += values[d * across + s] * values[d * across + s];
    std::fill(cost, cost + across, 0.0f);
    for (int64_t w = 0; w < lines; ++w) {
      const float *row = mass + w * across, *reads = along + w * across;
      const float constant = own[w];
#pragma omp simd
      for (int64_t s = 0; s < across; ++s) {
        float distance = square[s] + constant - 2 * reads[s];
        distance = distance < 0 ? 0.0f : distance;  // NaN stays NaN
        cost[s] += distance * row[s] * row[s];
      }
    }
    std::memcpy(out, cost, slots * sizeof(float));
  }

  // One token after the other, each the one that adds least.
  void together(const float* score, const int32_t* position, int64_t count, int64_t* out) {
    std::memcpy(cost, score, slots * sizeof(float));
    std::fill(cost + slots, cost + across, kInf);
    std::memcpy(places.data(), position, slots * sizeof(int32_t));
    for (int64_t w = 0; w < lines; ++w)
#pragma omp simd
      for (int64_t s = 0; s < across; ++s)
        along[w * across + s] = (along[w * across + s] - 0.5f * own[w]) * mass[w * across + s];
    for (int64_t round = 0; round < count; ++round) {
      const int64_t slot = lowest_of(cost, places.data(), across);
      out[round] = slot;
      if (round + 1 == count) break;
      product(values + slot, across, values, dim, across, added);
      for (int64_t j = 0; j < across; j += kLanes) {
        Lanes masses{}, cross{};
        for (int64_t w = 0; w < lines; ++w) {
          const Lanes row = lanes<Lanes>(mass + w * across + j);
          masses += mass[w * across + slot] * row;
          cross += along[w * across + slot] * row;
          cross += mass[w * across + slot] * lanes<Lanes>(along + w * across + j);
        }
        lanes<Lanes>(cost + j) += 2 * (lanes<Lanes>(added + j) * masses - cross);
      }
      cost[slot] = kInf;
    }
  }
};

// The change if each token goes alone, [B, H, S]; masses are [B, H, W, S].
Tensor change_alone(const Tensor& values, const Tensor& mass) {
  const int64_t lines = mass.size(2), slots = mass.size(3);
  Tensor changes = at::empty({mass.size(0), mass.size(1), slots}, mass.options());
  float* out = changes.mutable_data_ptr<float>();
  by_dtype(values, [&](auto zero) {
    const Rows<decltype(zero)> tokens(values);
    const Rows<float> masses(mass);
    each_head(changes, 1, [&](int64_t first, int64_t last) {
      const int64_t all = mass.size(0) * mass.size(1);
      Foreseen seen(lines, slots, values.size(3));
      for (int64_t at = first; at < last; ++at) {
        seen.look(tokens[at], tokens[std::min(at + 1, all - 1)], tokens.stride, masses[at], masses.stride);
        seen.alone(out + at * slots);
      }
    });
  });
  return changes;
}

// The slots that together change least, int64 [B, H, count], given what each costs to begin with.
Tensor change_together(
    const Tensor& values, const Tensor& mass, const Tensor& score, const Tensor& positions, int64_t count) {
  const int64_t lines = mass.size(2), slots = mass.size(3);
  Tensor chosen = at::empty({mass.size(0), mass.size(1), count}, mass.options().dtype(at::kLong));
  int64_t* out = chosen.mutable_data_ptr<int64_t>();
  by_dtype(values, [&](auto zero) {
    const Rows<decltype(zero)> tokens(values);
    const Rows<float> masses(mass), scores(score);
    const Rows<int32_t> position(positions);
    each_head(chosen, 1, [&](int64_t first, int64_t last) {
      const int64_t all = mass.size(0) * mass.size(1);
      Foreseen seen(lines, slots, values.size(3));
      for (int64_t at = first; at < last; ++at) {
        seen.look(tokens[at], tokens[std::min(at + 1, all - 1)], tokens.stride, masses[at], masses.stride);
        seen.together(scores[at], position[at], count, out + at * count);
      }
    });
  });
  return chosen;
}

// -- two kinds of heads -------------------------------------------------------------------------------

// The scores of kvpolicy.policies.ssd: minus the age in heads whose mass from a query on average lies
// on tokens that are at most `window` old, at least `local` of it; the mass in the others.
Tensor by_head(
    const Tensor& mass, const Tensor& positions, const std::optional<Tensor>& pinned, int64_t prefix,
    int64_t seen, int64_t window, double local) {
  const int64_t slots = mass.size(2);
  Tensor worth = at::empty(mass.sizes(), mass.options());
  float* out = worth.mutable_data_ptr<float>();
  const Rows<float> masses(mass);
  const Rows<int32_t> position(positions);
  std::optional<Rows<bool>> prefixes;
  if (pinned) prefixes.emplace(pinned->expand_as(mass));
  const int32_t now = static_cast<int32_t>(seen);
  each_head(worth, 32, [&](int64_t first, int64_t last) {
    std::vector<float> share(slots);
    for (int64_t at = first; at < last; ++at) {
      const float* given = masses[at];
      const int32_t* where = position[at];
      float* score = out + at * slots;
#pragma omp simd
      for (int64_t s = 0; s < slots; ++s) {
        score[s] = static_cast<float>(now - where[s]);
        share[s] = given[s] / score[s];
      }
      if (prefixes) {
        const bool* fixed = (*prefixes)[at];
        for (int64_t s = 0; s < slots; ++s)
          if (fixed[s] || where[s] < 0) share[s] = 0.0f;
      } else {
        std::fill(share.begin(), share.begin() + std::min(prefix, slots), 0.0f);
      }
      // Where all of it is near, both sums are the same to the last bit.
      float all = 0, near = 0;
#pragma omp simd reduction(+ : all, near)
      for (int64_t s = 0; s < slots; ++s) {
        all += share[s];
        near += score[s] <= static_cast<float>(window) ? share[s] : 0.0f;
      }
      if (near >= static_cast<float>(local) * all) {
#pragma omp simd
        for (int64_t s = 0; s < slots; ++s) score[s] = -score[s];
      } else {
        std::memcpy(score, given, slots * sizeof(float));
      }
    }
  });
  return worth;
}

// -- lengths of keys --------------------------------------------------------------------------------

// Find the lengths of keys whose reading says that it is not known, with a number below zero.
template <typename T>
void find_lengths(const Tensor& key, const Tensor& reading) {
  const int64_t slots = key.size(2), dim = key.size(3);
  const Rows<T> keys(key);
  float* readings = static_cast<float*>(reading.data_ptr());
  const int64_t heads = reading.size(1), batch_stride = reading.stride(0), stride = reading.stride(1);
  each_head(reading, 32, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      float* known = readings + at / heads * batch_stride + at % heads * stride;
      for (int64_t s = 0; s < slots; ++s) {
        if (!(known[s] < 0)) continue;
        const T* row = keys[at] + s * keys.stride;
        float square = 0;
#pragma omp simd reduction(+ : square)
        for (int64_t d = 0; d < dim; ++d)
          square += static_cast<float>(row[d]) * static_cast<float>(row[d]);
        known[s] = std::sqrt(square);
      }
    }
  });
}

void key_lengths(const Tensor& keys, Tensor reading) {
  TORCH_CHECK(reading.size(2) == 1 || reading.stride(2) == 1, "key_lengths: slots side by side");
  by_dtype(keys, [&](auto zero) { find_lengths<decltype(zero)>(keys, reading); });
}

// -- lots ---------------------------------------------------------------------------------------------

// The priorities of kvpolicy.policies.random: `base` and a head's index are of the key that is hashed.
Tensor lots(const Tensor& positions, int64_t base) {
  const int64_t slots = positions.size(2), heads = positions.size(1);
  Tensor drawn = at::empty(positions.sizes(), positions.options().dtype(at::kFloat));
  float* out = drawn.mutable_data_ptr<float>();
  const Rows<int32_t> position(positions);
  each_head(drawn, 32, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const uint64_t start = (static_cast<uint64_t>(base) + at % heads) * 1000003u;
      const int32_t* where = position[at];
#pragma omp simd
      for (int64_t s = 0; s < slots; ++s) {
        uint64_t key = start + static_cast<uint64_t>(static_cast<int64_t>(where[s]));
        key *= static_cast<uint64_t>(-7046029254386353131);
        key = (key ^ (key >> 30)) * static_cast<uint64_t>(-4658895280553007687);
        key = (key ^ (key >> 27)) * static_cast<uint64_t>(-7723592293110705685);
        key = (key ^ (key >> 31)) & 0x7FFFFFFFFFFFFFFF;
        out[at * slots + s] = static_cast<float>(static_cast<int32_t>(key >> 40));
      }
    }
  });
  return drawn;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kvpolicy_cpu, library) {
  library.def(
      "lowest(Tensor score, Tensor? protect, Tensor positions, Tensor? pinned, int prefix, int count) "
      "-> (Tensor, bool)");
  library.def("pool(Tensor mass, Tensor positions, int newest, int kernel, bool mean) -> Tensor");
  library.def("cosines(Tensor keys, Tensor positions, Tensor out, float similar) -> Tensor");
  library.def(
      "not_redundant(Tensor cosine, Tensor mass, Tensor positions, Tensor out, int newest, int kernel, "
      "float importance) -> Tensor");
  library.def("change_alone(Tensor values, Tensor mass) -> Tensor");
  library.def(
      "change_together(Tensor values, Tensor mass, Tensor score, Tensor positions, int count) -> Tensor");
  library.def(
      "by_head(Tensor mass, Tensor positions, Tensor? pinned, int prefix, int seen, int window, "
      "float local) -> Tensor");
  library.def("key_lengths(Tensor keys, Tensor(a!) reading) -> ()");
  library.def("lots(Tensor positions, int base) -> Tensor");
}

TORCH_LIBRARY_IMPL(kvpolicy_cpu, CPU, library) {
  library.impl("lowest", lowest);
  library.impl("pool", pool);
  library.impl("cosines", cosines);
  library.impl("not_redundant", not_redundant);
  library.impl("change_alone", change_alone);
  library.impl("change_together", change_together);
  library.impl("by_head", by_head);
  library.impl("key_lengths", key_lengths);
  library.impl("lots", lots);
}
