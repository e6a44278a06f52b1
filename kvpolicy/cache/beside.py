"""Attention of several new tokens, to slots as they were and to the new tokens beside them.

Token i reclaims its slot when its turn comes, so queries before it still see the victim: new keys
lie beside the old slots while the queries attend, and are written afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.cache.lending import Pass
from kvpolicy.cache.terms import Terms
from kvpolicy.ops.attend import by_slot

__all__ = ["QUERY_CHUNK", "Part", "attend_beside", "mass_by_slot"]

#: Queries that attend, and are observed, at once: bounds the memory of a long call.
QUERY_CHUNK = 128


class Part(NamedTuple):
    """What some of the new queries attended to.

    Attributes:
        begin: the first of these queries.
        end: behind the last of them.
        output: ``[B, G * H, end - begin, Dv]``.
        mass: to old slots and new tokens, ``[B, H, end - begin, N]``; None where nobody asks.
        weights: by query head, ``[B, G * H, end - begin, N]``; None likewise.
        attended: all that it takes to repeat it.
    """

    begin: int
    end: int
    output: Tensor
    mass: Tensor | None
    weights: Tensor | None
    attended: Pass


def attend_beside(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    ends: list[int],
    *,
    seen: int,
    old: tuple[Tensor, Tensor, Tensor] | None,
    slots: Tensor | None,
    need_mass: bool,
    weights: bool,
) -> Iterator[Part]:
    """Attend, in chunks of queries: observing costs memory for chunk x length, not length squared.

    Args:
        query: ``[B, G * H, T, D]``.
        key: the new keys ``[B, H, T, D]``.
        value: the new values ``[B, H, T, Dv]``.
        terms: of these T queries, by position.
        ends: of each new token, where its block ends (:func:`kvpolicy.cache.blocks.block_ends`).
        seen: position of the first new token.
        old: keys, values and positions of slots that have held a token; None for none.
        slots: where the new tokens will lie, ``[B, H, T]``; None where no old slot is reclaimed.
        need_mass: whether to report the mass.
        weights: whether to report what each query head gave.
    """
    count, device = query.shape[2], query.device
    starts = _starts(ends)
    turn = torch.tensor(starts, device=device)
    if old is None:
        old = key[:, :, :0], value[:, :, :0], _positions(key, 0, 0)
    keys, values, positions = old
    kept_until = None
    if slots is not None:
        # The turn at which each old slot is reclaimed: that of its new token's block.
        kept_until = torch.full(positions.shape, count, device=device)
        reclaims = slots < positions.shape[2]
        scratch = torch.full((*positions.shape[:2], positions.shape[2] + 1), count, device=device)
        where = torch.where(reclaims, slots, positions.shape[2])
        kept_until = scratch.scatter_(2, where, turn.expand_as(slots))[..., :-1]
    for begin in range(0, count, QUERY_CHUNK):
        end = min(begin + QUERY_CHUNK, count)
        last = ends[end - 1]
        rows = terms.rows(slice(begin, end))
        now = turn[begin:end, None]
        shown = (positions >= 0).unsqueeze(2)
        if kept_until is not None:
            shown = shown & (now < kept_until.unsqueeze(2))
        if rows.visible is None:
            new = (
                torch.arange(last, device=device)
                <= torch.arange(begin, end, device=device)[:, None]
            )
            new = new[None, None]
        else:
            shown = shown & by_slot(rows.visible, positions)
            new = rows.visible[..., seen : seen + last]
        heads = max(shown.shape[1], new.shape[1])
        size = (len(key), heads, end - begin)
        visible = torch.cat([shown.expand(*size, shown.shape[3]), new.expand(*size, last)], dim=3)
        bias = None
        if rows.bias is not None:
            by_old = by_slot(rows.bias, positions)
            by_new = rows.bias[..., seen : seen + last]
            bias = torch.cat([by_old, by_new.expand(*by_old.shape[:3], last)], dim=-1)
        attended = Pass(
            end - begin,
            torch.cat([keys, key[:, :, :last]], dim=2) if keys.shape[2] else key[:, :, :last],
            torch.cat([values, value[:, :, :last]], dim=2) if keys.shape[2] else value[:, :, :last],
            visible,
            bias,
            torch.cat([positions, _positions(key, seen, last)], dim=2),
        )
        output, mass, given = attended.attend(
            query[:, :, begin:end], terms, need_mass=need_mass, weights=weights
        )
        yield Part(begin, end, output, mass, given, attended)


def mass_by_slot(mass: Tensor, slots: Tensor, held: int, handed_out: int) -> Tensor:
    """Mass to old slots and new tokens, as mass to slots once the new tokens are written.

    What was given to victims by those who still saw them is nobody's any more.

    Args:
        mass: ``[B, H, Q, held + N]``, of queries that saw the first N of T new tokens.
        slots: where the new tokens go, ``[B, H, T]``.
        held: old slots.
        handed_out: slots of each head that have held a token once these are written.

    Returns:
        ``[B, H, Q, handed_out]``.
    """
    given = mass.new_zeros(*mass.shape[:3], handed_out)
    given[..., :held] = mass[..., :held]
    new = mass[..., held:]
    into = slots[..., : new.shape[3]].unsqueeze(2)
    given.scatter_(3, into.expand_as(new), new)
    if new.shape[3] < slots.shape[2]:
        rest = slots[..., new.shape[3] :].unsqueeze(2)
        given.scatter_(3, rest.expand(*new.shape[:3], -1), 0.0)
    return given


def _starts(ends: list[int]) -> list[int]:
    """Where the block of each token starts."""
    starts: list[int] = []
    for token, end in enumerate(ends):
        starts.append(token if token == 0 or ends[token - 1] != end else starts[-1])
    return starts


def _positions(key: Tensor, first: int, count: int) -> Tensor:
    """Positions of ``count`` new tokens, ``[B, H, count]``."""
    positions = torch.arange(first, first + count, device=key.device, dtype=torch.int32)
    return positions.expand(*key.shape[:2], count)
