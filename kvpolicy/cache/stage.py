"""Stage: the layers of a cache stage tokens, keep some of them and forget the others together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy.cache.staging import StagedLayer, Staging

__all__ = ["Stage"]


class Stage:
    """The stages of one cache, one after the other.

    Args:
        layers: those that the policy manages, the first to see a token first.

    Attributes:
        lookahead: tokens that may be staged at once, in a stage that is on; None outside of one.
        counted: commits so far, tokens staged before them, and tokens that they kept.
    """

    def __init__(self, layers: Sequence[StagedLayer]) -> None:
        self.layers = layers
        self.lookahead: int | None = None
        self.counted = (0, 0, 0)
        # Of each layer, with all that the last stage had allocated, for the next one.
        self.stagings: tuple[Staging, ...] = ()
        # The newest mask, the tokens before it, and whether it hides nothing but their future.
        self._mask: tuple[Tensor, int, bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy stages nothing, and keeps nothing aside."""
        return {**vars(self), "lookahead": None, "stagings": (), "_mask": None}

    def begin(self, lookahead: int, sure: int, together: bool) -> None:
        """Stage tokens from position ``sure`` on; see :meth:`PolicyCache.stage`."""
        if not self.stagings:
            self.stagings = tuple(Staging(layer) for layer in self.layers)
        for staging in self.stagings:
            staging.begin(lookahead, sure, together)
        self.lookahead = lookahead

    def end(self) -> None:
        """Forget what is staged, and take tokens for sure again."""
        self.lookahead = self._mask = None
        for staging in self.stagings:
            staging.end()

    @property
    def staged(self) -> int:
        """Tokens that the first layer has seen and that are not sure."""
        return 0 if self.lookahead is None else self.stagings[0].staged

    @property
    def nbytes(self) -> int:
        """Bytes that stages have allocated, and reports that wait in one."""
        return sum(staging.nbytes for staging in self.stagings)

    def commit(self, count: int) -> None:
        """Keep the first ``count`` staged tokens, of which a layer that is left out has none.

        Raises:
            CacheStateError: a block would be cut; nothing has changed.
        """
        if count:
            for staging in self.stagings:
                staging.check(count)
        if staged := self.staged:
            passes, before, kept = self.counted
            self.counted = (passes + 1, before + staged, kept + count)
        self._mask = None
        for staging in self.stagings:
            staging.commit(count)

    def unless_causal(self, visible: Tensor, seen: int, count: int, *, anew: bool) -> Tensor | None:
        """A mask of staged tokens; None if it hides nothing but their future: None is faster.

        Layers are given the same mask one after the other, so that it is looked at once. On a GPU
        that waits for the device. A token alone is not worth it; among several, every layer would
        have to look which of them see each other, so that to look once is to wait less.

        Args:
            visible: the mask, which nobody has looked at.
            seen: tokens before these.
            count: tokens.
            anew: whether a pass begins: the same tensor may say something else by now.
        """
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool or visible.ndim != 4:
            return visible  # which is about to be refused
        if count == 1 and visible.device.type != "cpu":
            return visible
        if anew or self._mask is None or self._mask[0] is not visible or self._mask[1] != seen:
            causal = visible.shape[2:] == (count, seen + count) and bool(
                (visible == torch.ones_like(visible[:1, :1]).tril(seen)).all()
            )
            self._mask = visible, seen, causal
        return None if self._mask[2] else visible
