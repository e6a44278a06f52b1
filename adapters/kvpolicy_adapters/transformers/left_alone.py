"""Layers that the policy leaves alone, while tokens are staged: transformers' own are cropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvpolicy import CacheStateError

__all__ = ["LeftAlone"]


class LeftAlone:
    """transformers' own cache layers, inside of a stage.

    Args:
        layers: those layers, by their index in the model.

    Raises:
        CacheStateError: one of them can't take tokens back.
    """

    def __init__(self, layers: Sequence[tuple[int, Any]]) -> None:
        self.layers = [layer for _, layer in layers]
        for index, layer in layers:
            slides = getattr(layer, "is_sliding", False)
            if not getattr(layer, "is_croppable", hasattr(layer, "crop")) or (
                slides and not hasattr(layer, "activate_past_recording")
            ):
                raise CacheStateError(
                    f"layer {index}, which the policy leaves alone or manages in part, is a "
                    f"{type(layer).__name__}, which can't take tokens back in this version of "
                    f"transformers; decode without a stage, or with a budget smaller than its "
                    f"window"
                )
        self._recorded = [getattr(layer, "record_past", None) for layer in self.layers]
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def crop(self, seen: int) -> None:
        """Take back all but the first ``seen`` tokens of the sequence."""
        for layer in self.layers:
            length = layer.get_seq_length()
            if length:  # none that keeps no tokens
                layer.crop(min(seen - length, 0))

    def end(self, seen: int) -> None:
        """Take back all but the first ``seen`` tokens, and keep no more of them than before."""
        self.crop(seen)
        for layer, recorded in zip(self.layers, self._recorded, strict=True):
            if recorded is not None:
                layer.record_past = recorded
