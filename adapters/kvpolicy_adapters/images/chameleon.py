"""Chameleon's image generators: Lumina-mGPT and Anole, as transformers' ``Chameleon...`` classes.

Lumina-mGPT (arXiv:2408.02657) opens an image with ``<racm3:break>`` and two size tokens (rows,
then columns, counted in patches of 2 x 2 tokens), ends each line with ``<reserved08799>`` and the
image with ``<eoss>``. Anole (arXiv:2407.06135) and Chameleon (arXiv:2405.09818) put 32 x 32 tokens
between ``<racm3:break>`` and ``<eoss>``, with no line break.

transformers' ``ChameleonForConditionalGeneration`` never draws: its ``forward`` overwrites the
logits of image tokens. :class:`ImageChameleon` is the same model without that::

    model = ImageChameleon.sharing(ChameleonForConditionalGeneration.from_pretrained(...))
    with attach(model, ...) as cache, attach(model, ...) as second:
        model.generate(
            prompt,
            cache=cache,
            logits_processor=[ImageGuidance(4.0, model, second), ImageGrammar(model)],
        )
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    ChameleonForConditionalGeneration,
    LogitsProcessor,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvpolicy import LayoutError, RasterLayout
from kvpolicy_adapters.images.guidance import SecondHalf, guided
from kvpolicy_adapters.images.token_reader import TokenReader
from kvpolicy_adapters.transformers.cache import TransformersCache
from kvpolicy_adapters.transformers.cache_argument import CACHE_ARGUMENT, as_argument

__all__ = ["Chameleon", "ImageChameleon", "ImageGrammar", "ImageGuidance"]

_START, _END, _LINE_BREAK = "<racm3:break>", "<eoss>", "<reserved08799>"
#: ``<reserved08800>`` + n: n patches, of 2 x 2 tokens each.
_SIZE_ZERO, _PATCH = 8800, 2
#: Lumina-mGPT: the header is image start, rows and columns.
_HEADER = 3


class Chameleon:
    """The family of ``ChameleonForConditionalGeneration``, drawing images.

    Which of its generators a checkpoint is shows in the token behind ``<racm3:break>``: a size
    token (Lumina-mGPT) or an image token (Anole, Chameleon). Everything up to the image that is
    drawn is prefix, images in the prompt included; see :class:`TokenReader` for what follows it. A
    text answer is kept whole: to put text under a policy, attach with ``layout=TextLayout(...)``.
    """

    def recognises(self, model: PreTrainedModel) -> bool:
        """Whether a model is a Chameleon of transformers."""
        return model.config.model_type == "chameleon"

    def layout(self, model: PreTrainedModel) -> TokenReader:
        """A reader of image starts and sizes."""
        return TokenReader(_Header(_Tokens(model), None))


class _Tokens:
    """The ids of the tokens that images consist of."""

    def __init__(self, model: PreTrainedModel) -> None:
        vocabulary: dict[str, int] = model.config.vocabulary_map or {}
        missing = [name for name in (_START, _END) if name not in vocabulary]
        if missing:
            raise LayoutError(
                f"{type(model).__name__} has no {missing[0]} in its config.vocabulary_map, so its "
                f"images can't be found; say where tokens sit: attach(..., layout=AfterPrompt("
                f"RasterLayout(rows=32, cols=32)))"
            )
        self.start, self.end = vocabulary[_START], vocabulary[_END]
        self.line_break = vocabulary.get(_LINE_BREAK)
        self.images = sorted(
            token for name, token in vocabulary.items() if name.startswith("IMGIMG")
        )
        # The processor writes <image> where an image of the prompt goes.
        self.drawn = {*self.images, vocabulary.get("<image>")}
        self.sizes: dict[int, int] = {}
        for name, token in vocabulary.items():
            number = re.fullmatch(r"<reserved(\d{5})>", name)
            if number and int(number[1]) > _SIZE_ZERO:
                self.sizes[token] = (int(number[1]) - _SIZE_ZERO) * _PATCH
        vision = model.config.vq_config
        self.side = vision.resolution // 2 ** (len(vision.channel_multiplier) - 1)


class _Header:
    """Image start, and two size tokens (Lumina-mGPT) or none (Anole).

    Args:
        tokens: the ids.
        sizes: whether there are size tokens; None to see from the token behind image start.
    """

    def __init__(self, tokens: _Tokens, sizes: bool | None) -> None:
        self.tokens = tokens
        self.sizes = sizes

    def grid(self, text: Sequence[int]) -> tuple[RasterLayout, int] | None:
        """The grid, where the newest token settles it.

        Raises:
            LayoutError: a size token is followed by another token than a second one.
        """
        tokens = self.tokens
        # Behind an image without sizes comes its end; behind one with sizes, its end and the token
        # that ends the turn.
        if self.sizes is False and text[-1] == tokens.start:
            return RasterLayout(rows=tokens.side, cols=tokens.side, suffix=1), 0
        if len(text) >= 2 and text[-2] == tokens.start and text[-1] in tokens.drawn:
            if self.sizes:
                raise LayoutError(
                    f"image start is followed by the image token {text[-1]}, where the number of "
                    f"rows was expected; for a model without size tokens, give sizes=False"
                )
            return RasterLayout(rows=tokens.side, cols=tokens.side, suffix=1), 1
        if len(text) < _HEADER or text[-3] != tokens.start or text[-2] not in tokens.sizes:
            return None
        if text[-1] not in tokens.sizes:
            raise LayoutError(
                f"image start and the rows {text[-2]} are followed by token {text[-1]}, which says "
                f"no number of columns; sizes are the tokens {min(tokens.sizes)} to "
                f"{max(tokens.sizes)}"
            )
        rows, cols = tokens.sizes[text[-2]], tokens.sizes[text[-1]]
        return RasterLayout(rows=rows, cols=cols, line_break=1, suffix=2), 0


class ImageChameleon(ChameleonForConditionalGeneration):
    """``ChameleonForConditionalGeneration`` whose logits of image tokens are what it computed.

    Load it like its parent, with ``from_pretrained``, or let it share the weights of a model that
    is loaded already.
    """

    @classmethod
    def sharing(cls, model: ChameleonForConditionalGeneration) -> Self:
        """The same model, drawing: weights, configuration and submodules are shared, not copied."""
        twin = cls.__new__(cls)
        twin.__dict__.update(model.__dict__)
        for method in ("generate", "generate_batch", "forward"):  # of an open block, on the other
            twin.__dict__.pop(method, None)
        return twin

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, vocabulary]`` of the last ``logits_to_keep`` tokens (0 for all)."""
        # The cache is among the other arguments, under the name that this version gives it.
        kwargs["return_dict"] = True
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return CausalLMOutputWithPast(
            logits=self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:]),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **as_argument(outputs.get(CACHE_ARGUMENT)),
        )


