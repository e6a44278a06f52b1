"""attach: put a transformers model under a policy for the length of a ``with`` block.

Both of transformers' registries (attention functions and mask functions) are public and additive:
the names are registered by the first ``attach``, never at import, and nothing is patched.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy import (
    Budget,
    EvictionPolicy,
    Halves,
    LateLayout,
    ParameterError,
    PolicyCache,
    Reclaim,
    Schedule,
    TokenLayout,
)
from kvpolicy_adapters.images.families import layout_of
from kvpolicy_adapters.images.llamagen import official as llamagen
from kvpolicy_adapters.images.lpd import official as lpd
from kvpolicy_adapters.images.token_reader import telling
from kvpolicy_adapters.transformers.attention import policy_attention
from kvpolicy_adapters.transformers.cache import TransformersCache, marked_layer
from kvpolicy_adapters.transformers.generation import refuse_dropped_cache, unwatch, watch
from kvpolicy_adapters.transformers.layers import kept_by, uses_interface
from kvpolicy_adapters.transformers.masks import explicit_mask, made_for_policy
from kvpolicy_adapters.transformers.own_attention import override, restore
from kvpolicy_adapters.transformers.tensor_parallel import HeadSplit
from kvpolicy_adapters.transformers.versions import say_if_newer
from kvpolicy_adapters.transformers.wrappers import unwrapped

__all__ = ["attach"]

_NAME = "kvpolicy"
_LOCK = threading.Lock()
#: By the id of its configuration, which is alive while attached.
_ATTACHED: dict[int, _Attached] = {}


@contextmanager
def attach(
    model: Any,
    *,
    policy: EvictionPolicy | str = "linear",
    budget: Budget | int | float | str | None = None,
    layout: TokenLayout | LateLayout | None = None,
    reclaim: Reclaim = "lazy",
    schedule: Schedule | None = None,
    halves: Halves = "own",
) -> Iterator[TransformersCache]:
    """Put a model under a policy; the cache that it gives is passed on to the model.

    Its argument is called ``cache`` since transformers 5.24, and ``past_key_values`` before.
    The model's weights and code stay as they are. Calls of the model without this cache, inside
    the block and after it, do what they always did. Blocks may be nested and may run in several
    threads: each generation belongs to the cache that it is given.

    Example::

        with attach(model, policy="linear", budget="1/6", layout=layout) as cache:
            out = model.generate(**inputs, cache=cache)
        cache.stats()

    Args:
        model: a causal language model of transformers that uses its attention interface; or the
            ``Transformer`` of LlamaGen's own repository, whose ``generate`` then needs no cache
            passed (see :func:`kvpolicy_adapters.images.llamagen.attach_official`); or the ``LPD``
            of its authors' (:func:`kvpolicy_adapters.images.lpd.attach_official`). It may be
            wrapped: by ``torch.compile``, ``DataParallel`` and its kin, PEFT, or a pipeline.
        policy: a policy, or its name in the registry.
        budget: evictable tokens a head of a layer may hold; None for as many as the layout has.
        layout: where tokens sit; by default as the model's family has it, which is text where no
            family recognises the model (see :mod:`kvpolicy_adapters.images.families`).
        reclaim: ``lazy`` or ``eager``.
        schedule: how layers share the budget; the policy's own by default.
        halves: ``own``, or ``first``: see :class:`kvpolicy.PolicyCache`.

    Raises:
        ParameterError: the model is no model of transformers.
        ModelError: no policy can serve this model; the message says why, and what would.
        LayoutError: the model's configuration does not describe its family's grid, or an order
            must be given.
        BudgetError: the budget is too small for this policy on this layout.
        UnknownNameError: no policy has this name.
    """
    for official in (llamagen, lpd):
        if official.recognises(model):
            with official.attach_official(
                model,
                policy=policy,
                budget=budget,
                layout=layout,
                reclaim=reclaim,
                schedule=schedule,
                halves=halves,
            ) as cache:
                yield cache
            return
    model = unwrapped(model)
    say_if_newer(stacklevel=3)  # this generator, contextlib, and whoever attaches
    kept = kept_by(model)
    layout = layout_of(model) if layout is None else layout
    split = HeadSplit.of(model)
    policy_cache = PolicyCache(
        policy,
        budget,
        layout=layout,
        num_layers=len(kept.layers),
        reclaim=reclaim,
        schedule=schedule,
        halves=halves,
        windows=kept.windows,
        lent=kept.lent,
        first_head=split.first_head(model),
    )
    split.check(policy_cache.policy)
    cache = TransformersCache(policy_cache, model, kept.layers, kept.chunked)
    entered = _enter(model)
    try:
        with telling(model, cache, layout):
            yield cache
    finally:
        cache.closed = True
        _leave(model, entered)


@dataclass
class _Attached:
    """A configuration that some open block has changed.

    Models may share one (a causal model and the model inside it do), so blocks are counted here.
    """

    config: PreTrainedConfig
    before: str
    blocks: int = 0


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The distinct configurations of a model and of all that is inside it."""
    found: dict[int, PreTrainedConfig] = {}
    queue = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    for config in queue:
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, name, None) for name in config.sub_configs)
            queue.extend(part for part in parts if part is not None)
    return list(found.values())


