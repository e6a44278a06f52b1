"""Attention over slots that also reports the mass each slot received; and a token's whole step.

Scores and softmax are float32 whatever the tensors' dtype, on every path. :func:`attend` is the
plain torch reference, which hands over to torch's fused kernel where nobody wants the mass, and to
Triton (``ops.triton``) on a GPU. :func:`write_and_attend` writes a token into its slot first; the
C++ kernel (``ops.cpu``) and Triton's do both in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kvpolicy.ops.sums import mean_over
from kvpolicy.ops.triton import decode

__all__ = ["attend", "attend_with_weights", "by_slot", "write_and_attend"]

#: ``decode`` of ``cpu/decode_cpu.cpp``, or ``writer`` of ``triton``: see there.
Kernel = Callable[..., tuple[Tensor, Tensor | None, bool]]
#: Puts key and value of the token at a position into slots: :meth:`kvpolicy.SlotStore.write`.
Write = Callable[[Tensor, Tensor, Tensor, int], None]

#: Parts in which half precision keys are widened, so that no copy of all of them is ever made.
_PARTS = 10


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
    need_mass: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of T queries over S slots; query heads may share KV heads.

    Args:
        query: ``[B, G * H, T, D]``; heads ``h * G`` to ``h * G + G - 1`` share KV head ``h``.
        keys: ``[B, H, S, D]``, in any order.
        values: ``[B, H, S, Dv]``.
        scale: factor of the scores; ``1 / sqrt(D)`` by default.
        visible: bool, broadcastable to ``[B, H, T, S]``; False hides a slot from a query.
        need_mass: whether to return the mass.
        bias: added to the scores, ``[B|1, 1|H|G * H, T, S]`` (ALiBi and its like).
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv:2408.00118).
        sinks: a learned logit of each query head, ``[G * H]``, that takes its share of the softmax
            and gives nothing (gpt-oss, arXiv:2508.10925).

    Returns:
        The output ``[B, G * H, T, Dv]``, and the attention probabilities averaged over the G query
        heads of each KV head, ``[B, H, T, S]``, float32 (None unless asked for).
    """
    group = query.shape[1] // keys.shape[1]
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    plain = softcap is None and sinks is None
    if plain and bias is None and query.is_cuda and (need_mass or visible is not None):
        # With nothing to hide and nothing to observe, torch's own kernel has all it needs.
        reported = decode(query, keys, values, scale, visible, need_mass)
        if reported is not None:
            return reported
    # A bias that is wider than the queries would be rounded in the fused kernel's mask.
    rounded = bias is not None and bias.dtype != query.dtype
    if not need_mass and plain and not rounded and _fused_is_faster(query, group, visible):
        output = functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=_fused_mask(visible, bias, query.shape[1]),
            scale=scale,
            enable_gqa=group > 1,
        )
        return output, None
    output, shares = _by_products(query, keys, values, scale, visible, bias, softcap, sinks)
    return output, _mass(shares, visible) if need_mass else None


