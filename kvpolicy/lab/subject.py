"""Subjects: what policies are tried on.

A subject brings a model, real data and measures. Packages add theirs through the entry-point
group ``kvpolicy.subjects``; the lab never imports an adapter by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kvpolicy.cache import CacheStats
from kvpolicy.layout import RasterLayout
from kvpolicy.policy import EvictionPolicy
from kvpolicy.registry import Registry

__all__ = ["SUBJECTS", "Advance", "Generated", "ImageSubject", "Scored", "Setting", "load_subject"]

#: Called with the number of finished steps since the last call.
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Setting:
    """One policy at one budget.

    Attributes:
        policy: the policy.
        budget: as a user would spell it; None for everything.
    """

    policy: EvictionPolicy
    budget: str | None


@dataclass(frozen=True)
class Scored:
    """How well real images are predicted under a setting.

    Attributes:
        bits: bits per pixel of each image, float64 ``[n]``.
        stats: what the cache of the last batch cost.
    """

    bits: NDArray[np.float64]
    stats: CacheStats


@dataclass(frozen=True)
class Generated:
    """Images drawn under a setting.

    Attributes:
        images: grey images, uint8 ``[n, rows, cols]``.
        features: what the Fréchet distance compares, float64 ``[n, F]``.
        correct: whether a classifier sees the class that was asked for, bool ``[n]``.
        classes: the class asked for, int64 ``[n]``.
        seconds: time that generating took.
        stats: what the cache of the last batch cost.
        batch: sequences in that batch.
    """

    images: NDArray[np.uint8]
    features: NDArray[np.float64]
    correct: NDArray[np.bool_]
    classes: NDArray[np.int64]
    seconds: float
    stats: CacheStats
    batch: int


@runtime_checkable
class ImageSubject(Protocol):
    """An autoregressive image model with real images and measures."""

    name: str
    layout: RasterLayout
    num_layers: int
    class_names: tuple[str, ...]

    def score(self, setting: Setting, images: int, advance: Advance) -> Scored:
        """Teacher-force real held-out images; ``advance`` counts images."""

    def generate(self, setting: Setting, images: int, seed: int, advance: Advance) -> Generated:
        """Draw images, classes in turn; ``advance`` counts tokens of a batch."""

    def retention(
        self, setting: Setting, moments: tuple[int, ...]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """What is still cached of a real image after ``moments`` of its tokens.

        Returns:
            The image, uint8 ``[rows, cols]``, and the share of heads that hold each of its
            tokens, ``[moments, layers, rows, cols]``.
        """

    def reference(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean ``[F]`` and covariance ``[F, F]`` of the features of real images."""

    def batch_tokens(self, images: int) -> int:
        """How many tokens ``generate`` will report for so many images."""


SUBJECTS: Registry[Callable[[], ImageSubject]] = Registry("subject", "kvpolicy.subjects")


def load_subject(name: str) -> ImageSubject:
    """Make the subject of this name.

    Raises:
        UnknownNameError: no subject has this name; near matches are listed.
        ParameterError: its package can't be loaded.
    """
    return SUBJECTS.get(name)()
