"""The invariants that every policy is held to, each as one check of a policy on a stream.

A check drives the policy (through :func:`kvpolicy.testing.drive.drive`, never through stubs) and
raises :class:`PolicyCheckError` if what it saw breaks the invariant. Checks that compare two runs
feed them tensors of the same shapes, so that what must be equal is equal bit for bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from kvpolicy.budget.span import tokens_of
from kvpolicy.layout import TokenLayout
from kvpolicy.policies import Near
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.testing.claims import anchors_of, is_line_by_line, lines_kept
from kvpolicy.testing.drive import Trace, drive
from kvpolicy.testing.failure import PolicyCheckError
from kvpolicy.testing.streams import Stream, Tokens

__all__ = ["INVARIANTS", "Case", "Invariant", "applicable"]

#: Seeds of the tensors that replace others; beyond those that the streams draw.
_OTHER = 2**20
#: How many times what a layer needs its neighbours may be given so that it has enough.
_MOST_ROOM = 64


class Case:
    """A policy on a stream, driven once for all checks that look at the same run.

    Args:
        policy: the policy.
        stream: the stream.
    """

    def __init__(self, policy: EvictionPolicy, stream: Stream) -> None:
        self.policy = policy
        self.stream = stream

    @cached_property
    def trace(self) -> Trace:
        """The run as the stream says."""
        with _global_seed(0):
            return drive(self.policy, self.stream)

    @cached_property
    def stepwise(self) -> Trace:
        """The same run, one token a call."""
        if self.stream.calls == (1,):
            return self.trace
        return drive(self.policy, self.stream, calls=(1,))


class _Broken(Exception):
    """What a check found; :class:`Invariant` turns it into a :class:`PolicyCheckError`."""

    def __init__(
        self, trace: Trace | None, found: str, layer: int, batch: int, head: int, step: int
    ) -> None:
        super().__init__(found)
        self.trace, self.found = trace, found
        self.where = (layer, batch, head, step)


def _fail(
    trace: Trace | None, found: str, *, layer: int, batch: int = 0, head: int = 0, step: int = 0
) -> NoReturn:
    raise _Broken(trace, found, layer, batch, head, step)


@dataclass(frozen=True)
class Invariant:
    """One thing that every policy is held to.

    Attributes:
        name: short name.
        words: what must hold, in words.
        check: raises if it does not.
        applies: whether a policy is held to it.
    """

    name: str
    words: str
    check: Callable[[Case], None]
    applies: Callable[[EvictionPolicy], bool]

    def __call__(self, case: Case) -> None:
        """Check one case.

        Raises:
            PolicyCheckError: the invariant is broken.
        """
        try:
            self.check(case)
        except _Broken as broken:
            layer, batch, head, step = broken.where
            where = f"layer {layer}, batch {batch}, head {head}, step {step}"
            story = "" if broken.trace is None else broken.trace.story(layer, batch, head, step)
            raise PolicyCheckError(
                self.name,
                self.words,
                repr(case.policy),
                case.stream,
                f"{where}: {broken.found}",
                story,
            ) from None


#: All invariants by name, in the order in which they are checked.
INVARIANTS: dict[str, Invariant] = {}


def _always(policy: EvictionPolicy) -> bool:
    return True


def _invariant(
    name: str, words: str, applies: Callable[[EvictionPolicy], bool] = _always
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def add(check: Callable[[Case], None]) -> Callable[[Case], None]:
        INVARIANTS[name] = Invariant(name, words, check, applies)
        return check

    return add


def applicable(policy: EvictionPolicy) -> tuple[Invariant, ...]:
    """The invariants that this policy is held to."""
    return tuple(invariant for invariant in INVARIANTS.values() if invariant.applies(policy))


# -- what one run shows ----------------------------------------------------------------------------


@_invariant(
    "runs", "with any budget from min_budget up, every stream runs to its end; no score is NaN."
)
def _runs(case: Case) -> None:
    assert case.trace.stats is not None


@_invariant("decision", "a decision names as many distinct slots of the layer as were asked for.")
def _decision(case: Case) -> None:
    for decision in case.trace.decisions:
        at = {"layer": decision.layer, "step": decision.step}
        if not decision.well_formed():
            _fail(
                case.trace,
                f"victims() gave {decision.slots.dtype} {decision.slots.tolist()} before position "
                f"{decision.seen}; expected int64 [B, H, {decision.count}] out of the "
                f"{decision.handed_out} slots that have been handed out",
                **at,
            )
        ordered = decision.slots.sort(dim=-1).values
        twice = _first(ordered[..., 1:] == ordered[..., :-1])
        if twice is not None:
            batch, head, place = twice
            _fail(
                case.trace,
                f"slot {int(ordered[batch, head, place])} is named twice before position "
                f"{decision.seen}",
                batch=batch,
                head=head,
                **at,
            )


@_invariant("budget", "at no instant does a head hold more than the prefix and the layer's budget.")
def _budget(case: Case) -> None:
    trace = case.trace
    prefix = case.stream.layout.prefix
    for shot in sorted([*trace.instants, *trace.snapshots], key=lambda shot: shot.step):
        held = (shot.positions >= 0).sum(-1)
        most = prefix + trace.budgets[shot.layer]
        over = _first(held > most)
        if over is not None:
            batch, head = over
            _fail(
                trace,
                f"holds {int(held[batch, head])} tokens {shot.moment}, with {shot.seen} seen; "
                f"prefix {prefix} + budget {trace.budgets[shot.layer]} allow {most}",
                layer=shot.layer,
                batch=batch,
                head=head,
                step=shot.step,
            )


@_invariant(
    "pins",
    "the prefix, anchors and sinks are never evicted, nor is what protect() names at a decision.",
)
def _pins(case: Case) -> None:
    trace = case.trace
    pinned = case.stream.layout.prefix + anchors_of(case.policy, case.stream.layout)
    for shot in trace.snapshots:
        must = torch.arange(case.stream.tokens) < min(pinned, shot.seen)
        lost = _first((shot.present(case.stream.tokens) == 0) & must)
        if lost is not None:
            batch, head, position = lost
            _fail(
                trace,
                f"pinned position {position} is no longer cached after {shot.seen} tokens",
                layer=shot.layer,
                batch=batch,
                head=head,
                step=shot.step,
            )
    for decision in trace.decisions:
        if not decision.well_formed():
            continue
        lost = _first(decision.protected.gather(2, decision.slots))
        if lost is not None:
            batch, head, place = lost
            position = int(decision.positions[batch, head, decision.slots[batch, head, place]])
            _fail(
                trace,
                f"protected position {position} is a victim before position {decision.seen}",
                layer=decision.layer,
                batch=batch,
                head=head,
                step=decision.step,
            )


@_invariant(
    "line locality",
    "every token of the current line and of the last recent_lines lines is cached.",
    is_line_by_line,
)
def _line_locality(case: Case) -> None:
    layout: TokenLayout = case.stream.layout
    recent_lines = lines_kept(case.policy, layout)
    positions = torch.arange(case.stream.tokens)
    for shot in case.trace.snapshots:
        # A compressed prompt has made room for the line of the token to come.
        compressed = shot.step == 0 and case.trace.compressed(shot.layer)
        current = layout.line(shot.seen if compressed else shot.seen - 1)
        must = (layout.line(positions) >= current - recent_lines) & (positions < shot.seen)
        lost = _first((shot.present(case.stream.tokens) == 0) & must)
        if lost is not None:
            batch, head, position = lost
            _fail(
                case.trace,
                f"position {position} of line {layout.line(position)} is not cached after "
                f"{shot.seen} tokens, in line {current}",
                layer=shot.layer,
                batch=batch,
                head=head,
                step=shot.step,
            )


@_invariant(
    "once gone, gone", "an evicted position never comes back, and no head holds a position twice."
)
def _once_gone(case: Case) -> None:
    trace = case.trace
    for layer, held in enumerate(trace.held):
        shots = trace.of_layer(layer)
        for before, step in zip([None, *range(len(shots))], range(len(shots)), strict=False):
            at = {"layer": layer, "step": shots[step].step}
            twice = _first(held[step] > 1)
            if twice is not None:
                batch, head, position = twice
                _fail(trace, f"position {position} is held twice", batch=batch, head=head, **at)
            strange = _first(held[step][..., shots[step].seen :] > 0)
            if strange is not None:
                batch, head, ahead = strange
                _fail(
                    trace,
                    f"position {shots[step].seen + ahead} is held before it has come",
                    batch=batch,
                    head=head,
                    **at,
                )
            if before is None:
                continue
            old = torch.arange(case.stream.tokens) < shots[before].seen
            back = _first((held[step] > 0) & (held[before] == 0) & old)
            if back is not None:
                batch, head, position = back
                _fail(
                    trace,
                    f"position {position} had been evicted and is cached again",
                    batch=batch,
                    head=head,
                    **at,
                )


@_invariant(
    "truth",
    "a slot's key and value are bit for bit those of the position it claims, and no observer's "
    "reading outlives its token.",
)
def _truth(case: Case) -> None:
    trace = case.trace
    for shot in trace.snapshots:
        where = shot.positions.clamp(min=0).to(torch.int64).unsqueeze(-1)
        for name, held, given in (
            ("key", shot.keys, trace.tokens.key[shot.layer]),
            ("value", shot.values, trace.tokens.value[shot.layer]),
        ):
            assert held is not None
            true = given.gather(2, where.expand(*where.shape[:3], given.shape[-1]))
            wrong = _first(((_bits(held) != _bits(true)).any(-1)) & (shot.positions >= 0))
            if wrong is not None:
                batch, head, slot = wrong
                _fail(
                    trace,
                    f"slot {slot} claims position {int(shot.positions[batch, head, slot])}, but "
                    f"holds another {name}",
                    layer=shot.layer,
                    batch=batch,
                    head=head,
                    step=shot.step,
                )
    for stale in trace.stale:
        wrong = _first(stale.reading != stale.fresh)
        if wrong is not None:
            batch, head, place = wrong
            _fail(
                trace,
                f"{stale.observer}.forget left {float(stale.reading[batch, head, place]):g} in "
                f"slot {int(stale.slots[batch, head, place])}, which now holds another token",
                layer=stale.layer,
                batch=batch,
                head=head,
                step=stale.step,
            )


@_invariant("full use", "a slot is left empty only while nothing has been evicted (lazy reclaim).")
def _full_use(case: Case) -> None:
    if case.stream.reclaim != "lazy":
        return
    for shot in case.trace.snapshots:
        held = (shot.positions >= 0).sum(-1)
        capacity = case.stream.layout.prefix + case.trace.budgets[shot.layer]
        idle = _first(held < min(shot.seen, capacity))
        if idle is not None:
            batch, head = idle
            _fail(
                case.trace,
                f"holds {int(held[batch, head])} tokens after {shot.seen}, but has "
                f"{capacity} slots",
                layer=shot.layer,
                batch=batch,
                head=head,
                step=shot.step,
            )


@_invariant("stats", "stats() tells what happened: budgets, peaks, evictions, tokens.")
def _stats(case: Case) -> None:
    trace, stream = case.trace, case.stream
    stats = trace.stats
    assert stats is not None
    for layer in range(stream.layers):
        counts = [int((shot.positions >= 0).sum(-1).max()) for shot in trace.of_layer(layer)]
        lost = stream.tokens - counts[-1]
        most = stream.layout.prefix + stats.budgets[layer]
        # Within a call of many tokens a layer may have held more than at its end.
        if not max(counts) <= stats.peak_tokens[layer] <= min(most, stream.tokens):
            _fail(
                trace,
                f"peak_tokens says {stats.peak_tokens[layer]}; up to {max(counts)} were seen, and "
                f"{most} are allowed",
                layer=layer,
            )
        if stats.evictions[layer] != lost:
            _fail(trace, f"evictions says {stats.evictions[layer]}; {lost} are gone", layer=layer)
    if stats.seen != stream.tokens:
        _fail(trace, f"seen says {stats.seen} after {stream.tokens} tokens", layer=0)
    on_average = case.stream.budget
    if stream.layout.evictable is not None:
        on_average = min(on_average, stream.layout.evictable)
    if sum(stats.budgets) != on_average * stream.layers:
        _fail(trace, f"budgets {stats.budgets} are not {on_average} on average", layer=0)


# -- what comparing runs shows ---------------------------------------------------------------------


@_invariant(
    "lossless", "with a budget of at least the length, the output equals plain causal attention."
)
def _lossless(case: Case) -> None:
    stream = case.stream
    if stream.dtype != "float32":
        return
    trace = _roomy(case)
    tokens = trace.tokens
    close = 2e-3  # peaked attention magnifies the rounding of its scores
    for layer, output in enumerate(trace.outputs):
        plain = _plain_attention(tokens.query[layer], tokens.key[layer], tokens.value[layer])
        wrong = _first(((output.double() - plain).abs() > close * (1 + plain.abs())).any(-1))
        if wrong is not None:
            batch, head, position = wrong
            _fail(
                trace,
                f"the output of query {position} is off by "
                f"{float((output.double() - plain)[batch, head, position].abs().max()):.3g} though "
                f"everything fits into {trace.budgets[layer]} tokens",
                layer=layer,
                batch=batch,
                head=head // stream.group,
                step=_step_of(trace, position),
            )


@_invariant(
    "independence",
    "a sample's decisions do not depend on its batch neighbours, a head's not on other heads "
    "(unless the policy says so), a layer's not on other layers.",
)
def _independence(case: Case) -> None:
    stream, own = case.stream, case.trace.tokens
    other = stream.draw(_OTHER + stream.seed)
    if stream.batch > 1:
        for kept in {0, stream.batch - 1}:
            mixed = Tokens(
                *(_spliced(a, b, 1, kept, 1) for a, b in zip(_all(own), _all(other), strict=True))
            )
            _same(case, mixed, "its batch neighbours", batch=kept)
        turned = Tokens(*(tensor.flip(1) for tensor in _all(own)))
        _same(case, turned, "its place in the batch", turned=True)
    if stream.heads > 1 and not case.policy.mixes_heads:
        for kept in {0, stream.heads - 1}:
            mixed = Tokens(
                _spliced(own.query, other.query, 2, kept, stream.group),
                _spliced(own.key, other.key, 2, kept, 1),
                _spliced(own.value, other.value, 2, kept, 1),
            )
            _same(case, mixed, "other heads", head=kept)
    if stream.layers > 1:
        for kept in {0, stream.layers - 1}:
            mixed = Tokens(
                *(_spliced(a, b, 0, kept, 1) for a, b in zip(_all(own), _all(other), strict=True))
            )
            _same(case, mixed, "other layers", layer=kept)


def _same(
    case: Case,
    tokens: Tokens,
    on_what: str,
    *,
    layer: int | None = None,
    batch: int | None = None,
    head: int | None = None,
    turned: bool = False,
) -> None:
    """Demand that the decisions of the given layer, sample and head are the same as they were."""
    again = drive(case.policy, case.stream, tokens=tokens)
    batches, heads = slice(batch, _end(batch)), slice(head, _end(head))
    for at in range(case.stream.layers) if layer is None else [layer]:
        held = again.held[at].flip(1) if turned else again.held[at]
        differs = _first((case.trace.held[at] != held)[:, batches, heads])
        if differs is None or (turned and not _decisive(case)):
            continue
        step, of_batch, of_head, position = differs
        _fail(
            again,
            f"whether position {position} is cached depends on {on_what}",
            layer=at,
            batch=of_batch + (batch or 0),
            head=of_head + (head or 0),
            step=step,
        )


@_invariant("determinism", "the same stream gives the same decisions, ties included.")
def _determinism(case: Case) -> None:
    first = case.trace
    with _global_seed(1):
        again = drive(case.policy, case.stream)
    for layer in range(case.stream.layers):
        differs = _first(first.held[layer] != again.held[layer])
        if differs is not None:
            step, batch, head, position = differs
            _fail(
                again,
                f"position {position} was treated differently when the same stream ran again",
                layer=layer,
                batch=batch,
                head=head,
                step=step,
            )


@_invariant(
    "inter-line only",
    "the choice for the next line depends on the last finished line's mass, and on no other "
    "query's.",
    is_line_by_line,
)
def _inter_line(case: Case) -> None:
    """Replace all queries but those of the line before, and see whether the choice changes.

    Other queries lead to other choices for earlier lines, so only heads which held the same tokens
    in the same slots all through the line before are compared: they saw the same mass, bit for bit.
    """
    layout, stream, base = case.stream.layout, case.stream, case.stepwise
    last = layout.line(stream.tokens - 1)
    other = stream.draw(_OTHER + stream.seed).query
    decided = sorted({layout.line(d.seen) for d in base.decisions if layout.is_line_start(d.seen)})
    for line in [*decided[:2], *decided[-1:]]:
        start = layout.prefix + line * layout.line_length
        before = max(start - layout.line_length, 0)
        if line > last:
            continue
        query = other.clone()
        query[..., before:start, :] = base.tokens.query[..., before:start, :]
        again = drive(case.policy, stream, tokens=replace(base.tokens, query=query), calls=(1,))
        for layer in range(stream.layers):
            ours, theirs = base.of_layer(layer), again.of_layer(layer)
            same = torch.ones(stream.batch, stream.heads, dtype=torch.bool)
            for step in range(max(before - 1, 0), start):
                same &= (ours[step].positions == theirs[step].positions).all(-1)
            end = min(start + layout.line_length, stream.tokens)
            for step in range(start, end):
                changed = (base.held[layer][step] != again.held[layer][step]) & same.unsqueeze(-1)
                differs = _first(changed)
                if differs is not None:
                    batch, head, position = differs
                    _fail(
                        again,
                        f"whether position {position} stays for line {line} changed with queries "
                        f"outside line {line - 1}",
                        layer=layer,
                        batch=batch,
                        head=head,
                        step=step,
                    )


@_invariant(
    "nearest stays",
    "what goes is, of the tokens that may go, what lies farthest on the grid from the next ones.",
    lambda policy: isinstance(policy, Near),
)
def _nearest_stays(case: Case) -> None:
    """Distances are worked out anew, token by token, from rows and columns."""
    policy, layout, trace = case.policy, case.stream.layout, case.trace
    assert isinstance(policy, Near)
    for decision in trace.decisions:
        end = decision.seen + tokens_of(policy.horizon, layout)
        end = end if layout.length is None else min(end, layout.length)
        coming = [(layout.line(t), layout.column(t)) for t in range(decision.seen, end)]
        near = torch.tensor(
            [
                sum(
                    1 / ((layout.line(j) - row) ** 2 + (layout.column(j) - column) ** 2)
                    for row, column in coming
                )
                for j in range(decision.seen)
            ],
            dtype=torch.float32,  # behind the last token nothing comes, and each sum is a 0
        )
        held = near[decision.positions.clamp(min=0).long()]
        goes = torch.zeros_like(held, dtype=torch.bool).scatter_(2, decision.slots, True)
        may_go = (decision.positions >= 0) & ~decision.protected
        farthest = held.masked_fill(goes | ~may_go, torch.inf).amin(2, keepdim=True)
        wrong = _first(goes & may_go & (held > farthest * (1 + 1e-5)))
        if wrong is not None:
            batch, head, slot = wrong
            _fail(
                trace,
                f"position {int(decision.positions[batch, head, slot])} goes before position "
                f"{decision.seen} comes, and is nearer to what comes than one that stays",
                layer=decision.layer,
                batch=batch,
                head=head,
                step=decision.step,
            )


@_invariant("chunks", "tokens that come in one call are treated as if they had come one by one.")
def _chunks(case: Case) -> None:
    stream, chunked = case.stream, case.trace
    if stream.dtype != "float32" or any(map(chunked.compressed, range(stream.layers))):
        return
    single = case.stepwise
    for layer in range(stream.layers):
        for shot, held in zip(chunked.of_layer(layer), chunked.held[layer], strict=True):
            differs = _first(held != single.held[layer][shot.seen - 1])
            if differs is not None and _decisive(case):
                batch, head, position = differs
                _fail(
                    chunked,
                    f"after {shot.seen} tokens, position {position} is "
                    f"{'' if held[batch, head, position] else 'not '}cached in calls of "
                    f"{stream.sizes()}, and the other way round one by one",
                    layer=layer,
                    batch=batch,
                    head=head,
                    step=shot.step,
                )
        off = (chunked.outputs[layer] - single.outputs[layer]).abs()
        wrong = _first((off > 2e-3 * (1 + single.outputs[layer].abs())).any(-1))
        if wrong is not None and _decisive(case):
            batch, head, position = wrong
            _fail(
                chunked,
                f"the output of query {position} is off from what it is one by one, by "
                f"{float(off[batch, head, position].max()):.3g}",
                layer=layer,
                batch=batch,
                head=head // stream.group,
                step=_step_of(chunked, position),
            )


@_invariant("reset", "after reset() a cache is as good as new.")
def _reset(case: Case) -> None:
    other = case.stream.draw(_OTHER + case.stream.seed)
    with _global_seed(0):
        again = drive(case.policy, case.stream, used=other)
    for layer in range(case.stream.layers):
        differs = _first(case.trace.held[layer] != again.held[layer])
        if differs is not None:
            step, batch, head, position = differs
            _fail(
                again,
                f"position {position} is treated otherwise in a cache that was used before",
                layer=layer,
                batch=batch,
                head=head,
                step=step,
            )
        if not torch.equal(_bits(case.trace.outputs[layer]), _bits(again.outputs[layer])):
            _fail(again, "the output is another in a cache that was used before", layer=layer)


@_invariant(
    "reorder",
    "a sequence that select_batch() moves, or repeats, goes on as if it had been there before.",
)
def _reorder(case: Case) -> None:
    stream, steps = case.stream, len(case.stream.sizes())
    if stream.batch == 1 or steps == 1:
        return
    # The last sequence moves to the front, the first one comes twice, one in the middle is lost.
    index = torch.tensor([stream.batch - 1, *[0] * (stream.batch - 1)])
    moved = drive(case.policy, stream, reorder=(steps // 2, index))
    there = drive(case.policy, stream, tokens=case.trace.tokens.selected(index))
    for layer in range(stream.layers):
        differs = _first(moved.held[layer][steps // 2 :] != there.held[layer][steps // 2 :])
        if differs is not None and _decisive(case):
            step, batch, head, position = differs
            _fail(
                moved,
                f"position {position} is treated otherwise after select_batch({index.tolist()}) "
                f"before step {steps // 2}",
                layer=layer,
                batch=batch,
                head=head,
                step=step + steps // 2,
            )


@_invariant("round trip", "a policy is its parameters: frozen, and the same after JSON and back.")
def _round_trip(case: Case) -> None:
    policy = case.policy
    try:
        again = type(policy).model_validate_json(policy.model_dump_json())
    except Exception as error:
        _fail(None, f"JSON and back raised {type(error).__name__}: {error}", layer=0)
    if again != policy:
        _fail(None, f"JSON and back gave {again!r}", layer=0)
    if not policy.model_config.get("frozen"):
        _fail(None, "its model_config is not frozen", layer=0)


# -- helpers ---------------------------------------------------------------------------------------


def _decisive(case: Case) -> bool:
    """Whether the stream's decisions stand when its tensors are nudged by more than rounding.

    Sums in another order differ in their last bit, which decides between scores that are as good
    as equal. Where two runs may differ in that bit, a difference counts only in a stream that no
    such bit decides.
    """
    base, tokens = case.stepwise, case.stepwise.tokens
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        nudged = [
            tensor * (1 + 1e-5 * torch.randn(tensor.shape, generator=generator))
            + 1e-5 * torch.randn(tensor.shape, generator=generator)
            for tensor in (tokens.query, tokens.key)
        ]
        near = Tokens(
            nudged[0].to(tokens.query.dtype), nudged[1].to(tokens.key.dtype), tokens.value
        )
        again = drive(case.policy, case.stream, tokens=near, calls=(1,))
        if any(not torch.equal(a, b) for a, b in zip(base.held, again.held, strict=True)):
            return False
    return True


def _roomy(case: Case) -> Trace:
    """The run with a budget that gives every layer room for the whole stream."""
    layout, stream = case.stream.layout, case.stream
    if layout.evictable is None:
        floor = case.policy.min_budget(layout)
        # Without a length, a policy may make room for more tokens than there will be.
        enough = budget = stream.tokens + floor
        schedule = case.policy.schedule()
        while budget <= _MOST_ROOM * enough:
            if min(schedule.layers(budget, stream.layers, floor=floor)) >= enough:
                return drive(case.policy, stream, budget=budget)
            budget *= 2
        # A schedule so steep would cost more memory than there is; with a length no layer gets
        # more than that.
        length = max(stream.tokens, layout.prefix + 1)
        stream = replace(stream, layout=layout.model_copy(update={"length": length}))
        layout = stream.layout
    assert layout.evictable is not None
    return drive(case.policy, stream, budget=layout.evictable)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention from scratch in float64; ``[B, G * H, T, D]``."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = query.double() @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    output: Tensor = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
    return output


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def _first(where: Tensor) -> list[int] | None:
    """Index of the first True."""
    found = where.nonzero()
    return [int(index) for index in found[0]] if len(found) else None


def _all(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    return tokens.query, tokens.key, tokens.value


def _spliced(own: Tensor, other: Tensor, dim: int, kept: int, width: int) -> Tensor:
    """``other``, except for the ``kept``-th group of ``width`` along ``dim``, which is ``own``."""
    part = (slice(None),) * dim + (slice(kept * width, (kept + 1) * width),)
    mixed = other.clone()
    mixed[part] = own[part]
    return mixed


def _end(start: int | None) -> int | None:
    return None if start is None else start + 1


def _step_of(trace: Trace, position: int) -> int:
    return next((shot.step for shot in trace.snapshots if shot.seen > position), 0)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed every global generator that a policy might draw from, and put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
