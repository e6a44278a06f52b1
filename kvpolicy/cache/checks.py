"""What is refused before a layer takes tokens in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvpolicy.cache.terms import Terms
from kvpolicy.errors import CacheStateError, ShapeError
from kvpolicy.slots import SlotStore

__all__ = ["Accepted", "check_tokens"]


class Accepted:
    """What :func:`check_tokens` accepted last: most calls are like the one before."""

    def __init__(self) -> None:
        self._like: tuple[Any, ...] = ()
        self._store: SlotStore | None = None
        self._sizes = (0, 0, 0, 0)

    def check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        store: SlotStore | None,
        seen: int,
    ) -> int:
        """Refuse wrong tensors before anything changes; returns T. See :func:`check_tokens`."""
        like: tuple[Any, ...] = ()
        if type(query) is type(key) is type(value) is Tensor:
            like = (
                *(query.shape, key.shape, value.shape),
                *(query.dtype, key.dtype, value.dtype),
                *(query.device, key.device, value.device),
            )
        if not like or like != self._like or self._store is not store:
            count = check_tokens(query, key, value, store, seen)
            self._like, self._store = like, store
            self._sizes = key.shape[0], key.shape[1], query.shape[1], count
        terms.check(*self._sizes, seen + self._sizes[3])
        return self._sizes[3]


def check_tokens(
    query: Tensor, key: Tensor, value: Tensor, store: SlotStore | None, seen: int
) -> int:
    """Refuse wrong tensors before anything changes; returns T.

    Raises:
        ShapeError: a tensor has the wrong shape, dtype or device.
        CacheStateError: the batch is not the one that the store holds.
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
    if store is not None:
        if batch != store.shape.batch:
            raise CacheStateError(
                f"batch changed from {store.shape.batch} to {batch} after {seen} "
                f"tokens; use select_batch() to reorder a batch, reset() to start a new one"
            )
        store.check(key, value)
    return count
