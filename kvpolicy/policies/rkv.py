"""R-KV: what the last queries looked at, less what other keys say as well."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kvpolicy.ops.cpu import native
from kvpolicy.ops.portions import NEAR, portions
from kvpolicy.parts import Every, RecentTokens, WatchWindow, register_part
from kvpolicy.parts.score import Kernel, pool
from kvpolicy.policy.parts import Parts, Score
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.policy.view import CacheView
from kvpolicy.registry import register

__all__ = ["RKV", "NotRedundant"]


@register_part("not_redundant")
class NotRedundant(Score):
    """Pooled mass, less how much a key resembles the others."""

    needs_mass: ClassVar[bool] = True

    kernel: Kernel = Field(7, description="neighbours whose highest mass counts, odd")
    window: int = Field(8, ge=0, description="newest tokens, which are no one's neighbours")
    importance: float = Field(0.1, ge=0, le=1, description="weight of mass against redundancy")
    similar: float = Field(0.5, ge=-1, le=1, description="cosine above which keys are alike")

    def worth(self, view: CacheView) -> Tensor:
        """Both sum to 1 over the cached tokens, before pooling and weighting."""
        kernel = native.chooser("not_redundant", view.mass, view.positions, view.keys)
        if kernel is not None:
            out, newest = self._out(view), view.seen - self.window
            in_one_pass: Tensor = kernel(
                *(self._cosines(view, out), view.mass, view.positions, out),
                *(newest, self.kernel, self.importance),
            )
            return in_one_pass
        mass = view.mass.masked_fill((view.age <= self.window) | view.empty, 0.0)
        mass = mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        mass = pool(view, mass, self.kernel, self.window, "max")
        return self.importance * mass - (1 - self.importance) * self.redundancy(view)

    def redundancy(self, view: CacheView) -> Tensor:
        """Softmax over evictable tokens of each key's mean cosine with the others, ``[B, H, S]``.

        Each token spares the newest of those that are like it: of many alike, the newest stays.
        """
        out = self._out(view)
        total = self._cosines(view, out)
        mean = total / (~out).sum(-1, keepdim=True).clamp(min=1)
        return mean.masked_fill(out, torch.finfo(torch.float32).min).softmax(-1)

    def _out(self, view: CacheView) -> Tensor:
        """What no key is compared with, bool ``[B, H, S]``.

        The prefix stays whatever it is like, and the padding in it must not count: as keys of
        length zero, these are like none.
        """
        return view.empty | view.pinned if view.may_be_empty else view.pinned

    def _cosines(self, view: CacheView, out: Tensor) -> Tensor:
        """Sum of each key's cosines with the others that are not out, ``[B, H, S]``."""
        kernel = native.chooser("cosines", view.keys, view.positions, out)
        if kernel is not None:
            in_one_pass: Tensor = kernel(view.keys, view.positions, out, self.similar)
            return in_one_pass
        keys = view.keys.to(torch.float32)
        length = torch.linalg.vector_norm(keys, dim=-1, keepdim=True).clamp_(min=1e-8)
        keys = keys * (~out).unsqueeze(-1).to(torch.float32).div_(length)
        total = keys.new_zeros(keys.shape[:3])
        newer = (view.positions + 1).unsqueeze(2)
        heads, slots = view.positions.shape[1:]
        rows = max(NEAR // (heads * slots), 1)
        for part in portions(len(keys), heads * slots**2, keys.device):
            for first in range(0, slots, rows):
                total[part] += self._alike(keys[part], newer[part], first, rows)
        return total

    def _alike(self, keys: Tensor, newer: Tensor, first: int, rows: int) -> Tensor:
        """What some tokens add to the cosines of all: ``[b, H, S]``."""
        cosine = keys[:, :, first : first + rows] @ keys.transpose(2, 3)
        cosine.diagonal(first, dim1=2, dim2=3).zero_()
        newest, place = (newer * (cosine > self.similar)).max(-1, keepdim=True)
        cosine.scatter_(3, place, cosine.gather(3, place).masked_fill_(newest > 0, 0.0))
        return cosine.sum(2)


@register("rkv", paper="arXiv:2505.24133")
class RKV(ScoredPolicy):
    """Keep a window, and what its queries looked at unless other keys resemble it.

    ``score(j) = importance * I(j) - (1 - importance) * R(j)``: I is the window's mass on j as a
    share of its mass on all tokens behind the window, and the largest among j's neighbours; R is a
    softmax of the mean cosine of key j with the other keys, where each token leaves out the newest
    of those that are like it (Cai et al., "R-KV: Redundancy-aware KV Cache Compression for
    Reasoning Models", arXiv:2505.24133, section 3).

    The paper decides whenever a buffer of 128 tokens beside the budget is full; here the buffer,
    ``interval``, is part of the budget. Where query heads share a KV head their masses are averaged
    like everywhere here; the authors' code takes the largest of their logits.
    """

    window: int = Field(8, ge=1, description="last queries that vote, and are protected")
    interval: int = Field(8, ge=1, description="tokens between decisions")
    kernel: Kernel = Field(7, description="neighbours whose highest mass counts, odd")
    importance: float = Field(0.1, ge=0, le=1, description="weight of mass against redundancy")
    similar: float = Field(0.5, ge=-1, le=1, description="cosine above which keys are alike")

    @cached_property
    def parts(self) -> Parts:
        """A window; its queries' mass, less redundancy; every few tokens."""
        return Parts(
            protect=(RecentTokens(count=self.window),),
            observe=WatchWindow(queries=self.window),
            score=NotRedundant(
                kernel=self.kernel,
                window=self.window,
                importance=self.importance,
                similar=self.similar,
            ),
            decide=Every(tokens=self.interval),
        )
