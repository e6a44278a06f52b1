"""What image models have in common: options, random numbers, classes, where weights go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.lab.draw.image_model import ModelSource, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy_adapters.images.sampling import RowSampler

__all__ = [
    "dtype_of",
    "fits",
    "left_padded",
    "needs_class",
    "needs_prompt",
    "options_of",
    "row_sampler",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(source: ModelSource) -> torch.dtype:
    """Of the weights: as asked for; else bfloat16 on a GPU and float32 elsewhere.

    Raises:
        ParameterError: there is no such dtype.
    """
    if source.dtype is None:
        return torch.float32 if source.device == "cpu" else torch.bfloat16
    if source.dtype not in _DTYPES:
        raise ParameterError(f"dtype={source.dtype!r}; {near_matches(source.dtype, _DTYPES)}")
    return _DTYPES[source.dtype]


def options_of(source: ModelSource, known: Mapping[str, Any]) -> dict[str, Any]:
    """A model's options: those that were given, and the defaults of the others.

    Raises:
        ParameterError: an option is unknown, or is of another type than its default.
    """
    given = dict(source.options)
    for name, value in given.items():
        if name not in known:
            names = near_matches(name, known) if known else "it has none"
            raise ParameterError(f"image model {source.name!r} has no option {name!r}; {names}")
        if isinstance(known[name], int) and (type(value) is not int or value < 1):
            raise ParameterError(f"option {name}={value!r} must be a whole number, at least 1")
    return {**known, **given}


def row_sampler(
    items: Sequence[Item],
    seed: int,
    count: int,
    sampler: Sampler,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> RowSampler:
    """A sampler of ``count`` tokens for each item; the defaults are the model's own.

    Each row draws with its item's numbers, whatever rows lie beside it.
    """
    chances = torch.from_numpy(np.stack([item.chances(seed, count) for item in items]))
    return RowSampler(
        chances,
        temperature if sampler.temperature is None else sampler.temperature,
        top_k if sampler.top_k is None else sampler.top_k,
        top_p if sampler.top_p is None else sampler.top_p,
    )


def needs_class(model: str, item: Item, count: int) -> None:
    """Refuse an item that is no class of the model's.

    Raises:
        ParameterError: it is a prompt, or a class out of range.
    """
    if item.prompt is not None:
        raise ParameterError(f"{model} draws classes; give --classes 0-{count - 1}")
    if not 0 <= item.row < count:
        raise ParameterError(f"classes: {item.row} is not one of {model}'s 0 to {count - 1}")


def needs_prompt(model: str, item: Item) -> str:
    """The item's prompt.

    Raises:
        ParameterError: it is a class.
    """
    if item.prompt is None:
        raise ParameterError(f"{model} draws prompts, not classes; give --prompts FILE")
    return item.prompt


def fits(item: Item, length: int, room: int) -> None:
    """Refuse a prompt that leaves no room for its image.

    Raises:
        ParameterError: says how long it is.
    """
    if length > room:
        raise ParameterError(
            f"prompt {item.row} ({str(item.prompt)[:40]!r} ...) is {length} tokens long; the model "
            f"has room for {room} before an image"
        )


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids of different lengths as ``[B, longest]``, padded on the left, and their mask."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)
