"""decode: draw from an attached model with any decoder, as ``generate`` draws sequentially."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy import (
    CacheStateError,
    Decoded,
    Decoder,
    JointCache,
    ParameterError,
    Rule,
    Sampling,
    Step,
)
from kvpolicy_adapters.images import janus
from kvpolicy_adapters.images.chameleon import ImageGuidance
from kvpolicy_adapters.images.guidance import Guidance
from kvpolicy_adapters.images.llamagen import LlamaGen, official
from kvpolicy_adapters.images.lpd import LPD
from kvpolicy_adapters.images.lpd import official as lpd
from kvpolicy_adapters.transformers.cache import TransformersCache
from kvpolicy_adapters.transformers.steps import guided_step, model_step
from kvpolicy_adapters.transformers.wrappers import unwrapped

__all__ = ["decode"]


@torch.no_grad()
def decode(
    model: Any,
    prompt: Tensor,
    cache: TransformersCache,
    count: int,
    *,
    decoder: Decoder | str = "sequential",
    attention_mask: Tensor | None = None,
    guidance: Guidance | ImageGuidance | float = 1.0,
    sampling: Sampling | None = None,
    rules: Sequence[Rule] = (),
    suppress_tokens: Sequence[int] = (),
    seed: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Decoded:
    """Draw tokens from an attached model.

    :class:`~kvpolicy_adapters.images.llamagen.LlamaGen` and
    :class:`~kvpolicy_adapters.images.lpd.LPD` take a decoder in their own ``generate``.

    Example::

        with attach(model, policy="linear", budget="1/6", layout=layout) as cache:
            drawn = decode(model, prompt, cache, 576, decoder="sjd:window=32")
        drawn.tokens, drawn.passes

    Args:
        model: attached: a causal language model of transformers, a Janus, which draws an image
            then, or LlamaGen's own ``Transformer``.
        prompt: ids ``[B, P]``; for LlamaGen's object a condition: classes ``[B]``, or embeddings of
            captions ``[B, P, C]``.
        cache: empty, of the ``attach`` block.
        count: tokens to draw.
        decoder: or its spelling, e.g. ``sjd:window=32:draft=above``.
        attention_mask: of the prompt, ``[B, P]``, 0 where it is padding.
        guidance: ``Guidance`` or ``ImageGuidance``, as ``generate`` takes them among its logits
            processors; a number for a Janus and for LlamaGen's object, which double the batch.
        sampling: temperature, top-k and top-p; plain sampling by default.
        rules: a grammar, e.g. ``ImageGrammar``, and what else of transformers' processors of logits
            looks at nothing but the ids and scores that it is given.
        suppress_tokens: ids that never come.
        seed: makes the draw repeatable; None to go on from torch's own generator.
        advance: is told how many tokens have been settled since the last call.

    Returns:
        What was drawn; behind a condition, which is no token, without it.

    Raises:
        ParameterError: an option is out of range, or does not go with this model.
        CacheStateError: a cache holds tokens already, or its policy can't be staged.
        LayoutError: the layout has fewer tokens.
        ShapeError: the prompt has another shape.
    """
    decoder = Decoder.parse(decoder)
    guide = guidance if isinstance(guidance, Guidance | ImageGuidance) else None
    for used in (cache,) if guide is None else (cache, guide.half.cache):
        if (held := used.get_seq_length()) != 0:
            raise CacheStateError(
                f"a cache holds {held} tokens already; reset() it, or take another"
            )
    joint: Any = cache
    conditions = official.recognises(model)
    if lpd.recognises(model):
        raise ParameterError(
            f"{type(model).__name__} is asked for tokens by their place, group by group: draw with "
            f"its own sample_tokens in the attach block"
        )
    if not conditions:
        model = unwrapped(model)
        if isinstance(model, LPD):
            raise ParameterError(
                "LPD is asked for tokens by their place, group by group: "
                "model.generate(classes, cache=cache)"
            )
        if isinstance(model, LlamaGen):
            raise ParameterError(
                "LlamaGen draws from a condition: "
                "model.generate(condition, cache=cache, decoder=...)"
            )
    if conditions or janus.recognises(model):
        if not isinstance(guidance, float | int):
            raise ParameterError(
                f"{type(model).__name__} doubles the batch for guidance, in one cache: give "
                f"guidance as a number, e.g. guidance=5.0"
            )
        family = official if conditions else janus
        step, prompt = family.image_step(
            model, cache, prompt, count, attention_mask, float(guidance)
        )
    else:
        step = model_step(model, cache, attention_mask)
        if guide is not None:
            negative, mask = guide.begins(prompt)
            other: Any = guide.half.cache
            step = guided_step(
                step, model_step(guide.half.model, other, mask), negative, guide.scale
            )
            joint = JointCache(joint, other)
        elif guidance != 1:
            raise ParameterError(
                f"guidance={guidance!r}: {type(model).__name__} needs a second cache for it: "
                f"attach it twice, and give "
                f"guidance=Guidance({guidance}, model, second, negative_prompt)"
            )
    if len(suppress_tokens):
        step = _without(step, list(suppress_tokens))
    chance = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
    drawn: Decoded = decoder.decode(
        step,
        joint,
        prompt,
        count,
        sampling=sampling,
        rules=rules,
        generator=chance,
        advance=advance,
    )
    return replace(drawn, tokens=drawn.tokens[:, -count:]) if conditions else drawn


def _without(step: Step, tokens: list[int]) -> Step:
    """A step after which some tokens never come."""

    def suppressed(new: Tensor) -> Tensor:
        logits = step(new).clone()
        logits[..., tokens] = -torch.inf
        return logits

    return suppressed
