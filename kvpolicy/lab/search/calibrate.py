"""Find out how layers should share a budget: what does each lose per token taken from it?

First each layer alone gives up tokens while the others keep everything, which gives its loss as a
curve. The total is then shared out token by token to the layer that gains most from one more. As
layers are not independent, what comes of it is tried against moves of some tokens from a layer to
another, all of it on calibration items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryFile

from kvpolicy.budget.budget import Budget, Schedule
from kvpolicy.budget.calibrated import LayerBudgets
from kvpolicy.errors import BudgetError, ParameterError
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.subject import Setting, Subject
from kvpolicy.layout import LateLayout
from kvpolicy.policy.policy import EvictionPolicy

__all__ = ["Curve", "calibrate", "share_out"]

#: Budgets of a layer at which its curve is measured, as multiples of the average.
_STEPS = (Fraction(1), Fraction(3, 2), Fraction(2), Fraction(3))
_LEAST = 1e-7  # a loss that is no more than noise, in the main metric's unit

#: Told what is measured: tokens of each layer, and the main metric with them.
Tell = Callable[[Sequence[int], float], None]


@dataclass(frozen=True)
class Curve:
    """What a layer loses at some budgets, while all others keep everything.

    Attributes:
        budgets: tokens, rising; the last one is everything.
        losses: of the main metric, falling, 0 at the end.
    """

    budgets: tuple[int, ...]
    losses: tuple[float, ...]

    def at(self, tokens: int) -> float:
        """Loss at any budget: between two measured ones it falls exponentially."""
        losses = [max(loss, _LEAST) for loss in self.losses]
        for i in range(1, len(losses)):  # noise must not make a token cost something
            losses[i] = min(losses[i], losses[i - 1])
        for low, high, above, below in zip(
            self.budgets, self.budgets[1:], losses, losses[1:], strict=False
        ):
            if tokens <= high:
                part = (tokens - low) / (high - low)
                return math.exp((1 - part) * math.log(above) + part * math.log(below))
        return losses[-1]


def share_out(curves: Sequence[Curve], total: int) -> tuple[int, ...]:
    """Share ``total`` tokens out, each to the layer whose loss falls most by it.

    Every layer has at least the first budget of its curve, and at most the last.

    Raises:
        BudgetError: there are fewer tokens than the least, or more than can be used.
    """
    shares = [curve.budgets[0] for curve in curves]
    most = sum(curve.budgets[-1] for curve in curves)
    if not sum(shares) <= total <= most:
        raise BudgetError(f"{total} tokens: the layers hold {sum(shares)} to {most}")
    for _ in range(total - sum(shares)):
        gains = [
            curve.at(tokens) - curve.at(tokens + 1) if tokens < curve.budgets[-1] else -math.inf
            for curve, tokens in zip(curves, shares, strict=True)
        ]
        shares[gains.index(max(gains))] += 1
    return tuple(shares)


def calibrate(
    subject: Subject,
    policy: EvictionPolicy,
    budget: str,
    out: Path,
    *,
    named: tuple[str, str],
    moves: int = 24,
    seed: int = 0,
    tell: Tell = lambda layers, value: None,
) -> LayerBudgets:
    """Measure, share out, and write the file.

    Args:
        subject: with a method ``calibration()`` that gives the same model on items that no test
            scores, these are taken; else those of ``seed``.
        policy: whose layers are measured.
        budget: tokens a layer on average, in any spelling.
        out: the file.
        named: how a user spells the subject and the policy, which the file says.
        moves: tokens moved from a layer to another that are tried, at most.
        seed: of the subject.
        tell: told of each measurement.

    Raises:
        ParameterError: the subject's layout is known late, or its main metric can't be compared.
        BudgetError: the budget is too small for the policy.
        OSError: the file can't be written; known before anything is measured.
    """
    layout = subject.layout
    evictable = None if isinstance(layout, LateLayout) else layout.evictable
    if isinstance(layout, LateLayout) or evictable is None:
        raise ParameterError("calibrate needs a subject whose layout, and its length, is known")
    with TemporaryFile(dir=out.parent):  # not in the end, when everything is measured
        pass
    aside = getattr(subject, "calibration", None)
    subject = subject if aside is None else aside()
    tokens, floor = Budget.parse(budget).tokens(layout), min(policy.min_budget(layout), evictable)
    if tokens < floor:
        raise BudgetError(
            f"budget={budget} is {tokens} tokens per layer, too few for {policy.label}; the "
            f"smallest budget that works is {floor}"
        )
    bench = _Bench(subject, policy, seed, tell)
    every = (evictable,) * subject.num_layers
    whole = bench(every)
    curves = []
    for layer in range(subject.num_layers):
        wanted = {floor, *(min(int(step * tokens), evictable) for step in _STEPS)}
        measured = sorted(wanted - {evictable})
        losses = [bench((*every[:layer], b, *every[layer + 1 :])) - whole for b in measured]
        curves.append(Curve((*measured, evictable), (*losses, 0.0)))
    uniform = (tokens,) * subject.num_layers
    best = min((uniform, share_out(curves, sum(uniform))), key=bench)
    best = _improve(bench, best, floor, evictable, max(tokens // 8, 1), moves)
    found = LayerBudgets(
        subject=named[0],
        policy=named[1],
        layout=repr(layout),
        budget=tokens,
        layers=list(best),
        items=bench.items,
        uniform=bench.sign * bench(uniform),
        found=bench.sign * bench(best),
    )
    write_whole(out, found.text())
    return found


def _improve(
    bench: _Bench, best: tuple[int, ...], floor: int, ceiling: int, step: int, moves: int
) -> tuple[int, ...]:
    """Move tokens from layer to layer as long as that helps, then fewer at a time."""
    while moves > 0 and step > 0:
        before = best
        for giver, taker in permutations(range(len(best)), 2):
            amount = min(step, best[giver] - floor, ceiling - best[taker])
            if amount <= 0 or moves <= 0:
                continue
            tried = list(best)
            tried[giver] -= amount
            tried[taker] += amount
            moves -= tuple(tried) not in bench.known
            best = min(best, tuple(tried), key=bench)
        if best == before:
            step //= 2
    return best


class _Exact(Schedule):
    """These tokens, whatever is asked."""

    tokens: tuple[int, ...]

    def weights(self, num_layers: int) -> Sequence[Fraction]:
        return [Fraction(tokens) for tokens in self.tokens]

    def layers(
        self, budget: int, num_layers: int, *, floor: int = 0, ceiling: int | None = None
    ) -> tuple[int, ...]:
        return self.tokens


class _Bench:
    """The main metric at given budgets of layers, lower = better, each measured once."""

    def __init__(self, subject: Subject, policy: EvictionPolicy, seed: int, tell: Tell) -> None:
        self.subject, self.policy, self.seed, self.tell = subject, policy, seed, tell
        self.metric = subject.metrics[0]
        if self.metric.array is None or self.metric.better is None:
            raise ParameterError(
                f"metric {self.metric.name!r} has no items, or no better: nothing to calibrate by"
            )
        self.sign = -1 if self.metric.better == "higher" else 1
        self.items = 0
        self.known: dict[tuple[int, ...], float] = {}

    def __call__(self, layers: tuple[int, ...]) -> float:
        if layers not in self.known:
            exact = _Exact(tokens=layers)
            kind = type("Trial", (type(self.policy),), {"schedule": lambda policy: exact})
            policy = kind(**self.policy.model_dump())
            setting = Setting(policy, str(max(layers)))
            measured = self.subject.measure(setting, self.seed, [self.metric.name])
            array = measured.arrays[self.metric.array or ""]
            statistic = self.metric.statistic
            value = float(array.mean() if statistic is None else statistic(array))
            self.items = len(array)
            self.known[layers] = self.sign * value
            self.tell(layers, value)
        return self.known[layers]
