"""Least change: how much what is read changes when tokens go, each alone or all of them together.

Line w gives the tokens the masses ``m^w`` and reads ``o^w = sum_j m^w_j v_j / sum_j m^w_j``.
Without the tokens E it reads something else: but for a factor, what changes is
``sum_{j in E} m^w_j (o^w - v_j)``, and :func:`together` looks for the E for which the sum over
lines of its square is small.

Values of a head are centred, which changes nothing and would only cost digits, and taken in units
of the largest number among them, whose square might overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.ops.cpu import native
from kvpolicy.ops.portions import portions
from kvpolicy.ops.rank import oldest_of_lowest
from kvpolicy.ops.sums import sum_over, whole_tiles

__all__ = ["alone", "changes", "foreseen", "together"]

_TINY = torch.finfo(torch.float32).tiny


def alone(values: Tensor, mass: Tensor) -> Tensor:
    """The change if a token goes alone: ``sum over w of (m^w_j)^2 |o^w - v_j|^2``.

    Args:
        values: ``[B, H, S, D]``.
        mass: of each line, ``[B, H, W, S]``, float32, 0 in empty slots.

    Returns:
        ``[B, H, S]``, float32.
    """
    served = _serving("change_alone", values)
    if served is not None:
        in_one_pass: Tensor = served(values, mass)
        return in_one_pass
    values, read = foreseen(values, mass)
    slots = mass.shape[-1]
    mass, values = whole_tiles(mass, -1), whole_tiles(values, -2)
    squares = values.new_ones(1, values.shape[-1]) @ values.square().transpose(2, 3)
    distance = squares + read.square().sum(-1, keepdim=True)
    distance = distance.sub_(read @ values.transpose(2, 3), alpha=2).clamp_(min=0)
    return sum_over(distance.mul_(mass).mul_(mass), 2)[..., :slots]


def together(values: Tensor, mass: Tensor, cost: Tensor, positions: Tensor, count: int) -> Tensor:
    """Slots that together change little: one after the other, each the one that adds least.

    Args:
        values: ``[B, H, S, D]``.
        mass: of each line, ``[B, H, W, S]``, float32, 0 in empty slots.
        cost: what each token costs if it goes first, ``[B, H, S]``, float32: see :func:`alone`, and
            :func:`kvpolicy.ops.rank.leveled` for what can't go.
        positions: ``[B, H, S]``, int32; of equal costs the older goes first.
        count: how many slots are wanted.

    Returns:
        Slots, int64 ``[B, H, count]``, distinct within a head, in the order in which they go.
    """
    served = _serving("change_together", values)
    if served is not None:
        found: Tensor = served(values, mass, cost, positions, count)
        return found
    values, read = foreseen(values, mass)
    batch, heads, slots = cost.shape
    chosen = []
    for part in portions(batch, heads * slots**2, cost.device, near=False):
        of_pairs = values.new_empty(len(values[part]), heads, slots, slots)
        for some in portions(len(of_pairs), heads * slots**2, cost.device):
            of_pairs[some] = changes(mass[part][some], values[part][some], read[part][some])
        chosen.append(_one_by_one(of_pairs, cost[part], positions[part], count))
    return torch.cat(chosen)


def foreseen(values: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Centred values ``[B, H, S, D]``, and what each line reads of them, ``[B, H, W, D]``."""
    values = values.to(torch.float32)
    values = values - values.mean(2, keepdim=True)
    values.div_(values.abs().amax((2, 3), keepdim=True).clamp_(min=_TINY))
    return values, (mass @ values).div_(mass.sum(-1, keepdim=True).clamp_(min=_TINY))


def changes(mass: Tensor, values: Tensor, read: Tensor) -> Tensor:
    """``sum over w of m^w_i m^w_j (o^w - v_i) . (o^w - v_j)``, ``[b, H, S, S]``.

    Multiplied out: a product of two matrices, less a thin one and its transpose.
    """
    slots = mass.shape[-1]
    mass, values = whole_tiles(mass, -1), whole_tiles(values, -2)
    along = (read @ values.transpose(2, 3)).sub_(read.square().sum(-1, keepdim=True), alpha=0.5)
    of_pairs = (values @ values.transpose(2, 3)).mul_(mass.transpose(2, 3) @ mass)
    cross = along.mul_(mass).transpose(2, 3) @ mass
    return of_pairs.sub_(cross).sub_(cross.transpose(2, 3))[..., :slots, :slots]


def _one_by_one(of_pairs: Tensor, cost: Tensor, positions: Tensor, count: int) -> Tensor:
    """Slots ``[b, H, count]``; ``cost`` grows by what each token changes with those that go.

    ``|sum in E + j|^2 - |sum in E|^2`` is the change of j alone, and twice that with each in E.
    """
    chosen: list[Tensor] = []
    for _ in range(count):
        slot = oldest_of_lowest(cost, positions)
        chosen.append(slot)
        row = slot.unsqueeze(-1).expand(*slot.shape, cost.shape[-1])
        cost = cost.add(of_pairs.gather(2, row).squeeze(2), alpha=2)
        cost.scatter_(2, slot, torch.inf)
    return torch.cat(chosen, dim=-1)


def _serving(name: str, values: Tensor) -> native.Kernel | None:
    return native.serving(name, values) if values.dtype in native.DTYPES else None