def attend_with_weights(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with what each query *head* gave to each slot.

    Returns:
        Output and mass as :func:`attend`; the weights ``[B, G * H, T, S]``, in the query's dtype.
    """
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    output, shares = _by_products(query, keys, values, scale, visible, bias, softcap, sinks)
    weights = shares.flatten(1, 2)
    if visible is not None:
        shown = visible
        if 1 < visible.shape[1] < weights.shape[1]:
            shown = visible.repeat_interleave(weights.shape[1] // visible.shape[1], dim=1)
        weights = weights.masked_fill(~shown, 0.0)
    return output, _mass(shares, visible), weights.to(query.dtype)


def write_and_attend(
    kernel: Kernel | None,
    write: Write,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    position: int,
    held: int,
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    need_mass: bool = False,
    may_be_empty: bool = True,
) -> tuple[Tensor, Tensor | None, bool | None]:
    """Write a token into its slot, then attend from it to all slots that hold one.

    Args:
        kernel: the C++ or Triton kernel, if one serves such a store; None if not.
        write: how the store takes a token where the kernel does not.
        query: ``[B, G * H, 1, D]``.
        keys: the store ``[B, H, S, D]``.
        values: the store ``[B, H, S, Dv]``.
        positions: the store's, int32 ``[B, H, S]``, -1 = empty.
        slots: where the token goes, int64 ``[B, H, 1]``.
        key: ``[B, H, 1, D]``.
        value: ``[B, H, 1, Dv]``.
        position: of the token.
        held: slots of each head that have ever held a token, this one's included.
        scale: as in :func:`attend`; likewise softcap and sinks.
        visible: by *position*, bool ``[B|1, 1|H, 1, P]``; None hides nothing.
        bias: by *position*, ``[B|1, 1|H|G * H, 1, P]``.
        softcap: see :func:`attend`.
        sinks: see :func:`attend`.
        need_mass: whether to return the mass.
        may_be_empty: whether slots that have held a token can be empty now.

    Returns:
        Output ``[B, G * H, 1, Dv]``; the mass ``[B, H, 1, held]`` (None unless asked for); and
        whether the mass is finite, where that is known (True of a kernel that asserts it itself).
    """
    if (
        kernel is not None
        and visible is None
        and bias is None
        and softcap is None
        and sinks is None
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and not (query.requires_grad or key.requires_grad or value.requires_grad)
    ):
        scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
        output, mass, finite = kernel(
            *(query, keys, values, positions, slots, key, value, position, held, scale, need_mass)
        )
        return output, mass if need_mass else None, finite
    write(slots, key, value, position)
    if held < keys.shape[2]:
        keys, values, positions = keys[:, :, :held], values[:, :, :held], positions[:, :, :held]
    shown = (positions >= 0).unsqueeze(2) if may_be_empty else None
    if visible is not None:
        looked_up = by_slot(visible, positions)
        shown = looked_up if shown is None else looked_up & shown
    output, reported = attend(
        query,
        keys,
        values,
        scale=scale,
        visible=shown,
        need_mass=need_mass,
        bias=None if bias is None else by_slot(bias, positions),
        softcap=softcap,
        sinks=sinks,
    )
    return output, reported, None


def by_slot(term: Tensor, positions: Tensor) -> Tensor:
    """Look each slot's position up: ``[B|1, N, T, P]`` by position to ``[B, N', T, S]``.

    Positions are ``[B, H, S]``; N is 1, H, or a multiple G * H; N' is H or G * H. Empty slots get
    what position 0 has.
    """
    batch, heads, slots = positions.shape
    rows = term.shape[2]
    index = positions.clamp(min=0).to(torch.int64).unsqueeze(2)
    if term.shape[1] > heads:
        index = index.repeat_interleave(term.shape[1] // heads, dim=1)
    index = index.expand(batch, index.shape[1], rows, slots)
    return term.expand(batch, index.shape[1], rows, term.shape[3]).gather(3, index)


def _by_products(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    visible: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, G * H, T, Dv]`` and probabilities ``[B, H, G, T, S]``, float32."""
    batch, query_heads, count, _ = query.shape
    heads, slots = keys.shape[1], keys.shape[2]
    group = query_heads // heads
    scores = _scores(query, keys, group * count, scale)
    shared = scores.view(batch, heads, group, count, slots)
    if softcap is not None:
        shared.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        by_group = (heads, group) if bias.shape[1] == query_heads else (bias.shape[1], 1)
        shared += bias.reshape(bias.shape[0], *by_group, *bias.shape[2:])
    if visible is not None:
        # The lowest finite number, not -inf: a query that sees nothing must not turn into NaN.
        shared.masked_fill_(~visible.unsqueeze(2), torch.finfo(scores.dtype).min)
    left = None if sinks is None else _share_left(shared, sinks)
    if scores.requires_grad:
        shares = torch.softmax(scores, dim=-1)
    else:
        shares = torch.softmax(scores, dim=-1, out=scores)
    if left is not None:
        shares = (shares.view_as(shared) * left).view_as(scores)
    output = torch.bmm(shares.to(values.dtype), values.reshape(batch * heads, slots, -1))
    return (
        output.view(batch, query_heads, count, -1),
        shares.view(batch, heads, group, count, slots),
    )


