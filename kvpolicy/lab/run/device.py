"""Where torch computes: what can't be, is refused before anything is loaded."""

from __future__ import annotations

import torch

from kvpolicy.errors import ParameterError

__all__ = ["check_device"]


def check_device(device: str) -> None:
    """Refuse a device that is not here.

    Raises:
        ParameterError: torch knows no such device, or sees none here.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ParameterError(f"device={device!r} is none; cpu, cuda or cuda:1") from None
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (found.index or 0):
            seen = f"{count} of them" if count else "no GPU"
            raise ParameterError(f"device={device!r}: torch sees {seen} here; use --device cpu")
    elif found.type != "cpu":
        backend = getattr(torch, found.type, None)
        if not getattr(backend, "is_available", bool)():
            raise ParameterError(f"device={device!r}: torch sees none here; use --device cpu")
