"""What is refused before a layer takes tokens in."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.errors import CacheStateError, ShapeError

__all__ = ["check_gradients", "check_tokens", "under_autocast"]


def check_tokens(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse tensors that are no tokens, or don't fit each other.

    Raises:
        ShapeError: a tensor has the wrong shape, dtype or device.
    """
    for name, tensor in (("key", key), ("query", query), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise ShapeError(f"{name} is {type(tensor).__name__}; expected a torch.Tensor")
        if tensor.ndim != 4 or 0 in (*tensor.shape[1:2], tensor.shape[3]):
            raise ShapeError(
                f"{name} is {list(tensor.shape)}; expected 4 dims [B, H, T, D], with heads and "
                f"head dim at least 1"
            )
        if not tensor.is_floating_point():
            raise ShapeError(f"{name} is {tensor.dtype}; expected floating point")
        if tensor.dtype != key.dtype or tensor.device != key.device:
            raise ShapeError(
                f"{name} is {tensor.dtype} on {tensor.device}, but key is {key.dtype} on "
                f"{key.device}"
            )
    batch, heads, count, dim = key.shape
    if value.shape[:3] != key.shape[:3]:
        raise ShapeError(f"value is {list(value.shape)}, but key is {list(key.shape)}")
    if (query.shape[0], query.shape[2], query.shape[3]) != (batch, count, dim):
        raise ShapeError(
            f"query is {list(query.shape)}, but key is {list(key.shape)}: batch, tokens and "
            f"head dim must agree"
        )
    if query.shape[1] % heads:
        raise ShapeError(
            f"query has {query.shape[1]} heads, which is no multiple of the {heads} KV heads"
        )
    if count == 0:
        raise ShapeError("no tokens: key is " + str(list(key.shape)))


def check_gradients(layer: int, *tokens: Tensor) -> None:
    """Refuse to go on where gradients would have to go back through an earlier call.

    What that call cached has been overwritten in place since, or is about to be.

    Raises:
        CacheStateError: one of these tensors wants a gradient.
    """
    if any(tensor.requires_grad for tensor in tokens):
        raise CacheStateError(
            f"layer {layer}: gradients can't go back through several calls of a cache, whose slots "
            f"are written in place; decode under torch.no_grad() (generate does), or bring the "
            f"whole sequence in one call"
        )


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that ``torch.autocast`` gives attention; as they are outside it."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)
