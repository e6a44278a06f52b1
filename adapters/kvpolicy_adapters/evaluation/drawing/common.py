"""What image models have in common: options, random numbers, classes, where weights go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvpolicy import Rule, Sampling, Sequential
from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.lab.draw.image_model import ModelSource, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.subject import Setting
from kvpolicy_adapters.decode import decode
from kvpolicy_adapters.images.sampling import RowSampler

__all__ = [
    "chance_of",
    "draw_tokens",
    "dtype_of",
    "fits",
    "left_padded",
    "needs_class",
    "needs_prompt",
    "options_of",
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


def chance_of(
    items: Sequence[Item],
    seed: int,
    count: int,
    setting: Setting,
    sampler: Sampler,
    top_k: int = 0,
) -> tuple[RowSampler | None, Sampling, int]:
    """How a batch is drawn: with numbers of each item's own, where the decoder lets them be.

    Args:
        items: of the batch.
        seed: of all random numbers.
        count: tokens of an image.
        setting: its decoder draws one token a pass, or several.
        sampler: what was asked for.
        top_k: the model's own, where none was asked for.

    Returns:
        A sampler that comes last of all rules; None for a decoder that draws several tokens a pass,
        which takes the other two: what it draws from, and a seed of the whole batch.
    """
    sampling = Sampling(
        temperature=1.0 if sampler.temperature is None else sampler.temperature,
        top_k=top_k if sampler.top_k is None else sampler.top_k,
        top_p=1.0 if sampler.top_p is None else sampler.top_p,
    )
    if isinstance(setting.decoder, Sequential):
        chances = torch.from_numpy(np.stack([item.chances(seed, count) for item in items]))
        return RowSampler(chances, sampling), Sampling(), 0
    words = [seed, *(word for item in items for word in (item.row, item.sample))]
    return None, sampling, int(np.random.SeedSequence(words).generate_state(1)[0])


def draw_tokens(
    model: Any,
    prompt: Tensor,
    caches: Sequence[Any],
    items: Sequence[Item],
    count: int,
    setting: Setting,
    sampler: Sampler,
    seed: int,
    *,
    rules: Sequence[Rule] = (),
    top_k: int = 0,
    **options: Any,
) -> Tensor:
    """Draw ``count`` tokens behind each prompt ``[B, P]``: int64 ``[B, count]``.

    Args:
        model: attached.
        prompt: token ids.
        caches: of the model, and of the unconditional half where it has one of its own.
        items: what the rows are.
        count: tokens of an image.
        setting: the decoder.
        sampler: what was asked for.
        seed: of all random numbers.
        rules: the grammar of the model's images.
        top_k: the model's own.
        options: further ones of :func:`kvpolicy_adapters.decode`.
    """
    own, sampling, chance = chance_of(items, seed, count, setting, sampler, top_k)
    drawn = decode(
        model,
        prompt,
        caches[0],
        count,
        decoder=setting.decoder,
        sampling=sampling,
        rules=rules if own is None else (*rules, own),
        seed=chance,
        **options,
    )
    return drawn.tokens[:, -count:]


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
