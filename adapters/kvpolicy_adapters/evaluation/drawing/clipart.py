"""clipart-ar: 96 x 96 pictures in colour, from words."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from kvpolicy.errors import ParameterError
from kvpolicy.lab.draw.image_model import Drawn, ModelSource, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.subject import Setting
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.evaluation.drawing.common import draw_tokens, needs_prompt, options_of
from kvpolicy_adapters.images.guidance import Guidance
from kvpolicy_adapters.zoo.clipart import open_clipart

__all__ = ["ClipartImages"]

_CFG = 3.0


class ClipartImages:
    """Draws with clipart-ar: prompts of one to eight words that it knows.

    Args:
        source: ``path``, a folder that ``examples/training/pack_clipart_ar.py`` has written; None
            for the model that ships. Option: ``line_breaks``, 1 to draw a line-break token behind
            each row, 0 (the default) for none.

    Raises:
        ParameterError: the folder holds no clipart-ar; or a decoder's file, a dtype or an unknown
            option is given.
    """

    name = "clipart-ar"

    def __init__(self, source: ModelSource) -> None:
        given = options_of(source, {"line_breaks": None})["line_breaks"]
        if given not in (None, 0, 1):
            raise ParameterError(f"option line_breaks={given!r} must be 0 or 1")
        if source.vq is not None:
            raise ParameterError(f"clipart-ar has a decoder of its own; vq={source.vq!r} is not")
        if source.dtype not in (None, "float32"):
            raise ParameterError(f"clipart-ar computes in float32, not dtype={source.dtype!r}")
        self._line_breaks = bool(given)
        self._zoo = open_clipart(source.path)
        model: Any = self._zoo.model
        self._model = model.to(source.device)
        self._zoo.vqgan.to(source.device)
        self._device = source.device
        self.layout = self._zoo.layout(line_breaks=self._line_breaks)
        self.num_layers = self._model.config.num_hidden_layers

    def check(self, item: Item, sampler: Sampler) -> None:
        """Refuse a class, and a prompt that it can't read.

        Raises:
            ParameterError: says which, and which words are near.
        """
        prompt = needs_prompt(self.name, item)
        try:
            self._zoo.tokens.words(prompt)
        except ParameterError as error:
            raise ParameterError(f"prompt {item.row}: {error}") from None

    def draw(self, items: Sequence[Item], setting: Setting, sampler: Sampler, seed: int) -> Drawn:
        """Draw a batch, uint8 ``[B, 96, 96, 3]``."""
        breaks, model = self._line_breaks, self._model
        prompts = [needs_prompt(self.name, item) for item in items]
        prompt = self._zoo.prompts(prompts, line_breaks=breaks).to(self._device)
        nothing = self._zoo.unconditional(line_breaks=breaks).to(self._device)
        scale = _CFG if sampler.cfg is None else sampler.cfg
        how: dict[str, Any] = {
            "policy": setting.policy,
            "budget": setting.budget,
            "layout": self.layout,
        }
        with ExitStack() as stack:
            caches = [stack.enter_context(attach(model, **how))]
            guidance: Any = 1.0
            if scale > 1:
                caches.append(stack.enter_context(attach(model, **how)))
                guidance = Guidance(scale, model, caches[1], nothing)
            tokens = draw_tokens(
                model,
                prompt,
                caches,
                items,
                self.layout.rows * self.layout.line_length,
                setting,
                sampler,
                seed,
                rules=(self._zoo.grammar(line_breaks=breaks),),
                guidance=guidance,
            )
            stats = tuple(cache.stats() for cache in caches)
        return Drawn(self._zoo.images(tokens, line_breaks=breaks), stats)
