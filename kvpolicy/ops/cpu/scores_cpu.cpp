// What looks at each slot once, on a CPU: pooled mass, two kinds of heads, lengths of keys, lots.
//
// torch's own operators do the same where these are called; there, a few thousand numbers go by a dozen
// times, and calling costs more than counting. Built by kvpolicy/ops/cpu/native.py.

#include "by_slot.h"

#include <torch/library.h>

#include <cmath>
#include <optional>

namespace {

// kvpolicy.ops.pool; empty slots get zero.
Tensor pool(
    const Tensor& mass, const Tensor& positions, int64_t newest, int64_t kernel, bool mean, bool share) {
  const int64_t slots = mass.size(2);
  Tensor pooled = at::empty(mass.sizes(), mass.options());
  float* out = pooled.mutable_data_ptr<float>();
  const Rows<float> masses(mass);
  const Rows<int32_t> position(positions);
  each_head(mass, 16, [&](int64_t first, int64_t last) {
    Order order;
    Neighbours row(slots, kernel);
    std::vector<float> result(slots);
    for (int64_t at = first; at < last; ++at) {
      const float* given = masses[at];
      const int32_t* where = position[at];
      const int32_t held = order.find(where, slots);
      float total = 0;
      for (int64_t s = 0; share && s < slots; ++s)
        total += where[s] >= 0 && where[s] < newest ? given[s] : 0.0f;
      total = !share ? 1.0f : total < kTiny ? kTiny : total;
      for (int64_t s = 0; s < slots; ++s)
        if (where[s] >= 0) row[order.place[s]] = where[s] >= newest ? 0.0f : given[s] / total;
      if (mean)
        row.mean(held, result.data());
      else
        row.largest(held, result.data());
      for (int64_t s = 0; s < slots; ++s)
        out[at * slots + s] = where[s] >= 0 ? result[order.place[s]] : 0.0f;
    }
  });
  return pooled;
}

// kvpolicy.ops.locality.
Tensor is_local(
    const Tensor& mass, const Tensor& positions, const std::optional<Tensor>& pinned, int64_t prefix,
    bool may_be_empty, int64_t seen, int64_t window, double share) {
  const int64_t slots = mass.size(2);
  Tensor local = at::empty({mass.size(0), mass.size(1), 1}, mass.options().dtype(at::kBool));
  bool* out = local.mutable_data_ptr<bool>();
  const Rows<float> masses(mass);
  const Rows<int32_t> position(positions);
  std::optional<Rows<bool>> prefixes;
  if (pinned) prefixes.emplace(pinned->expand_as(mass));
  const int32_t now = static_cast<int32_t>(seen), before = static_cast<int32_t>(seen - window);
  each_head(mass, 32, [&](int64_t first, int64_t last) {
    std::vector<float> by_query(slots);
    for (int64_t at = first; at < last; ++at) {
      const float* given = masses[at];
      const int32_t* where = position[at];
#pragma omp simd
      for (int64_t s = 0; s < slots; ++s) by_query[s] = given[s] / static_cast<float>(now - where[s]);
      if (prefixes) {
        const bool* fixed = (*prefixes)[at];
        for (int64_t s = 0; s < slots; ++s)
          if (fixed[s]) by_query[s] = 0.0f;
      } else {
        std::fill(by_query.begin(), by_query.begin() + std::min(prefix, slots), 0.0f);
      }
      if (may_be_empty)
        for (int64_t s = 0; s < slots; ++s)
          if (where[s] < 0) by_query[s] = 0.0f;
      // Where all of it is near, both sums are the same to the last bit.
      float all = 0, near = 0;
#pragma omp simd reduction(+ : all, near)
      for (int64_t s = 0; s < slots; ++s) {
        all += by_query[s];
        near += where[s] >= before ? by_query[s] : 0.0f;
      }
      out[at] = near >= static_cast<float>(share) * all;
    }
  });
  return local;
}

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
          square = fused(static_cast<float>(row[d]), static_cast<float>(row[d]), square);
        known[s] = std::sqrt(square);
      }
    }
  });
}

void key_lengths(const Tensor& keys, Tensor reading) {
  TORCH_CHECK(reading.size(2) == 1 || reading.stride(2) == 1, "key_lengths: slots side by side");
  by_dtype(keys, [&](auto zero) { find_lengths<decltype(zero)>(keys, reading); });
}

// kvpolicy.ops.priorities.
Tensor priorities(const Tensor& positions, int64_t seed) {
  const int64_t slots = positions.size(2), heads = positions.size(1);
  Tensor drawn = at::empty(positions.sizes(), positions.options().dtype(at::kFloat));
  float* out = drawn.mutable_data_ptr<float>();
  const Rows<int32_t> position(positions);
  each_head(drawn, 32, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const uint64_t start = (static_cast<uint64_t>(seed) + at % heads) * 1000003u;
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
      "pool(Tensor mass, Tensor positions, int newest, int kernel, bool mean, bool share) -> Tensor");
  library.def(
      "is_local(Tensor mass, Tensor positions, Tensor? pinned, int prefix, bool may_be_empty, int seen, "
      "int window, float share) -> Tensor");
  library.def("key_lengths(Tensor keys, Tensor(a!) reading) -> ()");
  library.def("priorities(Tensor positions, int seed) -> Tensor");
}

TORCH_LIBRARY_IMPL(kvpolicy_cpu, CPU, library) {
  library.impl("pool", pool);
  library.impl("is_local", is_local);
  library.impl("key_lengths", key_lengths);
  library.impl("priorities", priorities);
}
