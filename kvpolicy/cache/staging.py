"""Staging: tokens that attention has seen, but that may still be taken back.

Staged tokens come as ever, each as if it came alone, decisions and evictions included. What one of
them overwrites is kept aside before it is written, and observers hear of it only when it is sure,
or when a decision has to be made from what it attended to. Between two decisions all that a layer
knows follows from what it knew behind the first of them and from how many tokens came since. So
only decisions need copies of positions and readings; of a token, what its slot held is enough.

To take tokens back is to put back what their slots held, and what the layer knew behind the last
decision before them; and to go on from there with the tokens that stay, without attending again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

from torch import Tensor

from kvpolicy.cache import readings
from kvpolicy.cache.aside import Aside
from kvpolicy.cache.decider import Decider
from kvpolicy.cache.lending import Lending
from kvpolicy.cache.plan import LayerPlan
from kvpolicy.errors import CacheStateError
from kvpolicy.layout import TokenLayout
from kvpolicy.observers import AttentionObserver, AttentionReport
from kvpolicy.slots import SlotBooks, SlotStore

__all__ = ["LayerBooks", "StagedLayer", "Staging", "Tell"]

#: Tells which slots hold other tokens now, and what attention did.
Tell = Callable[[Tensor | None, AttentionReport | None], None]

#: Slots a head that are allocated at first, where more may be staged.
_FIRST = 64


class LayerBooks(NamedTuple):
    """All that a layer knows besides what its store and its observers do; see ``Layer``."""

    store: SlotStore | None
    observers: Sequence[AttentionObserver]
    need_mass: bool
    layout: TokenLayout | None
    budget: int
    seen: int
    reports: int
    settled: int


class StagedLayer(Protocol):
    """What staging asks of a layer; see :class:`kvpolicy.cache.layer.Layer`."""

    plan: LayerPlan
    layout: TokenLayout | None
    store: SlotStore | None
    observers: Sequence[AttentionObserver]
    decider: Decider
    lending: Lending | None
    staging: Staging | None
    seen: int
    whole: bool
    books: LayerBooks

    def require_store(self) -> SlotStore:
        """The layer's slots, which are there once a token has come."""

    def deliver(self, reclaimed: Tensor | None, report: AttentionReport | None) -> None:
        """Tell observers which slots hold other tokens now, and what attention did."""


class RunNews(Protocol):
    """What observers are to hear of tokens that were staged together, and may go one by one."""

    @property
    def slots(self) -> Tensor:
        """Where they lie, ``[B, H, T]``."""

    @property
    def report(self) -> AttentionReport | None:
        """What all of them gave."""

    def of_first(self, count: int) -> tuple[Tensor | None, AttentionReport | None]:
        """Which slots were reclaimed, and what attention did, if only so many had come."""


class _News(NamedTuple):
    """What observers are to hear of the token (or block, or run) at ``token`` of the stage."""

    token: int
    reclaimed: Tensor | None
    report: AttentionReport | None
    run: RunNews | None = None


@dataclass
class _Segment:
    """Staged tokens with no decision between them, and what the layer knew before the first.

    Attributes:
        begin: tokens staged before it.
        decided: whether a decision, or a new layout, came between those and its first token.
        books: of the layer, behind that decision.
        slots: of its store, likewise; None where there was no store.
        known: what its observers knew, copied before they were told more; None until then.
        end: tokens staged up to its last one; None while it is open.
        positions: of the store at its end, copied then where decisions change them: where they hide
            victims, or tokens behind a window.
    """

    begin: int
    decided: bool
    books: LayerBooks
    slots: SlotBooks | None
    known: list[readings.Reading] | None = None
    end: int | None = None
    positions: Tensor | None = None


