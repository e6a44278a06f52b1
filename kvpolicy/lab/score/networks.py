"""Networks that look at images: what a figure of quality is computed from.

Packages add theirs through the entry-point group ``kvpolicy.networks``: a callable that takes a
path and a device. The lab never imports an adapter by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from kvpolicy.registry import Registry

__all__ = ["NETWORKS", "FeatureNetwork", "MatchNetwork"]


class FeatureNetwork(Protocol):
    """What the Fréchet distance, precision and recall, and the inception score look through.

    Attributes:
        name: for people.
        digest: SHA-256 of the file of its weights.
        published: whether these are the weights that published figures are computed with.
        features: numbers in a feature.
    """

    name: str
    digest: str
    features: int

    @property
    def published(self) -> bool: ...  # noqa: D102

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of uint8 images ``[B, H, W, 3]``, features ``[B, features]`` and logits ``[B, C]``."""


class MatchNetwork(Protocol):
    """What says how well an image fits its prompt.

    Attributes:
        name: for people.
        longest: tokens of a prompt that it reads; the rest is cut off.
    """

    name: str
    longest: int

    def match(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, int]:
        """Cosines ``[B]`` of uint8 images ``[B, H, W, 3]`` and prompts, and how many were cut."""


NETWORKS: Registry[Callable[[Path, str], Any]] = Registry("network", "kvpolicy.networks")
