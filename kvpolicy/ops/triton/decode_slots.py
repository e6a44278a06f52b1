"""One query's attention over slots, and the mass of each slot, in one pass over keys and values.

A decode step reads every cached key and value once and computes next to nothing with them, so the
kernel is as fast as the memory if it reads each byte once and keeps all of the GPU busy doing so.

* One program serves one KV head of one sequence, with all the query heads that share it: keys and
  values are read once, whatever the group. Programs are many (batch x KV heads, a thousand and
  more where speed matters), and each has little to read (100 to 1,200 slots), so slots are not
  split between programs: a split would need a second kernel to put the parts together, and would
  pay only where batch x KV heads is below the number of multiprocessors.
* The softmax is computed on the way (running maximum and sum), so the output needs no second pass.
  The mass does: a slot's probability is known only when the last score is. The scores themselves
  are kept for that, four bytes a slot and query head beside the ``4 D`` bytes (in bfloat16) of its
  key and value; the program that has just written them reads them back, out of its cache.
* A group of one multiplies and adds; larger ones use the tensor cores, whose smallest tile has 16
  rows. Products of float32 are computed as such (``ieee``), not as TensorFloat32.

Nothing waits for the host, and shapes are those of the arguments: it can be captured in a CUDA
graph. It has been tested against float64 in Triton's interpreter.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["decode_slots"]

#: log2(e): the hardware has a power of two, not of e.
_LOG2E = 1.4426950408889634
#: Triton's interpreter (3.9) multiplies the bits of bfloat16 as if they were integers; there, such
#: tiles are widened before they are multiplied, which changes no number.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def decode_slots(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    visible: Tensor | None,
    need_mass: bool,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of one query a head over S slots.

    Args:
        query: ``[B, G * H, 1, D]``.
        keys: ``[B, H, S, D]``, any strides.
        values: ``[B, H, S, Dv]``, any strides.
        scale: factor of the scores.
        visible: bool, broadcastable to ``[B, H, 1, S]``; False hides a slot.
        need_mass: whether to return the mass.

    Returns:
        The output ``[B, G * H, 1, Dv]``, and the probabilities averaged over each group,
        ``[B, H, 1, S]``, float32 (None unless asked for).
    """
    batch, query_heads, _, dim = query.shape
    heads, slots = keys.shape[1], keys.shape[2]
    group = query_heads // heads
    output = query.new_empty(batch, query_heads, 1, values.shape[3])
    mass = scores = output  # never written where nobody wants the mass
    if need_mass:
        mass = torch.empty(batch, heads, 1, slots, dtype=torch.float32, device=query.device)
        # A group of one needs no room of its own: its scores become its mass.
        scores = mass if group == 1 else mass.new_empty(batch, heads, group, slots)
    seen = keys if visible is None else visible.expand(batch, heads, 1, slots)
    wide_k, wide_v = _power_of_two(dim), _power_of_two(values.shape[3])
    _decode[(batch * heads,)](
        query,
        keys,
        values,
        seen,
        output,
        mass,
        scores,
        scale * _LOG2E,
        heads,
        slots,
        dim,
        values.shape[3],
        *query.stride()[:2],
        query.stride(3),
        *keys.stride(),
        *values.stride(),
        *seen.stride()[:2],
        seen.stride(3),
        GROUP=group,
        ROWS=1 if group == 1 else _power_of_two(group),
        WIDE_K=wide_k,
        WIDE_V=wide_v,
        BLOCK=64 if max(wide_k, wide_v) <= 128 else 32,
        MASKED=visible is not None,
        MASS=need_mass,
        WIDEN=_INTERPRETED,
        num_warps=4,
    )
    return output, mass if need_mass else None


def _power_of_two(size: int) -> int:
    """The next power of two, and at least 16: the smallest side of a tile that is multiplied."""
    return int(max(16, 1 << (size - 1).bit_length()))


