"""Saving: a cache in plain tensors, numbers and text, and a cache that goes on from them.

``torch.save(cache.state_dict(), file)`` writes it, and ``torch.load(file)``, which reads no code,
gives it back to :meth:`kvpolicy.PolicyCache.load_state_dict` of a cache that was made alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvpolicy.cache.layer import Layer
from kvpolicy.errors import CacheStateError, ParameterError
from kvpolicy.layout import OrderedLayout, RasterLayout, SequenceLayout, TextLayout, TokenLayout
from kvpolicy.slots import SlotStore

__all__ = ["check_alike", "load_layer", "save_layer"]

_LAYOUTS = {
    kind.__name__: kind for kind in (OrderedLayout, RasterLayout, SequenceLayout, TextLayout)
}
#: What a store is, besides its shape.
_TENSORS = ("keys", "values", "positions", "victims", "start")
_NUMBERS = ("fresh", "reclaimed", "hides", "may_be_empty", "peak")


def save_layer(layer: Layer) -> dict[str, Any]:
    """The state of a layer. Tensors are its own, not copies.

    Raises:
        CacheStateError: the layer was interrupted.
        ParameterError: its layout or an observer can't be written down.
    """
    if not layer.whole:
        raise layer.interrupted()
    store = layer.store
    return {
        "seen": layer.seen,
        "reports": layer.reports,
        "settled": layer.decider.settled,
        "budget": layer.budget,
        "layout": None if layer.layout is None else _spelled(layer.layout),
        "store": None
        if store is None
        else {name: getattr(store, name) for name in (*_TENSORS, *_NUMBERS)},
        "observers": [_books(observer) for observer in layer.observers],
    }


def load_layer(layer: Layer, state: Mapping[str, Any]) -> None:
    """Put a layer into a state that :func:`save_layer` gave; tensors are copied.

    Raises:
        CacheStateError: the state is that of another kind of layer.
    """
    layer.reset()
    layer.whole = False
    if layer.plan.bind is not None and state["layout"] is not None:
        layer.layout, layer.budget = _read(state["layout"]), state["budget"]
    here = None if layer.layout is None else _spelled(layer.layout)
    if (here, layer.budget) != (state["layout"], state["budget"]):
        raise CacheStateError(
            f"layer {layer.plan.layer} has a budget of {layer.budget} tokens on {here}, but the "
            f"state was saved with {state['budget']} on {state['layout']}; make the cache alike"
        )
    if state["store"] is not None:
        _fill(layer, state["store"], state["observers"])
    layer.seen, layer.reports = state["seen"], state["reports"]
    layer.decider.settled = state["settled"]
    layer.whole = True


def _fill(layer: Layer, saved: Mapping[str, Any], observers: list[dict[str, Any]]) -> None:
    """Make store and observers as they were."""
    keys, values = saved["keys"], saved["values"]
    if layer.layout is None:  # everything is prefix so far
        shape = layer.shape(keys, keys.shape[2])
        layer.store = SlotStore.holding(shape, keys.clone(), values.clone())
    else:
        store = layer.allocate(keys, values)
        if store.keys.shape != keys.shape:
            raise CacheStateError(
                f"layer {layer.plan.layer} would have {store.shape.slots} slots, but the state has "
                f"{keys.shape[2]}; make the cache alike"
            )
        store.keys.copy_(keys)
        store.values.copy_(values)
        layer.watch(store.shape)
    store = layer.require_store()
    store.positions.copy_(saved["positions"])
    for name in ("victims", "start"):
        tensor = saved[name]
        setattr(store, name, None if tensor is None else tensor.clone())
    for name in _NUMBERS:
        setattr(store, name, saved[name])
    made = [sorted(_books(observer)) for observer in layer.observers]
    if made != [sorted(books) for books in observers]:
        raise CacheStateError(
            f"layer {layer.plan.layer}: the state's observers keep {[sorted(o) for o in observers]}"
            f", but this policy's keep {made}; make the cache with the policy that was saved"
        )
    for observer, books in zip(layer.observers, observers, strict=True):
        for name, value in books.items():
            setattr(observer, name, value.clone() if isinstance(value, Tensor) else value)


def _books(observer: Any) -> dict[str, Any]:
    """What an observer keeps.

    Raises:
        ParameterError: something else than tensors and numbers.
    """
    for name, value in vars(observer).items():
        if not isinstance(value, Tensor | bool | int | float | str | None):
            raise ParameterError(
                f"{type(observer).__name__}.{name} is a {type(value).__name__}; a cache can be "
                f"saved if its observers keep tensors, numbers and text"
            )
    return dict(vars(observer))


def _spelled(layout: TokenLayout) -> dict[str, Any]:
    """A layout by the name of its class and its fields.

    Raises:
        ParameterError: it is none of kvpolicy's.
    """
    name = type(layout).__name__
    if not isinstance(layout, OrderedLayout | RasterLayout | SequenceLayout | TextLayout):
        raise ParameterError(
            f"layout={layout!r} can't be saved: only {', '.join(_LAYOUTS)} can; copy.deepcopy() "
            f"serves any"
        )
    return {"kind": name, "fields": layout.model_dump()}


def _read(spelled: Mapping[str, Any]) -> TokenLayout:
    """The layout that :func:`_spelled` wrote down."""
    made: TokenLayout = _LAYOUTS[spelled["kind"]](**spelled["fields"])
    return made


def check_alike(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a state of another cache.

    Raises:
        CacheStateError: policy, reclaim, halves or number of layers differ.
    """
    saved = {"halves": "own", **saved}  # a state of before there was a choice says nothing of it
    for name, value in here.items():
        if saved.get(name) != value:
            raise CacheStateError(
                f"the state was saved with {name}={saved.get(name)!r}, but this cache has "
                f"{name}={value!r}; make the cache alike"
            )
