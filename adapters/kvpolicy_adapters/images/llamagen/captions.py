"""Captions of LlamaGen's text-conditional models: embeddings of a T5, padded on the left.

The models were trained on FLAN-T5-XL's (arXiv:2406.06525, section 3.3), which is a model of its
own. Its embeddings come from a folder of transformers (:class:`T5Captions`), or from files that
somebody has written with it (:class:`StoredCaptions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from kvpolicy import ParameterError
from kvpolicy.errors import first_line

__all__ = ["Captions", "StoredCaptions", "T5Captions", "pad_left"]


class Captions(Protocol):
    """Where the embeddings of captions come from."""

    def check(self, row: int, prompt: str) -> None:
        """Refuse a caption that there are no embeddings of.

        Raises:
            ParameterError: it is too long, or its file is missing or no such embeddings.
        """

    def embed(self, row: int, prompt: str) -> Tensor:
        """Embeddings of a caption's tokens, ``[tokens, size]``.

        Raises:
            ParameterError: as :meth:`check` says.
        """


class T5Captions:
    """A T5 of transformers: its encoder and its tokenizer.

    A caption is embedded alone, so that it does not depend on others. It is taken in small letters,
    and otherwise as it is; the authors' script also takes addresses, markup and unusual
    punctuation out of it.

    Args:
        folder: of the checkpoint, such as FLAN-T5-XL's, or its name on the hub.
        size: width of the embeddings that are wanted.
        longest: tokens that a caption may have.
        device: where it computes.
        dtype: of its weights.

    Raises:
        ParameterError: there is no T5, or it is of another width.
    """

    def __init__(
        self, folder: str, *, size: int, longest: int, device: str, dtype: torch.dtype
    ) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            encoder = T5EncoderModel.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ParameterError(
                f"t5={folder}: no T5 could be opened: {first_line(error)}"
            ) from error
        if encoder.config.d_model != size:
            raise ParameterError(
                f"t5={folder} makes embeddings of {encoder.config.d_model} numbers; this LlamaGen "
                f"was trained on {size} (FLAN-T5-XL has 2048)"
            )
        self._encoder = encoder.eval().to(device)
        self._longest = longest

    def check(self, row: int, prompt: str) -> None:
        """Refuse a caption that is too long, which the authors' script would cut off.

        Raises:
            ParameterError: says how long it is.
        """
        self._ids(row, prompt)

    @torch.no_grad()
    def embed(self, row: int, prompt: str) -> Tensor:
        """Embeddings of a caption's tokens, its end token included, ``[tokens, size]``.

        Raises:
            ParameterError: it is too long.
        """
        ids = torch.tensor([self._ids(row, prompt)], device=self._encoder.device)
        embeddings: Tensor = self._encoder(input_ids=ids).last_hidden_state[0]
        return embeddings

    def _ids(self, row: int, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer(prompt.strip().lower()).input_ids
        if len(ids) > self._longest:
            raise ParameterError(
                f"prompt {row} ({prompt[:40]!r} ...) is {len(ids)} tokens long; the model takes "
                f"captions of {self._longest}"
            )
        return ids


class StoredCaptions:
    """A folder of ``.npy`` files: ``00000.npy`` holds the first prompt's embeddings, and so on.

    A file holds ``[tokens, size]``, or ``[1, tokens, size]`` as the authors' script for extracting
    them writes it, of real tokens only; it is read without pickle.

    Args:
        folder: where they lie.
        size: width of the embeddings that are wanted.
        longest: tokens that a caption may have.

    Raises:
        ParameterError: there is no such folder.
    """

    def __init__(self, folder: str, *, size: int, longest: int) -> None:
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise ParameterError(
                f"captions={folder}: there is no such folder; it holds 00000.npy, the first "
                f"prompt's embeddings, [tokens, {size}], and so on"
            )
        self._size, self._longest = size, longest

    def check(self, row: int, prompt: str) -> None:
        """Refuse a file that is missing, or holds something else.

        Raises:
            ParameterError: says which.
        """
        self.embed(row, prompt)

    def embed(self, row: int, prompt: str) -> Tensor:
        """What the file of a prompt's row holds, float32 ``[tokens, size]``.

        Raises:
            ParameterError: there is none, or it holds something else.
        """
        path = self._folder / f"{row:05d}.npy"
        try:
            found = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise ParameterError(f"{path} is missing: the embeddings of prompt {row}") from None
        except (ValueError, EOFError) as error:
            raise ParameterError(f"{path} is no array of numpy: {error}") from None
        shape = list(found.shape)
        if found.ndim == 3 and len(found) == 1:
            found = found[0]
        fits = found.ndim == 2 and found.shape[1] == self._size
        if not fits or not 1 <= len(found) <= self._longest or found.dtype.kind != "f":
            raise ParameterError(
                f"{path} holds {found.dtype} {shape}; expected floats [tokens, {self._size}], of 1 "
                f"to {self._longest} tokens"
            )
        embeddings = torch.from_numpy(found.astype(np.float32))
        if not bool(embeddings.isfinite().all()):
            raise ParameterError(f"{path} holds numbers that are not finite")
        return embeddings


def pad_left(captions: Sequence[Tensor], longest: int) -> tuple[Tensor, Tensor]:
    """Embeddings of different lengths as LlamaGen takes them: padded with zeros on the left.

    Args:
        captions: each ``[tokens, size]``.
        longest: tokens of the condition, at least as many as any of them has.

    Returns:
        Embeddings ``[B, longest, size]``, and the mask ``[B, longest]``, 0 where there is padding.
    """
    first = captions[0]
    embeddings = first.new_zeros(len(captions), longest, first.shape[1])
    mask = torch.zeros(len(captions), longest, dtype=torch.int64, device=first.device)
    for row, caption in enumerate(captions):
        embeddings[row, longest - len(caption) :] = caption
        mask[row, longest - len(caption) :] = 1
    return embeddings, mask
