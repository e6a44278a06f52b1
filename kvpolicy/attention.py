"""Attention over slots that also reports the mass each slot received."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["attend"]


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
    visible: Tensor | None = None,
    need_mass: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of T queries over S slots; query heads may share KV heads.

    Args:
        query: ``[B, G * H, T, D]``; heads ``h * G`` to ``h * G + G - 1`` share KV head ``h``.
        keys: ``[B, H, S, D]``, in any order.
        values: ``[B, H, S, Dv]``.
        scale: factor of the scores; ``1 / sqrt(D)`` by default.
        visible: bool, broadcastable to ``[B, H, T, S]``; False hides a slot from a query.
        need_mass: whether to return the mass.

    Returns:
        The output ``[B, G * H, T, Dv]``, and the attention probabilities averaged over the G query
        heads of each KV head, ``[B, H, T, S]``, float32 (None unless asked for).
    """
    batch, query_heads, count, dim = query.shape
    heads, slots = keys.shape[1], keys.shape[2]
    group = query_heads // heads
    scale = 1 / math.sqrt(dim) if scale is None else scale
    # A single query has too little work for the fused CPU kernel to pay off.
    if not need_mass and (count > 1 or query.device.type != "cpu"):
        if visible is not None and group > 1 and visible.shape[1] > 1:
            visible = visible.repeat_interleave(group, dim=1)
        output = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, scale=scale, enable_gqa=group > 1
        )
        return output, None

    grouped = query.reshape(batch, heads, group * count, dim)
    scores = torch.matmul(grouped * scale, keys.transpose(2, 3)).to(torch.float32)
    if visible is not None:
        shared = scores.view(batch, heads, group, count, slots)
        # The lowest finite number, not -inf: a query that sees nothing must not turn into NaN.
        shared.masked_fill_(~visible.unsqueeze(2), torch.finfo(torch.float32).min)
    probabilities = torch.softmax(scores, dim=-1)
    output = torch.matmul(probabilities.to(values.dtype), values)
    output = output.view(batch, query_heads, count, values.shape[-1])
    if not need_mass:
        return output, None
    mass = probabilities.view(batch, heads, group, count, slots)
    mass = mass[:, :, 0] if group == 1 else mass.mean(2)
    if visible is not None:
        mass = mass.masked_fill(~visible, 0.0)
    return output, mass
