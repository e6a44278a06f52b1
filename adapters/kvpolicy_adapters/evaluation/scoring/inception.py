"""The Inception network of the Fréchet inception distance, and the file of its weights.

This is the Inception v3 of 2015 (arXiv:1512.00567) as TensorFlow's public graph has it, which is
what published distances are computed with, and not torchvision's of the same name: it has 1,008
classes, resizes images as TensorFlow 1 did, leaves padding out of averages, and takes the maximum
in its last block. torch-fidelity's and pytorch-fid's weights fit, both of them one file. It stands
here because torch-fidelity reads that file as a pickle that may run code, and can't be imported
without torchvision, whose released wheels need a torch built for CUDA.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvpolicy import ParameterError, ShapeError
from kvpolicy_adapters.images.tensors import assign, read_checkpoint, weights_of

__all__ = ["Inception", "open_inception", "read_inception"]

#: Pixels a side that the network sees, whatever the images have.
_SIDE = 299
#: Channels of the stem, and classes, of the network that is published.
_STEM, _CLASSES = 32, 1008
#: First digits of the SHA-256 of the file that both packages fetch, by its name: torch's hub ends
#: a file's name with them, and checks them. The file itself was not at hand where this was written.
_PUBLISHED = "6726825d"
_NAMED = re.compile(r"-([0-9a-f]{8,64})\.pth?$")


class _Step(NamedTuple):
    """One convolution of a branch; a branch that forks has two in one place.

    Attributes:
        channels: it gives.
        kernel: height and width.
    """

    channels: int
    kernel: tuple[int, int]


_Branch = tuple[tuple[_Step, ...], ...]
_Pool = Literal["average", "maximum", "halve"]


def _chain(*steps: tuple[int, int] | tuple[int, int, int]) -> _Branch:
    """Steps one after another, given as channels and kernel, or channels, height and width."""
    return tuple((_Step(step[0], (step[1], step[-1])),) for step in steps)


_FORK = ((_Step(384, (1, 3)), _Step(384, (3, 1))),)


def _fives(pooled: int) -> dict[str, _Branch]:
    return {
        "branch1x1": _chain((64, 1)),
        "branch5x5": _chain((48, 1), (64, 5)),
        "branch3x3dbl": _chain((64, 1), (96, 3), (96, 3)),
        "branch_pool": _chain((pooled, 1)),
    }


def _sevens(inner: int) -> dict[str, _Branch]:
    across, down = (inner, 1, 7), (inner, 7, 1)
    return {
        "branch1x1": _chain((192, 1)),
        "branch7x7": _chain((inner, 1), across, (192, 7, 1)),
        "branch7x7dbl": _chain((inner, 1), down, across, down, (192, 1, 7)),
        "branch_pool": _chain((192, 1)),
    }


_FORKED = {
    "branch1x1": _chain((320, 1)),
    "branch3x3": _chain((384, 1)) + _FORK,
    "branch3x3dbl": _chain((448, 1), (384, 3)) + _FORK,
    "branch_pool": _chain((192, 1)),
}
#: Block by block: its branches, and what is taken of each place's neighbours beside them.
_BLOCKS: dict[str, tuple[dict[str, _Branch], _Pool]] = {
    "Mixed_5b": (_fives(32), "average"),
    "Mixed_5c": (_fives(64), "average"),
    "Mixed_5d": (_fives(64), "average"),
    "Mixed_6a": (
        {"branch3x3": _chain((384, 3)), "branch3x3dbl": _chain((64, 1), (96, 3), (96, 3))},
        "halve",
    ),
    "Mixed_6b": (_sevens(128), "average"),
    "Mixed_6c": (_sevens(160), "average"),
    "Mixed_6d": (_sevens(160), "average"),
    "Mixed_6e": (_sevens(192), "average"),
    "Mixed_7a": (
        {
            "branch3x3": _chain((192, 1), (320, 3)),
            "branch7x7x3": _chain((192, 1), (192, 1, 7), (192, 7, 1), (192, 3)),
        },
        "halve",
    ),
    "Mixed_7b": (_FORKED, "average"),
    "Mixed_7c": (_FORKED, "maximum"),
}


class Inception(nn.Module):
    """Features and logits of images.

    Args:
        stem: channels of the first convolution, a multiple of 2; 32 in the published network, and
            all other widths in proportion.
    """

    name = "inception"

    def __init__(self, stem: int = _STEM) -> None:
        super().__init__()

        def wide(channels: int) -> int:
            return channels * stem // _STEM

        self.Conv2d_1a_3x3 = _Convolution(3, wide(32), (3, 3), stride=2, padded=False)
        self.Conv2d_2a_3x3 = _Convolution(wide(32), wide(32), (3, 3), padded=False)
        self.Conv2d_2b_3x3 = _Convolution(wide(32), wide(64), (3, 3))
        self.Conv2d_3b_1x1 = _Convolution(wide(64), wide(80), (1, 1))
        self.Conv2d_4a_3x3 = _Convolution(wide(80), wide(192), (3, 3), padded=False)
        before = wide(192)
        for name, (branches, pool) in _BLOCKS.items():
            scaled = {
                branch: tuple(
                    tuple(_Step(wide(step.channels), step.kernel) for step in place)
                    for place in steps
                )
                for branch, steps in branches.items()
            }
            block = _Block(before, scaled, pool)
            self.add_module(name, block)
            before = block.channels
        self.fc = nn.Linear(before, _CLASSES)
        self.features: int = before
        #: SHA-256 of the file that the weights are from.
        self.digest = ""

    @property
    def published(self) -> bool:
        """Whether the weights are those that published distances are computed with."""
        return self.digest.startswith(_PUBLISHED)

    @torch.inference_mode()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the network says of images.

        Args:
            images: uint8 ``[B, H, W, 3]``.

        Returns:
            Features ``[B, features]`` (2,048 of the published network, after its last average), and
            logits without their bias ``[B, 1008]``, which the inception score is computed with in
            OpenAI's code and all that follow it; float32, on the processor.

        Raises:
            ShapeError: the images have another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ShapeError(
                f"images must be uint8 [B, H, W, 3], not {images.dtype} {list(images.shape)}"
            )
        hidden = images.to(self.fc.weight.device).movedim(-1, 1).float()
        hidden = (_resized(hidden) - 128) / 128
        hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(hidden)))
        hidden = functional.max_pool2d(hidden, 3, stride=2)
        hidden = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden))
        hidden = functional.max_pool2d(hidden, 3, stride=2)
        for name in _BLOCKS:
            hidden = self.get_submodule(name)(hidden)
        features = hidden.mean((2, 3))
        return features.cpu(), (features @ self.fc.weight.T).cpu()


class _Convolution(nn.Module):
    def __init__(
        self,
        before: int,
        channels: int,
        kernel: tuple[int, int],
        *,
        stride: int = 1,
        padded: bool = True,
    ) -> None:
        super().__init__()
        around = (kernel[0] // 2, kernel[1] // 2) if padded else 0
        self.conv = nn.Conv2d(before, channels, kernel, stride, around, bias=False)
        self.bn = _Norm(channels)

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(images)))


class _Norm(nn.Module):
    """Batch normalization as evaluated; torch's own counts steps of training, and wants them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, images: Tensor) -> Tensor:
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return functional.batch_norm(images, mean, variance, self.weight, self.bias, eps=1e-3)


