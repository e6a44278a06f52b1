"""Counting what a GPU would be asked to do, without one."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Launches"]

#: Operations that only make or look at a tensor, beside those that torch itself calls views.
_FREE = frozenset(
    (
        *("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"),
        *("aten::new_empty_strided", "aten::detach", "aten::alias", "aten::_unsafe_view"),
        *("aten::_reshape_alias", "aten::lift_fresh", "prim::device"),
    )
)
#: Those that wait for the device, to give a number or a size to the host.
_WAITS = frozenset(
    ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
)


class Launches(TorchDispatchMode):
    """Counts the operations of torch that launch a kernel on a GPU, and those that wait for it.

    An operation that is made of others counts as those. One that launches several kernels (a sort)
    counts once: it is a lower bound, and exact where each operation is one kernel.

    Attributes:
        by_name: how often each operation was called that launches.
        waits: how often the host waited.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.waits = 0

    @property
    def count(self) -> int:
        """All of them."""
        return self.by_name.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _WAITS:
            self.waits += 1
        elif not func.is_view and name not in _FREE:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            self.by_name[name] += 1
        return func(*args, **kwargs)
