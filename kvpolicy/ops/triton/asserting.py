"""Kernels that assert: how they are compiled."""

from __future__ import annotations

from typing import Any

__all__ = ["ASSERTING"]

#: ``tl.device_assert`` is left out of a kernel that is not told to ``debug``, and one that is looks
#: for overflow at every sum of integers unless told not to.
ASSERTING: dict[str, Any] = {"debug": True, "sanitize_overflow": False}
