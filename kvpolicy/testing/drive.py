"""Drive a policy through a stream and write down all that can be seen, from outside and inside."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from kvpolicy.cache.cache import PolicyCache
from kvpolicy.cache.layer import Layer
from kvpolicy.cache.stats import CacheStats
from kvpolicy.errors import KVPolicyError
from kvpolicy.observers import AttentionObserver, AttentionReport, Need, like_state, state_of
from kvpolicy.policy.policy import CacheView, EvictionPolicy, ScoredPolicy
from kvpolicy.slots import SlotShape
from kvpolicy.testing.failure import PolicyCheckError
from kvpolicy.testing.streams import Stream, Tokens

__all__ = ["Decision", "Snapshot", "StaleReading", "Trace", "drive", "shown"]


@dataclass(frozen=True)
class Snapshot:
    """What a layer holds at one instant.

    Attributes:
        step: index of the call.
        layer: index of the layer.
        seen: tokens of the sequence that have been written.
        moment: "after the call", "before a decision" or "inside the call".
        positions: ``[B, H, S]``, -1 = empty.
        keys: ``[B, H, S, D]``; only after a call.
        values: ``[B, H, S, D]``; only after a call.
    """

    step: int
    layer: int
    seen: int
    moment: str
    positions: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None

    def present(self, tokens: int) -> Tensor:
        """How often each head holds each position, ``[B, H, tokens]``."""
        # Empty slots are counted in a column of their own, which is cut off.
        where = self.positions.to(torch.int64)
        where = where.masked_fill((where < 0) | (where >= tokens), tokens)
        counts = torch.zeros(*where.shape[:2], tokens + 1, dtype=torch.int64)
        return counts.scatter_add_(2, where, torch.ones_like(where))[..., :tokens]


@dataclass(frozen=True)
class Decision:
    """What a policy answered when it was asked for room.

    Attributes:
        step: index of the call.
        layer: index of the layer.
        seen: position of the token about to come.
        count: how many slots were asked for.
        handed_out: how many slots of each head have ever held a token.
        slots: the answer.
        positions: what the layer held, ``[B, H, S]``.
        protected: what may not go, by the policy's own word and the layout's, ``[B, H, S]``.
    """

    step: int
    layer: int
    seen: int
    count: int
    handed_out: int
    slots: Tensor
    positions: Tensor
    protected: Tensor

    def well_formed(self) -> bool:
        """Whether the answer is ``[B, H, count]`` slots that have been handed out."""
        return (
            tuple(self.slots.shape) == (*self.positions.shape[:2], self.count)
            and self.slots.dtype == torch.int64
            and bool(((self.slots >= 0) & (self.slots < self.handed_out)).all())
        )


@dataclass(frozen=True)
class StaleReading:
    """An observer's reading that was still there when its token had gone.

    Attributes:
        step: index of the call.
        layer: index of the layer.
        observer: the observer's class.
        slots: the slots that were handed on, ``[B, H, N]``.
        reading: what the observer still said about them.
        fresh: what it says about a token that has just come.
    """

    step: int
    layer: int
    observer: str
    slots: Tensor
    reading: Tensor
    fresh: Tensor


@dataclass
class Trace:
    """All that was seen of one policy on one stream.

    Attributes:
        stream: the stream.
        tokens: its tensors.
        snapshots: what each layer held after each call, in order.
        instants: what it held at moments within calls.
        decisions: what the policy decided.
        stale: readings that outlived their tokens.
        outputs: of each layer, ``[B, G * H, tokens, D]``.
        budgets: of each layer.
        stats: at the end.
    """

    stream: Stream
    tokens: Tokens
    snapshots: list[Snapshot] = field(default_factory=list)
    instants: list[Snapshot] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    stale: list[StaleReading] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    budgets: tuple[int, ...] = ()
    stats: CacheStats | None = None

    def of_layer(self, layer: int) -> list[Snapshot]:
        """Snapshots after each call, of one layer."""
        return [snapshot for snapshot in self.snapshots if snapshot.layer == layer]

    @cached_property
    def held(self) -> list[Tensor]:
        """How often each position is held after each call: a layer ``[steps, B, H, tokens]``."""
        return [
            torch.stack([shot.present(self.stream.tokens) for shot in self.of_layer(layer)])
            for layer in range(self.stream.layers)
        ]

    def compressed(self, layer: int) -> bool:
        """Whether the first call of a layer was a prompt that did not fit."""
        capacity = self.stream.layout.prefix + self.budgets[layer]
        return self.stream.layout.compresses_prompt and self.stream.sizes()[0] > capacity

    def story(self, layer: int, batch: int, head: int, step: int, steps: int = 6) -> str:
        """What one head did in the steps up to ``step``, one line a step."""
        lines = []
        for shot in self.of_layer(layer):
            if not step - steps < shot.step <= step:
                continue
            lines += [
                _told(decision, batch, head)
                for decision in self.decisions
                if (decision.step, decision.layer) == (shot.step, layer)
            ]
            lines.append(
                f"  step {shot.step}: {shot.seen} tokens seen, layer {layer}, batch {batch}, "
                f"head {head} holds {shown(shot.positions[batch, head])}"
            )
        return "\n".join(lines)


def _told(decision: Decision, batch: int, head: int) -> str:
    start = f"  step {decision.step}: before position {decision.seen}, asked for {decision.count}"
    if not decision.well_formed():
        return f"{start}, the policy answered {decision.slots.tolist()}"
    gone = decision.positions[batch, head][decision.slots[batch, head]]
    return f"{start}, the policy gave up {[int(position) for position in gone]}"


def shown(positions: Tensor) -> str:
    """Positions in order, empty slots left out, runs joined: ``0-3 7 9``."""
    runs: list[list[int]] = []
    for position in sorted(int(position) for position in positions.flatten() if position >= 0):
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return " ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or "nothing"


class _Probe:
    """An observer that needs nothing and looks at the layer whenever the cache calls it."""

    needs: ClassVar[Need] = Need.NONE

    def __init__(self, spy: _Spy, shape: SlotShape, others: Sequence[AttentionObserver]) -> None:
        self.mass = torch.zeros(shape.batch, shape.heads, shape.slots)
        # Functions, not what they work on: this observer knows nothing that could be taken back.
        self._look = spy.look
        self._compare = partial(
            _compare, spy, others, [state_of(other).clone() for other in others]
        )

    def observe(self, report: AttentionReport) -> None:
        """Write down what the layer holds in the middle of a call."""
        self._look("inside the call")

    def forget(self, slots: Tensor) -> None:
        """Look, and see whether the other observers have forgotten (they were told before)."""
        self._look("inside the call")
        self._compare(slots)


def _compare(
    spy: _Spy, others: Sequence[AttentionObserver], untold: list[Tensor], slots: Tensor
) -> None:
    """Write down which readings of slots that hold other tokens now are not those of a new one."""
    for other, fresh in zip(others, untold, strict=True):
        where = like_state(slots, fresh)
        reading, expected = state_of(other).gather(-1, where), fresh.gather(-1, where)
        if not torch.equal(reading, expected):
            if reading.ndim > slots.ndim:  # of several numbers a slot, the one that is furthest off
                reading, expected = reading.flatten(2, -2), expected.flatten(2, -2)
                worst = (reading - expected).abs().argmax(2, keepdim=True)
                reading, expected = (x.gather(2, worst).squeeze(2) for x in (reading, expected))
            spy.trace.stale.append(
                StaleReading(
                    step=spy.step,
                    layer=spy.layer.plan.layer,
                    observer=type(other).__name__,
                    slots=slots.clone(),
                    reading=reading,
                    fresh=expected,
                )
            )


class _Spy:
    """Stands between one layer and its policy, passes everything on and writes it down."""

    def __init__(self, policy: EvictionPolicy, layer: Layer, trace: Trace) -> None:
        self.policy = policy
        self.layer = layer
        self.trace = trace
        self.step = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def look(self, moment: str) -> None:
        """Write down what the layer holds now."""
        store = self.layer.store
        if store is not None:
            layer = self.layer.plan.layer
            held = store.positions.clone()
            self.trace.instants.append(Snapshot(self.step, layer, self.layer.seen, moment, held))

    def observers(self, shape: SlotShape) -> Sequence[AttentionObserver]:
        """The policy's own, and a probe that is told after them."""
        made = tuple(self.policy.observers(shape))
        return (*made, _Probe(self, shape, made))

    def victims(self, view: CacheView, count: int) -> Tensor:
        """The policy's own."""
        self.look("before a decision")
        held = view.positions.clone()
        protected = view.pinned.clone()
        if isinstance(self.policy, ScoredPolicy):
            said = self.policy.protect(view)
            protected = (protected if said is None else protected | said) & (held >= 0)
        # A prompt that is being compressed does not lie in the layer's own store.
        store = self.layer.store
        handed_out = held.shape[2] if store is None else store.handed_out
        slots = self.policy.victims(view, count)
        self.trace.decisions.append(
            Decision(
                step=self.step,
                layer=self.layer.plan.layer,
                seen=view.seen,
                count=count,
                handed_out=handed_out,
                slots=slots.clone(),
                positions=held,
                protected=protected,
            )
        )
        return slots


