"""The backward pass of causal attention on a CPU with AMX tiles, for ``train_fashion_ar.py``.

PyTorch's fused attention runs forward at full speed on such a CPU, but its bfloat16 backward spends
most of its time in calls of small matrix products. This one keeps a 32 x 32 block of the score
matrix in tiles and registers, as FlashAttention does on a GPU, and is several times as fast at head
size 32. It is only ever a speed-up: the training script falls back to PyTorch's where the compiler
or the CPU cannot do it, and the gradients are the same up to bfloat16 rounding.

Source of the algorithm: Tri Dao, "FlashAttention-2", arXiv:2307.08691, algorithm 2.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.utils.cpp_extension import load_inline

HEAD_DIM = 32

SOURCE = r"""
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cstring>
#include <vector>
#include <ATen/Parallel.h>

using bf16 = at::BFloat16;
constexpr int D = 32, BLK = 32;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

static void configure_tiles() {
  TileConfig c;
  for (int t = 0; t < 8; ++t) { c.bytes[t] = 64; c.rows[t] = 16; }
  _tile_loadconfig(&c);
}

static inline __m512 exp_ps(__m512 x) {
  // 2^n * 2^f with |f| <= 1/2; the Taylor polynomial is far below bfloat16's rounding.
  x = _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _mm512_set1_ps(-126.f));
  __m512 n = _mm512_roundscale_ps(x, 0);
  __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, n);
}

// Everything one head of one sample needs, padded to whole blocks of 32 tokens.
struct Head {
  int T, P;                                     // tokens, padded tokens
  std::vector<uint16_t> buf;
  std::vector<float> f;
  uint16_t *k, *v, *kt, *qt, *ot, *qv, *ov;     // rows; transposes; pair-interleaved rows
  float *lse, *delta, *dqt;
  explicit Head(int T_) : T(T_), P((T_ + BLK - 1) / BLK * BLK), buf(size_t(P) * D * 7 + 64),
                          f(size_t(P) * (2 + D) + 32) {
    auto a = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(buf.data()) + 63) & ~63ull);
    size_t n = size_t(P) * D;
    k = a; v = a + n; kt = a + 2 * n; qt = a + 3 * n; ot = a + 4 * n;
    qv = a + 5 * n; ov = a + 6 * n;
    auto b = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(f.data()) + 63) & ~63ull);
    lse = b; delta = b + P; dqt = b + 2 * P;
  }
};

static void copy_rows(uint16_t* to, const uint16_t* from, int64_t stride, int T, int P) {
  for (int t = 0; t < T; ++t) std::memcpy(to + t * D, from + t * stride, D * 2);
  std::memset(to + T * D, 0, size_t(P - T) * D * 2);
}

// Per 16 rows: the 16 x 16 matrix of dwords (two neighbouring dims each), transposed.
static void dword_transpose(uint16_t* to, const uint16_t* from, int P) {
  auto src = reinterpret_cast<const uint32_t*>(from);
  auto dst = reinterpret_cast<uint32_t*>(to);
  for (int b = 0; b < P / 16; ++b, src += 256, dst += 256)
    for (int r = 0; r < 16; ++r)
      for (int c = 0; c < 16; ++c) dst[c * 16 + r] = src[r * 16 + c];
}

// Per 32 rows and half of the dims: [16 row pairs][16 dims][2].
static void interleave(uint16_t* to, const uint16_t* from, int P) {
  for (int b = 0; b < P / 32; ++b)
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < 16; ++r)
        for (int c = 0; c < 16; ++c, to += 2) {
          to[0] = from[(b * 32 + 2 * r) * D + half * 16 + c];
          to[1] = from[(b * 32 + 2 * r + 1) * D + half * 16 + c];
        }
}

// Four products of two tiles of 16 rows with two of 16 columns; tiles 0..3 accumulate.
#define PRODUCT(a, b)                                                        \
  _tile_loadd(4, (a), 64); _tile_loadd(5, (a) + 512, 64);                    \
  _tile_loadd(6, (b), 64); _tile_loadd(7, (b) + 512, 64);                    \
  _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);                          \
  _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
#define ZERO() _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
#define LOAD(c, ld)                                                          \
  _tile_loadd(0, (c), (ld) * 4); _tile_loadd(1, (c) + 16, (ld) * 4);         \
  _tile_loadd(2, (c) + 16 * (ld), (ld) * 4); _tile_loadd(3, (c) + 16 * (ld) + 16, (ld) * 4);