class Staging:
    """What one layer has staged, and what it takes to take it back.

    Args:
        layer: the layer.

    Attributes:
        together: whether the tokens of a call may attend together.
        apart: whether observers are told at once of the tokens that come now.
        opens: the position of the first token to be staged, in a stage that has not come to it;
            None in one that has, and outside of one.
    """

    def __init__(self, layer: StagedLayer) -> None:
        self.layer = layer
        self.together = self.apart = False
        self.opens: int | None = None
        self._lookahead = 0
        self._checked: object = ()
        self._aside: Aside | None = None
        # Copies that are not needed now, and overwritten by those that are.
        self._spare_positions: list[Tensor] = []
        self._spare_readings: list[list[readings.Reading]] = []
        self._segments: list[_Segment] = []

    def begin(self, lookahead: int, sure: int, together: bool) -> None:
        """Stage tokens from position ``sure`` on, up to ``lookahead`` at once.

        Raises:
            CacheStateError: an observer knows what can't be copied.
        """
        self._lookahead, self.together = lookahead, together
        self.opens = max(sure, self.layer.seen)
        if self.opens == self.layer.seen:
            self.start()
        self.layer.staging = self

    def end(self) -> None:
        """Forget what is staged, also where it was interrupted, and take tokens for sure again."""
        if self.layer.staging is self:
            try:
                self.commit(0)
            finally:
                self.opens = self.layer.staging = None

    def start(self) -> None:
        """Stage from here on: what has come is sure.

        Raises:
            CacheStateError: an observer knows what can't be copied.
        """
        if self._aside is not None:
            self._aside.clear()
        self._go_on()

    def _go_on(self) -> None:
        """Stage from here on, with what is copied ahead of the tokens to come."""
        for segment in self._segments:
            if segment.positions is not None:
                self._spare_positions.append(segment.positions)
            if segment.known is not None:
                self._spare_readings.append(segment.known)
        #: Slots kept aside: one for each staged token, and for one that was interrupted.
        self.kept = 0
        self._blocks: list[tuple[int, int]] = []
        self._news: list[_News] = []
        self._delivered = 0
        self._segments = []
        self.apart = self._torn = False
        self._open(decided=False)
        self.opens = None

    def restart(self) -> None:
        """All that the layer holds now is sure: it is another sequence, or another batch."""
        if self.opens is None:
            self.start()

    @property
    def staged(self) -> int:
        """Tokens that the layer has seen and that are not sure."""
        return 0 if self.opens is not None else self.layer.seen - self._segments[0].books.seen

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept aside, of copies, and of reports that wait."""
        known = [segment.known for segment in self._segments if segment.known is not None]
        return (
            (0 if self._aside is None else self._aside.nbytes)
            + sum(s.positions.nbytes for s in self._segments if s.positions is not None)
            + sum(map(readings.nbytes, known + self._spare_readings))
            + sum(positions.nbytes for positions in self._spare_positions)
            + sum(news.report.mass.nbytes for news in self._news if news.report is not None)
        )

    # -- while tokens come -------------------------------------------------------------------------

    def admit(self, count: int) -> None:
        """Refuse tokens that can't be staged.

        Raises:
            CacheStateError: with them more than ``lookahead`` would be staged, or nobody knows yet
                where tokens sit.
        """
        if self.staged + count > self._lookahead:
            raise CacheStateError(
                f"{self.staged} tokens are staged and {count} come, but stage() was given a "
                f"lookahead of {self._lookahead}; commit() what is sure first, or give a larger one"
            )
        if self.layer.layout is None:
            raise CacheStateError(
                f"layer {self.layer.plan.layer} does not know yet where tokens sit, and what comes "
                f"now would say so; bring the prompt before the stage"
            )

    def no_prompt(self, count: int, capacity: int) -> CacheStateError:
        """Why a prompt that has to be compressed can't be staged."""
        return CacheStateError(
            f"the first call brings {count} tokens for {capacity} slots, so they are compressed at "
            f"once, and none of them could be taken back alone; bring the prompt before the stage"
        )

    def keep(
        self, store: SlotStore, slots: Tensor, reclaims: bool, *, together: bool = False
    ) -> None:
        """Keep aside what slots ``[B, H, T]`` hold, before T tokens are written.

        Args:
            store: the layer's.
            slots: where the tokens go.
            reclaims: whether any of these slots has held a token before.
            together: whether they are a block.
        """
        if self._segments[-1].end is not None:  # a decision was tried, and was refused
            self._open(decided=True)
        count, aside = slots.shape[2], self._aside
        if aside is None or not aside.fits(store, self.kept + count):
            room = min(self._lookahead, max(2 * self.kept, self.kept + count, _FIRST))
            self._aside = Aside(store, room)
            if aside is not None and self.kept:
                self._aside.move_from(aside, self.kept)
        assert self._aside is not None
        self._aside.keep(store, slots, self.kept, reclaims)
        if together and count > 1:
            self._blocks.append((self.kept, self.kept + count))
        self.kept += count

    def hear(self, first: int, reclaimed: Tensor | None, report: AttentionReport | None) -> None:
        """Keep back what observers are to hear of the token, or block, at position ``first``."""
        self._news.append(_News(first - self._segments[0].books.seen, reclaimed, report))

    def teller(self, first: int) -> Tell:
        """Who is told of the tokens from position ``first`` on: whoever comes next."""
        return self.layer.deliver if self.apart else partial(self.hear, first)

    def hear_run(self, first: int, run: RunNews) -> None:
        """Keep back what observers are to hear of the tokens from position ``first`` on."""
        self._news.append(_News(first - self._segments[0].books.seen, None, run.report, run))

    def close(self) -> None:
        """A decision is about to be made: copy what observers know, then tell them all."""
        self._end()
        if self._segments[-1].known is None:
            self._segments[-1].known = self._keep_readings()
        self._deliver(self.kept)

    def _end(self) -> None:
        """No token joins those of the last segment."""
        segment, store = self._segments[-1], self.layer.store
        if segment.end is None:
            segment.end = self.kept
            if store is not None and (store.hides or self.layer.plan.window is not None):
                spare = self._spare_positions.pop() if self._spare_positions else None
                segment.positions = readings.copied(store.positions, spare)

    def _keep_readings(self) -> list[readings.Reading]:
        spare = self._spare_readings.pop() if self._spare_readings else None
        return readings.keep(self.layer.observers, spare)

    def isolate(self) -> None:
        """Tell observers at once of what comes next: it may be padding, which they then forget."""
        if self._segments[-1].begin < self.kept or self._segments[-1].end is not None:
            self.close()
            self._open(decided=False)
        segment = self._segments[-1]
        segment.known = self._keep_readings()
        self.apart = True

    def rejoin(self) -> None:
        """What :meth:`isolate` was called for has come."""
        self.apart = False
        self._end()
        self._open(decided=False)

    def decided(self) -> None:
        """A decision has been made: tokens behind it go on from what the layer knows now."""
        self._open(decided=True)

    def _open(self, *, decided: bool) -> None:
        store, observers = self.layer.store, self.layer.observers
        if self._checked is not observers:
            readings.check_readable(observers)
            self._checked = observers
        slots = None if store is None else store.books
        self._segments.append(_Segment(self.kept, decided, self.layer.books, slots))
        if decided and self._aside is not None:
            self._aside.decided(self.kept)

    def _deliver(self, count: int) -> None:
        """Tell observers what they have not heard of the first ``count`` tokens."""
        while self._delivered < len(self._news) and self._news[self._delivered].token < count:
            news = self._news[self._delivered]
            self._delivered += 1
            if news.run is None:
                self.layer.deliver(news.reclaimed, news.report)
            else:
                stay = min(count - news.token, news.run.slots.shape[2])
                self.layer.deliver(*news.run.of_first(stay))

    # -- when it is known which of them stay -------------------------------------------------------

    def check(self, count: int) -> None:
        """Refuse to keep a part of a block: who saw the rest can't stay without it.

        Raises:
            CacheStateError: ``count`` tokens end within a block.
        """
        for begin, end in self._blocks:
            if begin < count < end:
                raise CacheStateError(
                    f"commit({count}): staged tokens {begin} to {end - 1} see each other, so they "
                    f"stay or go together; commit({begin}) or commit({end})"
                )

    def commit(self, count: int) -> None:
        """Keep the first ``count`` staged tokens, forget the others, and stage from there on."""
        if self.opens is not None or self._torn:
            return  # nothing is; or nobody can tell what observers know, and the layer says so
        layer, last, staged = self.layer, self._segments[-1], self.staged
        count = min(count, staged)  # a layer that is left out of a pass has none
        # A decision for a token that has not come is taken back with it.
        ahead = last.end is not None or (last.decided and last.begin == count)
        stays = count == self.kept and not ahead and layer.whole
        if not stays:
            layer.whole = False
            self._take_back(count)
        layer.whole, self._torn = False, True
        self._deliver(count)
        recorder = layer.decider.recorder
        if recorder is not None and staged:
            recorder.committed(layer.seen - count, staged, count)
        if self._aside is not None and stays:
            self._aside.stay(count)
            self._go_on()
        else:
            self.start()
        layer.whole = True

    def _take_back(self, count: int) -> None:
        """The layer as it was when ``count`` tokens had come.

        But for what observers knew of those behind the last decision: they are about to be told.
        """
        layer = self.layer
        segment = next(
            s
            for s in reversed(self._segments)
            if s.begin < count or (s.begin == count and not s.decided)
        )
        store = layer.store
        layer.books = segment.books  # its store among them
        if store is not None and store is layer.store and self._aside is not None:
            end = self.kept
            if segment.positions is not None and segment.end is not None:
                store.positions.copy_(segment.positions)
                end = segment.end
            self._aside.put_back(store, count, end, self.kept)
        if segment.slots is not None:
            store = layer.require_store()
            handed_out = store.handed_out
            store.books = segment.slots
            if count > segment.begin:
                store.take(count - segment.begin)
            store.empty_fresh(handed_out)
        layer.seen += count - segment.begin
        if segment.known is not None:
            readings.give_back(layer.observers, segment.known)
            self._delivered = next(
                (i for i, news in enumerate(self._news) if news.token >= segment.begin),
                len(self._news),
            )
        if layer.lending is not None:
            layer.lending.passes = []
