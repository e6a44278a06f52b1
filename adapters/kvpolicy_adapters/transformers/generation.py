"""What is watched while ``generate`` runs with a cache under a policy: that no token goes past it.

transformers lets a model drop the cache that it is given and go on with another (Phi-3 does where
its rotation changes), cuts off a new prompt what a used cache is long, whatever it holds, and has
ways to decode that keep caches of their own. Each would be a policy in name only. While a model is
attached, its ``generate`` therefore looks at what it is asked for, and notes which cache it runs
with, so that the attention function can tell a call that belongs to it and comes without.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import partial, update_wrapper
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy import CacheStateError, ModelError, ParameterError
from kvpolicy_adapters.transformers.cache import TransformersCache
from kvpolicy_adapters.transformers.cache_argument import given_cache

__all__ = ["refuse_dropped_cache", "unwatch", "watch"]

#: The cache that ``generate`` runs with in this thread.
_RUNNING: ContextVar[TransformersCache | None] = ContextVar("kvpolicy_generates", default=None)
#: Candidates that may be staged at once; what they need is allocated as they come.
_MOST_CANDIDATES = 1 << 16
#: Blocks that watch a model, by its id; and what the object itself had in place of the methods.
_WATCHED: dict[int, tuple[int, dict[str, Any]]] = {}


def watch(model: PreTrainedModel) -> None:
    """Watch a model's ``generate``, once more; callers see to it that no other thread does."""
    blocks, before = _WATCHED.get(id(model), (0, {}))
    if not blocks:
        for name, watched in (("generate", _generate), ("generate_batch", _generate_batch)):
            if hasattr(model, name):
                original = getattr(model, name)
                before[name] = vars(model).get(name)
                setattr(model, name, update_wrapper(partial(watched, model, original), original))
    _WATCHED[id(model)] = blocks + 1, before


def unwatch(model: PreTrainedModel) -> None:
    """Undo one :func:`watch`."""
    blocks, before = _WATCHED.pop(id(model))
    if blocks > 1:
        _WATCHED[id(model)] = blocks - 1, before
        return
    for name, own in before.items():
        delattr(model, name)
        if own is not None:
            setattr(model, name, own)


def _generate(
    model: PreTrainedModel, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """``generate``, held to what a cache under a policy can do."""
    cache = given_cache(args, kwargs)
    if not isinstance(cache, TransformersCache):
        # Also the model as its own assistant (assistant_early_exit), which has a cache of its own.
        token = _RUNNING.set(None)
        try:
            return original(*args, **kwargs)
        finally:
            _RUNNING.reset(token)
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)

    def asked(name: str) -> Any:
        given = kwargs.get(name)
        return getattr(settings, name, None) if given is None else given

    if asked("use_cache") is False:
        raise ParameterError(
            "generate(use_cache=False) computes every token anew and keeps none, so there is "
            "nothing for a policy to evict; leave use_cache out (or say use_cache=True, where the "
            "model's configuration says otherwise), or the cache"
        )
    guessed = kwargs.get("assistant_model") is not None or any(
        asked(name) is not None for name in ("prompt_lookup_num_tokens", "assistant_early_exit")
    )
    if asked("use_mtp"):
        raise ParameterError(
            "generate(use_mtp=True) drafts with layers that read this model's hidden states, and "
            "was not tried on a cache under a policy; use an assistant model, "
            "prompt_lookup_num_tokens or assistant_early_exit"
        )
    inputs = _ids(args, kwargs)
    before = cache.get_seq_length()
    # A mask longer than the ids says that these are the new tokens alone.
    mask = kwargs.get("attention_mask")
    alone = inputs is not None and mask is not None and mask.shape[-1] > inputs.shape[1]
    if before and not alone:
        _check_goes_on(cache, inputs)
    stage = nullcontext() if not guessed else _stage(cache, inputs, before)
    token = _RUNNING.set(cache)
    try:
        with stage:
            output = original(*args, **kwargs)
    finally:
        _RUNNING.reset(token)
    seen = cache.get_seq_length()
    if seen == before:
        raise ModelError(
            f"{type(model).__name__}.generate was given a cache under a policy and ended, but no "
            f"token came to it; kvpolicy can't serve this way to generate"
        )
    cache.said = _said(output, inputs, seen)
    return output


