"""What each layer of a transformers model keeps between steps, and whether a policy can serve it.

transformers' own ``DynamicCache`` knows: it makes one cache layer for each layer of the model, by
what the configuration says of it. A policy takes the place of those that keep every token's key
and value; the others are left as they are.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from kvpolicy.errors import ModelError
from kvpolicy_adapters.transformers.own_attention import own_attention

__all__ = ["Kept", "kept_by", "uses_interface"]


@dataclass(frozen=True)
class Kept:
    """The layers of one model, lowest first.

    Attributes:
        layers: transformers' own cache layers, new.
        windows: tokens that a query of each layer can see; None for all of them, 0 where a layer
            keeps no keys and values (recurrent state, or keys and values of another layer).
        lent: layers whose keys and values others attend to as well.
        chunked: layers whose windows are chunks, which all tokens leave at once.
    """

    layers: list[Any]
    windows: tuple[int | None, ...]
    lent: frozenset[int]
    chunked: frozenset[int]


def kept_by(model: PreTrainedModel) -> Kept:
    """Find out what a model keeps.

    Raises:
        ModelError: no policy can serve this model; the message says why, and what would.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{name} is an encoder-decoder: it keeps a second cache, of its encoder's tokens, "
            f"which no policy manages; attach() serves decoder-only models"
        )
    if not uses_interface(model) and not own_attention(model):
        if model._is_stateful:
            raise ModelError(
                f"{name} keeps a recurrent state instead of keys and values (state space, linear "
                f"attention): there is nothing to evict; attach() serves models with attention "
                f"layers"
            )
        raise ModelError(
            f"{name} does not use transformers' attention interface, so its attention can't be "
            f"watched from outside; a model that sets _supports_attention_backend would do, or "
            f"kvpolicy.PolicyCache called from its own attention"
        )
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "num_hidden_layers", None) is None:
        raise ModelError(
            f"{name} has no num_hidden_layers in its configuration: it is no causal language model "
            f"that attach() knows"
        )
    own = _cache_of_its_own(model)
    if own is not None:
        raise ModelError(
            f"{name} takes no cache but its own {own.__name__}, so no policy can take its place; "
            f"attach() serves models that take any cache of transformers"
        )
    # Not getattr: where layers differ in it, transformers refuses to name one value for all.
    if vars(config).get("kv_lora_rank"):
        raise ModelError(
            f"{name} keeps compressed latents (multi-head latent attention) and makes keys and "
            f"values of all of them anew at each step: there are no keys and values per head to "
            f"evict; attach() serves layers that keep keys and values per head"
        )
    loops = getattr(config, "n_recurrent_loops", 1)
    if loops != 1:
        raise ModelError(
            f"{name} goes through some of its layers {loops} times, and caches each time anew "
            f"(n_recurrent_loops); attach() serves models that go through each layer once"
        )
    layers = DynamicCache(config=model.config).layers
    if getattr(config, "add_cross_attention", False):
        raise ModelError(
            f"{name} attends to an encoder, too (add_cross_attention), whose tokens come through "
            f"the same cache; attach() serves decoder-only models, and models whose layers of "
            f"cross-attention are layers of their own"
        )
    # Layers of cross-attention keep an image's keys and values, which no text evicts.
    across = frozenset(getattr(config, "cross_attention_layers", None) or ())
    windows = tuple(
        0 if index in across else _window(name, index, layer) for index, layer in enumerate(layers)
    )
    if all(window == 0 for window in windows):
        raise ModelError(
            f"{name} keeps a state of fixed size (linear attention, state space) and no keys and "
            f"values: there is nothing to evict; attach() serves models with attention layers"
        )
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is None:  # transformers before 5.20 says only how many layers borrow
        borrow = getattr(config, "num_kv_shared_layers", None)
        modes = ["store" if borrow else None] * len(layers)
    lent = frozenset(i for i, mode in enumerate(modes) if mode == "store")
    types = getattr(config, "layer_types", None) or ()
    chunked = frozenset(i for i, kind in enumerate(types) if kind == "chunked_attention")
    return Kept(layers, windows, lent, chunked)


def uses_interface(model: PreTrainedModel) -> bool:
    """Whether some part of a model looks its attention function up in transformers' registry.

    Not every model that does so says so: hybrids leave the flag unset. A part that computes its
    attention itself after all is found out by the cache, in the first forward pass.
    """
    return any(
        part._supports_attention_backend
        or hasattr(sys.modules[type(part).__module__], "ALL_ATTENTION_FUNCTIONS")
        for part in _parts(model)
    )


def _cache_of_its_own(model: PreTrainedModel) -> type[Cache] | None:
    """The cache class that a model's own file defines; such models refuse any other."""
    for part in _parts(model):
        module = sys.modules[type(part).__module__]
        for thing in vars(module).values():
            if (
                isinstance(thing, type)
                and issubclass(thing, Cache)
                and thing.__module__ == module.__name__
            ):
                return thing
    return None


def _parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    """A model, and the models inside it."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _window(name: str, index: int, layer: Any) -> int | None:
    """How many tokens a query of this layer can see."""
    state = isinstance(layer, LinearAttentionCacheLayerMixin)
    # A recurrent state beside keys and values (FalconH1, Zamba) has a fixed size, and stays.
    beside = state and type(layer).__module__ == DynamicLayer.__module__
    if beside or type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        if isinstance(layer, DynamicSlidingWindowLayer):
            return int(layer.sliding_window)
        if isinstance(layer, DynamicLayer):
            return None
    if not isinstance(layer, DynamicLayer) and (state or type(layer).__name__ == "DummyLayer"):
        return 0
    raise ModelError(
        f"{name}: layer {index} keeps a {type(layer).__name__}, which is more than the keys and "
        f"values of its tokens (compressed latents, or an index beside them), so no policy can "
        f"manage it; attach() serves layers that keep keys and values per head"
    )
