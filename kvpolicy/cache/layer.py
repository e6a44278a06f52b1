"""Layer: one layer of a generation, a token's way from key and value to output and report.

What comes is checked; if room must be made, the policy decides; key and value are written into a
slot, the query attends over the slots, and what it attended to is reported to the observers. One
token goes through :meth:`Layer._token`; several go through :func:`attend_beside`, which lets each
query see what the later ones replace. There is no other way in or out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy.cache.beside import attend_beside
from kvpolicy.cache.blocks import block_ends
from kvpolicy.cache.checks import check_gradients, check_tokens
from kvpolicy.cache.decider import Decider
from kvpolicy.cache.lending import Lending, by_position
from kvpolicy.cache.plan import LayerPlan
from kvpolicy.cache.staged_run import attend_staged
from kvpolicy.cache.staging import LayerBooks, Staging
from kvpolicy.cache.terms import Terms
from kvpolicy.errors import AttentionError, CacheStateError, LayoutError
from kvpolicy.layout import TextLayout, TokenLayout
from kvpolicy.observers import AttentionObserver, AttentionReport, Need
from kvpolicy.ops.attend import write_and_attend
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotShape, SlotStore

__all__ = ["MOST_POSITIONS", "Layer"]

#: Keys, values and positions of some slots, and every observer's reading of them.
_Before = tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]
#: All but a scale.
_NO_TERMS = (None, None, None, None)
#: Positions are int32, and ranking adds as much to those that are protected.
MOST_POSITIONS = 2**30


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
        most: tokens that there can be at all.
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
        self.place(layout, budget)
        self.decider = Decider(plan)
        self.lending = Lending(plan.layer) if plan.lends else None
        self.staging: Staging | None = None
        # What the last stage had allocated, for the next one.
        self._spare: Staging | None = None
        self.reset()

    def reset(self) -> None:
        """Back to the state before the first token."""
        if self.plan.bind is not None:
            self.place(None, 0)
        self.store: SlotStore | None = None
        self.observers: Sequence[AttentionObserver] = ()
        self.need_mass = False
        self.seen = self.reports = self.decider.settled = 0
        if self.decider.recorder is not None:
            self.decider.recorder.reset()
        if self.lending is not None:
            self.lending.passes = []
        self.whole = True
        self.restage()

    def __getstate__(self) -> dict[str, Any]:
        """A copy stages nothing, and keeps nothing aside."""
        return {**vars(self), "staging": None, "_spare": None}

    @property
    def books(self) -> LayerBooks:
        """What the layer knows now."""
        return LayerBooks(
            self.store,
            self.observers,
            self.need_mass,
            self.layout,
            self.budget,
            self.most,
            self.seen,
            self.reports,
            self.decider.settled,
        )

    @books.setter
    def books(self, books: LayerBooks) -> None:
        for name, value in zip(books._fields, books, strict=True):
            setattr(self, name, value)

    @property
    def settled(self) -> int:
        """The position before which no decision is due."""
        return self.decider.settled

    @settled.setter
    def settled(self, settled: int) -> None:
        self.decider.settled = settled

    def replace_policy(self, policy: EvictionPolicy) -> None:
        """Let another object decide, which stands before the policy: tests watch it so."""
        self.plan = self.decider.plan = replace(self.plan, policy=policy)

    @property
    def capacity(self) -> int:
        """Slots of a head: pinned prefix + budget."""
        return (0 if self.layout is None else self.layout.prefix) + self.budget

    def require_store(self) -> SlotStore:
        """The slots.

        Raises:
            CacheStateError: no token has come yet.
        """
        if self.store is None:
            raise CacheStateError(f"layer {self.plan.layer} has not seen a token yet")
        return self.store

    # -- a call ------------------------------------------------------------------------------------

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, terms: Terms, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Cache T tokens and attend from them; see :meth:`PolicyCache.attend`."""
        if not self.whole:
            raise self.interrupted()
        if self._spare is not None and self._spare.opens is not None:
            return self._open_stage(self._spare, query, key, value, terms, weights)
        store = self.store
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
        staging = self.staging
        if staging is not None:
            staging.admit(count)
        if self.plan.bind is not None:
            self._follow(count)
            store = self.store
        layout = self.layout
        if self.seen + count > self.most:
            raise self._too_long(count)
        if self.lending is not None:
            self.lending.passes = []
        if layout is None:
            return self._hold_all(query, key, value, terms, weights)
        if store is None:
            if count > self.capacity and layout.compresses_prompt:
                if staging is not None:
                    raise staging.no_prompt(count, self.capacity)
                return self._compress(query, key, value, terms, weights)
            if staging is not None:
                staging.close()
            # Observers first: a store says that they are there.
            self.watch(self.shape(key, self.capacity))
            store = self.allocate(key, value)
            if staging is not None:
                staging.decided()
        padded = staging is not None and self._may_pad(terms)
        if count > 1 or weights or wants_gradient or padded:
            return self._tokens(query, key, value, terms, weights, wants_gradient)
        if self.seen >= self.decider.settled:
            self._decide(1)
        self.whole = False
        output = self._token(store, query, key, value, terms)
        self.whole = True
        return output, None

    def _token(
        self, store: SlotStore, query: Tensor, key: Tensor, value: Tensor, terms: Terms
    ) -> Tensor:
        """Write a token for which there is room, attend from it, and report."""
        first = self.seen
        slots, reclaimed = store.take(1)
        staging = self.staging
        if staging is not None:
            staging.keep(store, slots, reclaimed is not None)
        dead = None if terms.visible is None else self._dead(terms, store, 1)
        before = None if dead is None else self._peek(store, slots)
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
        report = None if mass is None else self._report(mass, first, store.room, finite)
        if staging is None:  # as deliver() has it, without a call
            if reclaimed is not None:
                for observer in self.observers:
                    observer.forget(reclaimed)
            if report is not None:
                for observer in self.observers:
                    observer.observe(report)
                self.reports += 1
        elif reclaimed is not None or report is not None:
            self._tell(reclaimed, report, first)
        if dead is not None and before is not None:
            self._bury(store, slots, dead, before)
        return output

    def _tokens(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        weights: bool,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Several tokens: runs of whole blocks with no decision within."""
        count, first, staging = key.shape[2], self.seen, self.staging
        ends = block_ends(terms.visible, first, count)
        outputs: list[Tensor] = []
        given: list[Tensor] = []
        done = 0
        while done < count:
            if self.seen >= self.decider.settled or ends[done] - done > 1:
                self._decide(ends[done] - done)
            run = ends[done]
            # Of what may be padding, observers are told at once, and then told otherwise.
            apart = staging is not None and self._may_pad(terms)
            # Staged tokens come as if alone: only those of a block are written together.
            in_turn = staging is not None and run - done == 1 and not (weights or wants_gradient)
            calm = self.decider.settled - self.seen
            while run < count and ends[run] - done <= calm:
                if staging is not None and (
                    apart or not in_turn or self.lending is not None or ends[run] - run > 1
                ):
                    break
                run = ends[run]
            self.whole = False
            part = slice(done, run)
            if staging is not None and apart:
                staging.isolate()
            new = query[:, :, part], key[:, :, part], value[:, :, part]
            if staging is not None and in_turn and run - done > 1:
                if staging.together:
                    outputs.append(
                        attend_staged(self, staging, *new, terms.rows(part), self._report)
                    )
                else:
                    outputs += self._in_turn(staging, *new, terms.rows(part))
            elif run - done == 1 and not (weights or wants_gradient):
                outputs.append(self._token(self.require_store(), *new, terms.rows(part)))
                if self.lending is not None and run < count:
                    self.lending.copy_slots()
            else:
                output, weight = self._run(
                    *new, terms.rows(part), [e - done for e in ends[part]], weights, first + count
                )
                outputs.append(output)
                given += [] if weight is None else [weight]
            if staging is not None and apart:
                staging.rejoin()
            done = run
        self.whole = True
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return output, torch.cat(given, dim=2) if weights else None

    def _in_turn(
        self, staging: Staging, query: Tensor, key: Tensor, value: Tensor, terms: Terms
    ) -> list[Tensor]:
        """Staged tokens with no decision between them, each as :meth:`_token` has it.

        All that it takes to take them back is kept aside at once.
        """
        store, first, count = self.require_store(), self.seen, key.shape[2]
        fresh, handed_out = store.fresh, store.handed_out
        slots, reclaimed = store.take(count)
        staging.keep(store, slots, reclaimed is not None)
        outputs = []
        each = zip(
            *(tensor.chunk(count, dim=2) for tensor in (query, key, value, slots)), strict=True
        )
        by_row = terms.visible is not None or terms.bias is not None
        for token, (one_query, one_key, one_value, slot) in enumerate(each):
            rows = terms.rows(slice(token, token + 1)) if by_row else terms
            output, mass, finite = write_and_attend(
                store.kernel,
                store.write,
                one_query,
                store.keys,
                store.values,
                store.positions,
                slot,
                one_key,
                one_value,
                first + token,
                handed_out + min(token + 1, fresh),
                scale=rows.scale,
                visible=rows.visible,
                bias=rows.bias,
                softcap=rows.softcap,
                sinks=rows.sinks,
                need_mass=self.need_mass,
                may_be_empty=store.may_be_empty,
            )
            self.seen += 1
            outputs.append(output)
            report = None
            if mass is not None:
                room = store.room + count - token - 1
                report = self._report(mass, first + token, room, finite)
            if token >= fresh or report is not None:
                staging.hear(first + token, slot if token >= fresh else None, report)
        return outputs

    def _run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        ends: list[int],
        weights: bool,
        length: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from tokens that come with no decision between them, then write them."""
        store, first, count = self.require_store(), self.seen, key.shape[2]
        old = store.cached()
        slots, reclaimed = store.take(count)
        if self.staging is not None:
            self.staging.keep(store, slots, reclaimed is not None, together=True)
        dead = self._dead(terms, store, count)
        before = None if dead is None else self._peek(store, slots)
        if reclaimed is not None:
            self._tell(reclaimed, None, first)
        parts = attend_beside(
            query,
            key,
            value,
            terms,
            ends,
            seen=first,
            old=old,
            slots=slots,
            need_mass=self.need_mass,
            weights=weights,
        )
        outputs, given, held = [], [], old[2].shape[2]
        for part in parts:
            outputs.append(part.output)
            if part.weights is not None:
                given.append(by_position(part.weights, part.attended.positions, length))
            if self.lending is not None:
                self.lending.passes.append(part.attended)
            if part.mass is not None:
                mass = part.mass.new_zeros(*part.mass.shape[:3], store.handed_out)
                mass[..., :held] = part.mass[..., :held]
                # What is given to victims by those who still saw them is nobody's any more.
                into = slots[..., : part.mass.shape[3] - held].unsqueeze(2)
                new = part.mass[..., held:]
                mass.scatter_(3, into.expand_as(new), new)
                if new.shape[3] < count:
                    rest = slots[..., new.shape[3] :].unsqueeze(2)
                    mass.scatter_(3, rest.expand(*new.shape[:3], -1), 0.0)
                report = self._report(mass, first + part.begin, store.room + count - part.end)
                self._tell(None, report, first)
        store.write(slots, key.detach(), value.detach(), first)
        self.seen = first + count
        if dead is not None and before is not None:
            self._bury(store, slots, dead, before)
        return torch.cat(outputs, dim=2), torch.cat(given, dim=2) if weights else None

    def _report(
        self, mass: Tensor, first: int, room: int, finite: bool | None = None
    ) -> AttentionReport:
        """Mass for the observers, after refusing NaN; ``finite`` where that is known."""
        if mass.device.type != "cpu":
            torch._assert_async(mass.sum().isfinite())
        elif not (math.isfinite(mass.sum().item()) if finite is None else finite):
            raise AttentionError(
                f"layer {self.plan.layer}: attention from position {first} is NaN; the model's "
                f"queries or keys are not finite; reset() the cache, which has lost its place"
            )
        assert self.layout is not None
        return AttentionReport(mass=mass, first=first, room=room, layout=self.layout)

    def _tell(self, reclaimed: Tensor | None, report: AttentionReport | None, first: int) -> None:
        """Tell observers of the token, or block, at position ``first``: once it is sure."""
        if self.staging is None or self.staging.apart:
            self.deliver(reclaimed, report)
        else:
            self.staging.hear(first, reclaimed, report)

    def deliver(self, reclaimed: Tensor | None, report: AttentionReport | None) -> None:
        """Tell observers which slots hold other tokens now, and what attention did."""
        if reclaimed is not None:
            for observer in self.observers:
                observer.forget(reclaimed)
        if report is not None:
            for observer in self.observers:
                observer.observe(report)
            self.reports += 1

    # -- room --------------------------------------------------------------------------------------

    def prepare(self, count: int) -> None:
        """Decide, if it is due, for one of ``count`` tokens that a compiled step will write.

        Raises:
            LayoutError: the layout has fewer tokens.
        """
        if self.plan.bind is not None:
            self._follow(count)
        if self.seen + count > self.most:
            raise self._too_long(count)
        if self.seen >= self.decider.settled:
            self._decide(1)

    def account(self, reclaimed: Tensor | None, mass: Tensor | None) -> None:
        """Account for a token that a compiled step has written; see :meth:`_token`."""
        store, first = self.require_store(), self.seen
        self.seen = first + 1
        if mass is None:
            self.deliver(reclaimed, None)
        else:
            mass = mass[..., : store.handed_out]
            self.deliver(reclaimed, self._report(mass, first, store.room))
        self.whole = True

    def _decide(self, block: int) -> None:
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

    def _dead(self, terms: Terms, store: SlotStore, count: int) -> Tensor | None:
        """New tokens of a text that the mask hides from themselves, bool ``[B, 1, T]``: padding.

        Where they come first in a sequence, ``store.start`` moves behind them: pinned sinks and
        anchors of a text are counted from its first real token, so that a sequence keeps what it
        would keep alone. None where there is no padding to look for: without a mask, and in an
        image, whose prompt is padded inside its pinned prefix, where nobody else's slots are.
        """
        if not self._may_pad(terms):
            return None
        assert terms.visible is not None
        first = self.seen
        own = terms.visible[:, 0, :, first : first + count].diagonal(dim1=1, dim2=2)
        dead = (~own).expand(store.shape.batch, count)
        if first == 0 or store.start is not None:
            leading = dead.to(torch.int32).cumprod(-1).sum(-1, dtype=torch.int32)
            if store.start is not None:
                leading = torch.where(store.start == first, store.start + leading, store.start)
            store.start = leading
        if self.decider.recorder is not None:
            self.decider.recorder.padded(first, dead)
        return dead.unsqueeze(1)

    def _may_pad(self, terms: Terms) -> bool:
        """Whether there is padding to look for; see :meth:`_dead`."""
        text = self.layout is not None and self.layout.compresses_prompt
        return text and terms.visible is not None

    def _peek(self, store: SlotStore, slots: Tensor) -> _Before:
        """What slots hold, and what is known of it."""
        return store.peek(slots), [observer.mass.gather(2, slots) for observer in self.observers]

    def _bury(self, store: SlotStore, slots: Tensor, dead: Tensor, before: _Before) -> None:
        """Undo what padding has done: it holds no slot that a live token could have."""
        held, readings = before
        store.put_back(slots, held, dead)
        for observer, reading in zip(self.observers, readings, strict=True):
            now = observer.mass.gather(2, slots)
            observer.mass.scatter_(2, slots, torch.where(dead, reading, now))

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

    def _compress(
        self, query: Tensor, key: Tensor, value: Tensor, terms: Terms, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over a prompt longer than the slots, then keep what the policy does not evict."""
        count = key.shape[2]
        prompt = SlotStore.holding(self.shape(key, count), key.detach(), value.detach())
        self.whole = False
        self.watch(prompt.shape)
        output, given = self._attend_all(query, key, value, terms, None, weights)
        dead = self._dead(terms, prompt, count)
        if dead is not None:
            prompt.positions.masked_fill_(dead, -1)
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
                observer.mass = observer.mass.gather(2, kept)
        self.whole = True
        return output, given

    def _hold_all(
        self, query: Tensor, key: Tensor, value: Tensor, terms: Terms, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend while the layout is unknown: every token is prefix, so every token is kept."""
        old = None if self.store is None else self.store.cached()
        output, given = self._attend_all(query, key, value, terms, old, weights)
        key, value = key.detach(), value.detach()
        if old is not None:
            key = torch.cat([old[0], key], dim=2)
            value = torch.cat([old[1], value], dim=2)
        self.whole = False
        self.store = SlotStore.holding(self.shape(key, key.shape[2]), key, value)
        self.seen = key.shape[2]
        self.whole = True
        return output, given

    def _attend_all(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        old: tuple[Tensor, Tensor, Tensor] | None,
        weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from new tokens to all there are; nothing is reclaimed, nothing written."""
        first, count = self.seen, key.shape[2]
        ends = block_ends(terms.visible, first, count)
        outputs, given = [], []
        for part in attend_beside(
            query,
            key,
            value,
            terms,
            ends,
            seen=first,
            old=old,
            slots=None,
            need_mass=self.need_mass,
            weights=weights,
        ):
            outputs.append(part.output)
            if part.weights is not None:
                given.append(by_position(part.weights, part.attended.positions, first + count))
            if self.lending is not None:
                self.lending.passes.append(part.attended)
            if part.mass is not None:
                self.deliver(None, self._report(part.mass, first + part.begin, count - part.end))
        return torch.cat(outputs, dim=2), torch.cat(given, dim=2) if weights else None

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
        known = self.plan.bind(self.plan.layer, self.seen, count, bound)
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
        self.place(layout, budget if bound is None else self.budget)
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
            known = self.plan.bind(self.plan.layer, position, 1, self.layout)
            if known is not None and known[0] is not self.layout:
                raise LayoutError(
                    f"at position {position}, among {count} tokens that are staged in one call, "
                    f"{self.layout!r} goes on as {known[0]!r}; bring that token in a call of its "
                    f"own"
                )

    # -- staging -----------------------------------------------------------------------------------

    def stage(self, lookahead: int, sure: int, together: bool) -> None:
        """Keep what tokens from position ``sure`` on overwrite, of up to ``lookahead`` at once."""
        if self._spare is None:
            self._spare = Staging(self)
        self._spare.lookahead, self._spare.together = lookahead, together
        if self.seen < sure:
            self._spare.opens = sure
        else:
            self._spare.begin()
            self.staging = self._spare

    def _open_stage(
        self,
        staging: Staging,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Take tokens before the first that is staged, and those behind it."""
        opens = staging.opens
        assert opens is not None
        check_tokens(query, key, value)
        terms.check(key, query.shape[1], self.seen)
        count = key.shape[2]
        sure = min(opens - self.seen, count)
        length, end = self.seen + count, self.seen + sure
        visible = terms.visible
        if visible is not None and bool(visible[:, :, :sure, end:].any()):
            raise CacheStateError(
                f"tokens before position {opens} are not staged, but the mask lets them see tokens "
                f"that are; stage all of them, or bring them apart"
            )
        staging.opens = None
        try:
            output, given = self.attend(
                query[:, :, :sure],
                key[:, :, :sure],
                value[:, :, :sure],
                terms.rows(slice(0, sure)).columns(end),
                weights,
            )
        except BaseException:
            staging.opens = opens
            raise
        if end < opens:
            staging.opens = opens
            return output, given
        staging.begin()
        self.staging = staging
        if sure == count:
            return output, given
        passes = [] if self.lending is None else [each.copied() for each in self.lending.passes]
        rest, more = self.attend(
            query[:, :, sure:],
            key[:, :, sure:],
            value[:, :, sure:],
            terms.rows(slice(sure, count)),
            weights,
        )
        if self.lending is not None:
            self.lending.passes = passes + self.lending.passes
        output = torch.cat([output, rest], dim=2)
        if given is None or more is None:
            return output, None
        wider = torch.nn.functional.pad(given, (0, length - end))
        return output, torch.cat([wider, more], dim=2)

    def unstage(self) -> None:
        """Forget what is staged, also where it was interrupted, and take tokens for sure again."""
        if self._spare is not None:
            self._spare.opens = None
        try:
            self.commit(0)
        finally:
            self.staging = None

    def restage(self) -> None:
        """Inside of a stage, all that the layer holds now is sure."""
        if self.staging is not None:
            self.staging.begin()

    @property
    def staged(self) -> int:
        """Tokens that the layer has seen and that are not sure."""
        return 0 if self.staging is None else self.staging.staged

    def check_commit(self, count: int) -> None:
        """Refuse to keep a part of a block; see :meth:`Staging.check`."""
        if self.staging is not None:
            self.staging.check(count)

    def commit(self, count: int) -> None:
        """Keep the first ``count`` staged tokens, of which a layer that is left out has none."""
        if self.staging is not None:
            self.staging.commit(min(count, self.staging.staged))

    @property
    def staging_bytes(self) -> int:
        """Bytes that stages have allocated, and reports that wait in one."""
        return 0 if self._spare is None else self._spare.nbytes

    # -- what is refused, and batches --------------------------------------------------------------

    def place(self, layout: TokenLayout | None, budget: int) -> None:
        """Say where tokens sit, and how many of them may be held."""
        self.layout, self.budget = layout, budget
        length = None if layout is None else layout.length
        self.most = MOST_POSITIONS if length is None else length

    def _too_long(self, count: int) -> LayoutError:
        """More tokens than the layout has, or than positions can count."""
        where = "what positions can count" if self.most == MOST_POSITIONS else f"{self.layout!r}"
        return LayoutError(
            f"position {self.seen + count - 1} is outside {where}, which has {self.most} tokens; "
            f"reset() the cache for a new sequence, or give the layout its real size"
        )

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
                observer.mass = observer.mass.index_select(0, index)
        self.whole = True
        self.restage()
