"""Lending: layers that keep no keys and values of their own attend to those of a layer below."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.cache.terms import Terms
from kvpolicy.errors import CacheStateError
from kvpolicy.ops.attend import attend, attend_with_weights, by_slot
from kvpolicy.slots import SlotStore

__all__ = ["Lending", "Pass"]


class Pass(NamedTuple):
    """One attention over slots, as it was: what it takes to repeat it.

    Attributes:
        queries: how many there were.
        keys: ``[B, H, N, D]``.
        values: ``[B, H, N, Dv]``.
        visible: ``[B, H, T, N]``; None hides nothing.
        bias: by slot, likewise.
        positions: of the keys, ``[B, H, N]``, -1 = empty.
    """

    queries: int
    keys: Tensor
    values: Tensor
    visible: Tensor | None
    bias: Tensor | None
    positions: Tensor

    def attend(
        self, query: Tensor, terms: Terms, *, need_mass: bool, weights: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Attend from the last of these queries, or from others in their place.

        Args:
            query: ``[B, G * H, T', D]``, where T' is at most ``queries``.
            terms: scale, soft cap and sinks; masks are those here.
            need_mass: whether to return the mass.
            weights: whether to return what each query head gave.

        Returns:
            Output, mass ``[B, H, T', N]`` and weights ``[B, G * H, T', N]``.
        """
        rows = Terms(visible=self.visible, bias=self.bias).rows(slice(-query.shape[2], None))
        if weights:
            output, mass, given = attend_with_weights(
                query,
                self.keys,
                self.values,
                scale=terms.scale,
                visible=rows.visible,
                bias=rows.bias,
                softcap=terms.softcap,
                sinks=terms.sinks,
            )
            return output, mass if need_mass else None, given
        output, reported = attend(
            query,
            self.keys,
            self.values,
            scale=terms.scale,
            visible=rows.visible,
            bias=rows.bias,
            softcap=terms.softcap,
            sinks=terms.sinks,
            need_mass=need_mass,
        )
        return output, reported, None

    def copied(self) -> Pass:
        """The same with tensors of its own: a slot is about to be overwritten."""
        return self._replace(
            keys=self.keys.clone(), values=self.values.clone(), positions=self.positions.clone()
        )


class Lending:
    """What the newest call of a layer attended to, for the layers that borrow from it.

    Args:
        layer: index of the layer that lends.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.passes: list[Pass] = []

    def keep(self, store: SlotStore, terms: Terms) -> None:
        """Keep what a token that has been written attended to; slots are not copied."""
        keys, values, positions = store.cached()
        visible = (positions >= 0).unsqueeze(2)
        if terms.visible is not None:
            visible = visible & by_slot(terms.visible, positions)
        bias = None if terms.bias is None else by_slot(terms.bias, positions)
        self.passes.append(Pass(1, keys, values, visible, bias, positions))

    def copy_slots(self) -> None:
        """Make what the newest pass attended to its own: a slot is about to be overwritten."""
        self.passes[-1] = self.passes[-1].copied()

    def attend(
        self, query: Tensor, terms: Terms, seen: int, *, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from another layer's queries to what the newest T tokens attended to.

        Nothing is cached and nothing observed: a layer that borrows keys and values has no say in
        what the layer that owns them keeps.

        Args:
            query: ``[B, G * H, T', D]``, of the last T' of those T tokens.
            terms: scale, soft cap and sinks of the borrowing layer; masks are the owner's.
            seen: tokens of the sequence so far.
            weights: whether to return the weights.

        Returns:
            Output ``[B, G * H, T', Dv]``, and weights by position ``[B, G * H, T', seen]``.

        Raises:
            CacheStateError: there are more queries than tokens.
        """
        skipped = sum(each.queries for each in self.passes) - query.shape[2]
        if skipped < 0:
            raise CacheStateError(
                f"layer {self.layer} lends its tokens to {query.shape[2]} queries, but its own "
                f"newest call had {query.shape[2] + skipped}"
            )
        outputs, given = [], []
        done = 0
        for each in self.passes:
            if skipped >= each.queries:
                skipped -= each.queries
                continue
            count, skipped = each.queries - skipped, 0
            output, _, by_slot_ = each.attend(
                query[:, :, done : done + count], terms, need_mass=False, weights=weights
            )
            if by_slot_ is not None:
                given.append(by_position(by_slot_, each.positions, seen))
            outputs.append(output)
            done += count
        return torch.cat(outputs, dim=2), torch.cat(given, dim=2) if given else None


def by_position(weights: Tensor, positions: Tensor, length: int) -> Tensor:
    """Weights by slot ``[B, G * H, T, N]``, sorted by position ``[B, G * H, T, length]``.

    Args:
        weights: what each query head gave to each slot; nothing to empty ones.
        positions: of the slots, ``[B, H, N]``, -1 = empty.
        length: positions that there are; those that are not cached got nothing.
    """
    where = positions.clamp(min=0).to(torch.int64).unsqueeze(2)
    where = where.repeat_interleave(weights.shape[1] // positions.shape[1], dim=1)
    sorted_ = weights.new_zeros(*weights.shape[:3], length)
    return sorted_.scatter_add_(3, where.expand_as(weights), weights)
