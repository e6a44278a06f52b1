"""The model's own mask, in explicit form, for layers under a policy.

A policy has to know what every query sees. But an attention implementation may leave that implicit:
flash attention is given a padding mask ``[B, tokens]`` or nothing, and learns a window as a number;
flex attention is given a program. So a mask for a cache under a policy is made as transformers
makes it for ``sdpa``, bool ``[B, 1, T, positions]``, whatever implementation the model was loaded
with; and it stays unmade only where transformers says that None is plainly causal.

transformers makes a mask for the length that a cache tells it. A cache under a policy tells it as a
:class:`PolicyLength`, so masks for it are told from those for others, in any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from kvpolicy import ModelError

__all__ = ["PolicyLength", "explicit_mask", "made_for_policy", "seen_and_added"]


class PolicyLength(int):
    """Positions that a mask has to reach over, told by a cache under a policy."""


def made_for_policy(arguments: dict[str, Any]) -> bool:
    """Whether a mask function is asked for the mask of a cache under a policy."""
    return isinstance(arguments.get("kv_length"), PolicyLength)


def explicit_mask(before: str, **arguments: Any) -> Tensor | None:
    """What each new token sees, bool ``[B, 1, T, positions]``; None for all before it.

    Args:
        before: the implementation that the model was loaded with.
        arguments: those of a mask function.
    """
    make: Callable[..., Tensor | None] = AttentionMaskInterface()["sdpa"]
    arguments["kv_length"] = int(arguments["kv_length"])
    if before == "eager" and arguments["q_length"] > 1:
        # Models that know eager attention alone need not say which of their modules are causal.
        arguments["allow_is_causal_skip"] = False
    elif (
        arguments.get("mask_function") is causal_mask_function
        and arguments.get("allow_is_causal_skip", True)
        and arguments.get("attention_mask") is None
        and arguments.get("local_size") is None
        and isinstance(begin := arguments.get("q_offset", 0), int)
        and begin + arguments["q_length"] == arguments["kv_length"]
    ):
        return None  # behind cached tokens transformers makes one; looking into it costs time
    # None would mean "everything" to who allows that, and means "causal" to us.
    return make(**arguments | {"allow_is_bidirectional_skip": False})


def seen_and_added(
    name: str,
    mask: object,
    bias: Tensor | None,
    *,
    causal: bool,
    queries: int,
    heads: int,
    length: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """What a model's mask hides, and what it adds to the scores.

    Args:
        name: of the attention module, for errors.
        mask: bool (True = visible) or additive ``[B|1, 1|H|Hq, T, positions]``, padding
            ``[B, positions]`` (0 = padding), or None.
        bias: what is added besides, by position.
        causal: whether None means that a token sees none behind it.
        queries: new tokens T.
        heads: KV heads H.
        length: positions so far, the new tokens' included.
        device: where the attention is.

    Returns:
        ``visible``, bool ``[B|1, 1|H, T, positions]`` or None, and ``bias`` or None, as
        :meth:`kvpolicy.PolicyCache.attend` takes them.

    Raises:
        ModelError: the mask is of none of these kinds.
    """
    if mask is None:
        if causal or queries == 1:
            return None, bias
        return torch.ones(1, 1, queries, length, dtype=torch.bool, device=device), bias
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        given = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ModelError(
            f"{name} masks its attention with {given}, and a policy must know what each token "
            f"sees: give attention_mask as [B, tokens] (0 for padding), or what each token sees as "
            f"[B, 1, T, tokens], bool or additive"
        )
    if mask.shape[-1] != length:
        raise ModelError(
            f"{name} masks its attention over {mask.shape[-1]} positions where there are {length} "
            f"so far: it makes the mask of what its cache gives back, which is all keys and values "
            f"there ever were, and under a policy only the new ones; kvpolicy can't serve it"
        )
    if mask.ndim == 2:
        shown = mask.to(device=device, dtype=torch.bool)[:, None, None]
        if not causal:
            return shown.expand(-1, 1, queries, -1), bias
        key = torch.arange(length, device=device)
        return shown & (key <= key[length - queries :, None]), bias
    if mask.dtype != torch.bool:
        # An additive mask hides with the lowest number, and may carry a bias besides (ALiBi).
        bias = mask if bias is None else bias + mask
        mask = mask > torch.finfo(mask.dtype).min / 2
        bias = bias.masked_fill(~mask, 0.0)
    if mask.shape[1] in (1, heads):
        return mask, bias
    # Query heads that share a KV head are masked each in its own way: what none of them sees is
    # hidden, and the rest by what is added to the scores of a head.
    hidden = torch.zeros(mask.shape, device=device).masked_fill(
        ~mask, torch.finfo(torch.float32).min / 2
    )
    return mask.unflatten(1, (heads, -1)).any(2), hidden if bias is None else bias + hidden
