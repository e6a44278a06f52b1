"""Steps: a model as a function from new tokens to the logits behind each of them.

Which tokens are new is asked of the cache each time, because a decoder may have taken some back.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from kvpolicy import Step
from kvpolicy_adapters.images.guidance import guided
from kvpolicy_adapters.transformers.cache import TransformersCache
from kvpolicy_adapters.transformers.cache_argument import as_argument

__all__ = ["guided_step", "model_step", "so_far"]


def model_step(model: Any, cache: TransformersCache, mask: Tensor | None = None) -> Step:
    """The step of a model that takes ids and gives logits.

    Args:
        model: attached.
        cache: of its ``attach`` block.
        mask: of the prompt, ``[B, P]``, 0 where it is padding; None where none is.
    """
    takes = inspect.signature(model.forward).parameters
    if mask is not None and bool(mask.all()):
        mask = None

    def step(tokens: Tensor) -> Tensor:
        options: dict[str, Any] = as_argument(cache)
        seen, count = cache.get_seq_length(), tokens.shape[1]
        if seen == 0 and "logits_to_keep" in takes:
            options["logits_to_keep"] = 1  # of a prompt the last logits will do
        if mask is not None:
            whole, places = so_far(mask, seen, count)
            options["attention_mask"] = whole
            if "position_ids" in takes:
                options["position_ids"] = places
        logits: Tensor = model(tokens, use_cache=True, **options).logits
        return logits

    return step


def so_far(mask: Tensor, seen: int, count: int) -> tuple[Tensor, Tensor]:
    """A prompt's mask ``[B, P]`` over all tokens ``[B, seen + count]``, and the newest's places.

    Places ``[B, count]`` are counted as ``generate`` counts them: padding on the left has none.
    """
    new = mask.new_ones(len(mask), seen + count - mask.shape[1])
    whole = torch.cat([mask, new], dim=1)
    places = whole.long().cumsum(-1).sub(1).clamp(min=0)
    return whole, places[:, -count:]


def guided_step(step: Step, other: Step, prompt: Tensor, scale: float) -> Step:
    """A step that is guided away from another sequence, which gets the same tokens.

    Args:
        step: of the conditional half.
        other: of the unconditional half.
        prompt: what the unconditional half begins with, ``[B, P']``.
        scale: 1 is no guidance.
    """
    begun = False

    def both(tokens: Tensor) -> Tensor:
        nonlocal begun
        logits, unconditional = step(tokens), other(tokens if begun else prompt)
        if not begun:
            logits, unconditional = logits[:, -1:], unconditional[:, -1:]
        begun = True
        return guided(logits, unconditional, scale)

    return both
