"""Evict what, taken together, changes least of what coming lines will read."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.ops.cpu import native
from kvpolicy.ops.portions import portions
from kvpolicy.ops.rank import lowest
from kvpolicy.parts.moving import moved
from kvpolicy.parts.named import register_part
from kvpolicy.policy.parts import Score
from kvpolicy.policy.view import CacheView

__all__ = ["LeastChange"]


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
        """The change if a token goes alone: ``sum over w of (m^w_j)^2 |o^w - v_j|^2``.

        Values of a head are in units of the largest number among them, once they are centred.
        """
        kernel = native.chooser("change_alone", view.values, view.mass)
        if kernel is not None:
            in_one_pass: Tensor = kernel(view.values, moved(view, self.lines))
            return in_one_pass
        mass, values, read = self._foreseen(view)
        distance = values.square().sum(-1).unsqueeze(2) + read.square().sum(-1, keepdim=True)
        distance = distance.sub_(read @ values.transpose(2, 3), alpha=2).clamp_(min=0)
        return distance.mul_(mass).mul_(mass).sum(2)

    def choose(self, view: CacheView, score: Tensor, count: int) -> Tensor | None:
        """One token after the other, each the one that adds least to the change."""
        if self.how == "alone":
            return None
        kernel = native.chooser("change_together", view.values, view.mass, score)
        if kernel is not None:
            mass = moved(view, self.lines)
            found: Tensor = kernel(view.values, mass, score, view.positions, count)
            return found
        seen = self._foreseen(view)
        batch, heads, slots = score.shape
        chosen = []
        for part in portions(batch, heads * slots**2, score.device, near=False):
            mass, values, read = (tensor[part] for tensor in seen)
            changes = values.new_empty(*mass.shape[:2], slots, slots)
            for some in portions(len(mass), heads * slots**2, score.device):
                changes[some] = _changes(mass[some], values[some], read[some])
            chosen.append(_one_by_one(changes, score[part], view.positions[part], count))
        return torch.cat(chosen)

    def _foreseen(self, view: CacheView) -> tuple[Tensor, Tensor, Tensor]:
        """Masses ``[B, H, W, S]``, values ``[B, H, S, D]``, and what is read, ``[B, H, W, D]``."""
        mass = moved(view, self.lines)
        values = view.values.to(torch.float32)
        # What all values share changes nothing, and would only cost digits.
        values = values - values.mean(2, keepdim=True)
        # Nor does a head's scale, and squares of large values would overflow.
        largest = values.abs().amax((2, 3), keepdim=True)
        values.div_(largest.clamp_(min=torch.finfo(torch.float32).tiny))
        total = mass.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        return mass, values, (mass @ values).div_(total)


def _changes(mass: Tensor, values: Tensor, read: Tensor) -> Tensor:
    """``sum over w of m^w_i m^w_j (o^w - v_i) . (o^w - v_j)``, ``[b, H, S, S]``.

    Multiplied out: a product of two matrices, less a thin one and its transpose.
    """
    along = (read @ values.transpose(2, 3)).sub_(read.square().sum(-1, keepdim=True), alpha=0.5)
    changes = (values @ values.transpose(2, 3)).mul_(mass.transpose(2, 3) @ mass)
    cross = along.mul_(mass).transpose(2, 3) @ mass
    return changes.sub_(cross).sub_(cross.transpose(2, 3))


def _one_by_one(changes: Tensor, cost: Tensor, positions: Tensor, count: int) -> Tensor:
    """The slots that go: int64 ``[b, H, count]``.

    ``|sum in E + j|^2 - |sum in E|^2`` is the change of j alone, and twice that with each in E.
    """
    chosen: list[Tensor] = []
    for _ in range(count):
        slot = lowest(cost, positions, cost.amin(-1, keepdim=True))
        chosen.append(slot)
        row = slot.unsqueeze(-1).expand(*slot.shape, cost.shape[-1])
        cost = cost.add(changes.gather(2, row).squeeze(2), alpha=2)
        cost.scatter_(2, slot, torch.inf)
    return torch.cat(chosen, dim=-1)
