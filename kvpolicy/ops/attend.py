"""Attention over slots that also reports the mass each slot received."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from kvpolicy.ops.triton import decode

__all__ = ["attend"]


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
        bias: added to the scores, ``[B|1, H|G * H, T, S]`` (ALiBi and its like).
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv:2408.00118).
        sinks: a learned logit of each query head, ``[G * H]``, that takes its share of the softmax
            and gives nothing (gpt-oss, arXiv:2508.10925).

    Returns:
        The output ``[B, G * H, T, Dv]``, and the attention probabilities averaged over the G query
        heads of each KV head, ``[B, H, T, S]``, float32 (None unless asked for).
    """
    batch, query_heads, count, dim = query.shape
    heads, slots = keys.shape[1], keys.shape[2]
    group = query_heads // heads
    scale = 1 / math.sqrt(dim) if scale is None else scale
    plain = softcap is None and sinks is None
    if plain and bias is None and (need_mass or visible is not None):
        # With nothing to hide and nothing to observe, torch's own kernel has all it needs.
        reported = decode(query, keys, values, scale, visible, need_mass)
        if reported is not None:
            return reported
    if not need_mass and plain and _fused_is_faster(query, group, visible):
        output = functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=_fused_mask(visible, bias, query_heads, query.dtype),
            scale=scale,
            enable_gqa=group > 1,
        )
        return output, None

    scores = _scores(query, keys, group * count, scale)
    shared = scores.view(batch, heads, group, count, slots)
    if softcap is not None:
        shared.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        by_group = (heads, group) if bias.shape[1] == query_heads else (bias.shape[1], 1)
        shared += bias.reshape(bias.shape[0], *by_group, *bias.shape[2:])
    if visible is not None:
        # The lowest finite number, not -inf: a query that sees nothing must not turn into NaN.
        shared.masked_fill_(~visible.unsqueeze(2), torch.finfo(torch.float32).min)
    share = None if sinks is None else _share_left(shared, sinks)
    probabilities = _softmax(scores)
    if share is not None:
        probabilities = (probabilities.view_as(shared) * share).view_as(scores)
    weights = probabilities if values.dtype == torch.float32 else probabilities.to(values.dtype)
    output = torch.bmm(weights, values.reshape(batch * heads, slots, values.shape[-1]))
    output = output.view(batch, query_heads, count, values.shape[-1])
    if not need_mass:
        return output, None
    mass = probabilities.view(batch, heads, group, count, slots)
    mass = mass[:, :, 0] if group == 1 else mass.mean(2)
    if visible is not None:
        mass = mass.masked_fill(~visible, 0.0)
    return output, mass


def _fused_mask(
    visible: Tensor | None, bias: Tensor | None, query_heads: int, dtype: torch.dtype
) -> Tensor | None:
    """One mask for the fused kernel, by query head where a term is by head."""
    if visible is not None and 1 < visible.shape[1] < query_heads:
        visible = visible.repeat_interleave(query_heads // visible.shape[1], dim=1)
    if bias is None:
        return visible
    if 1 < bias.shape[1] < query_heads:
        bias = bias.repeat_interleave(query_heads // bias.shape[1], dim=1)
    bias = bias.to(dtype)
    return bias if visible is None else bias.masked_fill(~visible, torch.finfo(dtype).min)


def _fused_is_faster(query: Tensor, group: int, visible: Tensor | None) -> bool:
    """Whether torch's fused kernel beats two batched products where no mass is wanted.

    Measured (torch 2.13, 97 and 325 slots, 12 to 384 heads, 1 and 2 threads): at one query a head
    the fused CPU kernel takes 0.9 to 1.15 times as long in float32 and 0.5 to 0.97 in bfloat16; it
    reads a KV head once for each query head that shares it, so with four of them it takes up to 1.9
    times as long.
    """
    if query.device.type != "cpu" or query.shape[2] > 1:
        return True
    return group == 1 and visible is None


def _scores(query: Tensor, keys: Tensor, rows: int, scale: float) -> Tensor:
    """``scale * q k``, float32 ``[B * H, rows, S]``, where a KV head has ``rows`` queries."""
    batch, heads, slots, dim = keys.shape
    flat_query = query.reshape(batch * heads, rows, dim)
    flat_keys = keys.reshape(batch * heads, slots, dim).transpose(1, 2)
    # beta=0 ignores the first argument, which only says where the result goes; alpha scales
    # within the product, which saves a pass over the queries.
    into = query.new_empty(batch * heads, rows, slots)
    scores = torch.baddbmm(into, flat_query, flat_keys, beta=0, alpha=scale)
    return scores if scores.dtype == torch.float32 else scores.to(torch.float32)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over slots, in place where no gradient is wanted."""
    if scores.requires_grad:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(scores, dim=-1, out=scores)


def _share_left(scores: Tensor, sinks: Tensor) -> Tensor:
    """What learned sinks leave of the softmax over slots, ``[B, H, G, T, 1]``.

    ``exp(s) / (sum exp(s) + exp(sink)) = softmax(s) * sigmoid(logsumexp(s) - sink)``.
    """
    heads, group = scores.shape[1:3]
    sink = sinks.to(torch.float32).view(1, heads, group, 1, 1)
    return torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sink)
