"""Inception score, and precision and recall: figures of features and logits.

The Fréchet distance is :func:`kvpolicy.lab.compare.frechet.frechet_distance`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvpolicy.errors import ShapeError

__all__ = ["inception_score", "within"]

#: Numbers in a piece of a matrix of distances: 512 MB.
_PIECE = 2**26


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """``exp(mean KL(p(class | image) ‖ p(class)))`` of each split: mean, and standard deviation.

    Args:
        logits: of the classes, without their bias, ``[n, C]``.
        splits: parts of equal length, in order; the usual ten.

    Returns:
        Mean over the splits, from 1 (all images alike, or no image certain) to C, and the deviation
        over them.

    Raises:
        ShapeError: there are fewer images than splits.

    Source:
        Salimans et al., arXiv:1606.03498.
    """
    count = len(logits)
    if logits.ndim != 2 or count < splits:
        raise ShapeError(f"logits must be [n, C] with n >= {splits}, not {list(logits.shape)}")
    sure = logits.double().log_softmax(1)
    scores = []
    for split in range(splits):
        log_p = sure[split * count // splits : (split + 1) * count // splits]
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(0).log())).nansum(1)
        scores.append(divergence.mean().exp())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))


def within(points: Tensor, others: Tensor, neighbours: int = 3) -> Tensor:
    """Which points lie in the manifold of others, bool ``[n]``.

    A point does where it is no farther from some other point than that one's k-th nearest
    neighbour among the others. The mean over drawn points in the manifold of real ones is the
    precision, and the mean over real points in the manifold of drawn ones the recall.

    Args:
        points: features, ``[n, F]``.
        others: features that make the manifold, ``[m, F]``, m > k.
        neighbours: k; 3 in published figures.

    Raises:
        ShapeError: there are no more others than neighbours.

    Source:
        Kynkäänniemi et al., arXiv:1904.06991.
    """
    if len(others) <= neighbours:
        raise ShapeError(f"{len(others)} features make no manifold of {neighbours} neighbours")
    points, others = points.double(), others.double()
    rows = max(1, _PIECE // len(others))

    def distances(some: Tensor) -> Iterator[Tensor]:
        for first in range(0, len(some), rows):
            yield torch.cdist(some[first : first + rows], others)

    # The nearest of all is the point itself.
    radii = torch.cat([apart.kthvalue(neighbours + 1).values for apart in distances(others)])
    return torch.cat([(apart <= radii).any(1) for apart in distances(points)])
