// Skinny products y = x W^T + b, a few rows x and a large matrix W, as a decode step is made of: one pass
// over the weights, in the order in which they lie. kvpolicy/ops/cpu/native.py says when it is used.
//
// With few rows a product does little for each weight that it reads, so reading is what it costs; general
// kernels are made for many rows, and take twice as long. Here a few rows of W go by together, against
// all rows of x, which stay near the processor. A sum is made in the same order whatever the number of
// rows, so a sequence gets the same numbers whoever its neighbours in the batch are.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "lanes.h"

#include <algorithm>
#include <cstring>

namespace {

using at::Tensor;

// Rows of W abreast and rows of x at once: their sums fill the registers. A stretch of columns is so
// long that the rows of x stay in the first cache.
constexpr int64_t kWeights = 3, kRows = kWide ? 8 : 4;
constexpr int64_t kStretch = 1024, kStripe = 4 * kWeights;

struct Product {
  const float* x;        // [rows, columns]
  const float* packed;   // the same, see pack
  const float* weights;  // [outputs, columns]
  const float* bias;     // [outputs], or null
  float* y;              // [rows, outputs]
  int64_t rows, columns, outputs;
};

// Rows of x as the tiles read them: of kRows rows, the first lanes of each, then the next lanes.
void pack(const float* x, int64_t rows, int64_t columns, float* packed) {
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t count = std::min(kRows, rows - row);
    for (int64_t k = 0; k < whole; k += kLanes)
      for (int64_t m = 0; m < count; ++m, packed += kLanes)
        std::memcpy(packed, x + (row + m) * columns + k, kLanes * sizeof(float));
  }
}

// Adds columns first..last of a tile of kN outputs and kM rows to y.
template <int64_t kN, int64_t kM>
inline void tile(const Product& p, int64_t output, int64_t row, int64_t first, int64_t last) {
  Lanes sums[kN][kM] = {};
  const float* w = p.weights + output * p.columns;
  const float* x = p.x + row * p.columns;
  const float* packed = p.packed + row * (p.columns / kLanes * kLanes) + first * kM;
  int64_t k = first;
  for (; k + kLanes <= last; k += kLanes, packed += kM * kLanes) {
    Lanes weights[kN];
    for (int64_t n = 0; n < kN; ++n) {
      weights[n] = load(w + n * p.columns + k);
      // The next rows of W, which lie behind these.
      if (row == 0) __builtin_prefetch(w + (n + kN) * p.columns + k);
    }
    for (int64_t m = 0; m < kM; ++m) {
      const Lanes values = load(packed + m * kLanes);
      for (int64_t n = 0; n < kN; ++n) sums[n][m] = fused(weights[n], values, sums[n][m]);
    }
  }
  constexpr int64_t kPower = kM > 4 ? 8 : kM > 2 ? 4 : kM;
  for (int64_t n = 0; n < kN; ++n) {
    Lanes apart[kPower] = {};
    float added[kPower];
    for (int64_t m = 0; m < kM; ++m) apart[m] = sums[n][m];
    sums_of<kPower>(apart, added);
    for (int64_t m = 0; m < kM; ++m) {
      for (int64_t rest = k; rest < last; ++rest)
        added[m] = fused(w[n * p.columns + rest], x[m * p.columns + rest], added[m]);
      p.y[(row + m) * p.outputs + output + n] += added[m];
    }
  }
}

template <int64_t kN, int64_t kM = kRows>
inline void some_rows(
    const Product& p, int64_t output, int64_t row, int64_t rows, int64_t first, int64_t last) {
  if (rows == kM) tile<kN, kM>(p, output, row, first, last);
  else if constexpr (kM > 1) some_rows<kN, kM - 1>(p, output, row, rows, first, last);
}

// All rows of x against some rows of W, of which the next to be read lie behind.
inline void stripe(const Product& p, int64_t output, int64_t end) {
  for (int64_t m = 0; m < p.rows; ++m)
    for (int64_t n = output; n < end; ++n)
      p.y[m * p.outputs + n] = p.bias == nullptr ? 0.0f : p.bias[n];
  for (int64_t first = 0; first < p.columns; first += kStretch) {
    const int64_t last = std::min(first + kStretch, p.columns);
    for (int64_t row = 0; row < p.rows; row += kRows) {
      const int64_t rows = std::min(kRows, p.rows - row);
      int64_t n = output;
      for (; n + kWeights <= end; n += kWeights) some_rows<kWeights>(p, n, row, rows, first, last);
      for (; n < end; ++n) some_rows<1>(p, n, row, rows, first, last);
    }
  }
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  TORCH_CHECK(
      weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == at::kFloat &&
          x.scalar_type() == at::kFloat && x.dim() > 0 && x.size(-1) == weight.size(1) &&
          (!bias.has_value() || (bias->is_contiguous() && bias->scalar_type() == at::kFloat &&
                                 bias->numel() == weight.size(0))),
      "linear: x [..., K], contiguous weight [N, K] and bias [N] must be float32 and fit");
  const int64_t columns = weight.size(1), outputs = weight.size(0);
  const Tensor rows = x.reshape({-1, columns}).contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  Tensor y = at::empty(sizes, x.options());
  const Tensor packed = at::empty(rows.sizes(), rows.options());
  pack(rows.const_data_ptr<float>(), rows.size(0), columns, packed.mutable_data_ptr<float>());
  const Product p{
      rows.const_data_ptr<float>(), packed.const_data_ptr<float>(), weight.const_data_ptr<float>(),
      bias.has_value() ? bias->const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>(),
      rows.size(0), columns, outputs};
  const int64_t stripes = (outputs + kStripe - 1) / kStripe;
  at::parallel_for(0, stripes, 2, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at)
      stripe(p, at * kStripe, std::min((at + 1) * kStripe, outputs));
  });
  return y;
}

// What comes out, for a compiler.
Tensor linear_shape(const Tensor& x, const Tensor& weight, const std::optional<Tensor>&) {
  auto sizes = x.sym_sizes().vec();
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, x.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(kvpolicy_cpu, library) {
  library.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(kvpolicy_cpu, CPU, library) { library.impl("linear", linear); }

TORCH_LIBRARY_IMPL(kvpolicy_cpu, Meta, library) { library.impl("linear", linear_shape); }