def _stage(
    cache: TransformersCache, inputs: Tensor | None, before: int
) -> AbstractContextManager[None]:
    """A stage for candidates behind a prompt, which comes in one call with the first of them.

    Raises:
        CacheStateError: the cache has seen tokens, which transformers would bring once more.
        ParameterError: the prompt does not come as ids, so its length is not known.
    """
    if before:
        raise CacheStateError(
            f"this cache has seen {before} tokens, and decoding with candidates brings the whole "
            f"sequence anew; reset() the cache first"
        )
    if inputs is None:
        raise ParameterError(
            "decoding with candidates under a policy has to know the prompt's length; pass it as "
            "input_ids"
        )
    return cache.stage(_MOST_CANDIDATES, sure=inputs.shape[1])


def _generate_batch(
    model: PreTrainedModel, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """``generate_batch``, which no policy can take part in.

    Raises:
        ParameterError: always.
    """
    raise ParameterError(
        f"{type(model).__name__}.generate_batch (continuous batching) keeps keys and values in "
        f"pages of its own, which no policy manages; inside an attach() block call generate with a "
        f"batch, and generate_batch outside of it"
    )


def refuse_dropped_cache(module: Any) -> None:
    """Refuse attention without the cache that ``generate`` runs with, in a layer that had it.

    Raises:
        ModelError: the model has put another cache, or none, in its place.
    """
    cache = _RUNNING.get()
    if cache is not None and id(module) in cache.served:
        raise ModelError(
            f"while generate ran with a cache under a policy, {cache.name} attended without it at "
            f"token {cache.get_seq_length()}, so what follows would be kept whole: some models "
            f"drop their cache where their rotation changes (Phi-3 and its like at "
            f"original_max_position_embeddings: keep the sequence shorter, or begin it longer), "
            f"and guidance_scale makes a second cache (attach twice, and use Guidance)"
        )


def _ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The prompt's ids ``[B, T]``; None where it comes as something else."""
    if kwargs.get("inputs_embeds") is not None:
        return None
    given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    ids = isinstance(given, Tensor) and given.ndim == 2 and not given.is_floating_point()
    return given if ids else None


def _said(output: Any, inputs: Tensor | None, seen: int) -> Tensor | None:
    """The ids that a cache has seen, where the output says so."""
    sequences = getattr(output, "sequences", output)
    if inputs is None or not isinstance(sequences, Tensor) or sequences.ndim != 2:
        return None
    prompt = inputs.shape[1]
    whole = sequences.shape[1] in (seen, seen + 1) and len(sequences) == len(inputs)
    if not whole or not bool((sequences[:, :prompt] == inputs.to(sequences.device)).all()):
        return None
    return sequences[:, :seen]


def _check_goes_on(cache: TransformersCache, inputs: Tensor | None) -> None:
    """Refuse a sequence that does not begin with what the cache has seen.

    Raises:
        CacheStateError: transformers would drop the first tokens of it unread.
    """
    said = cache.said
    if said is None or inputs is None or len(said) != len(inputs):
        return
    known = min(said.shape[1], inputs.shape[1])
    differs = (said[:, :known] != inputs[:, :known].to(said.device)).any(0)
    if bool(differs.any()):
        raise CacheStateError(
            f"this cache has seen {cache.get_seq_length()} tokens, and the new sequence is another "
            f"one from position {int(differs.int().argmax())} on; pass the ids that generate gave "
            f"and more, or reset() the cache for a new sequence"
        )
