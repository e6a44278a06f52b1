"""Staged tokens with no decision between them: attended together, and taken back one by one.

What observers are to hear of them waits until it is known how many of them stay, and is then what
those alone would have given. As wherever several tokens attend at once, sums are those of one token
after the other but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvpolicy.cache.beside import attend_beside
from kvpolicy.cache.staging import Staging
from kvpolicy.cache.terms import Terms
from kvpolicy.observers import AttentionObserver, AttentionReport
from kvpolicy.ops.attend import attend
from kvpolicy.slots import SlotStore

__all__ = ["RunNews", "attend_staged"]


class RunLayer(Protocol):
    """What a run of staged tokens needs of its layer."""

    seen: int
    observers: Sequence[AttentionObserver]
    need_mass: bool

    def require_store(self) -> SlotStore:
        """The layer's slots, which are there once a token has come."""


@dataclass(frozen=True)
class RunNews:
    """What observers are to hear of T tokens that were staged together.

    Attributes:
        slots: where they lie, int64 ``[B, H, T]``.
        fresh: how many of them, the first ones, lie in slots that no token had held.
        held: slots that had held a token before.
        report: mass to those slots, and to the new tokens beside them, ``[B, H, T, held + T]``;
            None where nobody asks.
    """

    slots: Tensor
    fresh: int
    held: int
    report: AttentionReport | None

    def of_first(self, count: int) -> tuple[Tensor | None, AttentionReport | None]:
        """Which slots were reclaimed, and what attention did, if only ``count`` had come."""
        slots, report = self.slots[:, :, :count], self.report
        reclaimed = slots[:, :, self.fresh :] if count > self.fresh else None
        if report is None:
            return reclaimed, None
        mass = report.mass[:, :, :count]
        by_slot = mass.new_zeros(*mass.shape[:3], self.held + min(count, self.fresh))
        by_slot[..., : self.held] = mass[..., : self.held]
        # What is given to victims by those who still saw them is nobody's any more.
        new = mass[..., self.held : self.held + count]
        by_slot.scatter_(3, slots.unsqueeze(2).expand_as(new), new)
        room = report.room + self.slots.shape[2] - count
        return reclaimed, AttentionReport(by_slot, report.first, room, report.layout)


def attend_staged(
    layer: RunLayer,
    staging: Staging,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    report: Callable[[Tensor, int, int], AttentionReport],
) -> Tensor:
    """Write T tokens for which there is room, attend from them, and keep back what they report.

    Args:
        layer: the layer.
        staging: its stage.
        query: ``[B, G * H, T, D]``.
        key: ``[B, H, T, D]``.
        value: ``[B, H, T, Dv]``.
        terms: of these T queries.
        report: makes a report of mass ``[B, H, T, N]`` from a position on, with so much room left.

    Returns:
        Output ``[B, G * H, T, Dv]``.
    """
    store, first, count = layer.require_store(), layer.seen, key.shape[2]
    old, fresh = store.cached(), min(store.fresh, count)
    slots, reclaimed = store.take(count)
    staging.keep(store, slots, reclaimed is not None)
    if terms.visible is None and terms.bias is None and not store.may_be_empty:
        output, mass = _attend_plainly(query, key, value, terms, old, reclaimed, layer.need_mass)
    else:
        # One part: decisions are foreseen no further ahead than as many queries attend at once.
        (part,) = attend_beside(
            query,
            key,
            value,
            terms,
            list(range(1, count + 1)),
            seen=first,
            old=old,
            slots=slots,
            need_mass=layer.need_mass,
            weights=False,
        )
        output, mass = part.output, part.mass
    if layer.observers:
        told = None if mass is None else report(mass, first, store.room)
        staging.hear_run(first, RunNews(slots, fresh, old[2].shape[2], told))
    store.write(slots, key.detach(), value.detach(), first)
    layer.seen = first + count
    return output


def _attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    old: tuple[Tensor, Tensor, Tensor],
    reclaimed: Tensor | None,
    need_mass: bool,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention to old slots that all hold a token, each until it is reclaimed."""
    count, held = query.shape[2], old[0].shape[2]
    batch, heads = key.shape[:2]
    rows = 1 if reclaimed is None else heads
    visible = query.new_ones(batch, rows, count, held + count, dtype=torch.bool)
    causal = visible.new_ones(count, count).tril()
    visible[..., held:] = causal
    if reclaimed is not None:
        # The last tokens are those that reclaim: an old slot is seen before its turn.
        turns = ~causal[:, count - reclaimed.shape[2] :]
        into = reclaimed.unsqueeze(2).expand(batch, heads, *turns.shape)
        visible.scatter_(3, into, turns.expand_as(into))
    return attend(
        query,
        torch.cat([old[0], key], dim=2),
        torch.cat([old[1], value], dim=2),
        scale=terms.scale,
        visible=visible,
        softcap=terms.softcap,
        sinks=terms.sinks,
        need_mass=need_mass,
    )
