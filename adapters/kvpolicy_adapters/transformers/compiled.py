"""compile_decode: one token at a time through a compiled model, decisions outside of it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy import CacheStateError, ParameterError, PolicyCache, SlotStore
from kvpolicy_adapters.transformers.cache import PolicyLayer, TransformersCache
from kvpolicy_adapters.transformers.cache_argument import brings
from kvpolicy_adapters.transformers.own_attention import own_attention

__all__ = ["compile_decode"]


@contextmanager
def compile_decode(
    model: PreTrainedModel, cache: TransformersCache, **options: Any
) -> Iterator[None]:
    """Compile the model's decode step for the length of a ``with`` block, inside ``attach``.

    Calls with one token a sequence and this cache run compiled: the whole model in one graph, with
    static shapes, compiled once for a whole image. The first call (the prompt) and all other calls,
    those that ask for attention weights among them, run as they always do. What a policy decides,
    and what its observers are told, happens before and after the compiled code (see
    :meth:`kvpolicy.PolicyCache.step`).

    Example::

        with attach(model, policy="linear", budget="1/6") as cache, compile_decode(model, cache):
            out = model.generate(**inputs, cache=cache)

    Args:
        model: a model that is attached.
        cache: what ``attach`` gave.
        options: of ``torch.compile``, such as ``mode="reduce-overhead"`` (CUDA graphs) or
            ``backend="eager"``.

    Warns:
        RuntimeWarning: the block ends, and no step was compiled.

    Raises:
        ParameterError: this is no attached model of transformers, or (at the first step) its layers
            borrow tokens from each other, or attend within chunks.
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(cache, TransformersCache):
        raise ParameterError(
            f"compile_decode(model, cache) takes a model of transformers and the cache that "
            f"attach() gave, not {type(model).__name__} and {type(cache).__name__}"
        )
    if own_attention(model):
        raise ParameterError(
            f"{type(model).__name__} computes its attention itself, with masks and biases that a "
            f"compiled step does not make; decode without compile_decode"
        )
    # A layer with a state beside its keys and values is more than the compiled step knows.
    layers = [layer for layer in cache.layers if type(layer) is PolicyLayer]
    if len(layers) != len(cache.layers):
        raise ParameterError(
            f"{len(cache.layers) - len(layers)} of {len(cache.layers)} layers of "
            f"{type(model).__name__} are not under the policy, or keep a state besides, which a "
            f"compiled step does not serve"
        )
    chunked = [layer.index for layer in layers if layer.index in cache.chunked]
    if chunked:
        raise ParameterError(
            f"layers {chunked} of {type(model).__name__} attend within chunks, whose masks a "
            f"compiled step does not make (it knows windows that slide); decode without "
            f"compile_decode"
        )
    eager = model.forward
    before = model.__dict__.get("forward")
    step = torch.compile(eager, fullgraph=True, dynamic=False, **options)
    # One sequence's masks are all alike, and are made by slot: this one is never looked at.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)

    counts = _counts_in_the_mask(model)
    calls = brought = compiled = 0

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, brought, compiled
        calls += 1
        brought += brings(cache, args, kwargs)
        asked = kwargs.get("output_attentions", getattr(model.config, "output_attentions", False))
        # Weights by position have no static shape: who asks for them gets them as ever.
        if asked or not _decodes(cache, args, kwargs):
            return eager(*args, **kwargs)
        if cache.closed:
            raise CacheStateError("this cache's attach() block has ended; attach the model again")
        hide = functools.partial(_hidden, cache.policy_cache, kwargs.get("attention_mask"))
        if counts and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = _counted(kwargs, args, cache)
        with cache.policy_cache.step(hide):
            output = step(*args, **{**kwargs, "attention_mask": unread})
        compiled += 1
        return output

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before
    if not compiled:
        warnings.warn(
            f"compile_decode compiled no step: of {calls} calls of this {type(model).__name__}, "
            f"{brought} brought the cache that it was given, and none of them one token a sequence "
            f"behind a prompt; call the model that compile_decode was given, pass it this cache, "
            f"and decode token by token",
            RuntimeWarning,
            stacklevel=3,
        )


def _decodes(cache: TransformersCache, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a call brings one token a sequence behind what this cache holds."""
    if not brings(cache, args, kwargs):
        return False
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None or tokens.shape[1] != 1:
        return False
    return cache.policy_cache.batch is not None and cache.policy_cache.layout is not None


def _counts_in_the_mask(model: PreTrainedModel) -> bool:
    """Whether a model works positions out of the mask, as OPT and its like do."""
    return "position_ids" in inspect.signature(model.forward).parameters and any(
        "attention_mask" in inspect.signature(module.forward).parameters
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    )


def _counted(kwargs: Any, args: tuple[Any, ...], cache: TransformersCache) -> Tensor:
    """The position of one new token of each sequence, ``[B, 1]``: padding has none."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.long().sum(-1, keepdim=True) - 1
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs["inputs_embeds"] if tokens is None else tokens
    return torch.full((len(tokens), 1), cache.get_seq_length(), device=tokens.device)


def _hidden(cache: PolicyCache, mask: Any, store: SlotStore) -> Tensor | None:
    """Slots of padding, bool ``[B, 1, S]``; None where there is none.

    Padding of an image's prompt lies in its prefix, which never moves. That of a text holds no
    slot.

    Raises:
        ParameterError: the mask does not say which tokens are padding.
    """
    layout = cache.layout
    if mask is None or layout is None or layout.compresses_prompt:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ParameterError(
            "a compiled step makes its masks itself: give attention_mask as [B, tokens], 0 for "
            "padding, or not at all"
        )
    hides = mask == 0
    if not bool(hides.any()):
        return None
    positions = store.positions[:, :1].to(torch.int64)
    looked_up = positions.clamp(0, mask.shape[1] - 1)
    found = hides[:, None].expand(len(positions), 1, -1).gather(2, looked_up)
    return found & (positions >= 0) & (positions < layout.prefix)
