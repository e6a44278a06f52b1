"""Attaching the ``Transformer`` object of LlamaGen's own repository, its ``generate`` untouched.

That code is not imported: the object is recognised by its parts. While it is attached, two of its
methods are overridden, on this object alone: ``setup_caches``, which makes no caches any more but
begins a new sequence, and each layer's attention, which keeps its keys and values under the policy.
The mask over all positions stays the object's own, so what ``generate`` writes into it (padding of
captions) holds as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy import (
    Budget,
    CacheStateError,
    EvictionPolicy,
    Halves,
    LateLayout,
    LayoutError,
    ParameterError,
    PolicyCache,
    RasterLayout,
    Reclaim,
    Schedule,
    Step,
    TokenLayout,
)
from kvpolicy_adapters.images.guidance import guided
from kvpolicy_adapters.images.llamagen.rotary import rotate
from kvpolicy_adapters.transformers.cache import TransformersCache

__all__ = ["attach_official", "image_step", "layout_of", "recognises"]

_PARTS = ("block_size", "cls_embedding", "cls_token_num", "freqs_cis", "layers", "setup_caches")
_ATTENTION_PARTS = ("head_dim", "kv_cache", "n_head", "n_kv_head", "resid_dropout", "wo", "wqkv")
#: What ``setup_caches`` and ``generate`` write on the object.
_WRITTEN = ("causal_mask", "freqs_cis", "max_batch_size", "max_seq_length")


def recognises(model: object) -> bool:
    """Whether this is a ``Transformer`` of LlamaGen's repository."""
    if not isinstance(model, nn.Module) or isinstance(model, PreTrainedModel):
        return False
    if not all(hasattr(model, part) for part in _PARTS):
        return False
    layers = list(model.layers) if isinstance(model.layers, nn.ModuleList) else []
    attention = getattr(layers[0], "attention", None) if layers else None
    return all(hasattr(attention, part) for part in _ATTENTION_PARTS)


def layout_of(model: Any) -> RasterLayout:
    """A square of ``block_size`` tokens behind ``cls_token_num``.

    Raises:
        LayoutError: ``block_size`` is no square.
    """
    side = math.isqrt(model.block_size)
    if side * side != model.block_size:
        raise LayoutError(
            f"block_size={model.block_size} is no square, so it does not say how the image lies; "
            f"attach(..., layout=RasterLayout(rows=..., cols=..., prefix={model.cls_token_num}))"
        )
    return RasterLayout(rows=side, cols=side, prefix=model.cls_token_num)


@contextmanager
def attach_official(
    model: Any,
    *,
    policy: EvictionPolicy | str = "linear",
    budget: Budget | int | float | str | None = None,
    layout: TokenLayout | LateLayout | None = None,
    reclaim: Reclaim = "lazy",
    schedule: Schedule | None = None,
    halves: Halves = "own",
) -> Iterator[TransformersCache]:
    """Put the official object under a policy; ``attach`` comes here by itself.

    Every ``generate`` inside the block begins anew and runs under the policy; the cache that the
    block gives is there to be asked (``stats``, ``positions``), not to be passed on. The object
    keeps its mask on itself, so it draws one batch at a time, and can be attached once at a time.
    Calls without ``input_pos`` (training) do what they always did.

    Example::

        with attach(gpt_model, policy="linear", budget="1/6") as cache:
            index_sample = generate(gpt_model, c_indices, latent_size**2, cfg_scale=4.0)
        cache.stats()

    Args:
        model: the object, not compiled.
        policy: a policy, or its name in the registry.
        budget: evictable tokens a head of a layer may hold; None for as many as the layout has.
        layout: where tokens sit; as the object says by default.
        reclaim: ``lazy`` or ``eager``.
        schedule: how layers share the budget; the policy's own by default.
        halves: ``own``, or ``first``: see :class:`kvpolicy.PolicyCache`.

    Raises:
        ParameterError: this is no such object, or it is compiled.
        CacheStateError: it is attached already.
        LayoutError: its tokens make no square.
        BudgetError: the budget is too small for this policy on this layout.
    """
    if not recognises(model):
        raise ParameterError(f"{type(model).__name__} is not LlamaGen's Transformer")
    if hasattr(model, "_orig_mod"):
        raise ParameterError(
            "this model is compiled, so its layers can't be put under a policy; attach "
            "model._orig_mod, and generate with that"
        )
    if isinstance(getattr(model.setup_caches, "__self__", None), _Attachment):
        raise CacheStateError(
            "this model is attached already, and keeps its mask on itself; end the other block "
            "first, or use kvpolicy_adapters.images.llamagen.LlamaGen, which serves several at once"
        )
    policy_cache = PolicyCache(
        policy,
        budget,
        layout=layout_of(model) if layout is None else layout,
        num_layers=len(model.layers),
        reclaim=reclaim,
        schedule=schedule,
        halves=halves,
    )
    cache = TransformersCache(policy_cache, model)
    with _Attachment(model, policy_cache).overriding():
        try:
            yield cache
        finally:
            cache.closed = True


