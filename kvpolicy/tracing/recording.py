"""Recording: watches the decisions of a cache while a block runs, and makes a trace of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kvpolicy.cache.cache import PolicyCache
from kvpolicy.cache.layer import Layer
from kvpolicy.cache.plan import LayerPlan
from kvpolicy.errors import CacheStateError, ParameterError
from kvpolicy.layout import OrderedLayout
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotStore
from kvpolicy.tracing.trace import STAYS, LayerTrace, Trace, check_pictures

__all__ = ["Recording", "trace"]


class _HasPolicyCache(Protocol):
    @property
    def policy_cache(self) -> PolicyCache: ...


class Recording:
    """A trace that is being made; what :func:`trace` gives."""

    def __init__(self, cache: PolicyCache, samples: Sequence[int] | None, *, scores: bool) -> None:
        self._cache = cache
        self._recorders = {
            layer.plan.layer: _Recorder(samples, scores=scores)
            for layer in cache.layers
            if layer.plan.layer not in cache.stats().left_alone
        }
        for index, recorder in self._recorders.items():
            if cache.layers[index].seen:
                raise CacheStateError(
                    f"layer {index} has seen {cache.layers[index].seen} tokens already; a trace "
                    f"begins before the first one: reset() the cache, or trace it from the start"
                )
            if cache.layers[index].decider.recorder is not None:
                raise CacheStateError("this cache is being traced already")
            cache.layers[index].decider.recorder = recorder

    def stop(self) -> None:
        """Record nothing any more."""
        for index in self._recorders:
            self._cache.layers[index].decider.recorder = None

    def finish(self, images: Tensor | None = None, prompts: Sequence[str] | None = None) -> Trace:
        """The trace so far.

        Args:
            images: what was drawn, to keep beside it: uint8 ``[B, height, width]``, or
                ``[B, height, width, 3]`` in colour.
            prompts: what each of them was asked to show.

        Raises:
            CacheStateError: no token has come yet, or tokens are staged.
            ParameterError: images or prompts are not those of the samples, or images have another
                shape.
        """
        if self._cache.staged:
            raise CacheStateError(
                f"{self._cache.staged} tokens are staged, and who knows what stays; commit() first"
            )
        layers = {
            index: recorder.finish(self._cache.layers[index])
            for index, recorder in self._recorders.items()
        }
        rows = next(iter(layers.values())).gone.shape[0] if layers else 0
        layout = self._cache.layout
        ordered = layout if isinstance(layout, OrderedLayout) else None
        image = layout if ordered is None else ordered.grid
        sizes = {n: getattr(image, n, None) for n in ("rows", "cols", "line_break", "prefix")}
        grid = {name: size for name, size in sizes.items() if isinstance(size, int)}
        policy = self._cache.policy
        found = Trace(
            policy=policy.label,
            parameters=policy.model_dump(mode="json"),
            layout=repr(layout),
            grid=grid if len(grid) == len(sizes) else None,
            seen=self._cache.seen,
            budgets=tuple(layer.budget for layer in self._cache.layers),
            layers=layers,
            images=images,
            prompts=None if prompts is None else tuple(prompts),
            passes=next(iter(self._recorders.values())).committed_so_far() if layers else None,
            order=None if ordered is None else _numbers(ordered.order),
            groups=None if ordered is None else _numbers(ordered.groups),
        )
        try:
            check_pictures(found)
        except ValueError as error:
            raise ParameterError(
                f"{error}; expected uint8 [{rows}, height, width], or [{rows}, height, width, 3] "
                f"in colour, a whole number of pixels a token, and as many prompts"
            ) from None
        return found

    def save(self, path: Path | str) -> None:
        """Write the trace so far; see :meth:`Trace.save`."""
        self.finish().save(path)


@contextmanager
def trace(
    cache: PolicyCache | _HasPolicyCache,
    *,
    samples: Sequence[int] | None = None,
    scores: bool = True,
) -> Iterator[Recording]:
    """Record every decision that is made while a block runs.

    Example::

        with attach(model, policy="linear", budget="1/6") as cache, kvpolicy.trace(cache) as trace:
            model.generate(**inputs, cache=cache)
        trace.save("linear.trace.safetensors")

    Args:
        cache: a cache that has seen no token yet.
        samples: sequences of the batch to record; all by default.
        scores: whether to record the scores, too, which are most of what a trace holds.

    Raises:
        CacheStateError: the cache has seen tokens, or is being traced already.
    """
    inner = cache if isinstance(cache, PolicyCache) else cache.policy_cache
    recording = Recording(inner, samples, scores=scores)
    try:
        yield recording
    finally:
        recording.stop()


@dataclass
class _Decision:
    """One decision, as it was made; what it removed is gone once ``after`` tokens are seen."""

    seen: int
    after: int
    fresh: int
    victims: Tensor
    places: Tensor | None
    scores: Tensor | None
    window: int | None
    eager: bool
    reclaimed: int = 0


@dataclass
class _Recorder:
    """Watches one layer; asked only where a decision is made."""

    samples: Sequence[int] | None
    scores: bool
    decisions: list[_Decision] = field(default_factory=list)
    #: Position of the first of some tokens, and which of them are padding, bool ``[B, T]``.
    padding: list[tuple[int, Tensor]] = field(default_factory=list)
    #: Tokens seen before each stage or commit, tokens staged behind them, and how many were kept.
    passes: list[tuple[int, int, int]] = field(default_factory=list)

    def reset(self) -> None:
        """Forget everything: a new sequence begins."""
        self.decisions.clear()
        self.padding.clear()
        self.passes.clear()

    def committed(self, seen: int, staged: int, kept: int) -> None:
        """Some staged tokens stay; decisions made for the others were not made."""
        self.passes.append((seen, staged, kept))
        after = seen + kept
        self.decisions = [decision for decision in self.decisions if decision.seen < after]
        self.padding = [(first, dead) for first, dead in self.padding if first < after]

    def committed_so_far(self) -> Tensor | None:
        """Seen before, staged and kept, of each commit, int32 ``[N, 3]``; None where none was."""
        return torch.tensor(self.passes, dtype=torch.int32) if self.passes else None

    def select_batch(self, index: Tensor) -> None:
        """Follow a batch whose sequences are reordered."""
        if self.samples is not None:
            raise CacheStateError(
                "a trace of some samples can't follow a batch that is reordered; trace them all"
            )
        for decision in self.decisions:
            for name in ("victims", "places", "scores"):
                tensor = getattr(decision, name)
                if tensor is not None:
                    setattr(decision, name, tensor.index_select(0, index.to(tensor.device)))
        self.padding = [
            (first, dead.index_select(0, index.to(dead.device))) for first, dead in self.padding
        ]

    def padded(self, first: int, dead: Tensor) -> None:
        """Some new tokens are padding: they are never cached, and replace nothing."""
        self.padding.append((first, self._rows(dead)))

    def decided(self, plan: LayerPlan, store: SlotStore, view: CacheView, victims: Tensor) -> None:
        """A decision is about to take the place of the one before.

        Args:
            plan: of the layer.
            store: its slots; the victims named there are still those of the decision before.
            view: what the policy saw.
            victims: the slots that it chose, ``[B, H, N]``.
        """
        self._close(store)
        positions = view.positions
        scores = places = None
        if self.scores and isinstance(plan.policy, ScoredPolicy):
            places = self._rows(positions).to(torch.int32).clone()
            scores = self._rows(plan.policy.score(view)).to(torch.float16).clone()
        self.decisions.append(
            _Decision(
                seen=view.seen,
                after=view.seen + 1,
                fresh=store.fresh,
                victims=self._rows(positions.gather(2, victims)).clone(),
                places=places,
                scores=scores,
                window=plan.window,
                eager=plan.eager,
            )
        )

    def compressed(
        self, plan: LayerPlan, store: SlotStore, view: CacheView, victims: Tensor
    ) -> None:
        """A prompt has been compressed: all victims are gone at once."""
        self.decided(plan, store, view, victims)
        # As if they were hidden: no slot of theirs is left to reclaim.
        self.decisions[-1].eager = True
        self.decisions[-1].after = view.seen

    def _close(self, store: SlotStore) -> None:
        """Note how many of the newest decision's victims have been reclaimed."""
        if self.decisions:
            self.decisions[-1].reclaimed = store.reclaimed

    def _rows(self, tensor: Tensor) -> Tensor:
        return tensor if self.samples is None else tensor[list(self.samples)]

    def finish(self, layer: Layer) -> LayerTrace:
        """The layer's trace so far."""
        store = layer.require_store()
        self._close(store)
        positions = self._rows(store.positions)
        batch, heads = positions.shape[:2]
        gone = positions.new_full((batch, heads, layer.seen), STAYS, dtype=torch.int32)
        dead = torch.zeros(batch, layer.seen + 1, dtype=torch.bool, device=gone.device)
        for first, padding in self.padding:
            dead[:, first : first + padding.shape[1]] = padding
        for decision in self.decisions:
            self._apply(decision, gone, dead)
        came = torch.arange(1, layer.seen + 1, device=gone.device, dtype=torch.int32)
        gone = torch.where(dead[:, None, :-1], came, gone)
        device = gone.device
        nothing = torch.zeros(batch, heads, 0, dtype=torch.int32, device=device)
        scored = [d for d in self.decisions if d.places is not None]
        traced = LayerTrace(
            gone=gone,
            decided=_numbers([d.seen for d in self.decisions]),
            counts=_numbers([d.victims.shape[2] for d in self.decisions]),
            victims=torch.cat([nothing, *(d.victims for d in self.decisions)], dim=2),
            candidates=_numbers(
                [0 if d.places is None else d.places.shape[2] for d in self.decisions]
            ),
            places=torch.cat([nothing, *(d.places for d in scored if d.places is not None)], dim=2),
            scores=torch.cat(
                [nothing.to(torch.float16), *(d.scores for d in scored if d.scores is not None)],
                dim=2,
            ),
        )
        return LayerTrace(**{name: tensor.cpu() for name, tensor in vars(traced).items()})

    def _apply(self, decision: _Decision, gone: Tensor, padding: Tensor) -> None:
        """Enter what a decision removed."""
        places = torch.arange(gone.shape[2], device=gone.device, dtype=torch.int32)
        dead = torch.zeros_like(gone, dtype=torch.bool)
        if decision.window is not None:
            dead |= places <= decision.seen - decision.window
        gone.copy_(torch.where(dead & (gone == STAYS), decision.after, gone))
        victims = decision.victims
        turn = torch.arange(victims.shape[2], device=gone.device, dtype=torch.int32)
        if decision.eager:
            moment = torch.full_like(turn, decision.after)
        else:
            # Fresh slots are used first, then the victims in their order, one a token.
            victims = victims[..., : decision.reclaimed]
            moment = (turn + decision.fresh + decision.after)[: decision.reclaimed]
            # The token that took its slot came right before; padding takes none.
            victims = torch.where(padding[:, None, moment.long() - 1], -1, victims)
        # Slots that were empty go to a column of their own.
        column = torch.where(victims >= 0, victims, gone.shape[2]).to(torch.int64)
        wider = torch.nn.functional.pad(gone, (0, 1), value=STAYS)
        wider.scatter_(2, column, moment.expand_as(column).to(torch.int32))
        gone.copy_(wider[..., :-1])


def _numbers(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)
