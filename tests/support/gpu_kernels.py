"""The Triton kernels on tensors without data: operators of torch that say what would come out."""

from __future__ import annotations

import torch
from torch import Tensor

from kvpolicy.ops import triton


def serve(monkeypatch) -> None:
    """Let the kernels serve whatever says that it lies on a GPU."""
    monkeypatch.setattr(triton, "_on_gpu", lambda tensor: tensor.is_cuda)
    monkeypatch.setattr(triton, "_lowest", _lowest)
    monkeypatch.setattr(triton, "_write_and_attend", _write_and_attend)
    monkeypatch.setattr(triton, "_decode", _decode)


def _write_and_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    position: int,
    held: int,
    scale: float,
    need_mass: bool,
) -> tuple[Tensor, Tensor | None, bool]:
    mass = None
    if need_mass:
        mass = torch.empty(*keys.shape[:2], 1, held, device=keys.device)
    # One launch, as the kernel has it; the position is a number there.
    where = torch.empty(1, dtype=torch.int32, device=keys.device)
    output = triton.step_op(query, keys, values, positions, mass, slots, key, value, where, scale)
    return output, mass, True


def _lowest(score, positions, count, protected, pinned, prefix):
    """One launch, as the kernel has it."""
    shown = [tensor for tensor in (score, protected, pinned) if isinstance(tensor, Tensor)]
    assert {tensor.device for tensor in shown} == {positions.device}
    return positions.new_zeros((*positions.shape[:2], count), dtype=torch.int64)


def _decode(query, keys, values, scale, visible, need_mass):
    output, mass = triton.decode_op(query, keys, values, scale, visible, need_mass)
    return output, mass if need_mass else None
