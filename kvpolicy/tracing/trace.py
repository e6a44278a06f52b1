"""Trace: every decision of a generation, and with them what was cached at any moment.

A token's life in a head is an interval: from the moment that it came to the moment that it was
gone. So a trace needs two numbers a token and head, one of which is the token's position; the
decisions themselves, and the scores that decided, lie beside them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from torch import Tensor

from kvpolicy.errors import ParameterError

__all__ = ["STAYS", "LayerTrace", "Trace", "check_pictures", "load_trace"]

_FORMAT = "kvpolicy-trace-1"
#: What ``gone`` says of a token that is still cached.
STAYS = torch.iinfo(torch.int32).max
_LARGEST_GRID = 1 << 24
#: Tensors that a trace may have beside those of its layers.
_BESIDE = ("images", "passes", "order", "groups")


@dataclass(frozen=True)
class LayerTrace:
    """One layer's decisions.

    Attributes:
        gone: of each token, how many tokens had been seen when it was cached no more, int32
            ``[B, H, seen]``; ``2**31 - 1`` for those that are still cached.
        decided: tokens seen at each decision, int32 ``[N]``.
        counts: victims of each decision, int32 ``[N]``.
        victims: positions of the victims, worst first, decision after decision, int32
            ``[B, H, sum(counts)]``; -1 for a slot that was empty. Those that were not
            needed stayed.
        candidates: how many slots each decision chose from, int32 ``[N]``.
        places: positions in those slots, decision after decision, int32
            ``[B, H, sum(candidates)]``; -1 for an empty slot. Empty where no scores were recorded.
        scores: what the policy's score said of them, float16, likewise.
    """

    gone: Tensor
    decided: Tensor
    counts: Tensor
    victims: Tensor
    candidates: Tensor
    places: Tensor
    scores: Tensor

    def held(self, seen: int) -> Tensor:
        """Which tokens were cached once ``seen`` tokens had come, bool ``[B, H, seen]``."""
        return self.gone[..., :seen] > seen


@dataclass(frozen=True)
class Trace:
    """A recorded generation.

    Attributes:
        policy: registry name of the policy.
        parameters: its parameters, as JSON has them.
        layout: what the layout's ``repr`` says.
        grid: rows, columns, line break and prefix of an image's layout; None for text.
        seen: tokens of the sequence.
        budgets: of each layer.
        layers: of each layer under the policy, by its index.
        images: the pictures that were drawn, where they were given: uint8 ``[B, height, width]``,
            or ``[B, height, width, 3]`` in colour; as many pixels a token down as across.
        passes: of each commit of staged tokens: the tokens seen before them, how many were staged,
            and how many accepted, int32 ``[N, 3]``; None where none were staged.
        prompts: what each picture was asked to show, where it was given.
        order: of an :class:`kvpolicy.OrderedLayout`: the raster index of each token of the image as
            it comes, int32 ``[rows * line length]``; None where tokens come line by line.
        groups: of the same: how many tokens come at once, int32 ``[groups]``.
    """

    policy: str
    parameters: dict[str, Any]
    layout: str
    grid: dict[str, int] | None
    seen: int
    budgets: tuple[int, ...]
    layers: dict[int, LayerTrace]
    images: Tensor | None = None
    passes: Tensor | None = None
    prompts: tuple[str, ...] | None = None
    order: Tensor | None = None
    groups: Tensor | None = None

    def dump(self) -> bytes:
        """The file: safetensors, with everything but the tensors as JSON in its header."""
        from safetensors.torch import save

        about = {
            "format": _FORMAT,
            "policy": self.policy,
            "parameters": self.parameters,
            "layout": self.layout,
            "grid": self.grid,
            "seen": self.seen,
            "budgets": list(self.budgets),
            "layers": sorted(self.layers),
            "prompts": self.prompts,
        }
        # Positions of most sequences fit into 16 bits, and a trace is mostly positions.
        narrow = self.seen < torch.iinfo(torch.int16).max
        tensors: dict[str, Tensor] = {}
        for index, layer in self.layers.items():
            for name, of_layer in vars(layer).items():
                if name in ("victims", "places") and narrow:
                    of_layer = of_layer.to(torch.int16)
                tensors[f"{index}.{name}"] = of_layer.contiguous()
        for name in _BESIDE:
            if (tensor := getattr(self, name)) is not None:
                tensors[name] = tensor.contiguous()
        return save(tensors, metadata={"kvpolicy": json.dumps(about)})

    def save(self, path: Path | str) -> None:
        """Write the trace to a ``.safetensors`` file.

        Raises:
            OSError: the file can't be written.
        """
        Path(path).write_bytes(self.dump())


class _Grid(BaseModel):
    """An image's layout, as a file says it."""

    model_config = ConfigDict(strict=True)

    rows: PositiveInt
    cols: PositiveInt
    line_break: Annotated[int, Field(ge=0, le=1)]
    prefix: NonNegativeInt

    @model_validator(mode="after")
    def _is_an_image(self) -> Self:
        if self.rows * (self.cols + 1) + self.prefix > _LARGEST_GRID:
            raise ValueError(f"an image of more than {_LARGEST_GRID} tokens")
        return self


