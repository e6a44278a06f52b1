// One decode step of one layer on a CPU, in a single pass over what is cached: the newest key and
// value go into their slots, one query a head attends over all slots, and each slot's mass comes out
// on the way. Built by kvpolicy/ops/cpu/native.py, which says when it is used.
//
// A step reads every cached key and value once and does little with them, so memory is what it costs.
// Batched products leave scores and probabilities in memory between them, and a scatter waits for
// each line that it writes; here a head's slots go by once, in order.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "lanes.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace {

using at::Tensor;

// exp for x <= 0: 2^n times a Taylor series on [-ln 2 / 2, ln 2 / 2], whose error is below 1e-8.
// NaN stays NaN.
inline float exponential(float x) {
  const float clipped = x < -87.0f ? -87.0f : x;
  const float whole = std::nearbyint(clipped * 1.44269504f);
  const float r = fused(whole, -1.42860677e-6f, fused(whole, -0.693145752f, clipped));
  float sum = 1.0f / 5040;
  sum = fused(sum, r, 1.0f / 720);
  sum = fused(sum, r, 1.0f / 120);
  sum = fused(sum, r, 1.0f / 24);
  sum = fused(sum, r, 1.0f / 6);
  sum = fused(sum, r, 0.5f);
  sum = fused(sum, r, 1.0f);
  sum = fused(sum, r, 1.0f);
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

// Slots that go by at once, and how far ahead memory is asked for: processors stop looking ahead at
// the end of each page.
constexpr int64_t kAbreast = 4, kAhead = 16;

template <typename T>
inline void ask_ahead(const T* row, int64_t dim) {
  for (int64_t byte = 0; byte < dim * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row + kAhead * dim) + byte);
}

// scores[i] = query . keys[i] for kCount of them, each in the same order whatever their count.
template <int64_t kCount, typename T>
inline void dots(const float* query, const T* keys, int64_t dim, float* scores) {
  const int64_t whole = dim / kLanes * kLanes;
  Lanes sums[kCount] = {};
  for (int64_t d = 0; d < whole; d += kLanes) {
    const Lanes asked = lanes<Lanes>(query + d);
    for (int64_t i = 0; i < kCount; ++i) sums[i] = fused(asked, load(keys + i * dim + d), sums[i]);
  }
  sums_of<kCount>(sums, scores);
  for (int64_t i = 0; i < kCount; ++i)
    for (int64_t d = whole; d < dim; ++d)
      scores[i] = fused(query[d], static_cast<float>(keys[i * dim + d]), scores[i]);
}

// scores[s] = query . keys[s]; kDim is the head dim where it is known when this is compiled, or 0.
template <int kDim, typename T>
inline void score(const float* query, const T* keys, int64_t held, int64_t any_dim, float* scores) {
  const int64_t dim = kDim ? kDim : any_dim;
  int64_t s = 0;
  for (; s + kAbreast <= held; s += kAbreast) {
    for (int64_t i = 0; i < kAbreast; ++i) ask_ahead(keys + (s + i) * dim, dim);
    dots<kAbreast>(query, keys + s * dim, dim, scores + s);
  }
  for (; s < held; ++s) dots<1>(query, keys + s * dim, dim, scores + s);
}

// output += sum over i < kCount of weights[i] * values[i].
template <int64_t kCount, typename T>
inline void add_weighted(const float* weights, const T* values, int64_t dim, float* output) {
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes) {
    Lanes sum = lanes<Lanes>(output + d);
    for (int64_t i = 0; i < kCount; ++i) sum = fused(weights[i], load(values + i * dim + d), sum);
    lanes<Lanes>(output + d) = sum;
  }
  for (int64_t d = whole; d < dim; ++d)
    for (int64_t i = 0; i < kCount; ++i)
      output[d] = fused(weights[i], static_cast<float>(values[i * dim + d]), output[d]);
}

// output = sum over s of weights[s] * values[s].
template <int kDim, typename T>
inline void combine(
    const float* weights, const T* values, int64_t held, int64_t any_dim, float* output) {
  const int64_t dim = kDim ? kDim : any_dim;
  std::memset(output, 0, dim * sizeof(float));
  int64_t s = 0;
  for (; s + kAbreast <= held; s += kAbreast) {
    for (int64_t i = 0; i < kAbreast; ++i) ask_ahead(values + (s + i) * dim, dim);
    add_weighted<kAbreast>(weights + s, values + s * dim, dim, output);
  }
  for (; s < held; ++s) add_weighted<1>(weights + s, values + s * dim, dim, output);
}