def _mass(shares: Tensor, visible: Tensor | None) -> Tensor:
    """Probabilities ``[B, H, G, T, S]`` averaged over the group, ``[B, H, T, S]``."""
    mass = shares[:, :, 0] if shares.shape[2] == 1 else mean_over(shares, 2)
    return mass if visible is None else mass.masked_fill(~visible, 0.0)


def _fused_mask(visible: Tensor | None, bias: Tensor | None, query_heads: int) -> Tensor | None:
    """One mask for the fused kernel, by query head where a term is by head."""
    if visible is not None and 1 < visible.shape[1] < query_heads:
        visible = visible.repeat_interleave(query_heads // visible.shape[1], dim=1)
    if bias is None:
        return visible
    if 1 < bias.shape[1] < query_heads:
        bias = bias.repeat_interleave(query_heads // bias.shape[1], dim=1)
    return bias if visible is None else bias.masked_fill(~visible, torch.finfo(bias.dtype).min)


def _fused_is_faster(query: Tensor, group: int, visible: Tensor | None) -> bool:
    """Whether torch's fused kernel beats two batched products where no mass is wanted.

    Measured (torch 2.13, 97 and 325 slots, 12 to 384 heads, 1 and 2 threads): at one query a head
    the fused CPU kernel takes 0.9 to 1.15 times as long in float32 and 0.5 to 0.97 in bfloat16; it
    reads a KV head once for each query head that shares it, so with four of them it takes up to 1.9
    times as long.
    """
    if query.device.type != "cpu" or query.shape[2] > 1 or query.dtype != torch.float32:
        return True
    return group == 1 and visible is None


def _scores(query: Tensor, keys: Tensor, rows: int, scale: float) -> Tensor:
    """``scale * q k``, float32 ``[B * H, rows, S]``, where a KV head has ``rows`` queries."""
    batch, heads, slots, dim = keys.shape
    flat_query = query.reshape(batch * heads, rows, dim)
    flat_keys = keys.reshape(batch * heads, slots, dim).transpose(1, 2)
    if keys.dtype.itemsize >= 4:
        # beta=0 ignores the first argument, which only says where the result goes; alpha scales
        # within the product, which saves a pass over the queries.
        into = query.new_empty(batch * heads, rows, slots)
        scores = torch.baddbmm(into, flat_query, flat_keys, beta=0, alpha=scale)
        return scores.to(torch.float32)
    if query.is_cuda:
        return torch.bmm(flat_query, flat_keys, out_dtype=torch.float32).mul_(scale)
    # A product of half precision tensors is rounded to it, which is 0.4% of a score: more than
    # what tells tokens apart. So keys are widened, a part at a time.
    wide = flat_query.to(torch.float32).mul_(scale)
    size = max(-(-slots // _PARTS), 1)
    parts = [
        torch.bmm(wide, flat_keys[:, :, first : first + size].to(torch.float32))
        for first in range(0, slots, size)
    ]
    return torch.cat(parts, dim=2)


def _share_left(scores: Tensor, sinks: Tensor) -> Tensor:
    """What learned sinks leave of the softmax over slots, ``[B, H, G, T, 1]``.

    ``exp(s) / (sum exp(s) + exp(sink)) = softmax(s) * sigmoid(logsumexp(s) - sink)``.
    """
    heads, group = scores.shape[1:3]
    sink = sinks.to(torch.float32).view(1, heads, group, 1, 1)
    return torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sink)