class _About(BaseModel):
    """What a file says besides its tensors."""

    model_config = ConfigDict(strict=True)

    format: str
    policy: str
    parameters: dict[str, Any]
    layout: str
    grid: _Grid | None
    seen: Annotated[int, Field(ge=0, lt=STAYS)]
    budgets: list[NonNegativeInt]
    layers: list[NonNegativeInt]
    prompts: list[str] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.format != _FORMAT:
            raise ValueError(f"a trace of format {self.format!r}; this kvpolicy reads {_FORMAT!r}")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError("a layer that comes twice")
        if self.layers and max(self.layers) >= len(self.budgets):
            raise ValueError(f"layer {max(self.layers)} of {len(self.budgets)} budgets")
        return self


def load_trace(path: Path | str) -> Trace:
    """Read a trace.

    Raises:
        ParameterError: the file is missing, damaged, or no trace.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = _About.model_validate_json((file.metadata() or {})["kvpolicy"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        beside: dict[str, Any] = {name: tensors.get(name) for name in _BESIDE}
        found = Trace(
            **about.model_dump(exclude={"format", "layers", "budgets", "prompts"}),
            budgets=tuple(about.budgets),
            prompts=None if about.prompts is None else tuple(about.prompts),
            layers={index: _layer(tensors, index, about.seen) for index in about.layers},
            **beside,
        )
        _check_order(found)
        check_pictures(found)
        _check_passes(found)
    except (OSError, SafetensorError) as error:
        raise ParameterError(f"{path} can't be read as a trace: {error}") from None
    except (KeyError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            wrong = error.errors()[0]
            said = ": ".join((*map(str, wrong["loc"]), wrong["msg"]))
        raise ParameterError(
            f"{path} is not a trace that kvpolicy wrote, or is damaged: {said}"
        ) from None
    return found


def _layer(tensors: dict[str, Tensor], index: int, seen: int) -> LayerTrace:
    """One layer's tensors, refused where they don't belong together or say what can't be.

    Raises:
        KeyError: a tensor is missing.
        ValueError: one is wrong; the message says how.
    """
    given = {name: tensors[f"{index}.{name}"] for name in LayerTrace.__dataclass_fields__}
    for name, tensor in given.items():
        narrow = name in ("victims", "places") and tensor.dtype == torch.int16
        wanted = torch.float16 if name == "scores" else torch.int32
        if tensor.dtype != wanted and not narrow:
            raise ValueError(f"{index}.{name} is {tensor.dtype}, not {wanted}")
        if narrow:
            given[name] = tensor.to(torch.int32)
    layer = LayerTrace(**given)
    sequences = tuple(layer.gone.shape[:2])
    sums = (int(layer.counts.sum()), int(layer.candidates.sum()))
    shapes = {
        "gone": (*sequences, seen),
        "counts": layer.decided.shape,
        "candidates": layer.decided.shape,
        "victims": (*sequences, sums[0]),
        "places": (*sequences, sums[1]),
        "scores": (*sequences, sums[1]),
    }
    for name, shape in shapes.items():
        if given[name].shape != shape:
            raise ValueError(f"{index}.{name} is {list(given[name].shape)}, not {list(shape)}")
    if layer.decided.ndim != 1 or layer.gone.ndim != 3 or 0 in sequences:
        raise ValueError(f"{index}.gone and {index}.decided have the wrong number of dimensions")
    come = torch.arange(seen, dtype=torch.int32)
    possible = {
        "gone": (layer.gone > come) & ((layer.gone <= seen) | (layer.gone == STAYS)),
        "decided": (layer.decided >= 0) & (layer.decided <= seen),
        "counts": layer.counts >= 0,
        "candidates": layer.candidates >= 0,
        "victims": (layer.victims >= -1) & (layer.victims < seen),
        "places": (layer.places >= -1) & (layer.places < seen),
        "scores": ~layer.scores.isnan(),
    }
    for name, right in possible.items():
        if not right.all():
            raise ValueError(f"{index}.{name} has {given[name][~right][0].item()} in it")
    if (layer.decided.diff() < 0).any():
        raise ValueError(f"{index}.decided falls")
    return layer


def _check_passes(found: Trace) -> None:
    """Refuse commits that can't have been."""
    passes = found.passes
    if passes is None:
        return
    if passes.dtype != torch.int32 or passes.ndim != 2 or passes.shape[1] != 3:
        raise ValueError(f"passes: {passes.dtype} {list(passes.shape)}, not int32 [N, 3]")
    seen, staged, accepted = passes.unbind(1)
    wrong = (accepted < 0) | (accepted > staged) | (seen < 0) | (seen + accepted > found.seen)
    if bool(wrong.any()):
        raise ValueError(f"passes has {passes[wrong][0].tolist()} in it")
    if bool((seen[1:] < (seen + accepted)[:-1]).any()):
        raise ValueError("passes overlap")


