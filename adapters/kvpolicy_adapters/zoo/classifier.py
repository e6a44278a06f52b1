"""The small convolutional classifier by which generated images are judged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvpolicy.errors import ShapeError

__all__ = ["FashionClassifier"]

_ROWS, _COLS, _GREYS, _CLASSES = 28, 28, 16, 10


class FashionClassifier(nn.Module):
    """Class and features of 28 x 28 images of 16 grey levels, given as pixel tokens.

    Five convolutions, 28 x 28 to 7 x 7, then the mean over the plane: ``FEATURES`` numbers an
    image, which a linear layer turns into logits and a Fréchet distance compares.
    """

    FEATURES = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 48, stride=2),
            *_convolution(48, 64),
            *_convolution(64, 96, stride=2),
            *_convolution(96, self.FEATURES),
        )
        self.head = nn.Linear(self.FEATURES, _CLASSES)

    def features(self, pixels: Tensor) -> Tensor:
        """Penultimate features, float32 ``[n, 64]``, of pixel tokens ``[n, 784]`` (0 to 15).

        Raises:
            ShapeError: the tokens are not ``[n, 784]``, not whole numbers, or not 0 to 15.
        """
        check_pixels(pixels)
        planes = pixels.reshape(-1, 1, _ROWS, _COLS).float() / (_GREYS - 1) - 0.5
        plane: Tensor = self.body(planes.contiguous(memory_format=torch.channels_last))
        return plane.float().mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``[n, 10]`` of pixel tokens ``[n, 784]``; errors as of ``features``."""
        logits: Tensor = self.head(self.features(pixels))
        return logits


def check_pixels(pixels: Tensor) -> None:
    """Refuse what is not ``[n, 784]`` grey levels from 0 to 15.

    Raises:
        ShapeError: says what was given.
    """
    if pixels.ndim != 2 or pixels.shape[1] != _ROWS * _COLS or pixels.is_floating_point():
        raise ShapeError(
            f"pixel tokens must be whole numbers [n, {_ROWS * _COLS}] without the class token, "
            f"not {pixels.dtype} {list(pixels.shape)}"
        )
    if len(pixels) and not 0 <= int(pixels.min()) <= int(pixels.max()) < _GREYS:
        raise ShapeError(
            f"pixel tokens must be grey levels 0 to {_GREYS - 1}, "
            f"not {int(pixels.min())} to {int(pixels.max())}"
        )


def _convolution(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