@triton.jit
def _decode(
    query: Any,
    keys: Any,
    values: Any,
    visible: Any,
    output: Any,
    mass: Any,
    scores: Any,
    scale: Any,
    heads: Any,
    slots: Any,
    dim_k: Any,
    dim_v: Any,
    query_b: Any,
    query_h: Any,
    query_d: Any,
    keys_b: Any,
    keys_h: Any,
    keys_s: Any,
    keys_d: Any,
    values_b: Any,
    values_h: Any,
    values_s: Any,
    values_d: Any,
    visible_b: Any,
    visible_h: Any,
    visible_s: Any,
    GROUP: tl.constexpr,  # query heads of a KV head
    ROWS: tl.constexpr,  # the same, as tiles have it
    WIDE_K: tl.constexpr,  # head dims, as tiles have them
    WIDE_V: tl.constexpr,
    BLOCK: tl.constexpr,  # slots that are read at once
    MASKED: tl.constexpr,
    MASS: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """One KV head of one sequence."""
    program = tl.program_id(0)
    # 64 bits: batch x heads x slots x head dim outgrow 32.
    b = (program // heads).to(tl.int64)
    h = (program % heads).to(tl.int64)
    row = tl.arange(0, ROWS)
    wide_k = tl.arange(0, WIDE_K)
    wide_v = tl.arange(0, WIDE_V)
    inside_k = wide_k < dim_k
    inside_v = wide_v < dim_v
    ours = row < GROUP
    q = tl.load(
        query + b * query_b + (h * GROUP + row[:, None]) * query_h + wide_k[None, :] * query_d,
        mask=ours[:, None] & inside_k[None, :],
        other=0.0,
    )
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDE_V], tl.float32)
    # int64 for the whole row of scores of this program.
    kept = scores + (b * heads + h) * GROUP * slots
    for first in range(0, slots, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        there = slot < slots
        k = tl.load(
            keys + b * keys_b + h * keys_h + slot[:, None] * keys_s + wide_k[None, :] * keys_d,
            mask=there[:, None] & inside_k[None, :],
            other=0.0,
        )
        if ROWS == 1:
            score = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)[None, :]
        else:
            if WIDEN:
                k = k.to(tl.float32)
            score = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="ieee")
        score = score * scale
        if MASKED:
            shown = tl.load(
                visible + b * visible_b + h * visible_h + slot * visible_s, mask=there, other=0
            )
            # The lowest finite number, not -inf: a query that sees nothing must not turn into NaN.
            score = tl.where((shown != 0)[None, :], score, -3.4028234663852886e38)
        score = tl.where(there[None, :], score, float("-inf"))
        if MASS:
            tl.store(
                kept + row[:, None] * slots + slot[None, :],
                score,
                mask=ours[:, None] & there[None, :],
            )
        above = tl.maximum(highest, tl.max(score, axis=1))
        shrink = tl.exp2(highest - above)
        chance = tl.exp2(score - above[:, None])
        v = tl.load(
            values
            + b * values_b
            + h * values_h
            + slot[:, None] * values_s
            + wide_v[None, :] * values_d,
            mask=there[:, None] & inside_v[None, :],
            other=0.0,
        )
        if ROWS == 1:
            weighted = tl.sum(tl.trans(chance) * v.to(tl.float32), axis=0)[None, :]
        else:
            narrow = chance.to(v.dtype)
            if WIDEN:
                v = v.to(tl.float32)
            weighted = tl.dot(narrow.to(v.dtype), v, input_precision="ieee")
        sums = sums * shrink[:, None] + weighted
        total = total * shrink + tl.sum(chance, axis=1)
        highest = above
    out = sums / total[:, None]
    tl.store(
        output + (b * heads + h) * GROUP * dim_v + row[:, None] * dim_v + wide_v[None, :],
        out.to(output.dtype.element_ty),
        mask=ours[:, None] & inside_v[None, :],
    )
    if MASS:
        # What a thread reads back below, another one may have written above.
        tl.debug_barrier()
        for first in range(0, slots, BLOCK):
            slot = first + tl.arange(0, BLOCK)
            there = slot < slots
            score = tl.load(
                kept + row[:, None] * slots + slot[None, :],
                mask=ours[:, None] & there[None, :],
                other=float("-inf"),
            )
            chance = tl.exp2(score - highest[:, None]) / total[:, None]
            chance = tl.where(ours[:, None], chance, 0.0)
            share = tl.sum(chance, axis=0) / GROUP
            if MASKED:
                shown = tl.load(
                    visible + b * visible_b + h * visible_h + slot * visible_s, mask=there, other=0
                )
                share = tl.where(shown != 0, share, 0.0)
            tl.store(mass + (b * heads + h) * slots + slot, share, mask=there)
