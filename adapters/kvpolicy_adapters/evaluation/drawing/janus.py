"""Janus-Pro, as transformers' ``JanusForConditionalGeneration``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvpolicy import AfterPrompt, CacheStats, RasterLayout
from kvpolicy.lab.draw.image_model import Drawn, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.subject import Setting
from kvpolicy_adapters.evaluation.drawing.caches import cost_of, drawing_cache, served
from kvpolicy_adapters.evaluation.drawing.common import (
    draw_tokens,
    fits,
    left_padded,
    needs_prompt,
)
from kvpolicy_adapters.images.families import layout_of
from kvpolicy_adapters.images.memory import in_pieces
from kvpolicy_adapters.images.vqgan import from_pixels, to_pixels

__all__ = ["JanusImages"]

_CFG = 5.0


class JanusImages:
    """Draws with a Janus and the decoder of its own.

    Args:
        model: the model.
        processor: its processor.
        size: pixels a side of the pictures; None for what the decoder gives.
        cache: one of :data:`CACHES`.

    Raises:
        ParameterError: there is no such cache.
    """

    name = "janus"

    def __init__(
        self, model: Any, processor: Any, *, size: int | None = None, cache: str = "kvpolicy"
    ) -> None:
        self.cache = served(self.name, cache)
        self._model, self._processor, self._size = model, processor, size
        layout = layout_of(model)
        assert isinstance(layout, AfterPrompt)  # this family's always is
        self.layout = layout
        self.num_layers = model.config.text_config.num_hidden_layers
        self._tokens: int = model.config.vision_config.num_image_tokens

    def check(self, item: Item, sampler: Sampler) -> None:
        """Refuse a class, and a prompt that is too long.

        Raises:
            ParameterError: says which.
        """
        room = self._model.config.text_config.max_position_embeddings - self._tokens
        fits(item, len(self._ids(needs_prompt(self.name, item))), room)

    def draw(self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int) -> Drawn:
        """Draw a batch, uint8 ``[B, rows, cols, 3]``."""
        tokens, stats = self.tokens(items, setting, sampler, seed)

        def paint(some: Tensor) -> Tensor:
            with torch.no_grad():
                pixels: Tensor = self._model.decode_image_tokens(some)
            return pixels.movedim(-1, 1)

        return Drawn(to_pixels(in_pieces(paint, tokens), self._size).numpy(), stats)

    def tokens(
        self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int
    ) -> tuple[Tensor, tuple[CacheStats, ...]]:
        """Draw a batch's tokens, int64 ``[B, count]``, and say what the cache cost."""
        model = self._model
        prompts = [self._ids(needs_prompt(self.name, item)) for item in items]
        ids, mask = left_padded(prompts, model.generation_config.pad_token_id, model.device)
        length = ids.shape[1] + self._tokens
        with drawing_cache(model, self.cache, setting, length) as cache:
            tokens = draw_tokens(
                model,
                ids,
                [cache],
                items,
                self._tokens,
                setting,
                sampler,
                seed,
                attention_mask=mask,
                guidance=_CFG if sampler.cfg is None else sampler.cfg,
            )
            return tokens, (cost_of(cache),)

    @property
    def image_layout(self) -> RasterLayout:
        """The image without its prompt."""
        return self.layout.preview()

    @property
    def side(self) -> int:
        """Pixels a side of the images that its tokens stand for."""
        levels = len(self._model.config.vq_config.channel_multiplier)
        return int(math.isqrt(self._tokens) * 2 ** (levels - 1))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Tokens ``[B, count]`` of images, uint8 ``[B, side, side, 3]``."""
        encoder = self._model.model.vqmodel

        def codes(some: Tensor) -> Tensor:
            found = encoder.encode(some.to(self._model.device, self._model.dtype), return_dict=True)
            return found.image_tokens.view(len(some), -1)

        return in_pieces(codes, from_pixels(pixels))

    def _ids(self, prompt: str) -> list[int]:
        said = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        text = self._processor.apply_chat_template(said, add_generation_prompt=True)
        found = self._processor(text=text, generation_mode="image", return_tensors="pt")
        ids: list[int] = found["input_ids"][0].tolist()
        return ids
