"""Drawing with :class:`LlamaGen`: classifier-free guidance, temperature, top-k, top-p, a seed."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from kvpolicy import CacheStateError, Decoder, ParameterError, Sampling, ShapeError
from kvpolicy_adapters.images.guidance import guided
from kvpolicy_adapters.images.llamagen.configuration import LlamaGenConfig
from kvpolicy_adapters.images.sampling import RowSampler
from kvpolicy_adapters.transformers.cache_argument import either

__all__ = ["generate"]


class Model(Protocol):
    """What drawing asks of :class:`~kvpolicy_adapters.images.llamagen.LlamaGen`."""

    config: LlamaGenConfig

    def __call__(self, input_ids: Tensor | None, **options: Any) -> Any:
        """Logits ``[B, tokens, codes]`` of a condition, or of the newest tokens ``[B, 1]``."""

    def unconditional(self, condition: Tensor) -> Tensor:
        """A condition of the same shape that stands for none."""


@torch.no_grad()
def generate(
    self: Model,
    condition: Tensor,
    *,
    condition_mask: Tensor | None = None,
    cache: Cache | None = None,
    past_key_values: Cache | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    decoder: Decoder | str = "sequential",
    sampler: RowSampler | None = None,
) -> Tensor:
    """Draw one image for each condition.

    Guidance (Ho and Salimans, arXiv:2207.12598) doubles the batch: the first half has the
    conditions, the second half none, and both draw the same tokens.

    Args:
        self: the model.
        condition: classes ``[B]``, or embeddings of captions ``[B, length, caption_size]``, padded
            on the left.
        condition_mask: ``[B, length]``, 0 where a caption is padding; of captions only.
        cache: an empty cache, e.g. that of ``attach``; one of transformers' by default.
        past_key_values: the former name of ``cache``.
        cfg_scale: guidance; 1 is none.
        cfg_interval: the last image token but one that is guided, counted from 0; -1 guides all.
        do_sample: draw at random; else take the likeliest token each time.
        temperature: divides the logits.
        top_k: draw from the likeliest so many tokens only; 0 for all.
        top_p: draw from the likeliest tokens that have this probability together; 1 for all.
        seed: makes the draw repeatable; None to go on from torch's own generator.
        decoder: or its spelling: ``sjd:window=32`` draws several tokens a pass, with the cache of
            ``attach``.
        sampler: draws each image with random numbers of its own, and with a temperature and limits
            of its own instead of those above; for the sequential decoder.

    Returns:
        Image tokens, int64 ``[B, n, n]``, row by row; the tokenizer's decoder makes pixels of them.

    Raises:
        ParameterError: an option is out of range, or a class is unknown.
        ShapeError: the condition or its mask has the wrong shape.
        CacheStateError: the cache holds tokens already.
    """
    for name, value, works, allowed in (
        ("cfg_scale", cfg_scale, cfg_scale >= 1, "at least 1, which is no guidance"),
        ("cfg_interval", cfg_interval, cfg_interval >= -1, "at least -1, which guides all tokens"),
        ("temperature", temperature, temperature > 0, "above 0 (do_sample=False is greedy)"),
        ("top_k", top_k, top_k >= 0, "at least 0, which is all tokens"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1, which is all tokens"),
    ):
        if not works:
            raise ParameterError(f"{name}={value!r} must be {allowed}")
    given = either(cache, past_key_values)
    cache = DynamicCache() if given is None else given
    if (held := cache.get_seq_length()) != 0:
        raise CacheStateError(
            f"this cache holds {held} tokens already; reset() it, or take another"
        )
    config = self.config
    batch = len(condition)
    mask = None
    if config.condition == "c2i":
        wrong = condition[(condition < 0) | (condition > config.num_classes)].tolist()
        if wrong:
            raise ParameterError(f"class {wrong[0]} is not one of 0 to {config.num_classes - 1}")
        if condition_mask is not None:
            raise ParameterError("condition_mask is for captions; a class has nothing to hide")
    elif condition_mask is not None:
        if condition_mask.shape != condition.shape[:2]:
            raise ShapeError(
                f"condition_mask is {list(condition_mask.shape)}; expected "
                f"{list(condition.shape[:2])}, like condition"
            )
        mask = torch.ones(batch, config.length, dtype=torch.bool, device=condition.device)
        mask[:, : config.prefix] = condition_mask
    if guidance := cfg_scale > 1:
        condition = torch.cat([condition, self.unconditional(condition)])
        mask = None if mask is None else mask.repeat(2, 1)

    count, prefix = config.grid_size**2, config.prefix

    def step(tokens: Tensor) -> Tensor:
        seen = int(cache.get_seq_length())
        after = seen + tokens.shape[1]
        output = self(
            tokens.repeat(2 if guidance else 1, 1) if seen else None,
            condition=None if seen else condition,
            attention_mask=None if mask is None else mask[:, :after],
            cache=cache,
            logits_to_keep=0 if seen else 1,
        )
        logits: Tensor = output.logits
        if not guidance:
            return logits
        logits, unconditional = logits.chunk(2)
        with_guidance = guided(logits, unconditional, cfg_scale)
        if cfg_interval == -1:
            return with_guidance
        # Which image tokens these logits are of.
        image = torch.arange(after - prefix + 1 - logits.shape[1], after - prefix + 1)
        late = (image > cfg_interval + 1).to(logits.device)
        return torch.where(late[:, None], logits, with_guidance)

    chance = None
    if seed is not None:
        chance = torch.Generator(condition.device).manual_seed(seed)
    sampling = Sampling(temperature=temperature if do_sample else 0.0, top_k=top_k, top_p=top_p)
    # The condition is no tokens: zeros stand for it.
    prompt = torch.zeros(batch, prefix, dtype=torch.int64, device=condition.device)
    drawn = Decoder.parse(decoder).decode(
        step,
        cache,
        prompt,
        count,
        sampling=sampling,
        generator=chance,
        rules=() if sampler is None else (sampler,),
    )
    return drawn.tokens[:, prefix:].reshape(batch, config.grid_size, config.grid_size)
