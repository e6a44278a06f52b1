"""Trace: every decision of a generation, and with them what was cached at any moment.

A token's life in a head is an interval: from the moment that it came to the moment that it was
gone. So a trace needs two numbers a token and head, one of which is the token's position; the
decisions themselves, and the scores that decided, lie beside them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy.errors import ParameterError

__all__ = ["STAYS", "LayerTrace", "Trace", "load_trace"]

_FORMAT = "kvpolicy-trace-1"
#: What ``gone`` says of a token that is still cached.
STAYS = torch.iinfo(torch.int32).max


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
        images: the pictures that were drawn, uint8 ``[B, rows, cols]``, where they were given.
    """

    policy: str
    parameters: dict[str, Any]
    layout: str
    grid: dict[str, int] | None
    seen: int
    budgets: tuple[int, ...]
    layers: dict[int, LayerTrace]
    images: Tensor | None = None

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
        }
        # Positions of most sequences fit into 16 bits, and a trace is mostly positions.
        narrow = self.seen < torch.iinfo(torch.int16).max
        tensors: dict[str, Tensor] = {}
        for index, layer in self.layers.items():
            for name, tensor in vars(layer).items():
                if name in ("victims", "places") and narrow:
                    tensor = tensor.to(torch.int16)
                tensors[f"{index}.{name}"] = tensor.contiguous()
        if self.images is not None:
            tensors["images"] = self.images.contiguous()
        return save(tensors, metadata={"kvpolicy": json.dumps(about)})

    def save(self, path: Path | str) -> None:
        """Write the trace to a ``.safetensors`` file.

        Raises:
            OSError: the file can't be written.
        """
        Path(path).write_bytes(self.dump())


def load_trace(path: Path | str) -> Trace:
    """Read a trace.

    Raises:
        ParameterError: the file is missing, damaged, or no trace.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})["kvpolicy"])
            if about["format"] != _FORMAT:
                raise ParameterError(f"{path} is a trace of format {about['format']!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers = {
            int(index): LayerTrace(
                **{
                    name: _widened(tensors[f"{index}.{name}"])
                    for name in LayerTrace.__dataclass_fields__
                }
            )
            for index in about["layers"]
        }
        found = Trace(
            policy=str(about["policy"]),
            parameters=dict(about["parameters"]),
            layout=str(about["layout"]),
            grid=None if about["grid"] is None else {k: int(n) for k, n in about["grid"].items()},
            seen=int(about["seen"]),
            budgets=tuple(int(budget) for budget in about["budgets"]),
            layers=layers,
            images=tensors.get("images"),
        )
        _check(found)
    except (OSError, SafetensorError) as error:
        raise ParameterError(f"{path} can't be read as a trace: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ParameterError):
            raise
        raise ParameterError(
            f"{path} is not a trace that kvpolicy wrote, or is damaged: "
            f"{type(error).__name__}: {error}"
        ) from None
    return found


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32) if tensor.dtype == torch.int16 else tensor


def _check(found: Trace) -> None:
    """Refuse tensors that don't belong together."""
    for index, layer in found.layers.items():
        size = tuple(layer.gone.shape[:2])
        sums = (int(layer.counts.sum()), int(layer.candidates.sum()))
        fits = (
            layer.gone.ndim == 3
            and layer.gone.shape[2] == found.seen
            and len(layer.decided) == len(layer.counts) == len(layer.candidates)
            and tuple(layer.victims.shape) == (*size, sums[0])
            and tuple(layer.places.shape) == tuple(layer.scores.shape) == (*size, sums[1])
        )
        if not fits:
            raise ValueError(f"the tensors of layer {index} don't fit each other")
