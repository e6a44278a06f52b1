"""Policies and stores broken on purpose: the named invariant's check catches every one.

A mutant that survives is a hole in the suite, and fails the test.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from pydantic import Field
from support import invariants_page

import kvpolicy
import kvpolicy.cache.beside
import kvpolicy.cache.cache
import kvpolicy.cache.layer
import kvpolicy.cache.lending
import kvpolicy.cache.readings
from kvpolicy import (
    CumulativeMass,
    FadingMass,
    LineMass,
    Need,
    OrderedLayout,
    RollingMass,
    SlotStore,
)
from kvpolicy.cache.aside import Aside
from kvpolicy.cache.layer import Layer
from kvpolicy.cache.lending import Pass
from kvpolicy.cache.staging import Staging
from kvpolicy.parts import moving_mass
from kvpolicy.policies import (
    H2O,
    RKV,
    SSD,
    Full,
    KNorm,
    Linear,
    Linear2D,
    Near,
    Pyramid,
    Random,
    StreamingLLM,
    linear2d,
    near,
    rkv,
    ssd,
)
from kvpolicy.policy import probe
from kvpolicy.testing import INVARIANTS, PolicyCheckError, check_policy, find_violation

SMALL_LINEAR = {"anchors": 3, "recent_lines": 1}
SMALL_RKV = {"window": 2, "interval": 3, "kernel": 3}
SMALL_SSD = {"window": 3}
MUTANTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], kvpolicy.EvictionPolicy]]] = {}


def caught_by(invariant: str):
    """Register a mutant: called with a monkeypatch, it gives the policy to check."""

    def add(mutant):
        MUTANTS[mutant.__name__] = (invariant, mutant)
        return mutant

    return add


# -- 0: the contract of a decision -----------------------------------------------------------------


@caught_by("decision")
def names_a_slot_twice(patch):
    class Twice(H2O):
        def victims(self, view, count):
            slots = super().victims(view, count)
            slots[..., -1] = slots[..., 0]
            return slots

        def headroom(self, view):
            return 2 if view.room == 0 else 1

        def min_budget(self, layout):
            return 4

    return Twice()


@caught_by("runs")
def names_positions_instead_of_slots(patch):
    """As many slots as there are: a kernel that believed it would write beside its memory."""

    class Positions(StreamingLLM):
        def victims(self, view, count):
            return view.positions.gather(-1, super().victims(view, count)).long()

    return Positions(sinks=1)


@caught_by("decision")
def names_a_slot_that_was_never_handed_out(patch):
    """What happens when untouched slots are shown to a policy: they look empty, and rank lowest."""
    patch.setattr(kvpolicy.CacheView, "handed_out", property(lambda self: self._store.shape.slots))
    return Linear(**SMALL_LINEAR)


@caught_by("runs")
def scores_with_nan(patch):
    class Shares(H2O):
        def score(self, view):
            mass = super().score(view)
            return mass / mass.round().clamp(min=0)  # 0 / 0 where the mass is nothing

    return Shares()


@caught_by("pins")
def protects_a_token_too_few_for_a_decision_of_many(patch):
    """A composition that asks for less than it protects and makes room for."""
    patch.setattr(probe, "_count", lambda mask: 0)
    return kvpolicy.compose("streaming_llm", protect="window:3", decide="every:2")


@caught_by("runs")
def understates_its_min_budget(patch):
    class Modest(Linear):
        def min_budget(self, layout):
            return 1

    return Modest(**SMALL_LINEAR)


# -- 1: budget -------------------------------------------------------------------------------------


class _OneMore(SlotStore):
    """A store with a slot more than it says."""

    def __init__(self, shape, key, value, **named):
        super().__init__(shape, key, value, **named)
        self.add()

    def add(self):
        self.keys, self.values = (
            torch.nn.functional.pad(tensor, (0, 0, 0, 1)) for tensor in (self.keys, self.values)
        )
        self.positions = torch.nn.functional.pad(self.positions, (0, 1), value=-1)

    def fill_from(self, other, kept):
        self.keys, self.values = self.keys[:, :, :-1], self.values[:, :, :-1]
        self.positions = self.positions[:, :, :-1]
        super().fill_from(other, kept)
        self.add()


@caught_by("budget")
def holds_more_in_mid_line_only(patch):
    class MidLine(_OneMore):
        """Parks the second victim of a line in a slot of its own until the line is over."""

        def write(self, slots, key, value, first):
            layout = self.shape.layout
            if first >= layout.prefix and layout.column(first) == 1 and slots.shape[-1] == 1:
                into = slots.unsqueeze(-1).expand_as(key)
                self.keys[:, :, -1:] = self.keys.gather(2, into)
                self.values[:, :, -1:] = self.values.gather(2, into)
                self.positions[:, :, -1:] = self.positions.gather(2, slots)
            elif layout.is_line_start(first):
                self.positions[:, :, -1] = -1
            super().write(slots, key, value, first)

    patch.setattr(kvpolicy.cache.layer, "SlotStore", MidLine)
    return Random()


@caught_by("budget")
def holds_more_in_mid_step_only(patch):
    class MidStep(_OneMore):
        """Holds the victim beside the new token until the step is over."""

        def write(self, slots, key, value, first):
            self.positions[:, :, -1:] = self.positions.gather(2, slots[..., :1])
            super().write(slots, key, value, first)

    def attend(self, *args, **named):
        output = whole(self, *args, **named)
        self.store.positions[:, :, -1] = -1
        return output

    whole = Layer.attend
    patch.setattr(kvpolicy.cache.layer, "SlotStore", MidStep)
    patch.setattr(Layer, "attend", attend)
    return Random()


@caught_by("budget")
def has_one_slot_too_many(patch):
    patch.setattr(Layer, "capacity", property(lambda self: self.layout.prefix + self.budget + 1))
    return Random()


# -- 2: pins ---------------------------------------------------------------------------------------


@caught_by("pins")
def evicts_the_prefix(patch):
    class Unpinned(Random):
        def victims(self, view, count):
            return self.score(view)[..., : view.handed_out].topk(count, largest=False).indices

    return Unpinned()


@caught_by("pins")
def evicts_the_last_anchor(patch):
    class OneAnchorLess(Linear):
        def protect(self, view):
            return (view.index < self.anchors - 1) | (view.lines >= view.line - self.recent_lines)

    return OneAnchorLess(**SMALL_LINEAR)


@caught_by("pins")
def evicts_a_sink(patch):
    class OneSinkLess(StreamingLLM):
        def protect(self, view):
            return view.index < self.sinks - 1

    return OneSinkLess(sinks=2)


@caught_by("pins")
def evicts_what_it_protects(patch):
    class Forgetful(H2O):
        def victims(self, view, count):
            score = self.score(view).masked_fill(view.pinned, torch.inf)
            return score[..., : view.handed_out].topk(count, largest=False).indices

    return Forgetful()


# -- 3: line locality ------------------------------------------------------------------------------


@caught_by("line locality")
def keeps_one_line_less(patch):
    class OffByOneLine(Linear):
        def protect(self, view):
            return (view.index < self.anchors) | (view.lines > view.line - self.recent_lines)

    return OffByOneLine(**SMALL_LINEAR)


@caught_by("line locality")
def loses_the_first_token_of_the_last_line(patch):
    class OffByOneToken(Linear):
        def protect(self, view):
            edge = (view.lines == view.line - self.recent_lines) & (
                view.layout.column(view.positions) == 0
            )
            return super().protect(view) & ~(edge & (view.index >= self.anchors))

    return OffByOneToken(**SMALL_LINEAR)


# -- 4: once gone, gone ----------------------------------------------------------------------------


@caught_by("once gone, gone")
def resurrects(patch):
    class Undead(SlotStore):
        """Every fifth token, the victim of the token before takes the place of another."""

        def __init__(self, shape, key, value, **named):
            super().__init__(shape, key, value, **named)
            self.grave = None

        def write(self, slots, key, value, first):
            at = slots[..., :1]
            into = at.unsqueeze(-1).expand(*key.shape[:2], 1, key.shape[-1])
            buried = (self.keys.gather(2, into), self.values.gather(2, into))
            where = self.positions.gather(2, at)
            super().write(slots, key, value, first)
            if self.grave is not None and first % 5 == 0:
                self.keys[:, :, :1], self.values[:, :, :1] = self.grave[:2]
                self.positions[:, :, :1] = self.grave[2]
            if (where >= 0).all():
                self.grave = (*buried, where)

    patch.setattr(kvpolicy.cache.layer, "SlotStore", Undead)
    return Random()


@caught_by("once gone, gone")
def holds_a_position_twice(patch):
    class Double(SlotStore):
        def write(self, slots, key, value, first):
            super().write(slots, key, value, first)
            if first == self.shape.slots:
                other = (slots[..., :1] + 1) % self.shape.slots
                super().write(other, key[:, :, :1], value[:, :, :1], first)

    patch.setattr(kvpolicy.cache.layer, "SlotStore", Double)
    return Random()


# -- 5: truth --------------------------------------------------------------------------------------


@caught_by("truth")
def writes_the_key_of_another_token(patch):
    class Shifted(SlotStore):
        def write(self, slots, key, value, first):
            super().write(slots, key.roll(1, 2), value, first)

    patch.setattr(kvpolicy.cache.layer, "SlotStore", Shifted)
    return H2O()


@caught_by("truth")
def writes_the_value_of_the_neighbour_in_the_batch(patch):
    class Crossed(SlotStore):
        def write(self, slots, key, value, first):
            super().write(slots, key, value.roll(1, 0), first)

    patch.setattr(kvpolicy.cache.layer, "SlotStore", Crossed)
    return H2O()


@caught_by("truth")
def keeps_the_victims_value(patch):
    class Stale(SlotStore):
        def write(self, slots, key, value, first):
            old = self.values.clone()
            super().write(slots, key, value, first)
            if self.fresh == 0:
                self.values = old

    patch.setattr(kvpolicy.cache.layer, "SlotStore", Stale)
    return StreamingLLM(sinks=1)


@caught_by("truth")
def stores_in_half_precision(patch):
    class Rounded(SlotStore):
        def write(self, slots, key, value, first):
            super().write(slots, key.bfloat16().to(key.dtype), value, first)

    patch.setattr(kvpolicy.cache.layer, "SlotStore", Rounded)
    return Random()


@caught_by("truth")
def moves_tensors_itself(patch):
    class Meddler(H2O):
        def victims(self, view, count):
            view.keys.neg_()
            return super().victims(view, count)

    return Meddler()


@caught_by("truth")
def forgets_to_forget(patch):
    class Remembers(CumulativeMass):
        def forget(self, slots):
            """The new token inherits what the victim had."""

    class Heir(H2O):
        def observers(self, shape):
            return (Remembers(shape),)

    return Heir()


@caught_by("truth")
def compresses_a_prompt_out_of_order(patch):
    whole = SlotStore.fill_from

    def fill_from(self, other, kept):
        whole(self, other, kept)
        self.positions.copy_(self.positions.flip(-1))

    patch.setattr(SlotStore, "fill_from", fill_from)
    return H2O()


# -- 6: lossless when it fits ----------------------------------------------------------------------


@caught_by("lossless")
def has_one_slot_too_few(patch):
    patch.setattr(
        Layer,
        "capacity",
        property(lambda self: self.layout.prefix + max(self.budget - 1, 1)),
    )
    return StreamingLLM(sinks=0)


def _change_queries(patch, change):
    """Of one token, and of several."""
    one, several = kvpolicy.cache.layer.write_and_attend, kvpolicy.cache.lending.attend

    def write_and_attend(kernel, write, query, *args, **named):
        return one(kernel, write, change(query), *args, **named)

    def attend(query, *args, **named):
        return several(change(query), *args, **named)

    patch.setattr(kvpolicy.cache.layer, "write_and_attend", write_and_attend)
    patch.setattr(kvpolicy.cache.lending, "attend", attend)


@caught_by("lossless")
def attends_with_another_scale(patch):
    _change_queries(patch, lambda query: query * 0.9)
    return Full()


@caught_by("lossless")
def mixes_up_query_groups(patch):
    _change_queries(patch, lambda query: query.flip(1))
    return Full()


# -- 7: independence -------------------------------------------------------------------------------


@caught_by("independence")
def peeks_at_the_neighbour_in_the_batch(patch):
    class Peeks(H2O):
        def score(self, view):
            return super().score(view).mean(0, keepdim=True).expand_as(view.positions)

    return Peeks()


@caught_by("independence")
def treats_the_first_sample_otherwise(patch):
    class Favours(H2O):
        def score(self, view):
            score = super().score(view).clone()
            score[1:] *= -1
            return score

    return Favours()


@caught_by("independence")
def mixes_heads_without_saying_so(patch):
    class Mixes(H2O):
        def score(self, view):
            return super().score(view).mean(1, keepdim=True).expand_as(view.positions)

    return Mixes()


@caught_by("independence")
def copies_the_layer_below(patch):
    class Copies(H2O):
        below: ClassVar[dict] = {}

        def victims(self, view, count):
            key = (view.seen, count, view.positions.shape)
            own = super().victims(view, count)
            if view.layer == 0:
                self.below[key] = own
            return self.below.get(key, own)

    return Copies()


@caught_by("independence")
def tells_heads_apart_by_what_all_do(patch):
    whole = ssd.local_heads
    patch.setattr(ssd, "local_heads", lambda *given: whole(*given).all(1, keepdim=True))
    return SSD(**SMALL_SSD)


@caught_by("independence")
def compares_keys_across_heads(patch):
    whole = rkv.resemblance
    patch.setattr(rkv, "resemblance", lambda *given: whole(*given).mean(1, keepdim=True))
    return RKV(**SMALL_RKV)


@caught_by("independence")
def looks_up_in_another_head(patch):
    """Mass that has moved down from the head beside it."""
    whole = linear2d.moved_mass
    patch.setattr(linear2d, "moved_mass", lambda view, lines: whole(view, lines).roll(1, 1))
    return Linear2D(anchors=3)


# -- 8: determinism --------------------------------------------------------------------------------


@caught_by("determinism")
def breaks_ties_by_chance(patch):
    class Chance(H2O):
        def score(self, view):
            return super().score(view) + 1e-6 * torch.rand(view.positions.shape)

    return Chance()


@caught_by("determinism")
def counts_its_decisions(patch):
    class Counts(StreamingLLM):
        made: ClassVar = itertools.count()

        def score(self, view):
            return view.age if next(self.made) % 7 == 0 else -view.age

    return Counts(sinks=1)


# -- 9: inter-line only ----------------------------------------------------------------------------


@caught_by("inter-line only")
def moves_down_what_all_lines_gave(patch):
    class AllLines(Linear):
        def observers(self, shape):
            return (CumulativeMass(shape),)

        def score(self, view):
            return moving_mass(view)

    return AllLines(**SMALL_LINEAR)


@caught_by("inter-line only")
def never_starts_from_zero(patch):
    class AllLines(LineMass):
        def observe(self, report):
            self._add(report.mass)

    class Older(Linear):
        def observers(self, shape):
            return (AllLines(shape),)

    return Older(**SMALL_LINEAR)


@caught_by("inter-line only")
def fades_older_lines_instead_of_dropping_them(patch):
    class Fading(LineMass):
        def observe(self, report):
            if report.layout.is_line_start(report.first):
                self.mass *= 0.2
            self._add(report.mass)

    class Fades(Linear):
        def observers(self, shape):
            return (Fading(shape),)

    return Fades(**SMALL_LINEAR)


@caught_by("inter-line only")
def decides_within_the_line(patch):
    class Hasty(Linear):
        def headroom(self, view):
            return 1

    return Hasty(**SMALL_LINEAR)


# -- 10: full use ----------------------------------------------------------------------------------


@caught_by("full use")
def hides_victims_at_once(patch):
    whole = SlotStore.name_victims

    def name_victims(self, victims):
        whole(self, victims)
        self.clear(victims)

    patch.setattr(SlotStore, "name_victims", name_victims)
    return Linear(**SMALL_LINEAR)


@caught_by("full use")
def leaves_a_slot_empty(patch):
    class Wasteful(SlotStore):
        def write(self, slots, key, value, first):
            super().write(slots, key, value, first)
            if self.fresh == 0:
                self.clear((slots[..., :1] + 1) % self.shape.slots)

    patch.setattr(kvpolicy.cache.layer, "SlotStore", Wasteful)
    return Random()


# -- beyond the ten --------------------------------------------------------------------------------


@caught_by("chunks")
def looks_for_line_starts_at_the_start_of_a_report_only(patch):
    class Careless(LineMass):
        def observe(self, report):
            if report.layout.is_line_start(report.first):
                self.mass.zero_()
            self._add(report.mass)

    class Reports(Linear):
        def observers(self, shape):
            return (Careless(shape),)

    return Reports(**SMALL_LINEAR)


@caught_by("chunks")
def rolls_on_at_the_start_of_a_report_only(patch):
    class Careless(RollingMass):
        def observe(self, report):
            if report.layout.is_line_start(report.first):
                self.of_lines[:, :, 1] = self.of_lines[:, :, 0]
                self.of_lines[:, :, 0] = 0.0
            self._add(report.mass)

    class Reports(Linear2D):
        def observers(self, shape):
            return (Careless(shape),)

    return Reports(anchors=3)


@caught_by("truth")
def forgets_in_the_current_line_only(patch):
    class Hoards(RollingMass):
        def forget(self, slots):
            self.of_lines[:, :, 0].scatter_(2, slots, 0.0)

    class Remembers(Linear2D):
        def observers(self, shape):
            return (Hoards(shape),)

    return Remembers(anchors=3)


@caught_by("chunks")
def counts_reports_instead_of_queries(patch):
    class PerReport(CumulativeMass):
        needs: ClassVar[Need] = Need.MASS

        def observe(self, report):
            self._add(report.mass.mean(2, keepdim=True))

    class Mean(H2O):
        def observers(self, shape):
            return (PerReport(shape),)

    return Mean()


@caught_by("chunks")
def lets_a_chunk_see_its_own_future(patch):
    whole = Pass.attend

    def attend(self, *args, **named):
        allowed = self.visible.clone()
        allowed[..., -self.queries :] = True
        return whole(self._replace(visible=allowed), *args, **named)

    patch.setattr(Pass, "attend", attend)
    return Pyramid(window=2, interval=3, kernel=3)


@caught_by("chunks")
def lets_mass_fade_by_reports_instead_of_queries(patch):
    class PerReport(FadingMass):
        def observe(self, report):
            self.mass *= self.keep
            self._add(report.mass)

    class Hasty(H2O):
        def observers(self, shape):
            return (PerReport(shape, 3.0),)

    return Hasty()


@caught_by("reset")
def keeps_its_observers_when_reset(patch):
    whole = Layer.watch

    def watch(self, shape):
        kept = getattr(self, "kept", None)
        whole(self, shape)
        if kept is not None:
            for observer, old in zip(self.observers, kept, strict=False):
                if old.mass.shape == observer.mass.shape:
                    observer.mass = old.mass
        self.kept = self.observers

    patch.setattr(Layer, "watch", watch)
    return H2O()


@caught_by("reorder")
def leaves_observers_behind_when_a_batch_is_reordered(patch):
    def select_batch(self, index):
        self.store.select_batch(index)

    patch.setattr(Layer, "select_batch", select_batch)
    return H2O()


@caught_by("reorder")
def forgets_its_queue_when_a_batch_is_reordered(patch):
    whole = SlotStore.select_batch

    def select_batch(self, index):
        victims = self.victims
        whole(self, index)
        self.victims = victims

    patch.setattr(SlotStore, "select_batch", select_batch)
    return Linear(**SMALL_LINEAR)


@caught_by("stats")
def understates_its_peak(patch):
    half = property(lambda self: self.shape.slots // 2, lambda self, peak: None)
    patch.setattr(SlotStore, "peak", half, raising=False)
    return Random()


@caught_by("stats")
def spends_more_than_the_budget_on_some_layers(patch):
    class Greedy(kvpolicy.Uniform):
        def layers(self, budget, num_layers, *, floor=0, ceiling=None):
            whole = super().layers(budget, num_layers, floor=floor, ceiling=ceiling)
            return (*whole[:-1], whole[-1] + 1)

    class Spends(Random):
        def schedule(self):
            return Greedy()

    return Spends()


@caught_by("round trip")
def loses_a_parameter_in_json(patch):
    class Secretive(Random):
        salt: int = Field(0, exclude=True)

    return Secretive(salt=3)


# -- copies, interruptions, masks ------------------------------------------------------------------


@caught_by("copies")
def loads_a_cache_without_what_was_observed(patch):
    whole = kvpolicy.cache.cache.load_layer

    def load_layer(layer, state):
        whole(layer, state)
        for observer in layer.observers:
            observer.mass.zero_()

    patch.setattr(kvpolicy.cache.cache, "load_layer", load_layer)
    return H2O()


@caught_by("copies")
def shares_its_slots_with_a_copy(patch):
    patch.setattr(SlotStore, "__deepcopy__", lambda self, memo: self, raising=False)
    return StreamingLLM(sinks=1)


@caught_by("copies")
def saves_victims_that_were_reclaimed_already(patch):
    whole = kvpolicy.cache.cache.save_layer

    def save_layer(layer):
        state = whole(layer)
        if state["store"] is not None:
            state["store"]["reclaimed"] = 0
        return state

    patch.setattr(kvpolicy.cache.cache, "save_layer", save_layer)
    return Linear(**SMALL_LINEAR)


@caught_by("interruption")
def goes_on_after_whatever_happened(patch):
    patch.setattr(Layer, "whole", property(lambda self: True, lambda self, whole: None), False)
    return Linear(**SMALL_LINEAR)


@caught_by("interruption")
def says_once_that_it_can_not_go_on(patch):
    whole = Layer.interrupted

    def interrupted(self):
        self.whole = True
        return whole(self)

    patch.setattr(Layer, "interrupted", interrupted)
    return H2O()


@caught_by("interruption")
def counts_a_token_before_it_is_written(patch):
    """A layer that believes to be whole in the middle of a token."""
    whole = SlotStore.take

    def take(self, count):
        taken = whole(self, count)
        self.layer.whole = True
        return taken

    allocate = Layer.allocate

    def allocated(self, key, value):
        store = allocate(self, key, value)
        store.layer = self
        return store

    patch.setattr(SlotStore, "take", take)
    patch.setattr(Layer, "allocate", allocated)
    return StreamingLLM(sinks=1)


@caught_by("masks")
def puts_a_causal_triangle_over_the_mask(patch):
    whole = Pass.attend

    def attend(self, *args, **named):
        new = min(self.queries, self.visible.shape[3])
        allowed = self.visible.clone()
        allowed[..., -new:] &= torch.ones(self.queries, new, dtype=torch.bool).tril()
        return whole(self._replace(visible=allowed), *args, **named)

    patch.setattr(Pass, "attend", attend)
    return Full()


@caught_by("masks")
def shows_old_tokens_that_the_mask_hides(patch):
    patch.setattr(
        kvpolicy.cache.beside,
        "by_slot",
        lambda term, positions: torch.ones(
            *positions.shape[:2], term.shape[2], positions.shape[2], dtype=torch.bool
        ),
    )
    return Full()


# -- orders: nearest stays -------------------------------------------------------------------------


@caught_by("nearest stays")
def takes_arrival_for_the_place_on_the_grid(patch):
    nearness = near._nearness
    patch.setattr(
        near,
        "_nearness",
        lambda layout, *rest: nearness(getattr(layout, "grid", layout), *rest),
    )
    return Near(anchors=0)


@caught_by("nearest stays")
def takes_the_place_for_the_arrival(patch):
    """The order read backwards: where a token comes, not what comes."""
    nearness = near._nearness

    class Backwards(OrderedLayout):
        def place(self, position):
            return super().arrival(position)

    def backwards(layout, *rest):
        if isinstance(layout, OrderedLayout):
            layout = Backwards(grid=layout.grid, order=layout.order, groups=layout.groups)
        return nearness(layout, *rest)

    patch.setattr(near, "_nearness", backwards)
    return Near(anchors=0)


@caught_by("nearest stays")
def keeps_the_farthest(patch):
    nearness = near._nearness
    patch.setattr(near, "_nearness", lambda *given: -nearness(*given))
    return Near(anchors=0)


@caught_by("nearest stays")
def looks_one_token_ahead_whatever_the_horizon(patch):
    nearness = near._nearness
    patch.setattr(near, "_nearness", lambda layout, seen, _: nearness(layout, seen, 1))
    return Near(anchors=0)


# -- staging ---------------------------------------------------------------------------------------


def _restores(patch, change):
    """Stores whose books come back changed."""
    books = SlotStore.books

    def restore(self, given):
        books.fset(self, given._replace(**change(self, given)))

    patch.setattr(SlotStore, "books", property(books.fget, restore))


def _restores_books(patch, change):
    """Layers whose books come back changed."""
    books = Layer.books

    def restore(self, given):
        books.fset(self, given._replace(**change(self)))

    patch.setattr(Layer, "books", property(books.fget, restore))


@caught_by("rollback")
def leaves_a_reading_as_rejected_tokens_made_it(patch):
    patch.setattr(kvpolicy.cache.readings, "give_back", lambda observers, readings: None)
    return H2O()


@caught_by("rollback")
def gives_back_readings_but_not_what_observers_count(patch):
    def give_back(observers, readings):
        for observer, reading in zip(observers, readings, strict=True):
            observer.mass.copy_(reading["mass"])

    patch.setattr(kvpolicy.cache.readings, "give_back", give_back)
    return KNorm()


@caught_by("rollback")
def lets_a_random_stream_run_on(patch):
    class Rolls(CumulativeMass):
        def __init__(self, shape):
            super().__init__(shape)
            self.dice = random.Random(0)

        def observe(self, report):
            super().observe(report)
            self.mass *= self.dice.random()

    class Dice(H2O):
        def observers(self, shape):
            return (Rolls(shape),)

    copied = kvpolicy.cache.readings.copied
    patch.setattr(
        kvpolicy.cache.readings,
        "copied",
        lambda value, into: value if isinstance(value, random.Random) else copied(value, into),
    )
    return Dice()


@caught_by("rollback")
def tells_observers_of_rejected_tokens(patch):
    whole = Staging._deliver
    patch.setattr(Staging, "_deliver", lambda self, count: whole(self, self.kept))
    return Linear(**SMALL_LINEAR)


@caught_by("rollback")
def hands_out_a_victim_less_after_a_rollback(patch):
    _restores(patch, lambda store, books: {"reclaimed": books.reclaimed + 1})
    return Linear(**SMALL_LINEAR)


@caught_by("rollback")
def hands_out_a_victim_twice_after_a_rollback(patch):
    _restores(patch, lambda store, books: {"reclaimed": 0})
    return Linear(**SMALL_LINEAR)


@caught_by("rollback")
def remembers_a_peak_of_rejected_tokens(patch):
    _restores(patch, lambda store, books: {"peak": store.peak})
    return StreamingLLM(sinks=1)


@caught_by("rollback")
def believes_a_decision_that_was_taken_back(patch):
    """The next decision is foreseen where a rejected token's decision put it."""
    _restores_books(patch, lambda layer: {"settled": layer.decider.settled})
    return Linear(**SMALL_LINEAR)


