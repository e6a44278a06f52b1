"""LayerCache: one layer of a generation, a token's way from key and value to output and report.

The policy makes room if it must, the key and value are written into slots, the query attends over
the slots, and what it attended to is reported to the policy's observers. There is no other way in
or out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvpolicy.attention import attend
from kvpolicy.checks import check_tokens
from kvpolicy.errors import (
    AttentionError,
    BudgetError,
    CacheStateError,
    LayoutError,
    ParameterError,
    ShapeError,
)
from kvpolicy.layout import UNBOUND, TokenLayout
from kvpolicy.observer import AttentionObserver, AttentionReport, Need
from kvpolicy.policy import CacheView, EvictionPolicy
from kvpolicy.slots import SlotShape, SlotStore
from kvpolicy.step import Step
from kvpolicy.terms import Terms, by_slot

__all__ = ["LayerCache"]

#: Queries that attend, and are observed, at once: bounds the memory of a long call.
QUERY_CHUNK = 128

#: Given a layer, its tokens so far, how many are about to come, and its layout so far (None if it
#: has none): the layout from now on and the layer's budget; None while the layout is unknown.
Bind = Callable[[int, int, int, TokenLayout | None], tuple[TokenLayout, int] | None]


class DecisionRecorder(Protocol):
    """Told of each decision of a layer; see :mod:`kvpolicy.recording`."""

    def decided(self, layer: LayerCache, view: CacheView, victims: Tensor, fresh: int) -> None: ...
    def compressed(self, layer: LayerCache, view: CacheView, victims: Tensor) -> None: ...
    def select_batch(self, index: Tensor) -> None: ...
    def reset(self) -> None: ...


@dataclass(frozen=True)
class Pass:
    """One attention over slots, as it was: what another layer's queries need to repeat it."""

    queries: int
    keys: Tensor
    values: Tensor
    visible: Tensor | None
    bias: Tensor | None
    positions: Tensor | None


