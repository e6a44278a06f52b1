"""The cache that an image model draws with: a policy's, or transformers' own to compare it with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Cache, DynamicCache, StaticCache

from kvpolicy import CacheStats, Sequential
from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.lab.run.subject import Setting
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.transformers.cache import TransformersCache

__all__ = ["CACHES", "cost_of", "drawing_cache", "served"]

#: ``kvpolicy`` is that of ``attach``; the others are of transformers: ``DynamicCache``, which is
#: copied as it grows, and ``StaticCache``, which is allocated once and read whole, empty end too.
CACHES = ("kvpolicy", "dynamic", "static")


def served(model: str, option: Any, caches: tuple[str, ...] = CACHES) -> str:
    """The option ``cache`` of a model that serves some caches.

    Raises:
        ParameterError: there is no such cache, or the model can't draw with it.
    """
    if option not in caches:
        raise ParameterError(
            f"option cache={option!r} is not served by {model}; {near_matches(str(option), caches)}"
        )
    return str(option)


@contextmanager
def drawing_cache(
    model: Any, kind: str, setting: Setting, length: int, **how: Any
) -> Iterator[Cache]:
    """An empty cache; the model is attached for as long as it is a policy's.

    Args:
        model: of transformers.
        kind: one of ``CACHES``.
        setting: policy and budget; ``full`` for transformers' caches, which evict nothing.
        length: tokens of a sequence, its prompt included.
        how: further options of :func:`kvpolicy_adapters.attach`.

    Raises:
        ParameterError: transformers' caches can't do what the setting says.
    """
    if kind == "kvpolicy":
        with attach(model, policy=setting.policy, budget=setting.budget, **how) as cache:
            yield cache
        return
    if setting.policy.label != "full":
        raise ParameterError(
            f"option cache={kind}: transformers' cache evicts nothing; give --policy full, not "
            f"{setting.policy.label}"
        )
    if not isinstance(setting.decoder, Sequential):
        raise ParameterError(
            f"option cache={kind}: transformers' cache takes no token back; give --decoder "
            f"sequential, not {setting.decoder.label}"
        )
    config = model.config.get_text_config()
    if kind == "dynamic":
        yield DynamicCache(config=config)
    else:
        yield StaticCache(config=config, max_cache_len=length)


def cost_of(cache: Cache) -> CacheStats:
    """What a cache has cost."""
    if isinstance(cache, TransformersCache):
        return cache.stats()
    layers: Any = cache.layers
    seen = int(cache.get_seq_length())
    none = (0,) * len(layers)
    return CacheStats(
        policy="full",
        budgets=(seen,) * len(layers),
        peak_tokens=(seen,) * len(layers),
        bytes=sum(kept.nbytes for layer in layers for kept in (layer.keys, layer.values)),
        overhead_bytes=0,
        evictions=none,
        reports=none,
        seen=seen,
    )