@caught_by("rollback")
def keeps_a_decision_of_the_first_rejected_token(patch):
    whole = Staging._open
    patch.setattr(Staging, "_open", lambda self, decided: whole(self, decided=False))
    return Linear(**SMALL_LINEAR)


@caught_by("rollback")
def counts_the_reports_of_rejected_tokens(patch):
    _restores_books(patch, lambda layer: {"reports": layer.reports})
    return H2O()


@caught_by("rollback")
def leaves_the_position_of_a_rejected_token(patch):
    whole = Aside.put_back

    def put_back(self, store, begin, end, kept):
        stays = store.positions.clone()
        whole(self, store, begin, end, kept)
        store.positions.copy_(stays)

    patch.setattr(Aside, "put_back", put_back)
    return Linear(**SMALL_LINEAR)


@caught_by("rollback")
def leaves_the_key_of_a_rejected_token(patch):
    whole = Aside.put_back

    def put_back(self, store, begin, end, kept):
        stays = store.keys.clone()
        whole(self, store, begin, end, kept)
        store.keys.copy_(stays)

    patch.setattr(Aside, "put_back", put_back)
    return StreamingLLM(sinks=1)


@caught_by("rollback")
def puts_back_what_the_last_of_two_tokens_replaced(patch):
    whole = torch.Tensor.scatter_reduce_

    def last(self, dim, index, source, reduce):
        return whole(self, dim, index, source, "amax", include_self=False)

    patch.setattr(torch.Tensor, "scatter_reduce_", last)
    return Random()