template <typename T>
struct Sizes {
  int64_t heads, group, slots, held, dim, value_dim;
  const T* query;
  int64_t query_batch, query_head;
  const T* key;
  int64_t key_batch, key_head;
  const T* value;
  int64_t value_batch, value_head;
  T *keys, *values, *output;
  int32_t* positions;
  const int64_t* where;
  int64_t where_batch, where_head;
  int32_t position;
  float scale;
  float* mass;
};

// One KV head of one sequence; false where its attention is not finite.
template <int kDim, typename T>
bool attend(const Sizes<T>& z, int64_t batch, int64_t head, float* room) {
  const int64_t at = batch * z.heads + head;
  T* keys = z.keys + at * z.slots * z.dim;
  T* values = z.values + at * z.slots * z.value_dim;
  const int64_t slot = z.where[batch * z.where_batch + head * z.where_head];
  std::memmove(keys + slot * z.dim, z.key + batch * z.key_batch + head * z.key_head,
              z.dim * sizeof(T));
  std::memmove(values + slot * z.value_dim, z.value + batch * z.value_batch + head * z.value_head,
              z.value_dim * sizeof(T));
  z.positions[at * z.slots + slot] = z.position;

  float* scores = room;                          // [group, held]
  float* query = scores + z.group * z.held;      // [group, dim]
  float* output = query + z.group * z.dim;       // [group, value_dim]
  const T* asked = z.query + batch * z.query_batch + head * z.group * z.query_head;
  for (int64_t g = 0; g < z.group; ++g)
    for (int64_t d = 0; d < z.dim; ++d)
      query[g * z.dim + d] = static_cast<float>(asked[g * z.query_head + d]) * z.scale;
  for (int64_t g = 0; g < z.group; ++g)
    score<kDim>(query + g * z.dim, keys, z.held, z.dim, scores + g * z.held);

  const int32_t* lies = z.positions + at * z.slots;
  int32_t lowest = 0;  // below zero where a slot is empty: nothing attends to those
#pragma omp simd reduction(min : lowest)
  for (int64_t s = 0; s < z.held; ++s) lowest = lies[s] < lowest ? lies[s] : lowest;
  bool finite = true;
  for (int64_t g = 0; g < z.group; ++g) {
    float* row = scores + g * z.held;
    if (lowest < 0)
      for (int64_t s = 0; s < z.held; ++s)
        if (lies[s] < 0) row[s] = -std::numeric_limits<float>::infinity();
    float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
    for (int64_t s = 0; s < z.held; ++s) most = row[s] > most ? row[s] : most;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < z.held; ++s) {
      row[s] = exponential(row[s] - most);
      sum += row[s];
    }
    // The exponential of minus infinity is tiny there, not zero.
    if (lowest < 0)
      for (int64_t s = 0; s < z.held; ++s)
        if (lies[s] < 0) row[s] = 0.0f;
    finite = finite && std::isfinite(sum);
    const float share = 1.0f / sum;
#pragma omp simd
    for (int64_t s = 0; s < z.held; ++s) row[s] *= share;
  }

  for (int64_t g = 0; g < z.group; ++g)
    combine<kDim>(scores + g * z.held, values, z.held, z.value_dim, output + g * z.value_dim);
  T* result = z.output + at * z.group * z.value_dim;
  for (int64_t d = 0; d < z.group * z.value_dim; ++d) result[d] = static_cast<T>(output[d]);

  if (z.mass != nullptr) {
    float* mass = z.mass + at * z.held;
    const float part = 1.0f / z.group;
    for (int64_t s = 0; s < z.held; ++s) {
      float sum = 0;
      for (int64_t g = 0; g < z.group; ++g) sum += scores[g * z.held + s];
      mass[s] = sum * part;
    }
  }
  return finite;
}

template <int kDim, typename T>
bool attend_all(const Sizes<T>& z, int64_t batch) {
  std::atomic<bool> finite{true};
  const int64_t all = batch * z.heads;
  at::parallel_for(0, all, 4, [&](int64_t first, int64_t last) {
    std::vector<float> room(z.group * (z.held + z.dim + z.value_dim));
    for (int64_t at = first; at < last; ++at)
      if (!attend<kDim>(z, at / z.heads, at % z.heads, room.data())) finite = false;
  });
  return finite;
}