def _enter(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Attach a model; what :func:`_leave` wants back."""
    with _LOCK:
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, _mask)
        configs = _configs(model)
        for config in configs:
            _ATTACHED.setdefault(
                id(config), _Attached(config, config._attn_implementation)
            ).blocks += 1
        try:
            if uses_interface(model):
                model.set_attn_implementation(_NAME)
                if all(config._attn_implementation != _NAME for config in configs):
                    raise ParameterError(
                        f"{type(model).__name__} does not use transformers' attention interface, "
                        f"so no policy can be attached to it"
                    )
        except BaseException:
            _restore(configs)
            raise
        override(model)
        watch(model)
        return configs


def _leave(model: PreTrainedModel, configs: Iterable[PreTrainedConfig]) -> None:
    with _LOCK:
        unwatch(model)
        restore(model)
        _restore(configs)


def _restore(configs: Iterable[PreTrainedConfig]) -> None:
    """Give back what no other block needs."""
    for config in configs:
        attached = _ATTACHED[id(config)]
        attached.blocks -= 1
        if not attached.blocks:
            # Not through the property, which would also set the configurations inside this one.
            config._attn_implementation_internal = attached.before
            del _ATTACHED[id(config)]


class _AsBefore:
    """A module as it is when nothing is attached: its configuration names its implementation."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        config: Any = copy.copy(module.config)
        # Not through the property, which would also set the configurations inside this one.
        config._attn_implementation_internal = _before(module.config)
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _before(config: Any) -> str:
    """The implementation that a configuration had before it was attached."""
    attached = _ATTACHED.get(id(config))
    return "sdpa" if attached is None else attached.before


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: the policy's, or the one the model had before."""
    if marked_layer(key) is not None:
        return policy_attention(module, query, key, value, attention_mask, **kwargs)
    refuse_dropped_cache(module)
    before = _before(module.config)
    made = isinstance(attention_mask, Tensor) and attention_mask.ndim == 4
    if before not in ("eager", "sdpa") and made and torch.compiler.is_compiling():
        # Its mask had to be made before it could be told whose call this is (see _mask), and the
        # kernel that was loaded takes none.
        before, attention_mask = "eager", _added(attention_mask, query.dtype)
    if before == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[before]
    if before not in ("eager", "sdpa"):
        # Kernels look their own name up in the configuration.
        return function(_AsBefore(module), query, key, value, attention_mask, **kwargs)
    return function(module, query, key, value, attention_mask, **kwargs)


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask (True = visible) as eager attention adds it to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _mask(*, config: Any, **arguments: Any) -> Any:
    """The registered mask function: an explicit mask, or what the model had before."""
    before = _before(config)
    # Where a compiler traces the call, whose mask it is can't be told: an explicit one serves all,
    # and _attention sees to kernels that take none.
    implicit = before not in ("eager", "sdpa")
    if made_for_policy(arguments) or (implicit and torch.compiler.is_compiling()):
        return explicit_mask(before, config=config, **arguments)
    return AttentionMaskInterface()[before](config=config, **arguments)
