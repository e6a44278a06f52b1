"""Fréchet distance: how far the features of drawn images are from those of real ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvpolicy.errors import ParameterError, ShapeError

__all__ = ["FrechetTo", "frechet_distance"]

Array = NDArray[np.float64]


def frechet_distance(
    mean_a: ArrayLike, cov_a: ArrayLike, mean_b: ArrayLike, cov_b: ArrayLike
) -> float:
    """Fréchet (2-Wasserstein) distance, squared, between two Gaussians.

    ``|mean_a − mean_b|² + tr(cov_a + cov_b − 2 (cov_a^½ cov_b cov_a^½)^½)``

    With the features of a classifier this is the "FID" way to compare two sets of images; figures
    are comparable only between sets of equal size and under one classifier. The trace of the root
    is the sum of the roots of the eigenvalues of the symmetric product, so covariances of less
    than full rank (fewer images than features) need no special care.

    Args:
        mean_a: mean feature of the first set, ``[F]``.
        cov_a: covariance of the first set, ``[F, F]``, symmetric.
        mean_b: mean feature of the second set, ``[F]``.
        cov_b: covariance of the second set, ``[F, F]``, symmetric.

    Returns:
        The distance in squared units of the features; never negative, 0 for equal Gaussians.

    Raises:
        ShapeError: the shapes aren't ``[F]`` and ``[F, F]`` with one F.
        ParameterError: a number is not finite, or a covariance is not symmetric.

    Source:
        Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982;
        Heusel et al., arXiv:1706.08500.
    """
    mean_a, cov_a = _moments("a", mean_a, cov_a)
    mean_b, cov_b = _moments("b", mean_b, cov_b)
    if mean_a.shape != mean_b.shape:
        raise ShapeError(f"{len(mean_a)} features in a, {len(mean_b)} in b")
    root = _root(cov_a)
    cross = _cross(root @ cov_b @ root)
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(0.0, float(distance))


class FrechetTo:
    """Fréchet distance of a sample's features to known moments, quick enough to be resampled.

    The root of the known covariance is taken once. Calling it with features ``[n, F]``, n > 1,
    gives :func:`frechet_distance`.

    Args:
        mean: ``[F]``.
        cov: ``[F, F]``, symmetric.

    Raises:
        ShapeError, ParameterError: as :func:`frechet_distance`.
    """

    def __init__(self, mean: ArrayLike, cov: ArrayLike) -> None:
        self.mean, self.cov = _moments("of the reference", mean, cov)
        self._root = _root(self.cov)

    def __call__(self, features: ArrayLike) -> float:
        """The distance, in squared units of the features."""
        own = np.asarray(features, np.float64)
        if own.ndim != 2 or len(own) < 2 or own.shape[1] != len(self.mean):
            raise ShapeError(
                f"features must be [n, {len(self.mean)}] with n > 1, not {list(own.shape)}"
            )
        if not np.isfinite(own).all():
            raise ParameterError("features hold a number that is not finite")
        mean = own.mean(0)
        centred = own - mean
        cov = centred.T @ centred / (len(own) - 1)
        cross = _cross(self._root @ cov @ self._root)
        distance = ((self.mean - mean) ** 2).sum() + np.trace(self.cov) + np.trace(cov) - 2 * cross
        return max(0.0, float(distance))


def _moments(name: str, mean: ArrayLike, cov: ArrayLike) -> tuple[Array, Array]:
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or cov.shape != (*mean.shape, *mean.shape):
        raise ShapeError(
            f"mean_{name} must be [F] and cov_{name} [F, F], not {list(mean.shape)} "
            f"and {list(cov.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ParameterError(f"mean_{name} or cov_{name} holds a number that is not finite")
    if not np.allclose(cov, cov.T, atol=1e-6 * np.abs(cov).max(initial=0)):
        raise ParameterError(f"cov_{name} is not symmetric")
    return mean, cov


def _cross(product: Array) -> float:
    """Trace of the root of a product that is symmetric but for rounding."""
    return float(np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum())


def _root(cov: Array) -> Array:
    """The symmetric square root; eigenvalues below zero are rounding."""
    values, vectors = np.linalg.eigh(cov)
    root: Array = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root
