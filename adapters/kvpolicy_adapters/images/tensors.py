"""Published checkpoints, read as tensors and plain values, and never as code."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kvpolicy import ParameterError
from kvpolicy.errors import first_line

__all__ = ["assign", "naming_its_file", "read_checkpoint", "weights_of"]

#: A file, or a state dict.
Source: TypeAlias = str | Path | Mapping[str, Any]
Options = ParamSpec("Options")
Model = TypeVar("Model")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a ``.safetensors`` file holds, or any other file that torch's weights-only reader takes.

    Args:
        path: the file.

    Raises:
        ParameterError: it is truncated, holds more than tensors and plain values, or holds no
            mapping.
        OSError: it can't be read.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # Training scripts save their parsed arguments along, which are plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, SafetensorError) as error:
        # A file that can't be opened has a name in its error; of one that is cut off within its
        # first pages torch says EINVAL, and no name.
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ParameterError(
            f"{path} can't be read as a checkpoint of tensors ({first_line(error)}); it has "
            f"{Path(path).stat().st_size:,} bytes, and may be cut off; if it holds Python objects "
            f"and you trust it, load it yourself and give the state dict"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ParameterError(f"{path} holds a {type(checkpoint).__name__}, not a state dict")
    return checkpoint


def naming_its_file(
    read: Callable[Concatenate[Source, Options], Model],
) -> Callable[Concatenate[Source, Options], Model]:
    """Let what a reader refuses of a file begin with its name; a state dict has none."""

    @wraps(read)
    def named(source: Source, *args: Options.args, **options: Options.kwargs) -> Model:
        try:
            return read(source, *args, **options)
        except ParameterError as error:
            if isinstance(source, Mapping) or str(source) in str(error):
                raise
            raise ParameterError(f"{source}: {error}") from error

    return named  # type: ignore[return-value]  # a source may come by its name, too


def weights_of(checkpoint: Mapping[str, Any], nested: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, which may lie under the first of these names that it has."""
    inside = (checkpoint[key] for key in nested if isinstance(checkpoint.get(key), Mapping))
    found = next(inside, checkpoint)
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def assign(model: nn.Module, weights: Mapping[str, Tensor], refusal: str) -> None:
    """Let a model of ``meta`` tensors take weights, all of its own and no others.

    Args:
        model: what takes them.
        weights: by the model's names.
        refusal: what an error begins with.

    Raises:
        ParameterError: weights are missing, unknown or of another shape; the first three are named.
    """
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    differing = [
        f"{name} is {list(weights[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    differing += [f"{name} is missing" for name in expected if name not in weights]
    differing += [f"{name} is unknown" for name in weights if name not in expected]
    if differing:
        raise ParameterError(
            f"{refusal}: {'; '.join(differing[:3])}{' ...' if differing[3:] else ''}"
        )
    model.load_state_dict(weights, assign=True)
