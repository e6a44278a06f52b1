"""VQGAN: images to codes and back, for the models that draw codes (arXiv:2012.09841).

One module for the tokenizers of LlamaGen (arXiv:2406.06525; 16 or 8 pixels a code) and of Chameleon
(arXiv:2405.09818), which Lumina-mGPT and Anole share; they differ in widths, in where they attend,
and in the length of their codes' vectors. Their checkpoints are read by :func:`read_vqgan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvpolicy import ShapeError
from kvpolicy_adapters.images.memory import in_pieces

__all__ = ["VQGAN", "VQGANConfig", "from_pixels", "to_pixels"]

_EPSILON = 1e-6


@dataclass(frozen=True)
class VQGANConfig:
    """The shape of a VQGAN.

    Attributes:
        channels: width of the finest level; a multiple of ``groups``.
        multipliers: width of each level in units of ``channels``, the finest first; a level is half
            as fine as the one before.
        blocks: residual blocks of a level of the encoder; the decoder's have one more.
        latent: width between the coarsest level and the codes.
        codes: codes that there are.
        code_size: length of a code's vector.
        attends: levels whose blocks are followed by attention, 0 for the finest.
        unit_codes: whether vectors are compared at length 1, as LlamaGen's are.
        groups: of channels, each of which is normalised for itself; 32 in all released ones. One
            channel a group would lose how bright a flat picture is.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    latent: int = 256
    codes: int = 16384
    code_size: int = 8
    attends: tuple[int, ...] = (4,)
    unit_codes: bool = True
    groups: int = 32

    @property
    def scale(self) -> int:
        """Pixels a code, on each side."""
        return int(2 ** (len(self.multipliers) - 1))