class _Block(nn.Module):
    """Branches side by side, and what is pooled; the last convolutions of one that halves do so.

    A branch's modules are called as the files call them: by the branch where it is one convolution,
    else with their place behind it (``branch5x5_2``), and a letter where it forks.
    """

    def __init__(self, before: int, branches: dict[str, _Branch], pool: _Pool) -> None:
        super().__init__()
        self.pool = pool
        self.channels = before if pool == "halve" else 0
        self.branches: list[list[list[str]]] = []  # names: of each branch, place, and fork
        for branch, steps in branches.items():
            wide, places = before, []
            for number, fork in enumerate(steps, start=1):
                halves = pool == "halve" and number == len(steps)
                place = branch if len(steps) == 1 else f"{branch}_{number}"
                names = [place + letter for letter in ("ab" if len(fork) == 2 else ("",))]
                for name, step in zip(names, fork, strict=True):
                    self.add_module(
                        name,
                        _Convolution(wide, *step, stride=1 + halves, padded=not halves),
                    )
                wide = sum(step.channels for step in fork)
                places.append(names)
            self.channels += wide
            self.branches.append(places)

    def forward(self, hidden: Tensor) -> Tensor:
        found = []
        for places in self.branches:
            ahead = self._pooled(hidden) if places == [["branch_pool"]] else hidden
            for names in places:
                ahead = torch.cat([self.get_submodule(name)(ahead) for name in names], 1)
            found.append(ahead)
        if self.pool == "halve":
            found.append(functional.max_pool2d(hidden, 3, stride=2))
        return torch.cat(found, 1)

    def _pooled(self, hidden: Tensor) -> Tensor:
        if self.pool == "maximum":
            return functional.max_pool2d(hidden, 3, stride=1, padding=1)
        return functional.avg_pool2d(hidden, 3, stride=1, padding=1, count_include_pad=False)