def drive(
    policy: EvictionPolicy,
    stream: Stream,
    *,
    tokens: Tokens | None = None,
    calls: tuple[int, ...] | None = None,
    budget: int | None = None,
    used: Tokens | None = None,
    reorder: tuple[int, Tensor] | None = None,
) -> Trace:
    """Run a policy through a stream.

    Args:
        policy: the policy.
        stream: the stream.
        tokens: other tensors than the stream's own, of the same shapes.
        calls: other call sizes than the stream's own.
        budget: another budget than the stream's own.
        used: what the cache has held before it was reset; by default it is a new one.
        reorder: before which step the batch is reordered, and the sequences that take each place,
            int64 ``[B]``; one may come twice.

    Raises:
        PolicyCheckError: something raised on the way.
    """
    if calls is not None or budget is not None:
        stream = Stream(
            **{
                **stream.__dict__,
                "calls": stream.calls if calls is None else calls,
                "budget": stream.budget if budget is None else budget,
            }
        )
    tokens = stream.draw() if tokens is None else tokens
    trace = Trace(stream, tokens)
    step = first = at = 0
    try:
        cache = stream.cache(policy)
        trace.budgets = cache.stats().budgets
        if used is not None:
            _feed(cache, used, stream)
            cache.reset()
        spies = [_Spy(policy, layer, trace) for layer in cache.layers]
        for layer, spy in zip(cache.layers, spies, strict=True):
            layer.replace_policy(cast(EvictionPolicy, spy))
        outputs: list[list[Tensor]] = [[] for _ in spies]
        for step, size in enumerate(stream.sizes()):
            part = slice(first, first + size)
            if reorder is not None and reorder[0] == step:
                cache.select_batch(reorder[1])
                tokens = tokens.selected(reorder[1])
            for spy in spies:
                at = spy.layer.plan.layer
                spy.step = step
                outputs[at].append(cache.attend(at, *tokens.of_layer(at, part)))
                trace.snapshots.append(_snapshot(spy.layer, step))
            first += size
        trace.outputs = [torch.cat(parts, dim=2) for parts in outputs]
        trace.stats = cache.stats()
    except Exception as error:
        raise PolicyCheckError(
            "runs",
            "with any budget from min_budget up, every stream runs to its end; no score is NaN.",
            repr(policy),
            stream,
            f"step {step}, layer {at}, position {first}: {_told_of(error)}",
            trace.story(at, 0, 0, step),
        ) from error
    return trace


def _feed(cache: PolicyCache, tokens: Tokens, stream: Stream) -> None:
    """Bring a whole stream's tokens, and look at nothing."""
    first = 0
    for size in stream.sizes():
        tokens.bring(cache, slice(first, first + size))
        first += size


def _told_of(error: Exception) -> str:
    """An error and where it was raised; those of kvpolicy say so themselves."""
    told = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, KVPolicyError) or not frames:
        return told
    last = frames[-1]
    file = Path(last.filename).name
    return f"{told} (raised in {last.name}, {file} line {last.lineno}: {last.line})"


def _snapshot(layer: Layer, step: int) -> Snapshot:
    store = layer.require_store()
    return Snapshot(
        step=step,
        layer=layer.plan.layer,
        seen=layer.seen,
        moment="after the call",
        positions=store.positions.clone(),
        keys=store.keys.clone(),
        values=store.values.clone(),
    )