class VQGAN(nn.Module):
    """Encoder, codebook and decoder of a VQGAN; for drawing and scoring, not for training.

    Args:
        config: its shape.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.to_codes = nn.Conv2d(config.latent, config.code_size, 1)
        self.from_codes = nn.Conv2d(config.code_size, config.latent, 1)
        #: ``[codes, code_size]``, as they are looked up and compared: of length 1 in LlamaGen's.
        self.codebook = nn.Parameter(torch.randn(config.codes, config.code_size))

    @torch.no_grad()
    def encode(self, images: Tensor, piece: int | None = None) -> Tensor:
        """The codes, int64 ``[B, h, w]``, of images.

        Args:
            images: ``[B, 3, H, W]``, from −1 to 1 (see :func:`from_pixels`).
            piece: images at a time; None for as many as memory allows.

        Raises:
            ShapeError: the images have another shape, or a side that is no multiple of ``scale``.
        """
        scale = self.config.scale
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ShapeError(
                f"images must be numbers [B, 3, H, W] from -1 to 1, not {images.dtype} "
                f"{list(images.shape)}; from_pixels(...) makes them of uint8 [B, H, W, 3]"
            )
        if images.shape[2] % scale or images.shape[3] % scale:
            raise ShapeError(
                f"images are {images.shape[2]} x {images.shape[3]} pixels; both sides must be "
                f"multiples of {scale}, the pixels of a code of this VQGAN"
            )

        def nearest(some: Tensor) -> Tensor:
            hidden = self.to_codes(self.encoder(some)).movedim(1, -1)
            if self.config.unit_codes:
                hidden = functional.normalize(hidden, dim=-1)
            # |z|², the same for every code, is added first as the authors do: where codes are all
            # but equally near, its rounding decides, and here as there.
            lengths = hidden.square().sum(-1, keepdim=True) + self.codebook.square().sum(1)
            return (lengths - 2 * (hidden @ self.codebook.T)).argmin(-1)

        return in_pieces(nearest, images, piece)

    @torch.no_grad()
    def decode(self, codes: Tensor, piece: int | None = None) -> Tensor:
        """Images ``[B, 3, h * scale, w * scale]``, about −1 to 1, of codes.

        Args:
            codes: whole numbers ``[B, h, w]``.
            piece: images at a time; None for as many as memory allows.

        Raises:
            ShapeError: the codes have another shape, or one of them is not in the codebook.
        """
        if codes.ndim != 3 or codes.is_floating_point():
            raise ShapeError(
                f"codes must be whole numbers [B, rows, cols], not {codes.dtype} "
                f"{list(codes.shape)}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codes:
            raise ShapeError(
                f"codes are {int(codes.min())} to {int(codes.max())}, but this VQGAN has "
                f"{self.config.codes} of them; is it another model's?"
            )

        def paint(some: Tensor) -> Tensor:
            hidden = functional.embedding(some, self.codebook).movedim(-1, 1)
            return self.decoder(self.from_codes(hidden.contiguous()))

        return in_pieces(paint, codes, piece)


def to_pixels(images: Tensor, size: int | None = None) -> Tensor:
    """What a decoder gives, ``[B, 3, H, W]`` from −1 to 1, as uint8 ``[B, H, W, 3]``.

    Args:
        images: values beyond −1 and 1 are cut off.
        size: pixels a side, where others are wanted: resized (bicubic) before they are rounded, as
            LlamaGen's evaluation of 384 pixels at 256 has it.
    """
    images = images.float()
    if size is not None and images.shape[-2:] != (size, size):
        images = functional.interpolate(images, (size, size), mode="bicubic")
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu()


def from_pixels(pixels: Tensor) -> Tensor:
    """uint8 ``[B, H, W, 3]`` as float32 ``[B, 3, H, W]`` from −1 to 1.

    Raises:
        ShapeError: the pixels have another shape or dtype.
    """
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != torch.uint8:
        raise ShapeError(
            f"pixels must be uint8 [B, H, W, 3], not {pixels.dtype} {list(pixels.shape)}"
        )
    return pixels.movedim(-1, 1).float() / 127.5 - 1


class _Encoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * multiple for multiple in config.multipliers]
        self.stem = nn.Conv2d(3, config.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        before = config.channels
        for level, width in enumerate(widths):
            coarser = _Down(width) if level < len(widths) - 1 else None
            attends = level in config.attends
            self.levels.append(
                _Level(before, width, config.blocks, attends, coarser, config.groups)
            )
            before = width
        self.middle = _middle(before, config.groups)
        self.norm = _norm(before, config.groups)
        self.head = nn.Conv2d(before, config.latent, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        for level in self.levels:
            hidden = level(hidden)
        return self.head(functional.silu(self.norm(self.middle(hidden))))


class _Decoder(nn.Module):
    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.channels * multiple for multiple in config.multipliers]
        before = widths[-1]
        self.stem = nn.Conv2d(config.latent, before, 3, padding=1)
        self.middle = _middle(before, config.groups)
        self.levels = nn.ModuleList()  # as they run: the coarsest first
        for level in reversed(range(len(widths))):
            finer = _Up(widths[level]) if level else None
            attends = level in config.attends
            self.levels.append(
                _Level(before, widths[level], config.blocks + 1, attends, finer, config.groups)
            )
            before = widths[level]
        self.norm = _norm(before, config.groups)
        self.head = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.middle(self.stem(hidden))
        for level in self.levels:
            hidden = level(hidden)
        return self.head(functional.silu(self.norm(hidden)))


class _Level(nn.Module):
    """Residual blocks of one width, each with attention behind it or none; then another size."""

    def __init__(
        self,
        before: int,
        width: int,
        blocks: int,
        attends: bool,
        resample: nn.Module | None,
        groups: int,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _Residual(width if number else before, width, groups) for number in range(blocks)
        )
        self.attentions = nn.ModuleList(
            _Attention(width, groups) for _ in range(blocks if attends else 0)
        )
        self.resample = resample

    def forward(self, hidden: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            hidden = block(hidden)
            if self.attentions:
                hidden = self.attentions[number](hidden)
        return hidden if self.resample is None else self.resample(hidden)


class _Residual(nn.Module):
    def __init__(self, before: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(before, groups), nn.Conv2d(before, width, 3, padding=1)
        self.norm2, self.conv2 = _norm(width, groups), nn.Conv2d(width, width, 3, padding=1)
        self.shortcut: nn.Module = nn.Identity()
        if before != width:
            self.shortcut = nn.Conv2d(before, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.conv1(functional.silu(self.norm1(hidden)))
        inner = self.conv2(functional.silu(self.norm2(inner)))
        return self.shortcut(hidden) + inner


class _Attention(nn.Module):
    """One head over all places of the plane."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(width, groups)
        self.query, self.key = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.value, self.out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        parts = (part(normed) for part in (self.query, self.key, self.value))
        # One head: [B, 1, places, width].
        query, key, value = (part.flatten(2).mT.unsqueeze(1) for part in parts)
        seen = functional.scaled_dot_product_attention(query, key, value)
        return hidden + self.out(seen.squeeze(1).mT.reshape(hidden.shape))


class _Down(nn.Conv2d):
    """Half the size; padded on the right and below only, as the checkpoints were trained."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(functional.pad(hidden, (0, 1, 0, 1)))


class _Up(nn.Conv2d):
    """Twice the size, by repeating."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(functional.interpolate(hidden, scale_factor=2.0))


def _middle(width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        _Residual(width, width, groups), _Attention(width, groups), _Residual(width, width, groups)
    )


def _norm(width: int, groups: int) -> Any:
    return nn.GroupNorm(groups, width, eps=_EPSILON)
