"""Emu3: h lines of w image tokens and a line break (arXiv:2409.18869).

The prompt ends with ``<|image start|>``, the size in text (``90*90``) and ``<|image token|>``; the
image ends with ``<|extra_201|>`` and ``<|image end|>``. The size is read from the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy import LayoutError, RasterLayout
from kvpolicy_adapters.images.token_reader import TokenReader

__all__ = ["Emu3", "GridRule"]

_START, _WRAPPER, _END = "<|image start|>", "<|image token|>", "<|image end|>"
_VISUAL = "<|visual token"
_END_OF_LINE, _END_OF_FRAME = "<|extra_200|>", "<|extra_201|>"
#: Behind the last row: end of frame, end of image, end of sequence.
_SUFFIX = 3
#: Tokens from ``<|image start|>`` to ``<|image token|>``, were each digit a token.
_LONGEST_HEADER = 32


class Emu3:
    """The family of ``Emu3ForConditionalGeneration``, drawing images.

    Everything up to the image that is drawn is prefix, images in the prompt included; see
    :class:`TokenReader` for what follows it. A text answer is kept whole: to put text under a
    policy, attach with ``layout=TextLayout(...)``.
    """

    def recognises(self, model: PreTrainedModel) -> bool:
        """Whether a model is an Emu3 of transformers that knows image tokens."""
        return model.config.model_type == "emu3"

    def layout(self, model: PreTrainedModel) -> TokenReader:
        """A reader of the sizes that prompts give."""
        return TokenReader(_Header(model))


class _Header:
    """The size between ``<|image start|>`` and ``<|image token|>``."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.start = _token(model, _START)
        self.wrapper = _token(model, _WRAPPER)
        vocabulary: dict[str, int] = model.config.vocabulary_map
        self.words = {
            token: word for word, token in vocabulary.items() if re.fullmatch(r"[0-9*]+", word)
        }

    def grid(self, text: Sequence[int]) -> tuple[RasterLayout, int] | None:
        """The size, where ``<|image token|>`` is the newest token.

        Raises:
            LayoutError: the text before it is no size.
        """
        if text[-1] != self.wrapper:
            return None
        start = next((i for i in range(len(text) - 1, -1, -1) if text[i] == self.start), None)
        between = [] if start is None else text[start + 1 : -1]
        size = re.fullmatch(r"(\d+)\*(\d+)", "".join(self.words.get(t, "?") for t in between))
        if size is None or 0 in (rows := int(size[1]), cols := int(size[2])):
            raise LayoutError(
                f"the tokens {list(between)} before {_WRAPPER} are no size such as 90*90 behind "
                f"{_START}; use the processor with return_for_image_generation=True, or say where "
                f"tokens sit: attach(..., layout=AfterPrompt(RasterLayout(rows=..., cols=..., "
                f"line_break=1, suffix={_SUFFIX})))"
            )
        return RasterLayout(rows=rows, cols=cols, line_break=1, suffix=_SUFFIX), 0


class GridRule:
    """Which tokens may come next: a ``prefix_allowed_tokens_fn`` for ``generate``.

    Rows of image tokens, each with its line break; then end of frame, end of image, end of
    sequence, and padding. The size is the one that each row's prompt gives.

    Args:
        model: the model.

    Raises:
        LayoutError: the model's configuration lacks the tokens of an image.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._header = _Header(model)
        vocabulary: dict[str, int] = model.config.vocabulary_map
        self._image = torch.tensor(
            [token for name, token in vocabulary.items() if name.startswith(_VISUAL)]
        )
        self._break = torch.tensor([_token(model, _END_OF_LINE)])
        text = model.config.text_config
        eos = text.eos_token_id[0] if isinstance(text.eos_token_id, list) else text.eos_token_id
        closing = (_token(model, _END_OF_FRAME), _token(model, _END), eos, text.pad_token_id)
        self._closing = [torch.tensor([token]) for token in closing]

    def __call__(self, batch: int, input_ids: Tensor) -> Tensor:
        """Ids that may follow ``input_ids`` ``[T]``.

        Raises:
            LayoutError: the prompt does not end with an image's size.
        """
        wrappers = (input_ids == self._header.wrapper).nonzero()
        if len(wrappers) == 0:
            raise LayoutError(
                f"no {_WRAPPER} in row {batch} of the prompt; use the processor with "
                f"return_for_image_generation=True"
            )
        start = int(wrappers[-1]) + 1
        # Read anew each time, as a rule that remembered would mix up two generations.
        found = self._header.grid(input_ids[max(0, start - _LONGEST_HEADER) : start].tolist())
        assert found is not None
        grid, position = found[0], input_ids.shape[0] - start
        image = grid.rows * grid.line_length
        if position < image:
            return self._break if position % grid.line_length == grid.cols else self._image
        return self._closing[min(position - image, _SUFFIX)]


def _token(model: PreTrainedModel, name: str) -> int:
    """The id of a special token.

    Raises:
        LayoutError: the model's configuration lacks it.
    """
    vocabulary = model.config.vocabulary_map or {}
    if name not in vocabulary:
        raise LayoutError(
            f"{type(model).__name__} has no {name} in its config.vocabulary_map, so the grid of "
            f"its images can't be read; say where tokens sit: attach(..., layout=AfterPrompt("
            f"RasterLayout(rows=..., cols=..., line_break=1, suffix={_SUFFIX})))"
        )
    return int(vocabulary[name])
