"""Devices that this machine lacks: tensors without data that know where they would lie.

torch's FakeTensorMode refuses an operation over two devices as the devices themselves would, and
refuses to read a number off a device (a wait in every step).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode


@contextmanager
def fake_devices() -> Iterator[None]:
    """Inside, tensors can be made on any device, e.g. ``cuda:1``."""
    with FakeTensorMode(), _Indexing():
        yield


class _Indexing(TorchFunctionMode):
    """Says with torch's operations what Python's brackets want the device's driver for."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__:
            return _looked_up(*args)
        if func is Tensor.__setitem__:
            tensor, index, value = args
            part = _looked_up(tensor, index)
            aten = torch.ops.aten
            return (aten.copy_ if isinstance(value, Tensor) else aten.fill_)(part, value)
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


_INSTEAD = {
    Tensor.__invert__: torch.ops.aten.bitwise_not,
    Tensor.copy_: torch.ops.aten.copy_,
    Tensor.index_put_: torch.ops.aten.index_put_,
}


def _looked_up(tensor: Tensor, index: Any) -> Tensor:
    index = index if isinstance(index, tuple) else (index,)
    given = sum(entry is not None and entry is not Ellipsis for entry in index)
    dim = 0
    for entry in index:
        if entry is Ellipsis:
            dim += tensor.ndim - dim - given
        elif entry is None:
            tensor = tensor.unsqueeze(dim)
            dim += 1
        elif isinstance(entry, slice):
            tensor = torch.ops.aten.slice(tensor, dim, entry.start, entry.stop, entry.step or 1)
            dim += 1
            given -= 1
        elif isinstance(entry, int):
            tensor = torch.select(tensor, dim, entry)
            given -= 1
        else:
            raise NotImplementedError(f"indexing by {entry!r}")
    return tensor
