"""Reads the checkpoints that LPD's authors released, without their code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy import ParameterError
from kvpolicy_adapters.images.lpd.configuration import SIZES, LPDConfig
from kvpolicy_adapters.images.lpd.modeling import LPD
from kvpolicy_adapters.images.tensors import (
    assign,
    naming_its_file,
    read_checkpoint,
    weights_of,
)

__all__ = ["read_official"]

#: Where the weights lie in a checkpoint; else the checkpoint is the weights.
_NESTED = ("model", "state_dict")


@naming_its_file
def read_official(
    source: str | Path | Mapping[str, Any], *, num_attention_heads: int | None = None
) -> LPD:
    """Make an :class:`LPD` of a released checkpoint, e.g. ``lpd_l_256.pth``.

    Example::

        model = read_official("lpd_xl_512.pth").to("cuda", torch.bfloat16)

    Args:
        source: a ``.pth`` file, or a state dict, as it is or inside a checkpoint. The tensors of a
            state dict are taken over, not copied.
        num_attention_heads: for models of no released size, whose heads weights don't tell.

    Returns:
        The model in evaluation mode, without gradients, in the checkpoint's dtype.

    Raises:
        ParameterError: the file holds more than tensors and plain values, or they are not those of
            an LPD.
        OSError: the file can't be read.
    """
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source)
    weights = weights_of(checkpoint, _NESTED)
    with torch.device("meta"):
        model = LPD(_configuration(weights, num_attention_heads))
    layers = model.config.num_hidden_layers
    assign(model, weights, f"these are not the weights of an LPD of {layers} layers")
    model.config.dtype = weights["head.weight"].dtype
    return model.eval().requires_grad_(False)


def _configuration(weights: Mapping[str, Tensor], num_attention_heads: int | None) -> LPDConfig:
    """What the shapes of the weights say."""
    tokens, classes, places = "token_emb.weight", "class_emb.weight", "pos_embed"
    hidden = "blocks.0.mlp.fc1.weight"
    for name in (tokens, classes, places, hidden, "mask_token", "head.weight"):
        if name not in weights:
            raise ParameterError(
                f"these are not the weights of an LPD: {name} is missing among "
                f"{sorted(weights)[:5]} ..."
            )
    vocab_size, width = weights[tokens].shape
    places_known = weights[places].numel() // width
    side = math.isqrt(places_known - 1)
    if side * side != places_known - 1:
        raise ParameterError(
            f"these are not the weights of an LPD: pos_embed has {places_known} places, which are "
            f"no class and a square"
        )
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    if num_attention_heads is None:
        heads = {(layers, width): heads for layers, heads, width in SIZES.values()}
        if (layers, width) not in heads:
            raise ParameterError(
                f"no released LPD has {layers} layers of width {width}; say how many heads this "
                f"one has: read_official(..., num_attention_heads=...)"
            )
        num_attention_heads = heads[layers, width]
    return LPDConfig(
        grid_size=side,
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=len(weights[hidden]),
        num_classes=len(weights[classes]),
    )
