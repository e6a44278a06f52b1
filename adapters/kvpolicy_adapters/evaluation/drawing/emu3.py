"""Emu3, as transformers' ``Emu3ForConditionalGeneration``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PrefixConstrainedLogitsProcessor

from kvpolicy import CacheStats, LateLayout, RasterLayout
from kvpolicy.lab.draw.image_model import Drawn, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.subject import Setting
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.evaluation.drawing.common import (
    draw_tokens,
    fits,
    left_padded,
    needs_prompt,
)
from kvpolicy_adapters.images.emu3 import GridRule
from kvpolicy_adapters.images.families import layout_of
from kvpolicy_adapters.images.guidance import Guidance
from kvpolicy_adapters.images.memory import in_pieces
from kvpolicy_adapters.images.vqgan import from_pixels, to_pixels

__all__ = ["Emu3Images"]

_CFG, _TOP_K = 3.0, 2048
_NEGATIVE = "lowres, bad anatomy, bad hands, cropped, worst quality, low quality, blurry"
#: End of frame, end of image, end of sequence.
_SUFFIX = 3
_ENDS = ("<|extra_201|>", "<|image end|>")


class Emu3Images:
    """Draws with an Emu3 and the decoder of its own; guidance is away from a negative prompt.

    Args:
        model: the model.
        processor: its processor, which says the size in the prompt.
        size: pixels a side of the pictures; None for what the decoder gives.
    """

    name = "emu3"

    def __init__(self, model: Any, processor: Any, *, size: int | None = None) -> None:
        self._model, self._processor, self._size = model, processor, size
        self.num_layers = model.config.text_config.num_hidden_layers

    @property
    def layout(self) -> LateLayout:
        """A reader of the size that the prompt gives; it follows one generation."""
        layout = layout_of(self._model)
        assert isinstance(layout, LateLayout)  # this family's always is
        return layout

    def check(self, item: Item, sampler: Sampler) -> None:
        """Refuse a class, and a prompt that is too long.

        Raises:
            ParameterError: says which.
        """
        ids, grid = self._prompt(needs_prompt(self.name, item))
        room = self._model.config.text_config.max_position_embeddings - _count(grid)
        fits(item, len(ids), room)

    def draw(self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int) -> Drawn:
        """Draw a batch, uint8 ``[B, rows, cols, 3]``."""
        tokens, stats = self.tokens(items, setting, sampler, seed)
        grid = self.grid(items[0])

        def paint(some: Tensor) -> Tensor:
            with torch.no_grad():
                pixels: Tensor = self._model.decode_image_tokens(
                    image_tokens=some, height=grid.rows, width=grid.cols
                )
            pixels = pixels.flatten(1, -4) if pixels.ndim == 5 else pixels
            mean, deviation = self._normal(pixels.device)
            return (pixels.float() * deviation + mean) * 2 - 1

        return Drawn(to_pixels(in_pieces(paint, tokens), self._size).numpy(), stats)

    def tokens(
        self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int
    ) -> tuple[Tensor, tuple[CacheStats, ...]]:
        """Draw a batch's tokens, int64 ``[B, count]``, line breaks and end included, with stats."""
        model = self._model
        found = [self._prompt(needs_prompt(self.name, item)) for item in items]
        grid = found[0][1]
        text = model.config.text_config
        ids, mask = left_padded([prompt for prompt, _ in found], text.pad_token_id, model.device)
        negative = torch.tensor([self._prompt(_NEGATIVE)[0]], device=model.device)
        scale = _CFG if sampler.cfg is None else sampler.cfg
        how: dict[str, Any] = {"policy": setting.policy, "budget": setting.budget}
        with ExitStack() as stack:
            caches = [stack.enter_context(attach(model, **how))]
            guidance: Any = 1.0
            allowed: Any = GridRule(model)  # returns a tensor, which is as good as the list
            if scale > 1:
                caches.append(stack.enter_context(attach(model, **how)))
                guidance = Guidance(scale, model, caches[1], negative)
            tokens = draw_tokens(
                model,
                ids,
                caches,
                items,
                _count(grid),
                setting,
                sampler,
                seed,
                rules=(PrefixConstrainedLogitsProcessor(allowed, num_beams=1),),
                top_k=_TOP_K,
                attention_mask=mask,
                guidance=guidance,
            )
            return tokens, tuple(cache.stats() for cache in caches)

    def grid(self, item: Item) -> RasterLayout:
        """The grid that the processor writes into every prompt."""
        return self._prompt(needs_prompt(self.name, item))[1]

    def encode(self, pixels: Tensor) -> Tensor:
        """Tokens ``[B, count]``, line breaks and end included, of images, uint8 ``[B, H, W, 3]``.

        The images' sides are those of the grid, times the pixels of a code.
        """
        vision: Any = self._model.model.vqmodel
        names: dict[str, int] = self._model.config.vocabulary_map
        end = torch.tensor([names[name] for name in _ENDS] + [self._end], dtype=torch.int64)

        def codes(some: Tensor) -> Tensor:
            sizes = torch.tensor([some.shape[2:]] * len(some))
            with torch.no_grad():
                found = vision.encode(some.to(vision.device), sizes, return_dict=True).image_tokens
            lines = [self._model.model.vocabulary_mapping.convert_img2bpe(one) for one in found]
            return torch.stack([line.flatten().long() for line in lines])

        mean, deviation = self._normal(torch.device("cpu"))
        tokens = in_pieces(codes, ((from_pixels(pixels) + 1) / 2 - mean) / deviation)
        return torch.cat([tokens, end.to(tokens.device).expand(len(tokens), -1)], dim=1)

    def _normal(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation ``[3, 1, 1]`` that the processor gives pixels from 0 to 1."""
        images = getattr(self._processor, "image_processor", None)
        given = (getattr(images, name, None) or [0.5] * 3 for name in ("image_mean", "image_std"))
        mean, deviation = (torch.tensor(each, device=device).view(3, 1, 1) for each in given)
        return mean, deviation

    @property
    def scale(self) -> int:
        """Pixels a code, on each side."""
        levels: int = len(self._model.config.vq_config.channel_multiplier)
        return int(2 ** (levels - 1))

    @property
    def _end(self) -> int:
        return int(self._model.config.text_config.eos_token_id)

    def _prompt(self, prompt: str) -> tuple[list[int], RasterLayout]:
        """The ids of a prompt that ends where the image begins, and the grid that it says."""
        found = self._processor(
            text=[prompt], return_for_image_generation=True, return_tensors="pt"
        )
        ids: list[int] = found["input_ids"][0].tolist()
        reader: Any = self.layout
        grid, _ = reader.header.grid(ids)
        return ids, grid


def _count(grid: RasterLayout) -> int:
    return grid.rows * grid.line_length + _SUFFIX
