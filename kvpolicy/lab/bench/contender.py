"""What the bench runs: shapes, contenders, and the sessions in which they decode.

The lab knows no model. A *shape* is found through the entry-point group ``kvpolicy.shapes``: a
callable that makes a :class:`BenchModel` of real dimensions and random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpolicy.layout import RasterLayout
from kvpolicy.registry import Registry

__all__ = [
    "BASELINES",
    "SHAPES",
    "VARIANTS",
    "BenchModel",
    "Contender",
    "Decoder",
    "Dimensions",
    "Session",
    "Workload",
    "load_shape",
]

#: What every model decodes besides policies. ``floor`` attends over as many slots as a policy has,
#: always the same, with the fastest attention there is: no policy, no observation. ``skip`` leaves
#: attention out: what is above it is what the cache costs.
BASELINES = ("dynamic", "static", "floor", "skip")
#: How a contender's model may run: ``linear@skinny``, ``static@compiled@skinny``.
VARIANTS = ("compiled", "skinny")


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a Llama-type model.

    Attributes:
        hidden: width.
        layers: layers.
        heads: query heads of a layer.
        kv_heads: KV heads of a layer.
        head_dim: width of a head.
        intermediate: hidden units of a feed-forward layer.
        vocab: tokens that there are.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @property
    def step_weights(self) -> int:
        """Weights that a decode step reads: all but the embedding."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.hidden * self.vocab

    def cache_bytes(self, tokens: float, width: int) -> float:
        """Bytes of the keys and values of so many tokens a layer, ``width`` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * width

    def step_flops(self, batch: int, tokens: float) -> float:
        """Multiplications and additions of one step that attends to so many tokens a layer."""
        attention = 4 * self.layers * self.heads * self.head_dim * tokens
        return batch * (2 * self.step_weights + attention)


@dataclass(frozen=True)
class Workload:
    """What all contenders decode.

    Attributes:
        shape: name of the shape.
        batch: sequences.
        budget: as a user writes it.
        capacity: slots that the budget makes, prefix included.
        layers: layers of the model, fewer than the real one's where scaled down.
        device: of torch.
        dtype: of torch, without its prefix.
        seed: of weights and tokens.
    """

    shape: str
    batch: int
    budget: str
    capacity: int
    layers: int
    device: str
    dtype: str
    seed: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype``, a name that a file can hold, as torch's own type."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def tokens(self, length: int, vocab: int) -> Tensor:
        """The tokens that are decoded, int64 ``[B, length]``; the same for every contender."""
        chance = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocab, (self.batch, length), generator=chance)

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, as ``results.json`` holds them."""
        return asdict(self)


@dataclass(frozen=True)
class Contender:
    """Who decodes.

    Attributes:
        name: how tables call it.
        kind: ``policy``, or one of :data:`BASELINES`, or ``peer``.
        policy: registry name, where it is a policy.
        peer: whose code decodes, in a process of its own: ``kvpress`` or ``llamagen``; empty for
            ours.
        compiled: whether its step is compiled.
        skinny: whether the CPU kernel makes the model's products of a few rows.
    """

    name: str
    kind: str
    policy: str = ""
    peer: str = ""
    compiled: bool = False
    skinny: bool = False

    @property
    def variant(self) -> tuple[bool, bool]:
        """How its model runs: contenders that differ in this differ in more than the cache."""
        return self.compiled, self.skinny


class Decoder(Protocol):
    """One contender's generation, in this process."""

    def restart(self, prefix: Tensor) -> None:
        """Begin anew, and cache the prefix ``[B, P]``."""

    def step(self, token: Tensor) -> Tensor:
        """Decode one token a sequence, ``[B, 1]``; returns its logits ``[B, 1, vocab]``."""

    def skip(self, count: int) -> None:
        """Go on by so many tokens with random keys and values in place of the model's."""

    def wake(self) -> None:
        """Read all weights and the cache once."""

    def tokens_read(self) -> float:
        """Cached tokens that attention reads in the next step, mean over layers."""

    def cache_bytes(self) -> int:
        """Bytes allocated for keys and values."""

    def release(self) -> None:
        """Give the cache back; ``restart`` makes another."""

    def close(self) -> None:
        """Give back the cache and the model's changes (hooks, compiled code); nothing follows."""


class BenchModel(Protocol):
    """A model of some shape, with random weights.

    Attributes:
        layout: where its tokens sit.
        dimensions: its sizes.
        real_layers: layers that the shape has, where the model has been given fewer.
        peers: folder with ``kvpress_worker.py`` and ``llamagen_worker.py``, which decode a model of
            these dimensions with other projects' code.
    """

    layout: RasterLayout
    dimensions: Dimensions
    real_layers: int
    peers: Path

    def decoder(self, contender: Contender, workload: Workload) -> Decoder:
        """A decoder of one contender; all of them share the weights.

        Raises:
            BudgetError: the budget is too small for this policy.
        """


class Session(Protocol):
    """What the rounds drive, in this process or in another one.

    Attributes:
        contender: who decodes.
    """

    contender: Contender

    def restart(self) -> None:
        """Empty the cache and read the prefix; ``run`` goes on from there."""

    def run(self, count: int) -> tuple[list[float], list[float]]:
        """Decode so many tokens; seconds, and cached tokens read, of each step."""

    def skip(self, count: int) -> None:
        """Go on by so many tokens without the model."""

    def wake(self) -> None:
        """Read all weights and the cache once, before a turn whose time is taken.

        What a process has not touched for seconds, while others had their turn, may be slow to
        reach at first; that is the machine's doing, and must not be the first contender's loss.
        """

    def cache_bytes(self) -> int:
        """Bytes allocated for keys and values."""

    def release(self) -> None:
        """Give the cache back; ``restart`` makes another."""

    def close(self) -> None:
        """Give back the cache and the model's changes (hooks, compiled code); nothing follows."""


#: A shape takes layers (None for all), dtype, device and seed.
SHAPES: Registry[Callable[[int | None, torch.dtype, str, int], BenchModel]] = Registry(
    "shape", "kvpolicy.shapes"
)


def load_shape(
    name: str, *, layers: int | None, dtype: torch.dtype, device: str, seed: int
) -> BenchModel:
    """Make the model of a shape.

    Raises:
        UnknownNameError: no shape has this name; near matches are listed.
        ParameterError: its package can't be loaded, or it has fewer layers.
    """
    return SHAPES.get(name)(layers, dtype, device, seed)