#define STORE(c, ld)                                                         \
  _tile_stored(0, (c), (ld) * 4); _tile_stored(1, (c) + 16, (ld) * 4);       \
  _tile_stored(2, (c) + 16 * (ld), (ld) * 4); _tile_stored(3, (c) + 16 * (ld) + 16, (ld) * 4);

static void store_rows(uint16_t* to, int64_t stride, const float* from, int rows) {
  for (int r = 0; r < rows; ++r) {
    __m512bh row = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + r * D + 16),
                                       _mm512_loadu_ps(from + r * D));
    _mm512_storeu_si512(to + r * stride, (__m512i)row);
  }
}

static void backward_head(Head& h, float scale, uint16_t* dq, int64_t sq, uint16_t* dk, int64_t sk,
                          uint16_t* dv, int64_t sv) {
  alignas(64) float s[BLK * BLK], dp[BLK * BLK], dva[BLK * D], dka[BLK * D];
  alignas(64) uint16_t p[BLK * BLK], ds[BLK * BLK], dsv[BLK * BLK];
  const int blocks = h.P / BLK;
  const __m512 vscale = _mm512_set1_ps(scale);
  std::memset(h.dqt, 0, size_t(h.P) * D * 4);
  for (int j = 0; j < blocks; ++j) {
    std::memset(dva, 0, sizeof dva);
    std::memset(dka, 0, sizeof dka);
    const size_t kj = size_t(j) * BLK * D;
    for (int i = j; i < blocks; ++i) {
      const size_t qi = size_t(i) * BLK * D;
      ZERO() PRODUCT(h.k + kj, h.qt + qi) STORE(s, BLK)      // S^T  = K Q^T
      ZERO() PRODUCT(h.v + kj, h.ot + qi) STORE(dp, BLK)     // dP^T = V dO^T
      __m512 lse[2], delta[2];
      for (int c = 0; c < 2; ++c) {
        lse[c] = _mm512_loadu_ps(h.lse + i * BLK + 16 * c);
        delta[c] = _mm512_loadu_ps(h.delta + i * BLK + 16 * c);
      }
      __m512i even = _mm512_setzero_si512();
      for (int r = 0; r < BLK; ++r) {
        __m512 pv[2], dsr[2];
        for (int c = 0; c < 2; ++c) {
          __mmask16 seen = 0xffff;
          if (i == j) {
            int lag = r - 16 * c;                            // queries before key r do not see it
            seen = lag <= 0 ? 0xffff : lag >= 16 ? 0 : uint16_t(0xffff << lag);
          }
          __m512 x = _mm512_fmsub_ps(_mm512_load_ps(s + r * BLK + 16 * c), vscale, lse[c]);
          pv[c] = _mm512_maskz_mov_ps(seen, exp_ps(x));
          dsr[c] = _mm512_mul_ps(_mm512_mul_ps(pv[c], vscale),
                                 _mm512_sub_ps(_mm512_load_ps(dp + r * BLK + 16 * c), delta[c]));
        }
        _mm512_store_si512(p + r * BLK, (__m512i)_mm512_cvtne2ps_pbh(pv[1], pv[0]));
        __m512i row = (__m512i)_mm512_cvtne2ps_pbh(dsr[1], dsr[0]);
        _mm512_store_si512(ds + r * BLK, row);
        if (r % 2 == 0) { even = row; continue; }
        auto pair = [](__m256i a, __m256i b) {
          return _mm512_or_si512(_mm512_cvtepu16_epi32(a),
                                 _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
        };
        _mm512_store_si512(dsv + (r / 2) * 32,
                           pair(_mm512_castsi512_si256(even), _mm512_castsi512_si256(row)));
        _mm512_store_si512(dsv + 512 + (r / 2) * 32, pair(_mm512_extracti64x4_epi64(even, 1),
                                                          _mm512_extracti64x4_epi64(row, 1)));
      }
      LOAD(dva, D) PRODUCT(p, h.ov + qi) STORE(dva, D)       // dV  += P^T dO
      LOAD(dka, D) PRODUCT(ds, h.qv + qi) STORE(dka, D)      // dK  += dS^T Q
      LOAD(h.dqt + i * BLK, h.P) PRODUCT(h.kt + kj, dsv) STORE(h.dqt + i * BLK, h.P)  // K^T dS^T
    }
    int rows = std::min(BLK, h.T - j * BLK);
    store_rows(dv + int64_t(j) * BLK * sv, sv, dva, rows);
    store_rows(dk + int64_t(j) * BLK * sk, sk, dka, rows);
  }
  alignas(64) float row[D];
  for (int t = 0; t < h.T; ++t) {
    for (int d = 0; d < D; ++d) row[d] = h.dqt[size_t(d) * h.P + t];
    store_rows(dq + t * sq, sq, row, 1);
  }
}

std::vector<at::Tensor> backward(at::Tensor go, at::Tensor q, at::Tensor k, at::Tensor v,
                                 at::Tensor lse, at::Tensor delta, double scale) {
  TORCH_CHECK(q.size(3) == D && q.scalar_type() == at::kBFloat16, "bfloat16, head size 32 only");
  TORCH_CHECK(q.sizes() == k.sizes() && q.sizes() == v.sizes(), "q, k, v differ in shape");
  for (auto* t : {&go, &q, &k, &v}) if (t->stride(3) != 1) *t = t->contiguous();
  lse = lse.contiguous(); delta = delta.contiguous();
  int64_t B = q.size(0), H = q.size(1), T = q.size(2);
  auto make = [&] { return at::empty({B, T, H, D}, q.options()).transpose(1, 2); };
  auto dq = make(), dk = make(), dv = make();
  auto at_head = [](const at::Tensor& t, int64_t b, int64_t h) {
    return reinterpret_cast<uint16_t*>(t.data_ptr<bf16>()) + b * t.stride(0) + h * t.stride(1);
  };
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    configure_tiles();
    Head h(T);
    std::vector<uint16_t> rows(size_t(h.P) * D);
    for (int64_t n = begin; n < end; ++n) {
      int64_t b = n / H, a = n % H;
      copy_rows(h.k, at_head(k, b, a), k.stride(2), T, h.P);
      copy_rows(h.v, at_head(v, b, a), v.stride(2), T, h.P);
      for (int j = 0; j < h.P / BLK; ++j)
        for (int r = 0; r < BLK; ++r)
          for (int d = 0; d < D; ++d)
            h.kt[(j * BLK + d) * BLK + r] = h.k[(j * BLK + r) * D + d];
      copy_rows(rows.data(), at_head(q, b, a), q.stride(2), T, h.P);
      dword_transpose(h.qt, rows.data(), h.P);
      interleave(h.qv, rows.data(), h.P);
      copy_rows(rows.data(), at_head(go, b, a), go.stride(2), T, h.P);
      dword_transpose(h.ot, rows.data(), h.P);
      interleave(h.ov, rows.data(), h.P);
      for (int t = 0; t < h.P; ++t) {
        h.lse[t] = t < T ? lse.data_ptr<float>()[n * T + t] : 1e30f;
        h.delta[t] = t < T ? delta.data_ptr<float>()[n * T + t] : 0.f;
      }
      backward_head(h, float(scale), at_head(dq, b, a), dq.stride(2), at_head(dk, b, a),
                    dk.stride(2), at_head(dv, b, a), dv.stride(2));
    }
    _tile_release();
  });
  return {dq, dk, dv};
}

