"""Reads the checkpoints that LlamaGen's authors released, without their code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpolicy import ParameterError
from kvpolicy_adapters.images.llamagen.configuration import SIZES, LlamaGenConfig
from kvpolicy_adapters.images.llamagen.modeling import LlamaGen
from kvpolicy_adapters.images.tensors import (
    assign,
    naming_its_file,
    read_checkpoint,
    weights_of,
)

__all__ = ["read_official"]

#: Where the weights lie in a checkpoint, by what wrote it; else the checkpoint is the weights.
_NESTED = ("model", "module", "state_dict")
#: Tables and caches that some versions write along with the weights, and that are made anew.
_MADE_ANEW = ("freqs_cis", "causal_mask", "kv_cache.")


@naming_its_file
def read_official(
    source: str | Path | Mapping[str, Any],
    *,
    grid_size: int,
    num_attention_heads: int | None = None,
) -> LlamaGen:
    """Make a :class:`LlamaGen` of a released checkpoint.

    Example::

        model = read_official("c2i_XL_384.pt", grid_size=24).to("cuda", torch.bfloat16)

    Args:
        source: a ``.pt`` file, or a state dict, as it is or inside a checkpoint. The tensors of a
            state dict are taken over, not copied.
        grid_size: image tokens a side, which weights don't tell: 16 for 256 pixels, 24 for 384,
            32 for 512.
        num_attention_heads: for models of no released size, whose heads weights don't tell either.

    Returns:
        The model in evaluation mode, in the checkpoint's dtype.

    Raises:
        ParameterError: the file holds more than tensors, or they are not those of a LlamaGen.
        OSError: the file can't be read.
    """
    checkpoint = source if isinstance(source, Mapping) else read_checkpoint(source)
    weights = {
        name: tensor
        for name, tensor in weights_of(checkpoint, _NESTED).items()
        if not any(part in name for part in _MADE_ANEW)
    }
    with torch.device("meta"):
        model = LlamaGen(_configuration(weights, grid_size, num_attention_heads))
    layers = model.config.num_hidden_layers
    assign(model, weights, f"these are not the weights of a LlamaGen of {layers} layers")
    model.config.dtype = weights["output.weight"].dtype
    return model.eval()


def _configuration(
    weights: Mapping[str, Tensor], grid_size: int, num_attention_heads: int | None
) -> LlamaGenConfig:
    """What the shapes of the weights say."""
    captions = "cls_embedding.uncond_embedding"
    classes = "cls_embedding.embedding_table.weight"
    tokens, qkv = "tok_embeddings.weight", "layers.0.attention.wqkv.weight"
    hidden, head = "layers.0.feed_forward.w1.weight", "output.weight"
    missing = [name for name in (tokens, qkv, hidden, head) if name not in weights]
    if missing or (captions not in weights and classes not in weights):
        raise ParameterError(
            f"these are not the weights of a LlamaGen: {(missing or [classes])[0]} is missing "
            f"among {sorted(weights)[:5]} ..."
        )
    vocab_size, width = weights[tokens].shape
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    if num_attention_heads is None:
        heads = {(layers, width): heads for layers, heads, width in SIZES.values()}
        if (layers, width) not in heads:
            raise ParameterError(
                f"no released LlamaGen has {layers} layers of width {width}; say how many heads "
                f"this one has: read_official(..., num_attention_heads=...)"
            )
        num_attention_heads = heads[layers, width]
    fields: dict[str, Any] = {}
    if captions in weights:
        length, size = weights[captions].shape
        fields = {"condition": "t2i", "caption_length": length, "caption_size": size}
    else:
        fields = {"condition": "c2i", "num_classes": len(weights[classes]) - 1}
    kv_width = (len(weights[qkv]) - width) // 2
    return LlamaGenConfig(
        grid_size=grid_size,
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=kv_width * num_attention_heads // width,
        intermediate_size=len(weights[hidden]),
        **fields,
    )