def image_step(
    model: Any,
    cache: TransformersCache,
    condition: Tensor,
    count: int,
    mask: Tensor | None,
    scale: float,
) -> tuple[Step, Tensor]:
    """What a decoder calls to draw an image, as the repository's ``generate`` does.

    Args:
        model: attached; a new sequence begins on it.
        cache: that its block gave.
        condition: classes ``[B]``, or embeddings of captions ``[B, P, C]``.
        count: image tokens that are to be drawn.
        mask: of captions, ``[B, P]``, 0 where they are padding.
        scale: of guidance; 1 is none.

    Returns:
        The step, and ids ``[B, P]`` that stand for the condition: it is no tokens.
    """
    prefix, batch = model.cls_token_num, len(condition)
    if scale != 1:
        nothing = (
            torch.full_like(condition, model.num_classes)
            if condition.ndim == 1
            else model.cls_embedding.uncond_embedding.expand_as(condition)
        )
        condition = torch.cat([condition, nothing])
    model.setup_caches(
        max_batch_size=len(condition),
        max_seq_length=prefix + count,
        dtype=model.tok_embeddings.weight.dtype,
    )
    if mask is not None:
        seen = model.causal_mask
        seen[:, :, :prefix] &= mask.bool().repeat(len(condition) // batch, 1)[:, None]
        seen |= torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)

    def step(tokens: Tensor) -> Tensor:
        first = cache.get_seq_length()
        places = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        if first == 0:
            logits = model(None, condition, places)[0][:, -1:]
        else:
            logits = model(tokens.repeat(len(condition) // batch, 1), None, places)[0]
        if scale == 1:
            return logits
        conditional, unconditional = logits.chunk(2)
        return guided(conditional, unconditional, scale)

    return step, torch.zeros(batch, prefix, dtype=torch.int64, device=condition.device)


class _Attachment:
    """One block on one object."""

    def __init__(self, model: Any, cache: PolicyCache) -> None:
        self.model = model
        self.cache = cache
        self.attentions = [layer.attention for layer in model.layers]
        self.original_setup = model.setup_caches
        self.hides = False

    @contextmanager
    def overriding(self) -> Iterator[None]:
        """Override the two methods, and leave the object as it was."""
        written = {
            name: getattr(self.model, name) for name in _WRITTEN if hasattr(self.model, name)
        }
        owners = [(self.model, "setup_caches"), *((layer, "forward") for layer in self.attentions)]
        before = [owner.__dict__.get(name) for owner, name in owners]
        try:
            for index, attention in enumerate(self.attentions):
                attention.forward = partial(self.attend, index, attention, attention.forward)
            self.model.setup_caches = self.setup_caches
            yield
        finally:
            for (owner, name), override in zip(owners, before, strict=True):
                owner.__dict__.pop(name, None)
                if override is not None:
                    owner.__dict__[name] = override
            for name in _WRITTEN:
                if name in written:
                    setattr(self.model, name, written[name])
                elif hasattr(self.model, name):
                    delattr(self.model, name)

    def setup_caches(self, max_batch_size: int, max_seq_length: int, dtype: torch.dtype) -> None:
        """Begin a new sequence.

        The object's own method prepares what else it does, for a sequence of one token; the caches
        that it makes for that are dropped.
        """
        caches = [attention.kv_cache for attention in self.attentions]
        self.original_setup(max_batch_size=1, max_seq_length=1, dtype=dtype)
        for attention, cache in zip(self.attentions, caches, strict=True):
            del attention.kv_cache
            attention.kv_cache = cache
        self.model.max_batch_size, self.model.max_seq_length = max_batch_size, max_seq_length
        causal = torch.ones(max_seq_length, max_seq_length, dtype=torch.bool).tril()
        self.model.causal_mask = causal.repeat(max_batch_size, 1, 1)
        self.cache.reset()

    def attend(
        self,
        index: int,
        attention: Any,
        original: Callable[..., Tensor],
        x: Tensor,
        freqs_cis: Tensor,
        input_pos: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """A layer's attention.

        Args:
            index: the layer.
            attention: its module.
            original: the method that this one stands for.
            x: ``[B, T, width]``.
            freqs_cis: the new tokens' rotation ``[T, D // 2, 2]``.
            input_pos: their positions ``[T]``; None where no cache is wanted.
            mask: what each may see, bool ``[B, 1, T, positions]``.

        Returns:
            ``[B, T, width]``.
        """
        if input_pos is None:
            return original(x, freqs_cis, input_pos, mask)
        seen, count = self.cache.seen_by(index), x.shape[1]
        if index == 0:
            self.check(input_pos, seen, count)
        kv_width = attention.n_kv_head * attention.head_dim
        widths = [attention.n_head * attention.head_dim, kv_width, kv_width]
        query, key, value = (
            part.unflatten(-1, (-1, attention.head_dim))
            for part in attention.wqkv(x).split(widths, dim=-1)
        )
        output = self.cache.attend(
            index,
            rotate(query, freqs_cis).transpose(1, 2),
            rotate(key, freqs_cis).transpose(1, 2),
            value.transpose(1, 2),
            visible=mask[..., : seen + count] if self.hides and mask is not None else None,
        )
        return attention.resid_dropout(attention.wo(output.transpose(1, 2).flatten(2)))

    def check(self, input_pos: Tensor, seen: int, count: int) -> None:
        """Refuse positions that don't follow what is cached, and see whether the mask says more."""
        follows = (input_pos == torch.arange(seen, seen + count, device=input_pos.device)).all()
        if input_pos.device.type != "cpu":
            torch._assert_async(follows)
        elif not follows:
            raise CacheStateError(
                f"tokens came for the positions {input_pos.tolist()}, but the next one is {seen}; "
                f"setup_caches() begins a new sequence"
            )
        if seen == 0:
            # Looking every slot's position up in a mask that hides nothing would cost time.
            mask = self.model.causal_mask
            self.hides = not torch.equal(mask, torch.ones_like(mask).tril())
