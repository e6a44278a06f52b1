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

* A token that has just come is written by the program that then reads it, so that a whole step of
  a layer is one launch. That attention is not NaN the program asserts itself: looking at the mass
  from outside takes up to five launches more.

Nothing waits for the host, and shapes are those of the arguments: it can be captured in a CUDA
graph. It has been tested against float64 in Triton's interpreter, and compiled for GPUs.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvpolicy.ops.triton.asserting import ASSERTING

__all__ = ["decode_slots", "step_slots"]

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
    batch, heads, slots = keys.shape[:3]
    output, mass, scores = _room(query, keys, values, slots, need_mass, None)
    seen = keys if visible is None else visible.expand(batch, heads, 1, slots)
    _launch(
        *(query, keys, values, seen, output, mass, scores),
        *(query, query, query, 0),  # no token is written
        scale,
        slots,
        shown=(*seen.stride()[:2], seen.stride(3)),
        written=(0,) * 8,
        masked=visible is not None,
        write=False,
        need_mass=need_mass,
    )
    return output, mass if need_mass else None


def step_slots(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    position: int | Tensor,
    held: int,
    scale: float,
    need_mass: bool,
    mass_into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Write one token a head into its slot, and attend from it to all slots that hold one.

    That the mass is not NaN, where it is wanted, is asserted on the device.

    Args:
        query: ``[B, G * H, 1, D]``.
        keys: ``[B, H, S, D]``, any strides, written in place.
        values: ``[B, H, S, Dv]``, likewise.
        positions: int32 ``[B, H, S]``, -1 = empty, written in place.
        slots: where the token goes, int64 ``[B, H, 1]``.
        key: ``[B, H, 1, D]``.
        value: ``[B, H, 1, Dv]``.
        position: of the token; or an int32 tensor ``[1]``.
        held: slots from the first on that are looked at, this token's included.
        scale: factor of the scores.
        need_mass: whether to return the mass.
        mass_into: where it goes, ``[B, H, 1, held]``, contiguous; None to allocate it.

    Returns:
        The output ``[B, G * H, 1, Dv]``, and the mass ``[B, H, 1, held]`` (None unless asked for).
    """
    output, mass, scores = _room(query, keys, values, held, need_mass, mass_into)
    _launch(
        *(query, keys, values, positions, output, mass, scores),
        *(slots, key, value, position),
        scale,
        held,
        shown=positions.stride(),
        written=(
            *(*slots.stride()[:2], *key.stride()[:2], key.stride(3)),
            *(*value.stride()[:2], value.stride(3)),
        ),
        masked=True,
        write=True,
        need_mass=need_mass,
    )
    return output, mass if need_mass else None


def _room(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    held: int,
    need_mass: bool,
    mass_into: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for the output, the mass and the scores."""
    batch, query_heads = query.shape[:2]
    heads = keys.shape[1]
    output = query.new_empty(batch, query_heads, 1, values.shape[3])
    if not need_mass:
        return output, output, output  # never written where nobody wants the mass
    size = (batch, heads, 1, held)
    mass = mass_into
    if mass is None:
        mass = torch.empty(size, dtype=torch.float32, device=query.device)
    # A group of one needs no room of its own: its scores become its mass.
    group = query_heads // heads
    return output, mass, mass if group == 1 else mass.new_empty(batch, heads, group, held)


def _launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    output: Tensor,
    mass: Tensor,
    scores: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    position: int | Tensor,
    scale: float,
    held: int,
    *,
    shown: tuple[int, ...],
    written: tuple[int, ...],
    masked: bool,
    write: bool,
    need_mass: bool,
) -> None:
    """Launch the kernel, a program for each KV head of each sequence."""
    batch, heads = keys.shape[:2]
    dim, dim_v = query.shape[3], values.shape[3]
    group = query.shape[1] // heads
    wide_k, wide_v = _power_of_two(dim), _power_of_two(dim_v)
    _decode[(batch * heads,)](
        *(query, keys, values, visible, output, mass, scores),
        *(slots, key, value, position),
        *(scale * _LOG2E, heads, held, dim, dim_v),
        *(*query.stride()[:2], query.stride(3)),
        *keys.stride(),
        *values.stride(),
        *shown,
        *written,
        GROUP=group,
        ROWS=1 if group == 1 else _power_of_two(group),
        WIDE_K=wide_k,
        WIDE_V=wide_v,
        BLOCK=64 if max(wide_k, wide_v) <= 128 else 32,
        MASKED=masked,
        WRITE=write,
        FROM_TENSOR=isinstance(position, Tensor),
        MASS=need_mass,
        WIDEN=_INTERPRETED,
        num_warps=4,
        **ASSERTING,
    )


def _power_of_two(size: int) -> int:
    """The next power of two, and at least 16: the smallest side of a tile that is multiplied."""
    return int(max(16, 1 << (size - 1).bit_length()))


# Numbers that differ from step to step: a kernel for each kind of them would be compiled anew.
@triton.jit(do_not_specialize=["position", "slots"])
def _decode(
    query,
    keys,
    values,
    visible,
    output,
    mass,
    scores,
    into,
    key,
    value,
    position,
    scale,
    heads,
    slots,
    dim_k,
    dim_v,
    query_b,
    query_h,
    query_d,
    keys_b,
    keys_h,
    keys_s,
    keys_d,
    values_b,
    values_h,
    values_s,
    values_d,
    visible_b,
    visible_h,
    visible_s,
    into_b,
    into_h,
    key_b,
    key_h,
    key_d,
    value_b,
    value_h,
    value_d,
    GROUP: tl.constexpr,  # query heads of a KV head
    ROWS: tl.constexpr,  # the same, as tiles have it
    WIDE_K: tl.constexpr,  # head dims, as tiles have them
    WIDE_V: tl.constexpr,
    BLOCK: tl.constexpr,  # slots that are read at once
    MASKED: tl.constexpr,
    WRITE: tl.constexpr,  # a token comes; visible are the positions, int32, then
    FROM_TENSOR: tl.constexpr,  # its position lies in a tensor
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
    if WRITE:
        own = tl.load(into + b * into_b + h * into_h)
        tl.store(
            keys + b * keys_b + h * keys_h + own * keys_s + wide_k * keys_d,
            tl.load(key + b * key_b + h * key_h + wide_k * key_d, mask=inside_k),
            mask=inside_k,
        )
        tl.store(
            values + b * values_b + h * values_h + own * values_s + wide_v * values_d,
            tl.load(value + b * value_b + h * value_h + wide_v * value_d, mask=inside_v),
            mask=inside_v,
        )
        now = tl.load(position) if FROM_TENSOR else position
        tl.store(visible + b * visible_b + h * visible_h + own * visible_s, now)
        # What a thread reads below, another one may have written here.
        tl.debug_barrier()
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
            if WRITE:
                shown = shown >= 0
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
        if WRITE:
            tl.device_assert((total == total) | (row >= GROUP), "attention is NaN")
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
                if WRITE:
                    shown = shown >= 0
                share = tl.where(shown != 0, share, 0.0)
            tl.store(mass + (b * heads + h) * slots + slot, share, mask=there)
