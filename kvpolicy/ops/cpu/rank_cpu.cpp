// Ranking slots on a CPU: which go first, and whether all that was ranked is a number.
//
// torch's own operators do the same where these are called; there, a few thousand numbers go by a dozen
// times, and calling costs more than counting. Built by kvpolicy/ops/cpu/native.py.

#include "by_slot.h"

#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>

namespace {

// An integer that orders like these numbers: see kvpolicy.ops.rank.
inline int64_t sortable(float worth) {
  worth += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &worth, sizeof bits);
  return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
}
inline int64_t sortable(int32_t worth) { return worth; }

template <typename T>
struct Scale;  // Numbers as kvpolicy.ops.rank has them.

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
    const Tensor& given_score, const std::optional<Tensor>& protect, const Tensor& positions,
    const std::optional<Tensor>& pinned, int64_t prefix, bool may_be_empty, int64_t count) {
  const Tensor score = given_score.expand_as(positions);
  const int64_t slots = score.size(2);
  TORCH_CHECK(
      positions.dim() == 3 && positions.scalar_type() == at::kInt &&
          (!protect || protect->scalar_type() == at::kBool) &&
          (!pinned || pinned->scalar_type() == at::kBool),
      "lowest: positions must be int32 [B, H, S], masks bool");
  TORCH_CHECK(count <= slots, "lowest: ", count, " of ", slots, " slots");
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
        for (int64_t s = 0; s < slots; ++s)
          if (fixed[s]) worth[s] = S::pinned;
      } else {
        std::fill(worth, worth + std::min(prefix, slots), S::pinned);
      }
      if (may_be_empty)
        for (int64_t s = 0; s < slots; ++s)
          if (where[s] < 0) worth[s] = S::empty;
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
    const std::optional<Tensor>& pinned, int64_t prefix, bool may_be_empty, int64_t count) {
  if (score.scalar_type() == at::kInt)
    return rank<int32_t>(score, protect, positions, pinned, prefix, may_be_empty, count);
  return rank<float>(score, protect, positions, pinned, prefix, may_be_empty, count);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kvpolicy_cpu, library) {
  library.def(
      "lowest(Tensor score, Tensor? protect, Tensor positions, Tensor? pinned, int prefix, "
      "bool may_be_empty, int count) -> (Tensor, bool)");
}

TORCH_LIBRARY_IMPL(kvpolicy_cpu, CPU, library) {
  library.impl("lowest", lowest);
}
