"""Making room: before a token comes, the policy names the slots that it and later ones may take."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.cache.layer_state import QUERY_CHUNK, LayerState
from kvpolicy.cache.terms import Terms
from kvpolicy.errors import BudgetError, ShapeError
from kvpolicy.layout import UNBOUND
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotStore

__all__ = ["ask", "expire", "find_start", "hand_out", "make_room", "run_length"]


def make_room(state: LayerState) -> None:
    """Let the policy decide, if the next token needs more room than there is."""
    if state.seen >= state.settled:
        _decide(state)
        state.settled = state.seen + _calm(state)


def _decide(state: LayerState) -> None:
    """Ask the policy what it wants free, and for victims if that is not so."""
    room = state.room
    store = state.require_store()
    view = state.view(store, state.seen, room)
    wanted = _headroom(state, view)
    if room >= wanted:
        return
    count = wanted - store.fresh
    if count > state.capacity - state.layout.prefix:
        raise BudgetError(
            f"{state.name} wants {wanted} free slots at position {state.seen}, but layer "
            f"{state.layer} may hold only {state.budget} evictable tokens; min_budget must say so"
        )
    expire(state, store)
    victims = ask(state, view, count)
    if state.recorder is not None:
        state.recorder.decided(state, view, victims, store.fresh)
    # Victims of an earlier decision that were not reclaimed stay cached unless chosen again.
    state.queue, state.reused = victims, 0
    if state.eager:
        store.clear(victims)


def _headroom(state: LayerState, view: CacheView) -> int:
    """What the policy wants free, but never more than the layout still has tokens."""
    wanted = state.policy.headroom(view)
    length = state.layout.length
    return wanted if length is None else min(wanted, length - view.seen)


def ask(state: LayerState, view: CacheView, count: int) -> Tensor:
    """Ask the policy, and refuse an answer of another shape."""
    victims = state.policy.victims(view, count)
    expected = (*view.positions.shape[:2], count)
    if tuple(victims.shape) != expected or victims.dtype != torch.int64:
        raise ShapeError(
            f"{state.name}.victims gave {victims.dtype} {list(victims.shape)}; expected int64 "
            f"{list(expected)}"
        )
    return victims


def run_length(state: LayerState, limit: int) -> int:
    """Tokens, at most ``limit``, that can come at once with no decision between them."""
    make_room(state)
    return min(limit, state.settled - state.seen)


def _calm(state: LayerState) -> int:
    """Tokens that can come with no decision between them: what a policy wants is known ahead."""
    room, length = state.room, state.layout.length
    limit = min(room, QUERY_CHUNK)
    if length is not None and room >= length - state.seen:
        return limit
    view = state.view(state.require_store(), state.seen, room)
    for ahead in range(1, limit):
        # One view for all of them: headroom() reads none of what a view remembers.
        view.seen, view.room = state.seen + ahead, room - ahead
        if _headroom(state, view) > view.room:
            return ahead
    return limit


def hand_out(state: LayerState, count: int) -> tuple[Tensor, int]:
    """Slots for the next tokens, ``[B, H, count]``, and how many of them were fresh."""
    store = state.require_store()
    fresh = min(count, store.fresh)
    if fresh == count:
        return store.take_fresh(count), fresh
    assert state.queue is not None  # make_room has seen to it
    reclaimed = state.queue
    if reclaimed.shape[2] != count - fresh:
        reclaimed = reclaimed.narrow(2, state.reused, count - fresh)
    state.reused += count - fresh
    if fresh == 0:
        return reclaimed, 0
    return torch.cat([store.take_fresh(fresh), reclaimed], dim=-1), fresh


def find_start(state: LayerState, terms: Terms, count: int) -> None:
    """Find the padding before each sequence of text: tokens that don't see themselves.

    Prefix and anchors of a text are counted from its first real token, so that a sequence
    keeps what it would keep alone. An image's prompt is padded inside its pinned prefix, and
    the grid that follows begins at one position for the whole batch.
    """
    if terms.visible is None or state.layout is UNBOUND or not state.layout.compresses_prompt:
        return
    if state.seen > 0 and state.start is None:
        return
    own = terms.visible[..., state.seen :]
    if own.shape[2] > 1:
        own = own.diagonal(dim1=2, dim2=3)
    hidden = (~own).flatten(1).view(own.shape[0], -1, count)[:, 0]
    leading = hidden.to(torch.int32).cumprod(-1).sum(-1, dtype=torch.int32)
    if state.start is None:
        state.start = leading
    else:
        state.start = torch.where(state.start == state.seen, state.start + leading, state.start)


def expire(state: LayerState, store: SlotStore) -> None:
    """Empty the slots of tokens that no query will see again: padding, and behind a window."""
    if state.window is None and state.start is None:
        return
    positions = store.positions
    if state.window is not None:
        positions = positions.masked_fill(positions <= state.seen - state.window, -1)
    if state.start is not None:
        positions = positions.masked_fill(positions < state.start.view(-1, 1, 1), -1)
    store.positions = positions