def _resized(images: Tensor) -> Tensor:
    """Bilinear, corners at corners of the grid above and left, as TensorFlow 1 resized."""
    down, across = (_weights(size, images.device) for size in images.shape[2:])
    return down @ images @ across.T


def _weights(size: int, device: torch.device) -> Tensor:
    """What each of 299 places takes of ``size`` pixels, float32 ``[299, size]``."""
    at = torch.arange(_SIDE, device=device) * torch.tensor(size / _SIDE, device=device)
    low = at.long()
    share = (at - low)[:, None]
    one = functional.one_hot(low, size) * (1 - share)
    return one + functional.one_hot((low + 1).clamp(max=size - 1), size) * share


def read_inception(path: str | Path) -> Inception:
    """Make the network of a file of its weights, by torch's weights-only reader.

    Args:
        path: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``, pytorch-fid's
            ``pt_inception-2015-12-05-6726825d.pth``, or the same as ``.safetensors``.

    Returns:
        The network in evaluation mode, without gradients, in float32.

    Raises:
        ParameterError: the file is truncated, holds more than tensors, or another network; or its
            name ends with another digest than its own.
        OSError: the file can't be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    named = _NAMED.search(path.name)
    if named is not None and not digest.startswith(named[1]):
        raise ParameterError(
            f"{path} is not the file that its name says: its SHA-256 begins with {digest[:8]}, and "
            f"not with {named[1]}. It may be cut off ({path.stat().st_size:,} bytes): fetch it "
            f"again; other weights go by another name"
        )
    weights = {
        name: tensor
        for name, tensor in weights_of(read_checkpoint(path), ("state_dict", "model")).items()
        if not name.endswith("num_batches_tracked")
    }
    first: Any = weights.get("Conv2d_1a_3x3.conv.weight")
    stem = len(first) if first is not None and first.ndim == 4 else _STEM
    refusal = (
        f"{path} does not hold the Inception of the Fréchet distance (torchvision's of the same "
        f"name is another)"
    )
    if stem % 2:
        raise ParameterError(f"{refusal}: its first convolution has {stem} channels")
    with torch.device("meta"):
        model = Inception(stem)
    assign(model, weights, refusal)
    model.digest = digest
    return model.eval().requires_grad_(False).float()


def open_inception(path: Path, device: str) -> Inception:
    """Read the network for ``kvpolicy score``; see :func:`read_inception`."""
    return read_inception(path).to(device)