@caught_by("rollback")
def takes_what_was_copied_ahead_for_another_decisions_victims(patch):
    class Restless(Random):
        def headroom(self, view):
            return 3  # names three before each token, of which one goes

        def min_budget(self, layout):
            return 3

    patch.setattr(Aside, "decided", lambda self, kept: None)
    return Restless()


@caught_by("rollback")
def leaves_a_rejected_token_in_a_fresh_slot(patch):
    patch.setattr(SlotStore, "empty_fresh", lambda self, end: None)
    return Random()


# -- the tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MUTANTS))
def test_is_caught(name, monkeypatch):
    invariant, mutant = MUTANTS[name]
    policy = mutant(monkeypatch)
    found = find_violation(policy, [INVARIANTS[invariant]], examples=300)
    assert found is not None, f"the mutant {name!r} survived the check of {invariant!r}"
    assert found.invariant == invariant


def test_every_invariant_has_a_mutant():
    assert {invariant for invariant, _ in MUTANTS.values()} == set(INVARIANTS)
    assert len(MUTANTS) > 67


def test_the_page_says_what_is_caught():
    assert invariants_page.PAGE.read_text(encoding="utf-8") == invariants_page.page(), (
        f"docs/invariants.md is not what the mutants say; run: {invariants_page.COMMAND}"
    )


