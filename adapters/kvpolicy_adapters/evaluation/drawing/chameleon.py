"""Lumina-mGPT and Anole, as transformers' ``ChameleonForConditionalGeneration``, with a VQGAN."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kvpolicy import AfterPrompt, CacheStats, LateLayout, RasterLayout, TokenLayout
from kvpolicy.errors import ParameterError
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
from kvpolicy_adapters.images.chameleon import ImageChameleon, ImageGrammar, ImageGuidance
from kvpolicy_adapters.images.families import layout_of
from kvpolicy_adapters.images.vqgan import VQGAN, from_pixels, to_pixels

__all__ = ["ChameleonImages"]

_START, _END_OF_TURN, _END_OF_LINE = "<racm3:break>", "<reserved08706>", "<reserved08799>"
#: A size token stands for a patch of 2 x 2 codes of 16 pixels.
_PATCH, _SIZE_ZERO = 32, 8800
_CFG, _TOP_K = 4.0, 2000


class ChameleonImages:
    """Draws with Lumina-mGPT (whose prompt says the size) or Anole (a square as configured).

    Args:
        model: the model.
        tokenizer: its tokenizer.
        vqgan: what makes pixels of its codes.
        pixels: side of Lumina-mGPT's image, a multiple of 32; None for Anole.
        size: pixels a side of the pictures; None for what the decoder gives.
        cache: one of :data:`CACHES`.

    Raises:
        ParameterError: the VQGAN has other codes than the model draws, no token says this size, or
            there is no such cache.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        vqgan: VQGAN,
        *,
        pixels: int | None = None,
        size: int | None = None,
        cache: str = "kvpolicy",
    ) -> None:
        self._model = ImageChameleon.sharing(model)
        self._tokenizer, self._vqgan, self._pixels, self._size = tokenizer, vqgan, pixels, size
        self.name = "anole" if pixels is None else "lumina-mgpt"
        self.cache = served(self.name, cache)
        self._names: dict[str, int] = model.config.vocabulary_map
        # IMGIMGBCZ is code 12: letters are digits.
        self._code = torch.full((max(self._names.values()) + 1,), -1)
        for name, token in self._names.items():
            if name.startswith("IMGIMG"):
                digits = [str(ord(letter) - ord("A")) for letter in name[len("IMGIMG") : -1]]
                self._code[token] = int("".join(digits))
        codes = int(self._code.max()) + 1
        if codes > vqgan.config.codes:
            raise ParameterError(
                f"the VQGAN has {vqgan.config.codes} codes, but {self.name} draws {codes}: they "
                f"don't belong together"
            )
        if pixels is not None:
            token = f"<reserved{_SIZE_ZERO + pixels // _PATCH:05d}>"
            if pixels % _PATCH or pixels < _PATCH or token not in self._names:
                raise ParameterError(
                    f"option pixels={pixels}: {self.name} has no token for this size; multiples of "
                    f"{_PATCH}, e.g. 768 or 1024"
                )
            self._rows, self._break = pixels // _PATCH * 2, 1
            self._header = [self._names[_START], self._names[token], self._names[token]]
        else:
            vision = model.config.vq_config
            self._rows = vision.resolution // 2 ** (len(vision.channel_multiplier) - 1)
            self._break = 0
            self._header = [self._names[_START]]
        self.layout: TokenLayout | LateLayout = layout_of(self._model)
        if pixels is None:
            # The reader would know it from the first image token on; speculation asks before.
            self.layout = AfterPrompt(RasterLayout(rows=self._rows, cols=self._rows, suffix=1))
        self.num_layers = model.config.num_hidden_layers

    def check(self, item: Item, sampler: Sampler) -> None:
        """Refuse a class, a prompt that is too long, and guidance where none was trained.

        Raises:
            ParameterError: says which.
        """
        if self._pixels is None and sampler.cfg not in (None, 1):
            raise ParameterError(f"anole is drawn from without guidance; cfg={sampler.cfg}")
        room = self._model.config.max_position_embeddings - self._count
        fits(item, len(self._ids(needs_prompt(self.name, item))), room)

    def draw(self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int) -> Drawn:
        """Draw a batch, uint8 ``[B, rows, cols, 3]``."""
        tokens, stats = self.tokens(items, setting, sampler, seed)
        lines = tokens.view(len(items), self._rows, self._rows + self._break)
        codes = self._code.to(tokens.device)[lines[:, :, : self._rows]]
        return Drawn(to_pixels(self._vqgan.decode(codes), self._size).numpy(), stats)

    def tokens(
        self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int
    ) -> tuple[Tensor, tuple[CacheStats, ...]]:
        """Draw a batch's tokens, int64 ``[B, count]``, line breaks included, and say the cost."""
        model, sized = self._model, self._pixels is not None
        prompts = [self._ids(needs_prompt(self.name, item)) for item in items]
        ids, mask = left_padded(prompts, model.config.pad_token_id or 0, model.device)
        scale = (_CFG if sized else 1.0) if sampler.cfg is None else sampler.cfg
        how = {} if sized else {"layout": self.layout}

        def empty(prompt: int) -> Any:
            return drawing_cache(model, self.cache, setting, prompt + self._count, **how)

        with ExitStack() as stack:
            caches = [stack.enter_context(empty(ids.shape[1]))]
            guidance: Any = 1.0
            if scale > 1:
                caches.append(stack.enter_context(empty(len(self._header))))
                guidance = ImageGuidance(scale, model, caches[1], sizes=sized)
            tokens = draw_tokens(
                model,
                ids,
                caches,
                items,
                self._count,
                setting,
                sampler,
                seed,
                rules=(ImageGrammar(model, sizes=sized),),
                top_k=_TOP_K if sized else 0,
                attention_mask=mask,
                guidance=guidance,
            )
            return tokens, tuple(map(cost_of, caches))

    @property
    def image_layout(self) -> RasterLayout:
        """The image without its prompt; behind it may come its end, and that of Lumina-mGPT's."""
        return RasterLayout(
            rows=self._rows, cols=self._rows, line_break=self._break, suffix=1 + self._break
        )

    @property
    def side(self) -> int:
        """Pixels a side of the images that its tokens stand for."""
        return self._rows * self._vqgan.config.scale

    def encode(self, pixels: Tensor) -> Tensor:
        """Tokens ``[B, count]``, line breaks included, of images, uint8 ``[B, side, side, 3]``.

        Raises:
            ParameterError: the VQGAN gives a code for which the model has no token.
        """
        codes = self._vqgan.encode(from_pixels(pixels).to(self._model.device))
        token = torch.full((self._vqgan.config.codes,), -1, device=codes.device)
        known = (self._code >= 0).nonzero()[:, 0]
        token[self._code[known].to(codes.device)] = known.to(codes.device)
        lines = token[codes]
        if int(lines.min()) < 0:
            missing = int(codes[lines < 0][0])
            raise ParameterError(f"{self.name} has no token for code {missing} of the VQGAN")
        if self._break:
            ends = lines.new_full((*lines.shape[:2], 1), self._names[_END_OF_LINE])
            lines = torch.cat([lines, ends], dim=2)
        return lines.flatten(1)

    @property
    def _count(self) -> int:
        """Tokens of an image, line breaks included."""
        return self._rows * (self._rows + self._break)

    def _ids(self, prompt: str) -> list[int]:
        if self._pixels is None:
            words: list[int] = list(self._tokenizer(prompt).input_ids)
            return [*words, *self._header]
        wish = (
            f"Generate an image of {self._pixels}x{self._pixels} according to the following "
            f"prompt:\n{prompt}"
        )
        words = list(self._tokenizer(wish, add_special_tokens=False).input_ids)
        return [self._tokenizer.bos_token_id, *words, self._names[_END_OF_TURN], *self._header]