class ImageGrammar(LogitsProcessor):
    """Keeps a generation within the grammar of its images; text is free, but for image tokens.

    Behind Lumina-mGPT's size tokens: image tokens, a line break at the end of each line, and image
    end behind the last. Behind Anole's image start: image tokens, and image end. Batches must open
    images of one size at the same positions. An object serves one call of ``generate``.

    Args:
        model: the model.
        sizes: whether image start is followed by two size tokens (Lumina-mGPT); otherwise by
            the square of image tokens that the configuration describes (Anole).

    Raises:
        LayoutError: the model's configuration lacks the tokens of an image.
    """

    def __init__(self, model: PreTrainedModel, *, sizes: bool = True) -> None:
        self._tokens = tokens = _Tokens(model)
        if sizes and (tokens.line_break is None or not tokens.sizes):
            raise LayoutError(
                f"{type(model).__name__} has no {_LINE_BREAK} or no size tokens behind it in its "
                f"config.vocabulary_map; for a model without them, ImageGrammar(sizes=False)"
            )
        self._sizes = sizes
        self._reader = TokenReader(_Header(tokens, sizes))
        self._image: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask the scores ``[B, vocabulary]`` of the token behind ``input_ids`` ``[B, T]``.

        Raises:
            LayoutError: the scores of image tokens are overwritten, or the images can't be read.
        """
        tokens = self._tokens
        if self._image is None or self._image.device != scores.device:
            self._image = torch.zeros(scores.shape[-1], dtype=torch.bool, device=scores.device)
            self._image[tokens.images] = True
        seen = _read(self._reader, input_ids)
        image = self._reader.drawn(seen)
        if image is None:
            if self._sizes and tokens.start in input_ids[0, -(_HEADER - 1) :].tolist():
                return _only(scores, list(tokens.sizes))
            return scores.masked_fill(self._image, -torch.inf)
        if seen == image.stop:
            return _only(scores, [tokens.end])
        grid = image.grid
        if grid.line_break and (seen - image.start) % grid.line_length == grid.cols:
            assert tokens.line_break is not None  # __init__ has seen to it
            return _only(scores, [tokens.line_break])
        if seen == image.start:
            _refuse_overwritten(scores, tokens)
        return scores.masked_fill(~self._image, -torch.inf)


class ImageGuidance(LogitsProcessor):
    """Guidance while an image is drawn: the unconditional half sees the image and no prompt.

    It begins with the image's header and has a cache of its own, which each image starts anew
    (Lumina-mGPT's inference code does so; text is not guided). Beam search and
    ``num_return_sequences`` are followed.

    Args:
        scale: 1 is no guidance.
        model: the model, attached.
        cache: the cache of the unconditional half.
        sizes: as for :class:`ImageGrammar`.

    Raises:
        LayoutError: the model's configuration lacks the tokens of an image.
    """

    def __init__(
        self,
        scale: float,
        model: PreTrainedModel,
        cache: TransformersCache,
        *,
        sizes: bool = True,
    ) -> None:
        self.scale = scale
        self.half = SecondHalf(model, cache)
        self._header = _HEADER if sizes else 1
        self._reader = TokenReader(_Header(_Tokens(model), sizes))

    def begins(self, prompt: Tensor) -> tuple[Tensor, None]:
        """What the unconditional half begins with, beside a prompt ``[B, T]`` that opens an image.

        Raises:
            LayoutError: no image begins right behind the prompt.
        """
        seen = _read(self._reader, prompt)
        image = self._reader.drawn(seen)
        if image is None or seen != image.start:
            raise LayoutError(
                f"the prompt of {seen} tokens does not end where an image begins, and guidance "
                f"begins there: let it end with image start, and sizes where the model has them"
            )
        return prompt[:, -self._header :], None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guide the scores ``[B, vocabulary]`` of the token behind ``input_ids`` ``[B, T]``."""
        seen = _read(self._reader, input_ids)
        image = self._reader.drawn(seen)
        goes_on = self.half.follows(input_ids)
        if image is None or seen == image.stop:
            return scores
        if seen == image.start:
            unconditional = self.half.begin(input_ids[:, -self._header :])
        elif goes_on:
            unconditional = self.half.go_on(input_ids[:, -1:])
        else:
            raise LayoutError(
                f"ImageGuidance was not called with the tokens from the image's start at "
                f"{image.start} on, and is called in its middle, at {seen}; generate images whole"
            )
        return guided(scores, unconditional, self.scale)


def _read(reader: TokenReader, input_ids: Tensor) -> int:
    """Tell a reader what is new in ``input_ids`` ``[B, T]``; returns T."""
    seen = input_ids.shape[1]
    first = reader.read if reader.read == seen - 1 else 0
    reader.told(first, input_ids[:, first:])
    return seen


def _only(scores: Tensor, tokens: list[int]) -> Tensor:
    """Scores of some tokens, ``-inf`` for all others."""
    masked = torch.full_like(scores, -torch.inf)
    masked[:, tokens] = 0.0 if len(tokens) == 1 else scores[:, tokens]
    return masked


def _refuse_overwritten(scores: Tensor, tokens: _Tokens) -> None:
    """Refuse scores which transformers has overwritten: all images would be noise."""
    if bool((scores[:, tokens.images] <= torch.finfo(scores.dtype).min).all()):
        raise LayoutError(
            "the logits of all image tokens are overwritten, as transformers' "
            "ChameleonForConditionalGeneration does; draw with ImageChameleon.sharing(model)"
        )
