"""Where heads look, by where it lies from them: measured of a model, from a file."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    model_validator,
)
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.layout import TokenLayout
from kvpolicy.measured import read_measured

__all__ = ["HeadOffsets", "OffsetAttention", "OffsetsFile", "read_offsets"]

_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class HeadOffsets(BaseModel):
    """What a query of one KV head gives to a cached token, on average.

    Attributes:
        near: by where the token lies from it, ``[2R + 1, 2R + 1]``: entry ``[R + y][R + x]`` for a
            token y rows below and x columns right of the query.
        far: for a token that lies farther away.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    near: list[list[_Share]]
    far: _Share


class OffsetAttention(BaseModel):
    """What ``kvpolicy offsets`` writes.

    Attributes:
        kind: what the file is.
        version: of its form.
        subject: what it was measured on, and how that was drawn.
        layout: where tokens sat.
        queries: of each head, how many were watched.
        radius: rows and columns R up to which offsets are told apart.
        layers: of each layer, lowest first, its KV heads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["kvpolicy attention by offset"] = "kvpolicy attention by offset"
    version: Literal[1] = 1
    subject: str
    layout: str
    queries: int = Field(ge=1)
    radius: int = Field(ge=0, le=64)
    layers: Annotated[list[Annotated[list[HeadOffsets], Field(min_length=1)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _square(self) -> OffsetAttention:
        side = 2 * self.radius + 1
        for layer, heads in enumerate(self.layers):
            for head, offsets in enumerate(heads):
                if [len(row) for row in offsets.near] != [side] * side:
                    raise ValueError(
                        f"layers[{layer}][{head}].near is not {side} rows of {side} numbers, as "
                        f"radius={self.radius} says"
                    )
        return self

    def text(self) -> str:
        """The file that :func:`read_offsets` reads: JSON, four digits a number."""
        fields = self.model_dump()
        for heads in fields["layers"]:
            for head in heads:
                head["near"] = [[_short(share) for share in row] for row in head["near"]]
                head["far"] = _short(head["far"])
        return json.dumps(fields) + "\n"

    def given(
        self,
        layer: int,
        layout: TokenLayout,
        seen: int,
        first: int,
        end: int,
        device: torch.device,
    ) -> Tensor:
        """What queries at positions ``first`` to ``end`` give to those before ``seen``.

        Returns:
            float32 ``[H, seen, end - first]``, on the device: offsets are brought there, and
            looked up there for each head.
        """
        edge = self.radius + 1  # farther than that is no farther
        position = torch.arange(end, dtype=torch.int32)
        row, column = layout.line(position), layout.column(position)
        down, across = ((at[:seen, None] - at[first:]).clamp_(-edge, edge) for at in (row, column))
        place = across.add_(down, alpha=2 * edge + 1).add_((2 * edge + 2) * edge)
        of_heads = self._maps[layer].to(device)
        return of_heads.index_select(1, place.flatten().to(device)).view(-1, *place.shape)

    @cached_property
    def _maps(self) -> list[Tensor]:
        """Of each layer, ``near`` with ``far`` all around it, row by row, ``[H, (2R + 3)^2]``."""
        maps = []
        for heads in self.layers:
            far = torch.tensor([head.far for head in heads]).view(-1, 1, 1)
            side = 2 * self.radius + 3
            framed = far.repeat(1, side, side)
            framed[:, 1:-1, 1:-1] = torch.tensor([head.near for head in heads])
            maps.append(framed.flatten(1))
        return maps

    def check(self, num_layers: int) -> None:
        """Refuse another number of layers.

        Raises:
            ParameterError: it was measured on another.
        """
        self._refuse("layers", len(self.layers), num_layers)

    def check_heads(self, layer: int, heads: int) -> None:
        """Refuse another number of KV heads of a layer.

        Raises:
            ParameterError: it was measured on another.
        """
        self._refuse(f"KV heads in layer {layer}", len(self.layers[layer]), heads)

    def _refuse(self, what: str, known: int, given: int) -> None:
        if given != known:
            raise ParameterError(
                f"offsets of {self.subject} are of {known} {what}, and this cache has {given}; "
                f"run `kvpolicy offsets` on this model"
            )


def _short(share: float) -> float:
    return float(f"{share:.4g}")


def read_offsets(path: str | Path) -> OffsetAttention:
    """Read what ``kvpolicy offsets`` wrote.

    Raises:
        ParameterError: the file can't be read, is no such file, or contradicts itself.
    """
    return read_measured(path, OffsetAttention, "offsets", "kvpolicy offsets")


class OffsetsFile(str):
    """The path of such a file, which is read when a policy is made that names it."""

    found: OffsetAttention

    @classmethod
    def read(cls, path: str) -> OffsetsFile:
        """Read the file.

        Raises:
            ParameterError: as :func:`read_offsets`.
        """
        made = cls(path)
        made.found = read_offsets(path)
        return made

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler(Annotated[str, Field(min_length=1), AfterValidator(cls.read)])
