"""Kernels for a GPU, where there is Triton. It is imported when a kernel is first wanted."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["decode", "decode_op"]

_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 256


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    visible: Tensor | None,
    need_mass: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Attention of one query over slots, with its mass (:mod:`kvpolicy.ops.triton.decode_slots`).

    Returns:
        Output and mass; None where no kernel serves: not on a GPU, several queries, a head wider
        than 256, another dtype, gradients wanted, or Triton not installed.
    """
    if not _TRITON or not query.is_cuda or query.shape[2] != 1 or query.requires_grad:
        return None
    # Tensors can say that they lie on a GPU where there is none: those that only have a shape.
    if not torch.cuda.is_available():
        return None
    if max(query.shape[3], values.shape[3]) > _WIDEST or query.dtype not in _DTYPES:
        return None
    if torch.compiler.is_compiling():
        output, mass = decode_op(query, keys, values, scale, visible, need_mass)
        return output, mass if need_mass else None
    return _decode(query, keys, values, scale, visible, need_mass)


def _decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    visible: Tensor | None,
    need_mass: bool,
) -> tuple[Tensor, Tensor | None]:
    from kvpolicy.ops.triton.decode_slots import decode_slots

    return decode_slots(query, keys, values, scale, visible, need_mass)


@torch.library.custom_op(
    "kvpolicy::decode",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, float scale, Tensor? visible, "
    "bool need_mass) -> (Tensor, Tensor)",
)
def decode_op(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    visible: Tensor | None,
    need_mass: bool,
) -> tuple[Tensor, Tensor]:
    """The kernel as an operator of torch, which a compiler takes into its graph as it is.

    Returns:
        The output, and the mass, which is empty unless wanted.
    """
    output, mass = _decode(query, keys, values, scale, visible, need_mass)
    return output, torch.empty(0, device=query.device) if mass is None else mass


@decode_op.register_fake
def _shapes(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    visible: Tensor | None,
    need_mass: bool,
) -> tuple[Tensor, Tensor]:
    """What comes out, for a compiler."""
    batch, heads, slots = keys.shape[:3]
    size = (batch, heads, 1, slots) if need_mass else (0,)
    mass = torch.empty(size, dtype=torch.float32, device=query.device)
    return query.new_empty(batch, query.shape[1], 1, values.shape[3]), mass
