"""Classifier-free guidance whose unconditional half has a cache, and a policy, of its own.

transformers' ``guidance_scale`` makes the cache of its second half itself, so no policy can hold
it to a budget. Here it is a cache like the other, made by a second ``attach`` of the same model::

    with attach(model, ...) as cache, attach(model, ...) as second:
        guide = Guidance(3.0, model, second, negative_prompt)
        model.generate(prompt, cache=cache, logits_processor=[guide])
"""

from __future__ import annotations

import inspect
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from kvpolicy import GroupStep, OrderedLayout, ParameterError, ShapeError
from kvpolicy_adapters.transformers.cache import TransformersCache
from kvpolicy_adapters.transformers.cache_argument import as_argument

__all__ = ["CFGSchedule", "Guidance", "SecondHalf", "guided", "guided_groups"]

#: How guidance goes along an image: rising from none, or the same for all tokens.
CFGSchedule: TypeAlias = Literal["linear", "constant"]


def guided(scores: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """``u + scale * (s - u)``, all ``[B, vocabulary]`` (Ho and Salimans, arXiv:2207.12598)."""
    return unconditional + scale * (scores - unconditional)


def guided_groups(
    step: GroupStep,
    cache: Any,
    no_class: int,
    scale: float,
    schedule: CFGSchedule = "linear",
) -> GroupStep:
    """A step of groups with guidance, which doubles the batch: one half has the class, one none.

    Args:
        step: of the model; its first tokens are classes ``[B, 1]``.
        cache: the one that it writes to, with an ``OrderedLayout``.
        no_class: the number that stands for no class.
        scale: 1 is no guidance.
        schedule: ``linear``: the k-th of N image tokens as they come, from 0, is guided by
            ``1 + (scale - 1) * k / N``, as the authors of LPD do (arXiv:2507.01957); ``constant``:
            all by ``scale``.

    Raises:
        ParameterError: there is no such schedule, or the scale is less than 1.
    """
    if schedule not in get_args(CFGSchedule):
        raise ParameterError(f"cfg_schedule={schedule!r} is none of {get_args(CFGSchedule)}")
    if not 1 <= scale < float("inf"):
        raise ParameterError(f"cfg_scale={scale!r} must be at least 1, which is no guidance")
    layout: OrderedLayout = cache.layout

    def both(tokens: Tensor, ask: int) -> Tensor:
        seen = cache.get_seq_length()
        other = tokens if seen else torch.full_like(tokens, no_class)
        logits, unconditional = step(torch.cat([tokens, other]), ask).float().chunk(2)
        if schedule == "constant":
            return guided(logits, unconditional, scale)
        first = seen + tokens.shape[1] - layout.prefix
        index = torch.arange(first, first + ask, device=logits.device)
        rising = 1 + (scale - 1) * index / len(layout.order)
        return guided(logits, unconditional, rising[:, None])

    return both


class SecondHalf:
    """A sequence that is generated along with another, in a cache of its own.

    Args:
        model: the model, attached.
        cache: the second cache.
    """

    def __init__(self, model: PreTrainedModel, cache: TransformersCache) -> None:
        self.model = model
        self.cache = cache
        self._takes_places = "position_ids" in inspect.signature(model.forward).parameters
        self.mask = torch.empty(0)
        self._ids: Tensor | None = None

    def follows(self, ids: Tensor, groups: int = 1) -> bool:
        """Whether these are the ids of the call before, and one token more.

        Beam search moves rows, and drops some for others: the second cache moves its rows alike.

        Args:
            ids: ``[N, T]``, of the first sequence.
            groups: how many equal groups the rows lie in, one behind the other, out of which no
                row moves.
        """
        before, self._ids = self._ids, ids
        if before is None or ids.shape != (before.shape[0], before.shape[1] + 1):
            return False
        ids = ids[:, :-1].to(before.device)
        if torch.equal(ids, before):
            return True
        group = torch.arange(len(ids), device=ids.device) // (len(ids) // groups)
        same = (ids[:, None] == before).all(-1) & (group[:, None] == group)
        if not bool(same.any(1).all()):
            return False
        rows = same.to(torch.int8).argmax(1)
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows.to(self.mask.device)]
        return True

    def begin(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Start anew with the ids ``[B, T]``; returns the logits after the last one."""
        self.cache.reset()
        self.mask = torch.ones_like(tokens) if mask is None else mask
        return self._logits(tokens)

    def go_on(self, tokens: Tensor) -> Tensor:
        """Append ids ``[B, T]``; returns the logits ``[B, vocabulary]`` after the last one."""
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
        return self._logits(tokens)

    def _logits(self, tokens: Tensor) -> Tensor:
        options: dict[str, Any] = {"attention_mask": self.mask, **as_argument(self.cache)}
        if self._takes_places:
            # As generate counts them: padding on the left has no place.
            places = self.mask.long().cumsum(-1).sub(1).clamp(min=0)
            options["position_ids"] = places[:, -tokens.shape[1] :]
        return self.model(tokens, use_cache=True, **options).logits[:, -1]


class Guidance(LogitsProcessor):
    """Guidance away from a negative prompt.

    It serves one generation after the other: where the ids that it is given do not go on from those
    of the call before, the negative prompt is read anew. Beam search and ``num_return_sequences``
    are followed.

    Args:
        scale: 1 is no guidance.
        model: the model, attached.
        cache: the cache of the unconditional half.
        prompt: what the unconditional half begins with, ids ``[B, T]``, or ``[1, T]`` or ``[T]``
            for all rows; it may be longer or shorter than the prompt.
        mask: its attention mask, in the same shape; everything by default.

    Raises:
        ShapeError: the prompt or its mask has another shape; or, when called, its rows don't divide
            those that are generated.
    """

    def __init__(
        self,
        scale: float,
        model: PreTrainedModel,
        cache: TransformersCache,
        prompt: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        if prompt.ndim not in (1, 2) or prompt.is_floating_point() or prompt.numel() == 0:
            raise ShapeError(
                f"the negative prompt is {prompt.dtype} {list(prompt.shape)}; expected ids [B, T]"
            )
        if mask is not None and mask.shape != prompt.shape:
            raise ShapeError(
                f"the negative prompt's mask is {list(mask.shape)}, but the prompt is "
                f"{list(prompt.shape)}"
            )
        self.scale = scale
        self.half = SecondHalf(model, cache)
        self.prompt = prompt.view(-1, prompt.shape[-1])
        self.mask = None if mask is None else mask.view(self.prompt.shape)

    def begins(self, prompt: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the unconditional half begins with, and its mask, beside a prompt ``[N, T]``.

        Raises:
            ShapeError: the rows of the negative prompt don't divide those that are generated.
        """
        rows, of_prompt = len(prompt), len(self.prompt)
        if rows % of_prompt:
            raise ShapeError(
                f"the negative prompt has {of_prompt} rows, which don't divide the {rows} that are "
                f"generated; give one row for all, or one for each prompt"
            )
        each = rows // of_prompt  # beams and sequences of a prompt lie side by side
        mask = None if self.mask is None else self.mask.repeat_interleave(each, 0)
        return self.prompt.repeat_interleave(each, 0), mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guide the scores ``[N, vocabulary]`` of the token behind ``input_ids`` ``[N, T]``."""
        beginning = self.begins(input_ids)
        if self.half.follows(input_ids, groups=len(self.prompt)):
            unconditional = self.half.go_on(input_ids[:, -1:])
        else:
            unconditional = self.half.begin(*beginning)
        return guided(scores, unconditional, self.scale)
