"""Evict what, taken together, changes least of what coming lines will read."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.composition import Score
from kvpolicy.parts.moving import moved
from kvpolicy.parts.named import register_part
from kvpolicy.ranking import lowest
from kvpolicy.view import CacheView

__all__ = ["LeastChange"]

#: Numbers of the matrices that are made at once: bounds the memory of a decision.
AT_ONCE = 1 << 24


@register_part("least_change")
class LeastChange(Score):
    """The change of what is read if a token goes, and with what goes besides.

    A line whose queries gave the masses ``m`` read ``o = sum_j m_j v_j / sum_j m_j`` on average.
    Without the tokens E it would have read something else, and the change is
    ``sum_{j in E} m_j (o - v_j)`` but for a factor: many tokens of little mass that say the same
    are together worth a lot, and a token whose value is the average is worth nothing. What coming
    lines will look at is not known; line w from here is taken to look as the last one did, but w
    lines further down: ``m^w(j) = m(w lines above j)``. So of all sets E of the size that is
    wanted, one is sought for which

    ``sum over w = 0 ... lines of |sum_{j in E} m^w_j (o^w - v_j)|^2``

    is small, by adding the token that increases it least, again and again.
    """

    needs_mass: ClassVar[bool] = True

    lines: int = Field(5, ge=0, le=1000, description="coming lines that are thought of")
    how: Literal["together", "alone"] = Field(
        "together", description="whether what else goes counts, or each token alone"
    )

    def worth(self, view: CacheView) -> Tensor:
        """The change if a token goes alone: ``sum over w of (m^w_j)^2 |o^w - v_j|^2``."""
        alone = []
        for part in _parts(view):
            mass, values, read = self._foreseen(view, part)
            distance = values.square().sum(-1).unsqueeze(2) + read.square().sum(-1, keepdim=True)
            distance -= 2 * read @ values.transpose(2, 3)
            alone.append((mass.square() * distance.clamp(min=0)).sum(2))
        return torch.cat(alone)

    def choose(self, view: CacheView, score: Tensor, count: int) -> Tensor | None:
        """One token after the other, each the one that adds least to the change."""
        if self.how == "alone":
            return None
        return torch.cat([self._choose(view, part, score[part], count) for part in _parts(view)])

    def _choose(self, view: CacheView, part: slice, cost: Tensor, count: int) -> Tensor:
        """For some of the sequences, int64 ``[b, H, count]``."""
        changes = self._changes(view, part)
        positions = view.positions[part]
        chosen: list[Tensor] = []
        for _ in range(count):
            slot = lowest(cost, positions, cost.amin(-1, keepdim=True))
            chosen.append(slot)
            row = slot.unsqueeze(-1).expand(*slot.shape, cost.shape[-1])
            cost = cost.add(changes.gather(2, row).squeeze(2), alpha=2)
            cost.scatter_(2, slot, torch.inf)
        return torch.cat(chosen, dim=-1)

    def _foreseen(self, view: CacheView, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Mass ``[b, H, W, S]``, values ``[b, H, S, D]`` and read ``[b, H, W, D]`` of sequences."""
        mass = torch.stack([moved(view, line)[part] for line in range(self.lines + 1)], dim=2)
        values = view.values[part].to(torch.float32)
        # What all values share changes nothing, and would only cost digits.
        values = values - values.mean(2, keepdim=True)
        total = mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return mass, values, mass @ values / total

    def _changes(self, view: CacheView, part: slice) -> Tensor:
        """``sum over w of m^w_i m^w_j (o^w - v_i) . (o^w - v_j)``, ``[b, H, S, S]``.

        Multiplied out, a product of two matrices less a thin one and its transpose.
        """
        mass, values, read = self._foreseen(view, part)
        along = read @ values.transpose(2, 3) - read.square().sum(-1, keepdim=True) / 2
        changes = (values @ values.transpose(2, 3)).mul_(mass.transpose(2, 3) @ mass)
        cross = (mass * along).transpose(2, 3) @ mass
        return changes.sub_(cross).sub_(cross.transpose(2, 3))


def _parts(view: CacheView) -> list[slice]:
    """Sequences whose matrices are made at once."""
    batch, heads, slots = view.positions.shape
    step = max(AT_ONCE // (heads * slots * slots), 1)
    return [slice(first, first + step) for first in range(0, batch, step)]
