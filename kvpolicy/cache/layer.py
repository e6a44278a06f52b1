"""Layer: one layer of a generation, a token's way from key and value to output and report.

What comes is checked; if room must be made, the policy decides; key and value are written into a
slot, the query attends over the slots, and what it attended to is reported to the observers. One
token goes through :meth:`Layer.token`; several go through :func:`attend_beside`, which lets each
query see what the later ones replace. Tokens that may be taken back have an entry of their own
(:mod:`kvpolicy.cache.staged_run`), and so has a compiled step. There is no other way in or out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy.cache.beside import attend_beside, mass_by_slot
from kvpolicy.cache.blocks import block_ends
from kvpolicy.cache.checks import check_gradients, check_tokens
from kvpolicy.cache.decider import MOST_POSITIONS, Decider
from kvpolicy.cache.lending import Lending, by_position
from kvpolicy.cache.padding import Padding, find_padding
from kvpolicy.cache.plan import LayerPlan
from kvpolicy.cache.staged_run import attend_staged, attend_sure
from kvpolicy.cache.staging import LayerBooks, Staging, Tell
from kvpolicy.cache.terms import Terms
from kvpolicy.errors import AttentionError, CacheStateError, LayoutError
from kvpolicy.layout import TextLayout, TokenLayout
from kvpolicy.observers import (
    AttentionObserver,
    AttentionReport,
    Need,
    like_state,
    replace_state,
    state_of,
)
from kvpolicy.ops.attend import write_and_attend
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotShape, SlotStore

__all__ = ["Layer"]

#: All but a scale.
_NO_TERMS = (None, None, None, None)


class Layer:
    """One layer of a generation: caches tokens, and attends from them.

    Args:
        plan: what is fixed about it.
        layout: where tokens sit; None while that is not known.
        budget: evictable tokens that a head may hold.

    Attributes:
        plan: see above.
        layout: see above.
        budget: see above.
        store: its slots; None before the first token.
        observers: who is told what attention did.
        need_mass: whether one of them wants to know.
        seen: tokens of the sequence so far.
        reports: attention reports that reached the observers.
        decider: asks the policy.
        lending: what the newest call attended to, where other layers borrow it.
        staging: what can be taken back, inside of a stage; None outside of one.
        whole: False from the first change of a call to its last: an exception between them leaves a
            layer that nobody can tell the state of.
    """

    def __init__(self, plan: LayerPlan, layout: TokenLayout | None, budget: int) -> None:
        self.plan = plan
        self.layout, self.budget = layout, budget
        self.decider = Decider(plan)
        self.lending = Lending(plan.layer) if plan.lends else None
        self.staging: Staging | None = None
        self.reset()

    def reset(self) -> None:
        """Back to the state before the first token."""
        if self.plan.bind is not None:
            self.layout, self.budget = None, 0
        self.store: SlotStore | None = None
        self.observers: Sequence[AttentionObserver] = ()
        self.need_mass = False
        self.seen = self.reports = self.decider.settled = 0
        if self.decider.recorder is not None:
            self.decider.recorder.reset()
        if self.lending is not None:
            self.lending.passes = []
        self.whole = True
        if self.staging is not None:
            self.staging.restart()

    def __getstate__(self) -> dict[str, Any]:
        """A copy stages nothing."""
        return {**vars(self), "staging": None}

    @property
    def capacity(self) -> int:
        """Slots of a head: pinned prefix + budget."""
        return (0 if self.layout is None else self.layout.prefix) + self.budget

    # -- a token's way -----------------------------------------------------------------------------

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, terms: Terms, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Cache T tokens and attend from them; see :meth:`PolicyCache.attend`."""
        if not self.whole:
            raise self.interrupted()
        staging, store = self.staging, self.store
        if staging is not None and staging.opens is not None:
            return attend_sure(self, staging, query, key, value, terms, weights)
        if store is None or not store.accepts(query, key, value):
            check_tokens(query, key, value)
            if store is not None:
                store.check(query, key, value, self.seen)
        if terms[1:] != _NO_TERMS:
            terms.check(key, query.shape[1], self.seen)
        count = key.shape[2]
        wants_gradient = query.requires_grad or key.requires_grad or value.requires_grad
        if wants_gradient and self.seen and torch.is_grad_enabled():
            check_gradients(self.plan.layer, query, key, value)
        if staging is not None:
            staging.admit(count)
        if self.plan.bind is not None:
            self._follow(count)
            store = self.store
        if self.seen + count > self.decider.settled:
            self._check_length(count)
        if self.lending is not None:
            self.lending.passes = []
        if self.layout is None:
            return self._hold_all(query, key, value, terms, weights)
        if store is None:
            if count > self.capacity and self.layout.compresses_prompt:
                return self._compress(query, key, value, terms, weights)
            store = self._begin(key, value)
        if staging is not None:
            return attend_staged(self, staging, query, key, value, terms, weights, wants_gradient)
        if count > 1 or weights or wants_gradient:
            return self._several(query, key, value, terms, weights, wants_gradient)
        if self.seen >= self.decider.settled:
            self.decide(1)
        self.whole = False
        output = self.token(store, *store.take(1), query, key, value, terms)
        self.whole = True
        return output, None

    def decide(self, block: int) -> None:
        """Let the policy make room for ``block`` tokens that are written together."""
        store = self.require_store()
        if self.staging is not None:
            self.staging.close()
        view = self.view(store, store.room)
        victims = self.decider.victims(store, view, block)
        if victims is not None:
            before, self.whole = self.whole, False
            store.name_victims(victims)
            self.whole = before
        self.decider.foresee(view, store.room, block)
        if self.staging is not None:
            self.staging.decided()

    def token(
        self,
        store: SlotStore,
        slots: Tensor,
        reclaimed: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
    ) -> Tensor:
        """Write a token into the slots it was given, attend from it, and report."""
        first = self.seen
        padding = None if terms.visible is None else self._padding(terms, store, slots)
        output, mass, finite = write_and_attend(
            store.kernel,
            store.write,
            query,
            store.keys,
            store.values,
            store.positions,
            slots,
            key,
            value,
            first,
            store.shape.slots - store.fresh,
            scale=terms.scale,
            visible=terms.visible,
            bias=terms.bias,
            softcap=terms.softcap,
            sinks=terms.sinks,
            need_mass=self.need_mass,
            may_be_empty=store.may_be_empty,
        )
        self.seen = first + 1
        if self.lending is not None:
            self.lending.keep(store, terms)
        report = None if mass is None else self.report(mass, first, store.room, finite)
        if reclaimed is not None:  # as deliver() has it, without a call
            for observer in self.observers:
                observer.forget(reclaimed)
        if report is not None:
            for observer in self.observers:
                observer.observe(report)
            self.reports += 1
        if padding is not None:
            padding.empty()
        return output

    def report(
        self, mass: Tensor, first: int, room: int, finite: bool | None = None
    ) -> AttentionReport:
        """Mass for the observers, after refusing NaN; ``finite`` where that is known."""
        if mass.device.type != "cpu":
            if not finite:
                torch._assert_async(mass.sum().isfinite())
        elif not (math.isfinite(mass.sum().item()) if finite is None else finite):
            raise AttentionError(
                f"layer {self.plan.layer}: attention from position {first} is NaN; the model's "
                f"queries or keys are not finite; reset() the cache, which has lost its place"
            )
        assert self.layout is not None
        return AttentionReport(mass=mass, first=first, room=room, layout=self.layout)

    def deliver(self, reclaimed: Tensor | None, report: AttentionReport | None) -> None:
        """Tell observers which slots hold other tokens now, and what attention did."""
        if reclaimed is not None:
            for observer in self.observers:
                observer.forget(reclaimed)
        if report is not None:
            for observer in self.observers:
                observer.observe(report)
            self.reports += 1

    # -- several tokens in a call ------------------------------------------------------------------

    def _several(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        weights: bool,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs of whole blocks with no decision within."""
        count, first = key.shape[2], self.seen
        ends = block_ends(terms.visible, first, count)
        outputs: list[Tensor] = []
        given: list[Tensor] = []
        done = 0
        while done < count:
            if self.seen >= self.decider.settled or ends[done] - done > 1:
                self.decide(ends[done] - done)
            run, calm = ends[done], self.decider.settled - self.seen
            while run < count and ends[run] - done <= calm:
                run = ends[run]
            self.whole = False
            part = slice(done, run)
            new = query[:, :, part], key[:, :, part], value[:, :, part], terms.rows(part)
            if run - done == 1 and not (weights or wants_gradient):
                store = self.require_store()
                slots, reclaimed = store.take(1)
                outputs.append(self.token(store, slots, reclaimed, *new))
                if self.lending is not None and run < count:
                    self.lending.copy_slots()
            else:
                until = [end - done for end in ends[part]]
                output, weight = self.run(*new, until, weights, first + count)
                outputs.append(output)
                given += [] if weight is None else [weight]
            done = run
        self.whole = True
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return output, torch.cat(given, dim=2) if weights else None

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        ends: list[int],
        weights: bool,
        length: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from tokens that come with no decision between them, then write them.

        Args:
            query: ``[B, G * H, T, D]``.
            key: ``[B, H, T, D]``.
            value: ``[B, H, T, Dv]``.
            terms: of these T queries.
            ends: where the block of each ends.
            weights: whether to return what each query head gave to each position.
            length: positions of those weights.
        """
        store, first, count = self.require_store(), self.seen, key.shape[2]
        tell: Tell = self.deliver
        old = store.cached()
        slots, reclaimed = store.take(count)
        if self.staging is not None:
            self.staging.keep(store, slots, reclaimed is not None, together=True)
            tell = self.staging.teller(first)
        padding = self._padding(terms, store, slots)
        if reclaimed is not None:
            tell(reclaimed, None)
        new = query, key, value, terms
        output, given = self._beside(*new, ends, old, weights, length, slots, tell)
        store.write(slots, key.detach(), value.detach(), first)
        self.seen = first + count
        if padding is not None:
            padding.empty()
        return output, given

    def _beside(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        ends: list[int],
        old: tuple[Tensor, Tensor, Tensor] | None,
        weights: bool,
        length: int,
        slots: Tensor | None = None,
        tell: Tell | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from new tokens to old ones and to each other; write nothing.

        Args:
            query: ``[B, G * H, T, D]``.
            key: ``[B, H, T, D]``.
            value: ``[B, H, T, Dv]``.
            terms: of these T queries.
            ends: where the block of each ends.
            old: keys, values and positions that there are.
            weights: whether to return what each query head gave to each position.
            length: positions of those weights.
            slots: where the tokens will be written; None where nothing is reclaimed.
            tell: who is told what attention did; the observers by default.
        """
        outputs, given, count = [], [], key.shape[2]
        tell = self.deliver if tell is None else tell
        for part in attend_beside(
            query,
            key,
            value,
            terms,
            ends,
            seen=self.seen,
            old=old,
            slots=slots,
            need_mass=self.need_mass,
            weights=weights,
        ):
            outputs.append(part.output)
            if part.weights is not None:
                given.append(by_position(part.weights, part.attended.positions, length))
            if self.lending is not None:
                self.lending.passes.append(part.attended)
            if part.mass is not None:
                mass, room = part.mass, count - part.end
                if slots is not None and old is not None:
                    store = self.require_store()
                    mass = mass_by_slot(mass, slots, old[2].shape[2], store.handed_out)
                    room += store.room
                tell(None, self.report(mass, self.seen + part.begin, room))
        return torch.cat(outputs, dim=2), torch.cat(given, dim=2) if weights else None

    # -- the first call ----------------------------------------------------------------------------

    def shape(self, key: Tensor, slots: int) -> SlotShape:
        """The shape of a store that takes such keys."""
        batch, heads = key.shape[:2]
        # Where everything is prefix no observer asks for the layout.
        layout = self.layout or TextLayout(sinks=slots)
        return SlotShape(batch, heads, slots, key.device, layout)

    def allocate(self, key: Tensor, value: Tensor) -> SlotStore:
        """Allocate the slots, for such keys and values."""
        shape = self.shape(key, self.capacity)
        store = SlotStore(shape, key, value, hides=self.plan.eager)
        store.may_be_empty |= self.plan.window is not None
        self.store = store
        return store

    def watch(self, shape: SlotShape) -> None:
        """Make the observers of a store of this shape."""
        with torch.inference_mode(False):  # their readings outlive this call; see SlotStore
            self.observers = tuple(self.plan.policy.observers(shape))
        self.need_mass = any(observer.needs is not Need.NONE for observer in self.observers)

    def _begin(self, key: Tensor, value: Tensor) -> SlotStore:
        """Allocate all that the first tokens need."""
        if self.staging is not None:
            self.staging.close()
        # Observers first: a store says that they are there.
        self.watch(self.shape(key, self.capacity))
        store = self.allocate(key, value)
        if self.staging is not None:
            self.staging.decided()
        return store

    def _compress(
        self, query: Tensor, key: Tensor, value: Tensor, terms: Terms, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over a prompt longer than the slots, then keep what the policy does not evict."""
        count = key.shape[2]
        if self.staging is not None:
            raise self.staging.no_prompt(count, self.capacity)
        prompt = SlotStore.holding(self.shape(key, count), key.detach(), value.detach())
        self.whole = False
        self.watch(prompt.shape)
        ends = block_ends(terms.visible, 0, count)
        output, given = self._beside(query, key, value, terms, ends, None, weights, count)
        dead = self._dead(terms, prompt, count)
        if dead is not None:
            prompt.positions.masked_fill_(dead.unsqueeze(1), -1)
            prompt.may_be_empty = True
        self.seen = count
        self.decider.expire(prompt, count)
        prompt.may_be_empty |= self.plan.window is not None
        view = self.view(prompt, 0)
        victims = self.decider.ask(view, count - self.capacity)
        if self.decider.recorder is not None:
            self.decider.recorder.compressed(self.plan, prompt, view, victims)
        gone = torch.zeros_like(prompt.positions, dtype=torch.bool).scatter_(2, victims, True)
        # A stable sort of the flags lists the survivors first, in the order of their positions.
        kept = gone.to(torch.int8).argsort(dim=-1, stable=True)[:, :, : self.capacity]
        store = self.allocate(key, value)
        store.fill_from(prompt, kept)
        store.start, store.may_be_empty = prompt.start, store.may_be_empty or prompt.may_be_empty
        with torch.inference_mode(False):
            for observer in self.observers:
                state = state_of(observer)
                replace_state(observer, state.gather(-1, like_state(kept, state)))
        self.whole = True
        return output, given

    def _hold_all(
        self, query: Tensor, key: Tensor, value: Tensor, terms: Terms, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend while the layout is unknown: every token is prefix, so every token is kept."""
        old = None if self.store is None else self.store.cached()
        ends, length = block_ends(terms.visible, self.seen, key.shape[2]), self.seen + key.shape[2]
        output, given = self._beside(query, key, value, terms, ends, old, weights, length)
        key, value = key.detach(), value.detach()
        if old is not None:
            key = torch.cat([old[0], key], dim=2)
            value = torch.cat([old[1], value], dim=2)
        self.whole = False
        self.store = SlotStore.holding(self.shape(key, key.shape[2]), key, value)
        self.seen = key.shape[2]
        self.whole = True
        return output, given

    # -- where tokens sit --------------------------------------------------------------------------

    def _follow(self, count: int) -> None:
        """Take the layout that is known before the next tokens, and allocate the slots for it.

        Nothing that was seen before has to be observed again: it is prefix, which no policy may
        evict.
        """
        bound = self.layout
        assert self.plan.bind is not None
        if self.staging is not None and count > 1:
            self._stays(count)
            return
        known = self.plan.bind(self.plan.layer, self.seen, count, bound, self.budget)
        if known is None or known[0] is bound:
            return
        layout, budget = known
        if bound is not None and layout.prefix != bound.prefix:
            raise LayoutError(
                f"{layout!r} can't follow {bound!r}: slots have been allocated for "
                f"{bound.prefix} pinned tokens; keep the prefix, and say what comes behind it"
            )
        if bound is None and self.seen > layout.prefix:
            raise LayoutError(
                f"{layout!r} came after {self.seen} tokens, but its prefix has {layout.prefix}: "
                f"say where tokens sit before the first token behind the prefix is cached"
            )
        if self.staging is not None:
            self.staging.close()
        self.whole = False
        self.decider.settled = 0  # what was foreseen was another layout's
        self.layout, self.budget = layout, budget
        if bound is None:
            prefix = self.store
            if prefix is not None:
                store = self.allocate(prefix.keys, prefix.values)
                slots, _ = store.take(self.seen)
                store.write(slots, prefix.keys, prefix.values, 0)
                self.watch(store.shape)
        self.whole = True
        if self.staging is not None:
            self.staging.decided()

    def _stays(self, count: int) -> None:
        """Refuse several staged tokens among which the layout changes.

        What is asked before each call must be asked before each of them, as if it came alone.
        """
        assert self.plan.bind is not None
        for position in range(self.seen, self.seen + count):
            known = self.plan.bind(self.plan.layer, position, 1, self.layout, self.budget)
            if known is not None and known[0] is not self.layout:
                raise LayoutError(
                    f"at position {position}, among {count} tokens that are staged in one call, "
                    f"{self.layout!r} goes on as {known[0]!r}; bring that token in a call of its "
                    f"own"
                )

    def _check_length(self, count: int) -> None:
        """Refuse more tokens than the layout has, or than positions can count.

        Raises:
            LayoutError: there are more.
        """
        length = None if self.layout is None else self.layout.length
        most = MOST_POSITIONS if length is None else length
        if self.seen + count > most:
            where = "what positions can count" if length is None else f"{self.layout!r}"
            raise LayoutError(
                f"position {self.seen + count - 1} is outside {where}, which has {most} tokens; "
                f"reset() the cache for a new sequence, or give the layout its real size"
            )

    def may_pad(self, terms: Terms) -> bool:
        """Whether there is padding to look for.

        There is none without a mask, and in an image, whose prompt is padded inside its pinned
        prefix, where nobody else's slots are.
        """
        text = self.layout is not None and self.layout.compresses_prompt
        return text and terms.visible is not None

    def _padding(self, terms: Terms, store: SlotStore, slots: Tensor) -> Padding | None:
        """Padding among the tokens that are about to be written into slots ``[B, H, T]``."""
        dead = self._dead(terms, store, slots.shape[2])
        return None if dead is None else Padding(dead, store, slots, self.observers)

    def _dead(self, terms: Terms, store: SlotStore, count: int) -> Tensor | None:
        """Which new tokens are padding, bool ``[B, T]``; None where there is none to look for."""
        if terms.visible is None or not self.may_pad(terms):
            return None
        dead = find_padding(terms.visible, self.seen, count, store)
        if self.decider.recorder is not None:
            self.decider.recorder.padded(self.seen, dead)
        return dead

    # -- who else asks: compiled steps, stages, tests, batches -------------------------------------

    def prepare(self, count: int) -> None:
        """Decide, if it is due, for one of ``count`` tokens that a compiled step will write.

        Raises:
            LayoutError: the layout has fewer tokens.
        """
        if self.plan.bind is not None:
            self._follow(count)
        if self.seen + count > self.decider.settled:
            self._check_length(count)
        if self.seen >= self.decider.settled:
            self.decide(1)

    def account(
        self, reclaimed: Tensor | None, mass: Tensor | None, finite: bool | None = None
    ) -> None:
        """Account for a token that a compiled step has written; see :meth:`token`."""
        store, first = self.require_store(), self.seen
        self.seen = first + 1
        if mass is None:
            self.deliver(reclaimed, None)
        else:
            mass = mass[..., : store.handed_out]
            self.deliver(reclaimed, self.report(mass, first, store.room, finite))
        self.whole = True

    def view(self, store: SlotStore, room: int) -> CacheView:
        """What the policy may read, just before the next token is written."""
        assert self.layout is not None
        return CacheView(
            store,
            self.observers,
            seen=self.seen,
            room=room,
            layer=self.plan.layer,
            num_layers=self.plan.num_layers,
            budget=self.budget,
            layout=self.layout,
            may_be_empty=store.may_be_empty,
            start=store.start,
            first_head=self.plan.first_head,
        )

    @property
    def books(self) -> LayerBooks:
        """What the layer knows now."""
        return LayerBooks(
            self.store,
            self.observers,
            self.need_mass,
            self.layout,
            self.budget,
            self.seen,
            self.reports,
            self.decider.settled,
        )

    @books.setter
    def books(self, books: LayerBooks) -> None:
        self.store, self.observers, self.need_mass = books[:3]
        self.layout, self.budget, self.seen, self.reports, self.decider.settled = books[3:]

    def require_store(self) -> SlotStore:
        """The slots.

        Raises:
            CacheStateError: no token has come yet.
        """
        if self.store is None:
            raise CacheStateError(f"layer {self.plan.layer} has not seen a token yet")
        return self.store

    def replace_policy(self, policy: EvictionPolicy) -> None:
        """Let another object decide, which stands before the policy: tests watch it so."""
        self.plan = self.decider.plan = replace(self.plan, policy=policy)

    def interrupted(self) -> CacheStateError:
        """What every call says after an exception in the middle of one."""
        return CacheStateError(
            f"layer {self.plan.layer} was interrupted by an exception while it took tokens in at "
            f"position {self.seen}, so what it holds can't be told; reset() the cache"
        )

    def select_batch(self, index: Tensor) -> None:
        """Keep the sequences ``index``."""
        if self.store is None:
            return
        if not self.whole:
            raise self.interrupted()
        self.whole = False
        index = index.to(self.store.keys.device)
        self.store.select_batch(index)
        if self.decider.recorder is not None:
            self.decider.recorder.select_batch(index)
        with torch.inference_mode(False):
            for observer in self.observers:
                replace_state(observer, state_of(observer).index_select(0, index))
        self.whole = True
        if self.staging is not None:
            self.staging.restart()
