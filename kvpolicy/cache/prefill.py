"""The first call of a layer: a prompt longer than its slots, and a layout that is known late."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.cache.decider import ask, expire
from kvpolicy.cache.layer_state import QUERY_CHUNK, LayerState
from kvpolicy.cache.terms import Terms
from kvpolicy.errors import LayoutError
from kvpolicy.layout import UNBOUND
from kvpolicy.slots import SlotStore

__all__ = ["compress_prompt", "follow", "hold_all"]


def compress_prompt(
    state: LayerState, query: Tensor, key: Tensor, value: Tensor, terms: Terms
) -> Tensor:
    """Attend over a whole prompt, then keep of it what the policy does not evict.

    Queries attend in chunks, so that observing costs memory for chunk x length, never for
    length squared.
    """
    count = key.shape[2]
    shape = state.shape(key, count)
    prompt = SlotStore.holding(shape, key, value)
    state.watch(shape)
    output = _attend_in_full(state, query, key, value, terms)
    state.seen = count
    expire(state, prompt)
    view = state.view(prompt, count, 0)
    surplus = count - state.capacity
    gone = torch.zeros_like(prompt.positions, dtype=torch.bool)
    victims = ask(state, view, surplus)
    gone.scatter_(2, victims, True)
    if state.recorder is not None:
        state.recorder.compressed(state, view, victims)
    # A stable sort of the flags lists the survivors first, in the order of their positions.
    kept = gone.to(torch.int8).argsort(dim=-1, stable=True)[:, :, : state.capacity]
    state.allocate(key, value).fill_from(prompt, kept)
    for observer in state.observers:
        observer.mass = observer.mass.gather(2, kept)
    state.peak = max(state.peak, state.capacity)
    return output


def _attend_in_full(
    state: LayerState, query: Tensor, key: Tensor, value: Tensor, terms: Terms
) -> Tensor:
    """Attend from the newest T tokens to a whole sequence of keys, in order of position."""
    count, total = query.shape[2], key.shape[2]
    outputs = []
    for first in range(0, count, QUERY_CHUNK):
        after = min(first + QUERY_CHUNK, count)
        last = total - count + after
        turn = torch.arange(total - count + first, last, device=key.device)
        allowed = torch.arange(last, device=key.device)[None, :] <= turn[:, None]
        allowed = allowed[None, None]
        rows = terms.rows(slice(first, after)).places(slice(0, last))
        if rows.visible is not None:
            allowed = allowed & rows.visible
        output, mass = state.attend_over(
            query[:, :, first:after],
            key[:, :, :last],
            value[:, :, :last],
            rows,
            allowed,
            rows.bias,
            None,
        )
        outputs.append(output)
        state.observe(mass, first, count - after)
    return torch.cat(outputs, dim=2)


def follow(state: LayerState, count: int) -> None:
    """Take the layout that is known before the next tokens, and allocate the slots for it.

    Nothing that was seen before has to be observed again: it is prefix, which no policy may
    evict.
    """
    if state.bind is None:
        return
    bound = None if state.layout is UNBOUND else state.layout
    known = state.bind(state.layer, state.seen, count, bound)
    if known is None or known[0] is bound:
        return
    layout, budget = known
    state.settled = 0  # what was foreseen was another layout's
    if bound is not None:
        if layout.prefix != bound.prefix:
            raise LayoutError(
                f"{layout!r} can't follow {bound!r}: slots have been allocated for "
                f"{bound.prefix} pinned tokens; keep the prefix, and say what comes behind it"
            )
        state.layout = layout
        return
    if state.seen > layout.prefix:
        raise LayoutError(
            f"{layout!r} came after {state.seen} tokens, but its prefix has {layout.prefix}: "
            f"say where tokens sit before the first token behind the prefix is cached"
        )
    state.layout, state.budget = layout, budget
    if state.store is None:
        return
    prefix = state.store
    store = state.allocate(prefix.keys, prefix.values)
    store.write(store.take_fresh(state.seen), prefix.keys, prefix.values, 0)
    state.watch(store.shape)


def hold_all(state: LayerState, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
    """Attend while the layout is unknown: every token is prefix, so every token is kept."""
    held = [] if state.store is None else [state.store]
    key = torch.cat([*(store.keys for store in held), key], dim=2)
    value = torch.cat([*(store.values for store in held), value], dim=2)
    state.store = SlotStore.holding(state.shape(key, key.shape[2]), key, value)
    state.seen = state.peak = key.shape[2]
    return _attend_in_full(state, query, key, value, terms)