def _check_order(found: Trace) -> None:
    """Refuse an order that is none of the grid's, and groups that don't add up to it."""
    order, groups, grid = found.order, found.groups, found.grid
    if order is None and groups is None:
        return
    if order is None or groups is None or grid is None:
        raise ValueError("order, groups and a grid: one without the others")
    size = grid["rows"] * (grid["cols"] + grid["line_break"])
    if order.dtype != torch.int32 or groups.dtype != torch.int32:
        raise ValueError(f"order is {order.dtype} and groups {groups.dtype}, not torch.int32")
    if order.shape != (size,) or not torch.equal(order.sort()[0], torch.arange(size).int()):
        raise ValueError(f"order does not name each of the {size} places of the grid once")
    if groups.ndim != 1 or bool((groups < 1).any()) or int(groups.sum()) != size:
        raise ValueError(f"groups are no sizes that add up to {size}")


def check_pictures(found: Trace) -> None:
    """Refuse pictures and prompts that are not the sequences', and layers of different sequences.

    Raises:
        ValueError: says what does not fit.
    """
    batches = {layer.gone.shape[0] for layer in found.layers.values()}
    if len(batches) > 1:
        raise ValueError(f"layers of {sorted(batches)} sequences")
    if found.prompts is not None and batches and {len(found.prompts)} != batches:
        raise ValueError(f"{len(found.prompts)} prompts of {batches} sequences")
    if found.images is None:
        return
    size = tuple(found.images.shape)
    grid = found.grid
    if found.images.dtype != torch.uint8 or len(size) not in (3, 4) or grid is None:
        raise ValueError(f"images: {found.images.dtype} {list(size)} beside the grid {grid}")
    scale = size[1] // grid["rows"]
    fits = size[1:3] == (scale * grid["rows"], scale * grid["cols"]) and size[3:] in ((), (3,))
    if not fits or scale < 1 or (batches and {size[0]} != batches):
        raise ValueError(f"images: {list(size)} beside the grid {grid} and {batches} sequences")