def test_the_message_explains(monkeypatch):
    _, mutant = MUTANTS["evicts_the_last_anchor"]
    with pytest.raises(PolicyCheckError) as raised:
        check_policy(mutant(monkeypatch), examples=100)
    message = str(raised.value)
    for part in (
        "OneAnchorLess(anchors=3, recent_lines=1) breaks an invariant.",
        "Invariant 'pins': the prefix, anchors and sinks are never evicted",
        "pinned position",
        "is no longer cached",
        "the policy gave up [",
        "layer 0, batch 0, head 0 holds ",
        "Stream: Stream(layout=",
    ):
        assert part in message
    stream = raised.value.stream
    assert (stream.layers, stream.batch, stream.heads, stream.group) == (1, 1, 1, 1), "not shrunk"
    assert eval(repr(stream), vars(kvpolicy) | {"Stream": type(stream)}) == stream


def test_a_crash_is_explained():
    class Crashes(Random):
        def score(self, view):
            raise RuntimeError("out of luck")

    with pytest.raises(PolicyCheckError, match=r"'runs'.*(?s:.*)RuntimeError: out of luck"):
        check_policy(Crashes(), examples=50)


def test_wrong_arguments():
    with pytest.raises(kvpolicy.ParameterError, match="give an instance"):
        check_policy(Random)
    with pytest.raises(kvpolicy.ParameterError, match="did you mean 'pins'"):
        check_policy(Random(), invariants=["pin"])