// Writes and attends; false where that was not finite. Checked by the caller
// (kvpolicy.ops.cpu.native): shapes, dtypes, that the stores are contiguous and that the last dimension
// of every token is.
bool run(
    const Tensor& query, Tensor& keys, Tensor& values, Tensor& positions, const Tensor& slots,
    const Tensor& key, const Tensor& value, int64_t position, int64_t held, double scale,
    Tensor& output, float* mass) {
  bool finite = true;
  const auto go = [&](auto zero) {
    using T = decltype(zero);
    Sizes<T> z;
    z.heads = keys.size(1);
    z.group = query.size(1) / z.heads;
    z.slots = keys.size(2);
    z.held = held;
    z.dim = keys.size(3);
    z.value_dim = values.size(3);
    z.query = query.const_data_ptr<T>();
    z.query_batch = query.stride(0);
    z.query_head = query.stride(1);
    z.key = key.const_data_ptr<T>();
    z.key_batch = key.stride(0);
    z.key_head = key.stride(1);
    z.value = value.const_data_ptr<T>();
    z.value_batch = value.stride(0);
    z.value_head = value.stride(1);
    z.keys = keys.mutable_data_ptr<T>();
    z.values = values.mutable_data_ptr<T>();
    z.output = output.mutable_data_ptr<T>();
    z.positions = positions.mutable_data_ptr<int32_t>();
    z.where = slots.const_data_ptr<int64_t>();
    z.where_batch = slots.stride(0);
    z.where_head = slots.stride(1);
    z.position = static_cast<int32_t>(position);
    z.scale = static_cast<float>(scale);
    z.mass = mass;
    const int64_t batch = keys.size(0);
    for (int64_t at = 0; at < batch * z.heads; ++at) {
      const int64_t slot = z.where[at / z.heads * z.where_batch + at % z.heads * z.where_head];
      TORCH_CHECK_INDEX(
          slot >= 0 && slot < z.slots, "slot ", slot, " is out of range: there are ", z.slots);
    }
    if (z.dim == z.value_dim && z.dim == 64) finite = attend_all<64>(z, batch);
    else if (z.dim == z.value_dim && z.dim == 128) finite = attend_all<128>(z, batch);
    else finite = attend_all<0>(z, batch);
  };
  switch (keys.scalar_type()) {
    case at::kFloat: go(float{}); break;
    case at::kBFloat16: go(at::BFloat16{}); break;
    case at::kHalf: go(at::Half{}); break;
    default: TORCH_CHECK(false, "decode: no kernel for ", keys.scalar_type());
  }
  return finite;
}

Tensor empty_output(const Tensor& query, const Tensor& values) {
  return at::empty({query.size(0), query.size(1), 1, values.size(3)}, query.options());
}

// Output, mass of the first `held` slots, and whether that is finite.
std::tuple<Tensor, Tensor, bool> decode(
    const Tensor& query, Tensor keys, Tensor values, Tensor positions, const Tensor& slots,
    const Tensor& key, const Tensor& value, int64_t position, int64_t held, double scale,
    bool need_mass) {
  Tensor output = empty_output(query, values);
  Tensor mass = at::empty(
      {need_mass ? keys.size(0) : 0, keys.size(1), 1, held}, query.options().dtype(at::kFloat));
  const bool finite = run(
      query, keys, values, positions, slots, key, value, position, held, scale, output,
      need_mass ? mass.mutable_data_ptr<float>() : nullptr);
  return {output, mass, finite};
}

// The same for compiled code: the position is a tensor, `held` are all slots, of which some are empty at
// first, and the mass goes into a tensor that stays where it is.
Tensor decode_step(
    const Tensor& query, Tensor keys, Tensor values, Tensor positions,
    const std::optional<Tensor>& mass, const Tensor& slots, const Tensor& key, const Tensor& value,
    const Tensor& position, double scale) {
  const auto in_rows = [](const Tensor& tensor) {
    return tensor.stride(3) == 1 ? tensor : tensor.contiguous();
  };
  Tensor output = empty_output(query, values);
  Tensor into = mass.value_or(Tensor());
  run(in_rows(query), keys, values, positions, slots, in_rows(key), in_rows(value),
      *position.const_data_ptr<int32_t>(), keys.size(2), scale, output,
      into.defined() ? into.mutable_data_ptr<float>() : nullptr);
  return output;
}

// What comes out, for a compiler.
Tensor decode_step_shape(
    const Tensor& query, Tensor, Tensor values, Tensor, const std::optional<Tensor>&, const Tensor&,
    const Tensor&, const Tensor&, const Tensor&, double) {
  return at::empty_symint(
      {query.sym_size(0), query.sym_size(1), 1, values.sym_size(3)}, query.options());
}

}  // namespace

TORCH_LIBRARY(kvpolicy_cpu, library) {
  library.def(
      "decode(Tensor query, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, Tensor slots, "
      "Tensor key, Tensor value, int position, int held, float scale, bool need_mass) "
      "-> (Tensor, Tensor, bool)");
  library.def(
      "decode_step(Tensor query, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, "
      "Tensor(d!)? mass, Tensor slots, Tensor key, Tensor value, Tensor position, float scale) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(kvpolicy_cpu, CPU, library) {
  library.impl("decode", decode);
  library.impl("decode_step", decode_step);
}

TORCH_LIBRARY_IMPL(kvpolicy_cpu, Meta, library) { library.impl("decode_step", decode_step_shape); }
