"""Decider: before a token comes, the policy names the slots that it and later ones may take."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvpolicy.cache.plan import LayerPlan
from kvpolicy.errors import BudgetError, CacheStateError, ShapeError
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotStore

__all__ = ["FORESEEN", "MOST_POSITIONS", "Decider", "DecisionRecorder"]

#: Tokens ahead of which a layer asks, at most, when its next decision is due.
FORESEEN = 128
#: Positions are int32, and ranking adds as much to those that are protected.
MOST_POSITIONS = 2**30


class DecisionRecorder(Protocol):
    """Told of each decision of a layer; see :mod:`kvpolicy.tracing.recording`."""

    def decided(self, plan: LayerPlan, store: SlotStore, view: CacheView, victims: Tensor) -> None:
        """A decision has been made, and not yet taken effect."""

    def compressed(
        self, plan: LayerPlan, store: SlotStore, view: CacheView, victims: Tensor
    ) -> None:
        """A prompt is about to lose these tokens at once."""

    def padded(self, first: int, dead: Tensor) -> None:
        """Of the tokens from position ``first`` on, these are padding, bool ``[B, T]``."""

    def committed(self, seen: int, staged: int, kept: int) -> None:
        """Of ``staged`` tokens behind the first ``seen``, the first ``kept`` stay."""

    def select_batch(self, index: Tensor) -> None:
        """The batch is reordered."""

    def reset(self) -> None:
        """A new sequence begins."""


def _of_first_half(view: CacheView, victims: Tensor) -> Tensor:
    """What the first half of a batch gives up, for both; slots ``[2B, H, count]``."""
    first, second = view.positions.tensor_split(2)
    if len(first) != len(second):
        raise CacheStateError(
            f"halves='first' wants as many sequences in the second half of a batch as in the "
            f"first, not {len(first) + len(second)} in all"
        )
    if victims.device.type != "cpu":
        torch._assert_async((first == second).all())
    elif not torch.equal(first, second):
        raise CacheStateError(
            f"halves='first': before position {view.seen} of layer {view.layer} the halves of the "
            f"batch hold other tokens than each other (is one padded, or reordered?); with "
            f"halves='own' each decides for itself"
        )
    return victims[: len(first)].repeat(2, 1, 1)


class Decider:
    """Asks one layer's policy, and checks what it says.

    Attributes:
        plan: of the layer.
        recorder: told of each decision, where somebody wants a trace.
        settled: the position before which no decision is due.
    """

    def __init__(self, plan: LayerPlan) -> None:
        self.plan = plan
        self.recorder: DecisionRecorder | None = None
        self.settled = 0

    def victims(self, store: SlotStore, view: CacheView, block: int) -> Tensor | None:
        """The slots to reclaim next, so that the next ``block`` tokens have room; None if they do.

        Nothing has changed if this raises, but that tokens behind a window are gone.

        Raises:
            BudgetError: there can't be so much room.
            ShapeError: the policy names no slots, or not as many as it was asked for.
        """
        wanted = max(self._headroom(view), block)
        if view.room >= wanted:
            return None
        count = wanted - store.fresh
        if count > view.budget:
            raise BudgetError(self._too_much(view, wanted, block))
        self.expire(store, view.seen)
        victims = self.ask(view, count)
        if block > 1:
            self._check_block(view, victims, block)
        if self.recorder is not None:
            self.recorder.decided(self.plan, store, view, victims)
        return victims

    def foresee(self, view: CacheView, room: int, block: int) -> None:
        """Find out how many tokens can come with no decision between them, at least ``block``.

        What a policy wants is known ahead, as it reads no tensors for it. Nothing is settled beyond
        the layout's end: who comes there is refused, and need not be looked for before.
        """
        seen, length = view.seen, view.layout.length
        calm = min(room, FORESEEN, (MOST_POSITIONS if length is None else length) - seen)
        if length is None or room < length - seen:
            for ahead in range(1, calm):
                # One view for all of them: headroom() reads none of what a view remembers.
                view.seen, view.room = seen + ahead, room - ahead
                if self._headroom(view) > view.room:
                    calm = ahead
                    break
        self.settled = seen + max(calm, block)

    def ask(self, view: CacheView, count: int) -> Tensor:
        """Ask the policy for victims, and refuse an answer that names anything but slots.

        Raises:
            ShapeError: it has another shape or dtype, or names what is no slot of the view's.
            CacheStateError: halves are to give up the same, and don't hold the same.
        """
        policy = self.plan.policy
        victims = policy.victims(view, count)
        expected = (*view.positions.shape[:2], count)
        if tuple(victims.shape) != expected or victims.dtype != torch.int64:
            raise ShapeError(
                f"{policy.label}.victims gave {victims.dtype} {list(victims.shape)}; expected "
                f"int64 {list(expected)}"
            )
        if not policy.own_ranking:
            self._check_range(victims, view.handed_out)
        return _of_first_half(view, victims) if self.plan.alike else victims

    def expire(self, store: SlotStore, seen: int) -> None:
        """Empty the slots of tokens behind a sliding window: no query will see them again."""
        if self.plan.window is not None:
            store.positions.masked_fill_(store.positions <= seen - self.plan.window, -1)

    def _headroom(self, view: CacheView) -> int:
        """What the policy wants free, but never more than the layout still has tokens."""
        wanted = self.plan.policy.headroom(view)
        length = view.layout.length
        return wanted if length is None else min(wanted, length - view.seen)

    def _check_range(self, victims: Tensor, held: int) -> None:
        """Refuse slots that hold no token: kernels trust what comes behind this."""
        least, most = victims.aminmax()
        if victims.device.type != "cpu":
            torch._assert_async((least >= 0) & (most < held))
        elif int(least) < 0 or int(most) >= held:
            raise ShapeError(
                f"{self.plan.policy.label}.victims named slot {int(least if least < 0 else most)}; "
                f"slots are 0 to {held - 1} (places in the view's tensors, not positions)"
            )

    def _check_block(self, view: CacheView, victims: Tensor, block: int) -> None:
        """Refuse to give up protected tokens for a block that is too large for what is left.

        Raises:
            BudgetError: among the victims are tokens that the policy protects.
        """
        kept, policy = view.pinned, self.plan.policy
        said = policy.protect(view) if isinstance(policy, ScoredPolicy) else None
        if said is not None:
            kept = kept | said
        if bool((kept & ~view.empty).gather(2, victims).any()):
            raise BudgetError(self._too_much(view, block, block))

    def _too_much(self, view: CacheView, wanted: int, block: int) -> str:
        """Why so many slots can't be free at once."""
        name, where = self.plan.policy.label, f"position {view.seen} of layer {view.layer}"
        if block > 1:
            return (
                f"{block} tokens from {where} see each other, so they must be cached together, but "
                f"{name} with {view.budget} evictable tokens can't free so many slots; give a "
                f"larger budget, or bring them in the first call"
            )
        return (
            f"{name} wants {wanted} free slots at {where}, which may hold only {view.budget} "
            f"evictable tokens; min_budget must say so"
        )