bool permitted() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0; }
"""


@functools.cache
def _kernel() -> object | None:
    """The compiled kernel, or None where it cannot be built or used."""
    if not torch.cpu._is_amx_tile_supported():
        return None
    try:
        module = load_inline(
            "fashion_ar_amx",
            SOURCE,
            functions=["backward", "permitted"],
            extra_cflags=["-O3", "-march=sapphirerapids", "-fopenmp"],
        )
    except (OSError, RuntimeError, ImportError):
        return None
    return module if module.permitted() else None


def available() -> bool:
    return _kernel() is not None


# As operators of its own library, so that torch.compile takes them as they are.


@torch.library.custom_op("fashion_ar::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention and log-sum-exp [B, H, T]; q, k, v bfloat16 [B, H, T, 32]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)


@torch.library.custom_op("fashion_ar::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; delta [B, H, T] is the row sum of grad * output."""
    return tuple(_kernel().backward(grad, q, k, v, lse, delta, 1 / math.sqrt(q.shape[-1])))


@attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, dim = q.shape
    return tuple(q.new_empty(batch, length, heads, dim).transpose(1, 2) for _ in range(3))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = ctx.saved_tensors
    delta = (grad.float() * out.float()).sum(-1)
    return attention_backward(grad, q, k, v, lse, delta)


attention.register_autograd(_differentiate, setup_context=_save)


def attention_forward(module, query, key, value, attention_mask, **_) -> tuple[Tensor, None]:
    """For ``transformers.AttentionInterface``; the mask is causal and the batch not padded."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return attention(query, key, value)[0].transpose(1, 2), None
