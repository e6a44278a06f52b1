// Keys that say the same, on a CPU (kvpolicy.ops.redundancy): every key of a head against every other.
//
// torch's own operators do the same where these are called; there, a few thousand numbers go by a dozen
// times, and calling costs more than counting. Built by kvpolicy/ops/cpu/native.py.

#include "by_slot.h"

#include <torch/library.h>

#include <cmath>
#include <cstring>

namespace {

// Rows and vectors of a tile of cosines: their sums fill the registers.
constexpr int64_t kTileRows = 6, kTileVectors = kWide ? 4 : 2;

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
      for (int64_t v = 0; v < kVectors; ++v) sums[r][v] = fused(here[row + r], right[v], sums[r][v]);
  }
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t v = 0; v < kVectors; ++v)
      lanes<Lanes>(tile + (r * kTileVectors + v) * kLanes) = sums[r][v];
}

// Sum of each key's cosines with the others, where each token leaves out the newest of those that are
// like it: see kvpolicy.ops.redundancy.
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
    std::vector<float> room((2 * wide + 4) * across + wide + kTileRows);
    float* turned = room.data();  // [dim, across]; a tile's last rows may lie behind the last
    float* copied = turned + wide * across + kTileRows;
    float* own = copied + wide * across;
    float* sum = own + across;
    float* found = sum + across;  // cosine with the newest that is like a token
    float* unit = found + across;  // one over a key's length
    float* together = unit + across;
    std::vector<int32_t> like(across);  // which that is; -1 for none
    Order order;
    Ints one_by_one;
    for (int64_t lane = 0; lane < kLanes; ++lane) one_by_one[lane] = static_cast<int32_t>(lane);
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
          square = fused(row, row, square);
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
          lanes<Lanes>(own + j) = fused(row, row, lanes<Lanes>(own + j));
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
          with_count<kTileVectors>(vectors, [&](auto known) {
            multiply<known>(turned, dim, width, row, column, tile);
          });
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
              const Ints place = one_by_one + static_cast<int32_t>(column + j);
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

// Softmax over a head's tokens that are not out of the mean of these cosines.
Tensor redundancy(const Tensor& keys, const Tensor& positions, const Tensor& out, double similar) {
  Tensor found = cosines(keys, positions, out, similar);
  const int64_t slots = found.size(2);
  float* data = found.mutable_data_ptr<float>();
  const Rows<bool> outs(out);
  each_head(found, 32, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      float* alike = data + at * slots;
      const bool* left_out = outs[at];
      float count = 0, most = -kInf, all = 0;
      for (int64_t s = 0; s < slots; ++s) count += left_out[s] ? 0.0f : 1.0f;
      count = count < 1 ? 1.0f : count;
      for (int64_t s = 0; s < slots; ++s) {
        alike[s] /= count;
        most = !left_out[s] && alike[s] > most ? alike[s] : most;
      }
      for (int64_t s = 0; s < slots; ++s) {
        alike[s] = left_out[s] ? 0.0f : std::exp(alike[s] - most);  // NaN makes all of them NaN
        all += alike[s];
      }
      const float share = all == 0 ? 0.0f : 1 / all;
      for (int64_t s = 0; s < slots; ++s) alike[s] *= share;
    }
  });
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kvpolicy_cpu, library) {
  library.def("cosines(Tensor keys, Tensor positions, Tensor out, float similar) -> Tensor");
  library.def("redundancy(Tensor keys, Tensor positions, Tensor out, float similar) -> Tensor");
}

TORCH_LIBRARY_IMPL(kvpolicy_cpu, CPU, library) {
  library.impl("cosines", cosines);
  library.impl("redundancy", redundancy);
}
