"""What the tokens of clipart-ar mean: codes, a line break, two starts, and the words of prompts.

A sequence is a prefix of nine tokens, and a picture, with or without a line break behind each row::

    [blank] ... [word] [word] [start]  [code] ... [code] ([line break]) [code] ...

A prompt is a set of words. They stand in the order of the vocabulary, what many drawings share
first, so that the order in which somebody says them does not matter; blanks fill the prefix on its
left, and a prefix of blanks is the prompt of the unconditional half under guidance. Which start it
is says whether line breaks come.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvpolicy import ParameterError, RasterLayout, ShapeError

__all__ = ["MAX_WORDS", "SIDE", "ClipartTokens"]

#: Words of a prompt, at most.
MAX_WORDS = 8
#: Codes of a row, and rows.
SIDE = 24


class ClipartTokens:
    """Token ids: codes from 0, then line break, start, start with line breaks, blank, words.

    Args:
        vocabulary: the words, what many drawings share first; None for a token whose word is none
            for a prompt (the name of somebody who drew).
        codes: how many there are.

    Attributes:
        vocabulary: the words that prompts are made of, in this order.
        codes: how many there are.
        size: how many tokens there are.
        line_break: the token behind a row.
        blank: the token that fills the prefix on its left.
    """

    def __init__(self, vocabulary: Sequence[str | None], codes: int) -> None:
        self.codes, self.size = codes, codes + 4 + len(vocabulary)
        self.line_break = codes
        self.blank = codes + 3
        self._words = {word: codes + 4 + place for place, word in enumerate(vocabulary) if word}
        self.vocabulary = tuple(self._words)

    def start(self, line_breaks: bool) -> int:
        """The token behind which a picture begins."""
        return self.codes + 1 + line_breaks

    def layout(self, line_breaks: bool) -> RasterLayout:
        """24 x 24 codes behind the prefix."""
        return RasterLayout(rows=SIDE, cols=SIDE, prefix=MAX_WORDS + 1, line_break=int(line_breaks))

    def words(self, prompt: str) -> tuple[str, ...]:
        """The words of a prompt, in the order of the vocabulary, each once.

        Raises:
            ParameterError: it is empty, has a word that the model does not know, or more than
                eight words.
        """
        said = dict.fromkeys(re.findall(r"[a-z]+|\d+", prompt.lower()))
        if not said:
            raise ParameterError(
                f"prompt {prompt!r} has no words; clipart-ar draws words such as "
                f"'flags europe', 'fruit' or 'smilies'"
            )
        for word in said:
            if word not in self._words:
                # Not near_matches(), which lists all that are known: these are hundreds.
                near = difflib.get_close_matches(word, self.vocabulary)
                meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
                raise ParameterError(
                    f"prompt {prompt!r}: clipart-ar does not know {word!r}; {meant}its "
                    f"{len(self.vocabulary)} words are in drawings.json beside its weights"
                )
        if len(said) > MAX_WORDS:
            raise ParameterError(
                f"prompt {prompt!r} has {len(said)} words; clipart-ar takes {MAX_WORDS} at most"
            )
        return tuple(sorted(said, key=self._words.__getitem__))

    def prefix(self, words: Iterable[str], *, line_breaks: bool) -> list[int]:
        """The nine tokens before a picture; no words make the unconditional prefix."""
        ids = sorted(self._words[word] for word in words)
        blanks = [self.blank] * (MAX_WORDS - len(ids))
        return [*blanks, *ids, self.start(line_breaks)]

    def picture(self, codes: Tensor, *, line_breaks: bool) -> Tensor:
        """Codes ``[n, 24, 24]`` as tokens ``[n, 576]``, or ``[n, 600]`` with line breaks."""
        if line_breaks:
            codes = torch.nn.functional.pad(codes, (0, 1), value=self.line_break)
        return codes.flatten(1)

    def codes_of(self, tokens: Tensor, *, line_breaks: bool) -> Tensor:
        """Tokens of :meth:`picture` as codes ``[n, 24, 24]``.

        Raises:
            ShapeError: they are of another number, or a token is no code.
        """
        line = SIDE + line_breaks
        if tokens.ndim != 2 or tokens.shape[1] != SIDE * line:
            raise ShapeError(
                f"a picture is tokens [n, {SIDE * line}], not {list(tokens.shape)} "
                f"(line_breaks={line_breaks})"
            )
        codes = tokens.view(-1, SIDE, line)[:, :, :SIDE]
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codes:
            raise ShapeError(
                f"codes are 0 to {self.codes - 1}; among these are {int(codes.min())} and "
                f"{int(codes.max())}"
            )
        return codes