class LayerCache:
    """One layer's store, its observers, and the slots that it may reuse.

    Args:
        policy: the policy.
        layout: where tokens sit; ``UNBOUND`` until ``bind`` says so.
        layer: index of the layer, lowest first.
        num_layers: number of layers.
        budget: evictable tokens that a head may hold.
        eager: whether victims are hidden as soon as they are chosen.
        bind: asked before each call where the layout is known late.
        window: newest tokens that a query sees, itself included (a sliding window, which the
            caller's masks impose); None for all. Tokens behind it are the first to go.
        lent: whether other layers attend to this layer's tokens, too (:meth:`attend_again`).
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        layout: TokenLayout,
        *,
        layer: int,
        num_layers: int,
        budget: int,
        eager: bool,
        bind: Bind | None = None,
        window: int | None = None,
        lent: bool = False,
    ) -> None:
        self.policy = policy
        self.layout = layout
        self.layer = layer
        self.num_layers = num_layers
        self.budget = budget
        self.eager = eager
        self.bind = bind
        self.window = window
        self.lent = lent
        # Whether the next call's weights will be asked for (:meth:`weights`).
        self.watched = False
        # Where processes share a layer's heads, the index of the first one here.
        self.first_head = 0
        # Told of each decision, where somebody wants a trace.
        self.recorder: DecisionRecorder | None = None
        self.reset()

    @property
    def capacity(self) -> int:
        """Slots of a head: pinned prefix + budget."""
        return self.layout.prefix + self.budget

    def reset(self) -> None:
        """Back to the state before the first token."""
        if self.recorder is not None:
            self.recorder.reset()
        if self.bind is not None:
            self.layout, self.budget = UNBOUND, 0
        self.store: SlotStore | None = None
        self.observers: Sequence[AttentionObserver] = ()
        self.need = Need.NONE
        self.seen = 0
        # Victims not reclaimed yet, [B, H, N], of which `reused` have been handed out.
        self.queue: Tensor | None = None
        self.reused = 0
        self.peak = self.reports = 0
        # The step that compiled code is about to make, or is making; None between steps.
        self.step: Step | None = None
        self._step: Step | None = None
        # Position of each sequence's first real token, [B]; None while nothing is padded.
        self.start: Tensor | None = None
        # What the newest call attended to, where other layers ask for it.
        self.passes: list[Pass] = []

    @property
    def evictions(self) -> int:
        """Tokens that each head has lost."""
        return 0 if self.store is None else self.seen - self._held()

    def require_store(self) -> SlotStore:
        """The store, or an error where no token has come yet."""
        if self.store is None:
            raise CacheStateError(f"layer {self.layer} has not seen a token yet")
        return self.store

    def select_batch(self, index: Tensor) -> None:
        """Keep the sequences ``index``."""
        if self.store is None:
            return
        index = index.to(self.store.keys.device)
        self.store.select_batch(index)
        self._step = None  # its tensors have the batch that was
        if self.recorder is not None:
            self.recorder.select_batch(index)
        if self.start is not None:
            self.start = self.start.index_select(0, index)
        for observer in self.observers:
            observer.mass = observer.mass.index_select(0, index)
        if self.queue is not None:
            self.queue = self.queue.index_select(0, index)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
        """Cache T tokens and attend from them; see :meth:`PolicyCache.attend`."""
        if self.step is not None:
            return self.step.attend(query, key, value, terms)
        count = check_tokens(query, key, value, terms, self.store, self.seen)
        self._follow(count)
        self._check_length(count)
        self._find_start(terms, count)
        self.passes = []
        if self.layout is UNBOUND:
            return self._hold_all(query, key, value, terms)
        if self.seen == 0 and count > self.capacity and self.layout.compresses_prompt:
            return self._compress_prompt(query, key, value, terms)
        if self.store is None:
            shape = self._shape(key, self.capacity)
            self.store = SlotStore(shape, key, value)
            self._watch(shape)
        if count == 1:
            self._make_room()
            return self._run(query, key, value, terms)
        outputs = []
        done = 0
        while done < count:
            run = self._run_length(count - done)
            part = slice(done, done + run)
            done += run
            rows = terms.rows(part).places(slice(0, self.seen + run))
            outputs.append(self._run(query[:, :, part], key[:, :, part], value[:, :, part], rows))
            if (self.lent or self.watched) and run == 1 and done < count:
                # The slots themselves: the next token of this call overwrites one.
                latest = self.passes[-1]
                self.passes[-1] = replace(
                    latest, keys=latest.keys.clone(), values=latest.values.clone()
                )
        return torch.cat(outputs, dim=2)

    def attend_again(self, query: Tensor, terms: Terms) -> Tensor:
        """Attend from another layer's queries to what the newest T tokens attended to here.

        Nothing is cached and nothing is observed: a layer that borrows keys and values has no say
        in what the layer that owns them keeps.

        Args:
            query: ``[B, G * H, T', D]``, of the last T' of those T tokens.
            terms: scale, soft cap and sinks of the borrowing layer; masks are the owner's.

        Returns:
            Output ``[B, G * H, T', Dv]``.

        Raises:
            CacheStateError: there are more queries than tokens.
        """
        skipped = sum(each.queries for each in self.passes) - query.shape[2]
        if skipped < 0:
            raise CacheStateError(
                f"layer {self.layer} lends its tokens to {query.shape[2]} queries, but its own "
                f"newest call had {query.shape[2] + skipped}"
            )
        outputs = []
        done = 0
        for each in self.passes:
            if skipped >= each.queries:
                skipped -= each.queries
                continue
            rows = Terms(visible=each.visible, bias=each.bias).rows(slice(skipped, None))
            count, skipped = each.queries - skipped, 0
            output, _ = attend(
                query[:, :, done : done + count],
                each.keys,
                each.values,
                visible=rows.visible,
                bias=rows.bias,
                **terms.scoring(),
            )
            outputs.append(output)
            done += count
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def weights(self, query: Tensor, terms: Terms) -> Tensor:
        """What the newest call's queries gave to each position, evicted ones (zero) included.

        Made on request by repeating the call, which ``watched`` must have announced, with values
        that tell slots apart: the attention itself never gathers weights by query head.

        Args:
            query: ``[B, G * H, T, D]``, those of the newest call of :meth:`attend`.
            terms: scale, soft cap and sinks.

        Returns:
            ``[B, G * H, T, seen]``, in the query's dtype.
        """
        weights = query.new_zeros(*query.shape[:3], self.seen)
        done = 0
        for each in self.passes:
            assert each.positions is not None, "watched was not set"
            rows = slice(done, done + each.queries)
            done += each.queries
            slots = torch.eye(each.keys.shape[2], dtype=query.dtype, device=query.device)
            given = torch.cat(
                [
                    attend(
                        query[:, :, rows],
                        each.keys,
                        slots[:, at : at + 128].expand(*each.keys.shape[:2], -1, -1),
                        visible=each.visible,
                        bias=each.bias,
                        **terms.scoring(),
                    )[0]
                    # As wide as values usually are: kernels are made for that.
                    for at in range(0, slots.shape[1], 128)
                ],
                dim=-1,
            )
            where = each.positions.clamp(min=0).unsqueeze(2)  # an empty slot is given nothing
            where = where.repeat_interleave(query.shape[1] // each.keys.shape[1], dim=1)
            weights[:, :, rows].scatter_add_(3, where.expand_as(given), given)
        return weights

    def _attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        terms: Terms,
        visible: Tensor | None,
        bias: Tensor | None,
        held: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over slots; ``visible`` and ``bias`` are by slot.

        Of the keys, the first lie in slots that hold the positions ``held``; the others, or all,
        are new tokens in order.
        """
        if self.lent or self.watched:
            places = None
            if self.watched:
                old = keys.new_empty(*keys.shape[:2], 0) if held is None else held
                first = 0 if held is None else self.seen
                new = torch.arange(keys.shape[2] - old.shape[2], device=keys.device) + first
                places = torch.cat([old.long(), new.expand(*keys.shape[:2], -1)], dim=2)
            self.passes.append(Pass(query.shape[2], keys, values, visible, bias, places))
        return attend(
            query,
            keys,
            values,
            visible=visible,
            bias=bias,
            need_mass=self.need is not Need.NONE,
            **terms.scoring(),
        )

    # -- tokens that nobody will look at again -----------------------------------------------------

    def _find_start(self, terms: Terms, count: int) -> None:
        """Find the padding before each sequence of text: tokens that don't see themselves.

        Prefix and anchors of a text are counted from its first real token, so that a sequence
        keeps what it would keep alone. An image's prompt is padded inside its pinned prefix, and
        the grid that follows begins at one position for the whole batch.
        """
        if terms.visible is None or self.layout is UNBOUND or not self.layout.compresses_prompt:
            return
        if self.seen > 0 and self.start is None:
            return
        own = terms.visible[..., self.seen :]
        if own.shape[2] > 1:
            own = own.diagonal(dim1=2, dim2=3)
        hidden = (~own).flatten(1).view(own.shape[0], -1, count)[:, 0]
        leading = hidden.to(torch.int32).cumprod(-1).sum(-1, dtype=torch.int32)
        if self.start is None:
            self.start = leading
        else:
            self.start = torch.where(self.start == self.seen, self.start + leading, self.start)

    def _expire(self, store: SlotStore) -> None:
        """Empty the slots of tokens that no query will see again: padding, and behind a window."""
        if self.window is None and self.start is None:
            return
        positions = store.positions
        if self.window is not None:
            positions = positions.masked_fill(positions <= self.seen - self.window, -1)
        if self.start is not None:
            positions = positions.masked_fill(positions < self.start.view(-1, 1, 1), -1)
        store.positions = positions

    # -- making room ---------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Slots that can be handed out without a decision."""
        queued = 0 if self.queue is None else self.queue.shape[-1] - self.reused
        return self.require_store().fresh + queued

    def _view(self, store: SlotStore, seen: int, room: int) -> CacheView:
        return CacheView(
            store,
            self.observers,
            seen=seen,
            room=room,
            layer=self.layer,
            num_layers=self.num_layers,
            budget=self.budget,
            layout=self.layout,
            may_be_empty=self.eager or self.window is not None or self.start is not None,
            start=self.start,
            first_head=self.first_head,
        )

    def _headroom(self, view: CacheView) -> int:
        """What the policy wants free, but never more than the layout still has tokens."""
        wanted = self.policy.headroom(view)
        length = self.layout.length
        return wanted if length is None else min(wanted, length - view.seen)

    def _make_room(self) -> None:
        """Let the policy decide, if the next token needs more room than there is."""
        room = self.room
        store = self.require_store()
        view = self._view(store, self.seen, room)
        wanted = self._headroom(view)
        if room >= wanted:
            return
        count = wanted - store.fresh
        if count > self.capacity - self.layout.prefix:
            raise BudgetError(
                f"{self._name} wants {wanted} free slots at position {self.seen}, but layer "
                f"{self.layer} may hold only {self.budget} evictable tokens; min_budget must say so"
            )
        self._expire(store)
        victims = self._victims(view, count)
        if self.recorder is not None:
            self.recorder.decided(self, view, victims, store.fresh)
        # Victims of an earlier decision that were not reclaimed stay cached unless chosen again.
        self.queue, self.reused = victims, 0
        if self.eager:
            store.clear(victims)

    def _victims(self, view: CacheView, count: int) -> Tensor:
        """Ask the policy, and refuse an answer of another shape."""
        victims = self.policy.victims(view, count)
        expected = (*view.positions.shape[:2], count)
        if tuple(victims.shape) != expected or victims.dtype != torch.int64:
            raise ShapeError(
                f"{self._name}.victims gave {victims.dtype} {list(victims.shape)}; expected int64 "
                f"{list(expected)}"
            )
        return victims

    def _run_length(self, limit: int) -> int:
        """Tokens, at most ``limit``, that can come at once with no decision between them."""
        self._make_room()
        room, length = self.room, self.layout.length
        limit = min(limit, room, QUERY_CHUNK)
        if length is not None and room >= length - self.seen:
            return limit
        store = self.require_store()
        for ahead in range(1, limit):
            view = self._view(store, self.seen + ahead, room - ahead)
            if self._headroom(view) > view.room:
                return ahead
        return limit

    def _hand_out(self, count: int) -> tuple[Tensor, int]:
        """Slots for the next tokens, ``[B, H, count]``, and how many of them were fresh."""
        store = self.require_store()
        fresh = min(count, store.fresh)
        if fresh == count:
            return store.take_fresh(count), fresh
        assert self.queue is not None  # _make_room has seen to it
        reclaimed = self.queue[:, :, self.reused : self.reused + count - fresh]
        self.reused += count - fresh
        if fresh == 0:
            return reclaimed, 0
        return torch.cat([store.take_fresh(fresh), reclaimed], dim=-1), fresh

    # -- a run of tokens without a decision ----------------------------------------------------

    def _run(self, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
        """Write consecutive tokens and attend from them."""
        store = self.require_store()
        count = key.shape[2]
        before = store.handed_out
        slots, fresh = self._hand_out(count)
        reclaimed = slots[:, :, fresh:]
        if count == 1:
            store.write(slots, key, value, self.seen)
            held = store.handed_out
            positions = store.positions[:, :, :held]
            output, mass = self._attend(
                query,
                store.keys[:, :, :held],
                store.values[:, :, :held],
                terms,
                self._visible(terms.visible, positions),
                None if terms.bias is None else by_slot(terms.bias, positions),
                positions,
            )
        else:
            # Token i reclaims its slot when its turn comes, so the queries before it still see
            # the victim: attend to the slots as they were, and to the new tokens beside them.
            seen_by = self._visible_to_run(terms.visible, before, slots)
            bias = None
            if terms.bias is not None:
                old = by_slot(terms.bias, store.positions[:, :, :before])
                new = terms.bias[..., self.seen : self.seen + count]
                bias = torch.cat([old, new.expand(*old.shape[:3], count)], dim=-1)
            output, beside = self._attend(
                query,
                torch.cat([store.keys[:, :, :before], key], dim=2),
                torch.cat([store.values[:, :, :before], value], dim=2),
                terms,
                seen_by,
                bias,
                store.positions[:, :, :before],
            )
            store.write(slots, key, value, self.seen)
            mass = None
            if beside is not None:
                mass = beside.new_zeros(*beside.shape[:3], store.handed_out)
                mass[..., :before] = beside[..., :before]
                into = slots.unsqueeze(2).expand(*beside.shape[:3], count)
                mass.scatter_(3, into, beside[..., before:])
        first = self.seen
        self.seen += count
        self.peak = max(self.peak, self._held())
        if reclaimed.shape[-1]:
            for observer in self.observers:
                observer.forget(reclaimed)
        self._observe(mass, first, self.room)
        return output

    # -- a step in three parts, the middle one compiled -------------------------------------------

    def begin_step(self, hide: Callable[[SlotStore], Tensor | None] | None = None) -> None:
        """Decide for the next token, and say where it goes (see :mod:`kvpolicy.step`).

        Args:
            hide: asked once for the slots of padding, bool ``[B, 1, S]``, that are to be hidden
                from every step; None for none.

        Raises:
            CacheStateError: no token has come yet, or a step has begun and not ended.
            ParameterError: other layers attend to this layer's tokens.
        """
        if self.step is not None:
            raise CacheStateError(f"layer {self.layer}: a step has begun that has not ended")
        if self.lent:
            raise ParameterError(
                f"layer {self.layer} lends its tokens to other layers, which a compiled step does "
                f"not serve; decode without compile_decode"
            )
        store = self.require_store()
        self._follow(1)
        self._check_length(1)
        self._make_room()
        if self._step is None or self._step.store is not store:
            need_mass = self.need is not Need.NONE
            self._step = Step(
                store,
                need_mass=need_mass,
                window=self.window,
                start=self.start,
                hidden=None if hide is None else hide(store),
            )
        self.begun_with = store.fresh, self.reused
        slots, fresh = self._hand_out(1)
        self.reclaims = fresh == 0
        self._step.aim(slots, self.seen)
        self.step = self._step

    def end_step(self, done: bool = True) -> None:
        """Account for the token, and report what it attended to.

        Args:
            done: whether the model has run; if not, the slot is taken back.
        """
        step, self.step = self.step, None
        if step is None:
            return
        if not done:
            step.store.fresh, self.reused = self.begun_with
            return
        first = self.seen
        self.seen += 1
        self.peak = max(self.peak, self._held())
        if self.reclaims:
            for observer in self.observers:
                observer.forget(step.slots)
        mass = step.mass
        if mass is not None:
            mass = mass[..., : step.store.handed_out]
        self._observe(mass, first, self.room)

    def _held(self) -> int:
        """Tokens that each head holds now."""
        store = self.require_store()
        hidden = self.room - store.fresh if self.eager else 0
        return store.handed_out - hidden

    def _visible(self, by_position: Tensor | None, positions: Tensor) -> Tensor | None:
        """Which slots one query may see, ``[B, H, 1, S]``; None for all."""
        if by_position is not None:
            return by_slot(by_position, positions) & (positions >= 0).unsqueeze(2)
        return (positions >= 0).unsqueeze(2) if self.eager else None

    def _visible_to_run(self, by_position: Tensor | None, before: int, slots: Tensor) -> Tensor:
        """Which old slots and new tokens T queries may see, ``[B, H, T, before + T]``."""
        store = self.require_store()
        batch, heads, count = slots.shape
        device = slots.device
        positions = store.positions[:, :, :before]
        turn = torch.arange(count, device=device)
        # The turn at which each old slot is reclaimed; `count` for those that are not.
        gone_at = torch.full((batch, heads, store.shape.slots), count, device=device)
        gone_at.scatter_(2, slots, turn.expand_as(slots))
        old = turn[:, None] < gone_at[:, :, None, :before]
        old = old & (positions >= 0).unsqueeze(2)
        new = (turn[None, :] <= turn[:, None]).expand(batch, heads, count, count)
        if by_position is not None:
            old = old & by_slot(by_position, positions)
            new = new & by_position[..., self.seen : self.seen + count]
        return torch.cat([old, new], dim=-1)

    def _observe(self, mass: Tensor | None, first: int, room: int) -> None:
        """Hand the mass to the observers, after refusing NaN."""
        if mass is None:
            return
        total = mass.sum()
        if mass.device.type == "cpu":
            if not math.isfinite(total.item()):
                raise AttentionError(
                    f"layer {self.layer}: attention from position {first} is NaN; the model's "
                    f"queries or keys are not finite"
                )
        else:
            torch._assert_async(total.isfinite())
        report = AttentionReport(mass=mass, first=first, room=room, layout=self.layout)
        for observer in self.observers:
            observer.observe(report)
        self.reports += 1

    # -- the first call ------------------------------------------------------------------------

    def _shape(self, key: Tensor, slots: int) -> SlotShape:
        return SlotShape(
            batch=key.shape[0],
            heads=key.shape[1],
            slots=slots,
            device=key.device,
            layout=self.layout,
        )

    def _watch(self, shape: SlotShape) -> None:
        self.observers = tuple(self.policy.observers(shape))
        self.need = max((observer.needs for observer in self.observers), default=Need.NONE)

    def _compress_prompt(self, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
        """Attend over a whole prompt, then keep of it what the policy does not evict.

        Queries attend in chunks, so that observing costs memory for chunk x length, never for
        length squared.
        """
        count = key.shape[2]
        shape = self._shape(key, count)
        prompt = SlotStore.holding(shape, key, value)
        self._watch(shape)
        output = self._attend_in_full(query, key, value, terms)
        self.seen = count
        self._expire(prompt)
        view = self._view(prompt, count, 0)
        surplus = count - self.capacity
        gone = torch.zeros_like(prompt.positions, dtype=torch.bool)
        victims = self._victims(view, surplus)
        gone.scatter_(2, victims, True)
        if self.recorder is not None:
            self.recorder.compressed(self, view, victims)
        # A stable sort of the flags lists the survivors first, in the order of their positions.
        kept = gone.to(torch.int8).argsort(dim=-1, stable=True)[:, :, : self.capacity]
        self.store = SlotStore(self._shape(key, self.capacity), key, value)
        self.store.fill_from(prompt, kept)
        for observer in self.observers:
            observer.mass = observer.mass.gather(2, kept)
        self.peak = max(self.peak, self.capacity)
        return output

    def _attend_in_full(self, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
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
            output, mass = self._attend(
                query[:, :, first:after],
                key[:, :, :last],
                value[:, :, :last],
                rows,
                allowed,
                rows.bias,
                None,
            )
            outputs.append(output)
            self._observe(mass, first, count - after)
        return torch.cat(outputs, dim=2)

    # -- a layout that is known late -----------------------------------------------------------

    def _follow(self, count: int) -> None:
        """Take the layout that is known before the next tokens, and allocate the slots for it.

        Nothing that was seen before has to be observed again: it is prefix, which no policy may
        evict.
        """
        if self.bind is None:
            return
        bound = None if self.layout is UNBOUND else self.layout
        known = self.bind(self.layer, self.seen, count, bound)
        if known is None or known[0] is bound:
            return
        layout, budget = known
        if bound is not None:
            if layout.prefix != bound.prefix:
                raise LayoutError(
                    f"{layout!r} can't follow {bound!r}: slots have been allocated for "
                    f"{bound.prefix} pinned tokens; keep the prefix, and say what comes behind it"
                )
            self.layout = layout
            return
        if self.seen > layout.prefix:
            raise LayoutError(
                f"{layout!r} came after {self.seen} tokens, but its prefix has {layout.prefix}: "
                f"say where tokens sit before the first token behind the prefix is cached"
            )
        self.layout, self.budget = layout, budget
        if self.store is None:
            return
        prefix = self.store
        shape = self._shape(prefix.keys, self.capacity)
        self.store = SlotStore(shape, prefix.keys, prefix.values)
        self.store.write(self.store.take_fresh(self.seen), prefix.keys, prefix.values, 0)
        self._watch(shape)

    def _hold_all(self, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
        """Attend while the layout is unknown: every token is prefix, so every token is kept."""
        held = [] if self.store is None else [self.store]
        key = torch.cat([*(store.keys for store in held), key], dim=2)
        value = torch.cat([*(store.values for store in held), value], dim=2)
        self.store = SlotStore.holding(self._shape(key, key.shape[2]), key, value)
        self.seen = self.peak = key.shape[2]
        return self._attend_in_full(query, key, value, terms)

    def _check_length(self, count: int) -> None:
        """Refuse more tokens than the layout has."""
        length = self.layout.length
        if length is not None and self.seen + count > length:
            raise LayoutError(
                f"position {self.seen + count - 1} is outside {self.layout!r}, which has {length} "
                f"tokens; reset() the cache for a new sequence, or give the layout its real size"
            )

    @property
    def _name(self) -> str:
        return self.policy.key or type(self.policy).__name__
