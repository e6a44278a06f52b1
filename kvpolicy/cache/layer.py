"""LayerCache: one layer of a generation, a token's way from key and value to output and report.

The policy makes room if it must, the key and value are written into slots, the query attends over
the slots, and what it attended to is reported to the policy's observers. There is no other way in
or out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kvpolicy.cache.decider import find_start, hand_out, make_room, run_length
from kvpolicy.cache.layer_state import LayerState
from kvpolicy.cache.prefill import compress_prompt, follow, hold_all
from kvpolicy.cache.step import Step
from kvpolicy.cache.terms import Terms, by_slot
from kvpolicy.errors import CacheStateError, ParameterError
from kvpolicy.layout import UNBOUND
from kvpolicy.observers import Need
from kvpolicy.ops.cpu import native
from kvpolicy.slots import SlotStore

__all__ = ["LayerCache"]


class LayerCache(LayerState):
    """One layer of a generation: caches tokens, and attends from them."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
        """Cache T tokens and attend from them; see :meth:`PolicyCache.attend`."""
        if self.step is not None:
            return self.step.attend(query, key, value, terms)
        count = self.accepted.check(query, key, value, terms, self.store, self.seen)
        follow(self, count)
        self.check_length(count)
        find_start(self, terms, count)
        self.newest.forget()
        if self.layout is UNBOUND:
            return hold_all(self, query, key, value, terms)
        if self.seen == 0 and count > self.capacity and self.layout.compresses_prompt:
            return compress_prompt(self, query, key, value, terms)
        if self.store is None:
            self.watch(self.allocate(key, value).shape)
        if count == 1:
            make_room(self)
            return self._run(query, key, value, terms)
        outputs = []
        done = 0
        while done < count:
            run = run_length(self, count - done)
            part = slice(done, done + run)
            done += run
            rows = terms.rows(part).places(slice(0, self.seen + run))
            outputs.append(self._run(query[:, :, part], key[:, :, part], value[:, :, part], rows))
            if run == 1 and done < count:
                self.newest.copy_slots()
        return torch.cat(outputs, dim=2)

    # -- a run of tokens without a decision ----------------------------------------------------

    def _run(self, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> Tensor:
        """Write consecutive tokens and attend from them."""
        count = key.shape[2]
        before = self.require_store().handed_out
        slots, fresh = hand_out(self, count)
        finite: bool | None = None
        if count > 1:
            output, mass = self._several(query, key, value, terms, slots, before)
        elif self._one_pass(query, key, value, terms):
            output, mass, finite = self._by_kernel(query, key, value, terms, slots)
        else:
            output, mass = self._one(query, key, value, terms, slots)
        first = self.seen
        self.seen += count
        self.peak = max(self.peak, self.held())
        if fresh < count:
            reclaimed = slots if fresh == 0 else slots[:, :, fresh:]
            for observer in self.observers:
                observer.forget(reclaimed)
        self.observe(mass, first, self.room, finite)
        return output

    def _one(
        self, query: Tensor, key: Tensor, value: Tensor, terms: Terms, slots: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Write a token, then attend from it."""
        store = self.require_store()
        store.write(slots, key, value, self.seen)
        keys, values, positions = store.cached()
        return self.attend_over(
            query,
            keys,
            values,
            terms,
            self._visible(terms.visible, positions),
            None if terms.bias is None else by_slot(terms.bias, positions),
            positions,
        )

    def _one_pass(self, query: Tensor, key: Tensor, value: Tensor, terms: Terms) -> bool:
        """Whether the CPU kernel serves this token: nothing is hidden or added."""
        return (
            self.decoder is not None
            and terms.plain
            and not self.eager
            and not self.newest.wanted
            and native.serves(query, key, value)
        )

    def _by_kernel(
        self, query: Tensor, key: Tensor, value: Tensor, terms: Terms, slots: Tensor
    ) -> tuple[Tensor, Tensor | None, bool]:
        """Write a token and attend from it in one pass; also tells whether that was finite."""
        store = self.require_store()
        assert self.decoder is not None
        output, mass, finite = self.decoder(
            *(query, store.keys, store.values, store.positions, slots, key, value),
            *(self.seen, store.handed_out),
            1 / math.sqrt(query.shape[3]) if terms.scale is None else terms.scale,
            self.need is not Need.NONE,
        )
        return output, None if self.need is Need.NONE else mass, finite

    def _several(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        slots: Tensor,
        before: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from tokens, the first of which still see what the last of them replace.

        Token i reclaims its slot when its turn comes, so the queries before it still see the
        victim: attend to the slots as they were, and to the new tokens beside them.
        """
        store = self.require_store()
        count = key.shape[2]
        seen_by = self._visible_to_run(terms.visible, before, slots)
        bias = None
        if terms.bias is not None:
            old = by_slot(terms.bias, store.positions[:, :, :before])
            new = terms.bias[..., self.seen : self.seen + count]
            bias = torch.cat([old, new.expand(*old.shape[:3], count)], dim=-1)
        output, beside = self.attend_over(
            query,
            torch.cat([store.keys[:, :, :before], key], dim=2),
            torch.cat([store.values[:, :, :before], value], dim=2),
            terms,
            seen_by,
            bias,
            store.positions[:, :, :before],
        )
        store.write(slots, key, value, self.seen)
        if beside is None:
            return output, None
        mass = beside.new_zeros(*beside.shape[:3], store.handed_out)
        mass[..., :before] = beside[..., :before]
        into = slots.unsqueeze(2).expand(*beside.shape[:3], count)
        return output, mass.scatter_(3, into, beside[..., before:])

    # -- a step in three parts, the middle one compiled -------------------------------------------

    def begin_step(self, hide: Callable[[SlotStore], Tensor | None] | None = None) -> None:
        """Decide for the next token, and say where it goes (see :mod:`kvpolicy.cache.step`).

        Args:
            hide: asked once for the slots of padding, bool ``[B, 1, S]``, that are to be hidden
                from every step; None for none.

        Raises:
            CacheStateError: no token has come yet, or a step has begun and not ended.
            ParameterError: other layers attend to this layer's tokens.
        """
        if self.step is not None:
            raise CacheStateError(f"layer {self.layer}: a step has begun that has not ended")
        if self.newest.lent:
            raise ParameterError(
                f"layer {self.layer} lends its tokens to other layers, which a compiled step does "
                f"not serve; decode without compile_decode"
            )
        store = self.require_store()
        follow(self, 1)
        self.check_length(1)
        make_room(self)
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
        slots, fresh = hand_out(self, 1)
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
        self.peak = max(self.peak, self.held())
        if self.reclaims:
            for observer in self.observers:
                observer.forget(step.slots)
        mass = step.mass
        if mass is not None:
            mass = mass[..., : step.store.handed_out]
        self.observe(mass, first, self.room)

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
