"""The input that each family is made for: ids alone, or with token types, an image, a state of one.

Some of it changes what tokens see (an image's tokens see each other, token types make a prefix that
sees itself), some adds to what they are. Where a model takes none of it, its input is ids of text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy_adapters.evaluation.sweep.tiny import HIDDEN

__all__ = ["made_for"]

#: Where an image lies in the prompt, or a prefix ends.
_FIRST, _AFTER = 4, 8


def made_for(model: PreTrainedModel, ids: Tensor) -> tuple[str, Tensor, dict[str, Any]]:
    """What a model is given beside a prompt.

    Args:
        model: tiny, of any architecture.
        ids: a prompt of text ``[B, T]``.

    Returns:
        What the input is, in words; the prompt, in which an image may have its place; and the
        other arguments of ``generate``.
    """
    name = type(model).__name__
    torch.manual_seed(2)
    if name in _IMAGES:
        words, make = _IMAGES[name]
        ids, extra = make(model, ids)
        return words, ids, extra
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        types = torch.zeros_like(ids)
        types[:, :_AFTER] = 1
        return "ids, token types", ids, {"token_type_ids": types}
    return "ids", ids, {}


def _place(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The prompt with an image's tokens in it, and where they are."""
    config: Any = model.config
    ids = ids.clone()
    ids[:, _FIRST:_AFTER] = config.image_token_id
    return ids, (ids == config.image_token_id).long()


def _gemma3(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    ids, image = _place(model, ids)
    return ids, {"pixel_values": torch.randn(len(ids), 3, 28, 28), "token_type_ids": image}


def _gemma4(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Patches and where they lie: 6 x 6 of them, of which 3 x 3 become a token."""
    ids, image = _place(model, ids)
    side = 6
    config: Any = model.config
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    return ids, {
        "pixel_values": torch.rand(len(ids), side * side, 3 * config.vision_config.patch_size**2),
        "image_position_ids": places.expand(len(ids), -1, -1),
        "mm_token_type_ids": image,
    }


def _gemma4_unified(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Patches and where they lie, each of which is a token."""
    ids, image = _place(model, ids)
    config: Any = model.config
    pixels = 3 * config.vision_config.model_patch_size**2
    places = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    return ids, {
        "pixel_values": torch.rand(len(ids), _AFTER - _FIRST, pixels),
        "image_position_ids": places.expand(len(ids), -1, -1),
        "mm_token_type_ids": image,
    }


def _got_ocr2(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    ids, _ = _place(model, ids)
    config: Any = model.config
    size = config.vision_config.image_size
    return ids, {"pixel_values": torch.randn(len(ids), 3, size, size)}


def _fuyu(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Patches, each of which is a token."""
    ids, _ = _place(model, ids)
    config: Any = model.config
    pixels = config.num_channels * config.patch_size**2
    return ids, {"pixel_values": torch.randn(len(ids), _AFTER - _FIRST, pixels)}


def _mllama(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    return ids, {"cross_attention_states": torch.randn(len(ids), 10, HIDDEN)}


_Make = Callable[[PreTrainedModel, Tensor], tuple[Tensor, dict[str, Any]]]
#: What the input is, in words, and who makes it, by architecture.
_IMAGES: dict[str, tuple[str, _Make]] = {
    "FuyuForCausalLM": ("ids, an image", _fuyu),
    "Gemma3ForConditionalGeneration": ("ids, an image that sees itself", _gemma3),
    "Gemma4ForConditionalGeneration": ("ids, an image that sees itself", _gemma4),
    "Gemma4UnifiedForConditionalGeneration": ("ids, an image that sees itself", _gemma4_unified),
    "GotOcr2ForConditionalGeneration": ("ids, an image", _got_ocr2),
    "MllamaForCausalLM": ("ids, an image's states", _mllama),
}
