"""NewestCall: what a layer's newest call attended to, where others want to know.

Layers that borrow another layer's keys and values attend to them again, from queries of their own;
and a caller may ask for the attention weights, by position. Both repeat the call as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpolicy.cache.terms import Terms
from kvpolicy.errors import CacheStateError
from kvpolicy.ops.attend import attend

__all__ = ["NewestCall"]


@dataclass(frozen=True)
class Pass:
    """One attention over slots, as it was: what it takes to repeat it."""

    queries: int
    keys: Tensor
    values: Tensor
    visible: Tensor | None
    bias: Tensor | None
    positions: Tensor | None


class NewestCall:
    """The attention of one layer's newest call, kept where somebody will ask for it.

    Args:
        layer: index of the layer.
        lent: whether other layers attend to this layer's tokens, too (:meth:`attend_again`).
    """

    def __init__(self, layer: int, *, lent: bool) -> None:
        self.layer = layer
        self.lent = lent
        # Whether the next call's weights will be asked for (:meth:`weights`).
        self.watched = False
        self.passes: list[Pass] = []

    @property
    def wanted(self) -> bool:
        """Whether a call has to be kept."""
        return self.lent or self.watched

    def forget(self) -> None:
        """A call begins, or the sequence does."""
        self.passes = []

    def keep(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        visible: Tensor | None,
        bias: Tensor | None,
        held: Tensor | None,
        seen: int,
    ) -> None:
        """Keep one attention over slots, if somebody will ask.

        Of the keys, the first lie in slots that hold the positions ``held``; the others, or all,
        are new tokens in order, behind the ``seen`` before them.
        """
        if not self.wanted:
            return
        places = None
        if self.watched:
            old = keys.new_empty(*keys.shape[:2], 0) if held is None else held
            first = 0 if held is None else seen
            new = torch.arange(keys.shape[2] - old.shape[2], device=keys.device) + first
            places = torch.cat([old.long(), new.expand(*keys.shape[:2], -1)], dim=2)
        self.passes.append(Pass(query.shape[2], keys, values, visible, bias, places))

    def copy_slots(self) -> None:
        """Make the newest pass's keys and values its own: a slot is about to be overwritten."""
        if self.wanted:
            latest = self.passes[-1]
            self.passes[-1] = replace(
                latest, keys=latest.keys.clone(), values=latest.values.clone()
            )

    def attend_again(self, query: Tensor, terms: Terms) -> Tensor:
        """Attend from another layer's queries to what the newest T tokens attended to here.

        Nothing is cached and nothing is observed: a layer that borrows keys and values has no say
        in what the layer that owns them keeps.

        Args:
            query: ``[B, G * H, T', D]``, of the last T' of those T tokens.
            terms: scale, soft cap and sinks of the borrowing layer; masks are the owner's.

        Returns:
            Output ``[B, G * H, T', Dv]``.

        Raises:
            CacheStateError: there are more queries than tokens.
        """
        skipped = sum(each.queries for each in self.passes) - query.shape[2]
        if skipped < 0:
            raise CacheStateError(
                f"layer {self.layer} lends its tokens to {query.shape[2]} queries, but its own "
                f"newest call had {query.shape[2] + skipped}"
            )
        outputs = []
        done = 0
        for each in self.passes:
            if skipped >= each.queries:
                skipped -= each.queries
                continue
            rows = Terms(visible=each.visible, bias=each.bias).rows(slice(skipped, None))
            count, skipped = each.queries - skipped, 0
            output, _ = attend(
                query[:, :, done : done + count],
                each.keys,
                each.values,
                visible=rows.visible,
                bias=rows.bias,
                **terms.scoring(),
            )
            outputs.append(output)
            done += count
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def weights(self, query: Tensor, terms: Terms, seen: int) -> Tensor:
        """What the newest call's queries gave to each position, evicted ones (zero) included.

        Made on request by repeating the call, which ``watched`` must have announced, with values
        that tell slots apart: the attention itself never gathers weights by query head.

        Args:
            query: ``[B, G * H, T, D]``, those of the newest call.
            terms: scale, soft cap and sinks.
            seen: tokens of the sequence so far.

        Returns:
            ``[B, G * H, T, seen]``, in the query's dtype.
        """
        weights = query.new_zeros(*query.shape[:3], seen)
        done = 0
        for each in self.passes:
            assert each.positions is not None, "watched was not set"
            rows = slice(done, done + each.queries)
            done += each.queries
            slots = torch.eye(each.keys.shape[2], dtype=query.dtype, device=query.device)
            given = torch.cat(
                [
                    attend(
                        query[:, :, rows],
                        each.keys,
                        slots[:, at : at + 128].expand(*each.keys.shape[:2], -1, -1),
                        visible=each.visible,
                        bias=each.bias,
                        **terms.scoring(),
                    )[0]
                    # As wide as values usually are: kernels are made for that.
                    for at in range(0, slots.shape[1], 128)
                ],
                dim=-1,
            )
            where = each.positions.clamp(min=0).unsqueeze(2)  # an empty slot is given nothing
            where = where.repeat_interleave(query.shape[1] // each.keys.shape[1], dim=1)
            weights[:, :, rows].scatter_add_(3, where.expand_as(given), given)
        return weights
