"""What a real generation loop does to a cache, held to the invariants at every call.

Nothing here trusts the cache's own books: what a slot holds is compared with the keys and values
that the model passed in, and what ``linear`` gives up is recomputed from the queries of the last
finished line and the keys that each of them could see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kvpolicy
from kvpolicy.cache.layer import Layer

#: Recomputed scores may differ by rounding.
CLOSE = 1e-5


@dataclass
class Watch:
    """Watches a cache under ``linear`` from before its first token on.

    Attributes:
        cache: what ``attach`` gave.
        anchors: first image tokens that may not go.
        recent: finished lines that may not go.
        line_ends: layer, line, positions held there ``[B, H, S]``; of each line end.
        decisions: of all layers.
    """

    cache: Any
    anchors: int
    recent: int
    line_ends: list[tuple[int, int, Tensor]] = field(default_factory=list)
    decisions: int = 0
    calls: int = 0

    def __post_init__(self) -> None:
        for layer in self.cache.policy_cache.layers:
            _LayerWatch(self, layer)


@dataclass
class _Query:
    """One query token: its heads, and the positions that it could see."""

    position: int
    heads: Tensor
    held: Tensor
    visible: Tensor | None
    scale: float


class _LayerWatch:
    """Stands before and behind one layer."""

    def __init__(self, watch: Watch, layer: Layer) -> None:
        self.watch = watch
        self.layer = layer
        self.policy = layer.plan.policy
        self.attend = layer.attend
        self._restart()
        layer.attend = self.watched  # type: ignore[method-assign]
        layer.replace_policy(self)  # type: ignore[arg-type]

    def _restart(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.before: Tensor | None = None
        self.queries: list[_Query] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    # -- a call ------------------------------------------------------------------------------------

    def watched(self, query, key, value, terms, weights=False):
        first = self.layer.seen
        if first == 0:
            self._restart()
        self.keys = key if first == 0 else torch.cat([self.keys, key], dim=2)
        self.values = value if first == 0 else torch.cat([self.values, value], dim=2)
        visible, scale = terms.visible, terms.scale
        self.visible, self.scale = visible, scale or 1 / math.sqrt(query.shape[-1])
        given = self.attend(query, key, value, terms, weights)
        assert self.layer.seen == first + key.shape[2]
        self.look(first)
        held = self.layer.store.positions.clone()
        if key.shape[2] == 1:
            self.queries.append(_Query(first, query, held, visible, self.scale))
        self.before = held
        self.watch.calls += 1
        layout = self.layer.layout
        seen = self.layer.seen
        if layout is not None and seen > layout.prefix and layout.is_line_start(seen):
            self.watch.line_ends.append((self.layer.plan.layer, layout.line(seen - 1), held))
        return given

    def look(self, first: int) -> None:
        """Invariants 1 to 5, after a call."""
        layer, store = self.layer, self.layer.store
        positions, seen, layout = store.positions, layer.seen, layer.layout
        held = positions >= 0
        count = held.sum(-1)
        assert (count == count.flatten()[0]).all()
        bound = self.watch.cache.policy_cache.layout is not None
        if not bound:
            assert (count == seen).all(), "until the layout is known, everything is kept"
            pins = range(seen)
        else:
            assert positions.shape[-1] <= layout.prefix + layer.budget
            near = layout.line(seen - 1) - self.watch.recent
            pins = [
                p
                for p in range(seen)
                if p < layout.prefix + self.watch.anchors or layout.line(p) >= near
            ]
        for p in pins:
            assert ((positions == p).sum(-1) == 1).all(), f"position {p} at {seen} tokens"
        ordered = positions.sort(-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        assert not twice.any()
        if self.before is not None:
            old = held & (positions < first)
            known = (positions.unsqueeze(-1) == self.before.unsqueeze(-2)).any(-1)
            assert known[old].all(), "a position came back"
        where = positions.clamp(min=0).long().unsqueeze(-1)
        for slots, came in ((store.keys, self.keys), (store.values, self.values)):
            true = came.gather(2, where.expand(*positions.shape, came.shape[-1]))
            assert torch.equal(slots[held], true[held])

    # -- a decision --------------------------------------------------------------------------------

    def victims(self, view, count):
        """The policy's own, after a look, and then compared with what the last line says."""
        self.watch.decisions += 1
        self.look(self.layer.seen)
        slots = self.policy.victims(view, count)
        positions = view.positions
        layout, seen = view.layout, view.seen
        gone = torch.zeros_like(positions, dtype=torch.bool).scatter_(2, slots, True)
        free = positions >= layout.prefix + self.watch.anchors
        free &= layout.line(positions) < layout.line(seen) - self.watch.recent
        assert (free | ~gone).all(), "a protected token was given up"
        score = self.last_line(positions)
        worst = torch.where(gone, score, -torch.inf).amax(-1)
        kept = torch.where(free & ~gone, score, torch.inf).amin(-1)
        assert (worst <= kept + CLOSE).all(), "the choice is not the last finished line's"
        return slots

    def last_line(self, positions: Tensor) -> Tensor:
        """Mass that each held token got from the last finished line alone, float64."""
        layout, seen = self.layer.layout, self.layer.seen
        mass = torch.zeros(*positions.shape[:2], seen, dtype=torch.float64)
        line = [q for q in self.queries if layout.line(q.position) == layout.line(seen - 1)]
        assert len(line) == 1 + layout.column(seen - 1)
        for query in line:
            batch, heads = query.held.shape[:2]
            group = query.heads.shape[1] // heads
            index = query.held.clamp(min=0).long()
            keys = self.keys.gather(
                2, index.unsqueeze(-1).expand(*index.shape, self.keys.shape[-1])
            )
            asked = query.heads.view(batch, heads, group, -1).double()
            scores = query.scale * asked @ keys.double().transpose(2, 3)
            seen_by = query.held >= 0
            if query.visible is not None:
                table = query.visible[:, :, -1].expand(batch, heads, query.position + 1)
                seen_by = seen_by & table.gather(2, index)
            scores = scores.masked_fill(~seen_by.unsqueeze(2), -torch.inf)
            mass.scatter_add_(2, index, scores.softmax(-1).mean(2).nan_to_num())
        return mass.gather(2, positions.long())


def sharpen(model: torch.nn.Module, factor: float = 12.0) -> None:
    """Random weights attend almost uniformly; sharpened, a wrong cache changes tokens."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")) and "vision" not in name:
                weight *= factor
            if name.endswith("q_norm.weight"):  # where queries are normalised
                weight *= factor / 2


def linear(anchors: int = 3, recent_lines: int = 1) -> kvpolicy.EvictionPolicy:
    return kvpolicy.create("linear", anchors=anchors, recent_lines=recent_lines)
