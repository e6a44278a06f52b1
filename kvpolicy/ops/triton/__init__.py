"""Kernels for a GPU, where there is Triton. It is imported when a kernel is first wanted."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["decode", "decode_op", "lowest", "ranks", "step_op", "writer"]

_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 256
#: Slots of a head up to which each is compared with each. A guess, until somebody has measured it.
_MOST_COMPARED = 2048


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
    if query.shape[2] != 1 or query.requires_grad or not _serves(query, values):
        return None
    if torch.compiler.is_compiling():
        output, mass = decode_op(query, keys, values, scale, visible, need_mass)
        return output, mass if need_mass else None
    return _decode(query, keys, values, scale, visible, need_mass)


def writer(
    keys: Tensor, values: Tensor
) -> Callable[..., tuple[Tensor, Tensor | None, bool]] | None:
    """The kernel that writes a token and attends to it in one launch, for one store.

    It takes what that of the CPU takes (:mod:`kvpolicy.ops.cpu.native`): query, keys, values,
    positions, slots, key, value, position, slots held, scale, and whether the mass is wanted. It
    gives output, mass, and True: that no mass is NaN it asserts itself, on the device.

    Args:
        keys: the store's, ``[B, H, S, D]``.
        values: the store's, ``[B, H, S, Dv]``.

    Returns:
        The kernel; None where none serves.
    """
    if values.dtype != keys.dtype or not _serves(keys, values):
        return None
    return _write_and_attend


def ranks(positions: Tensor) -> bool:
    """Whether :func:`lowest` serves such slots, ``[B, H, S]``."""
    return _on_gpu(positions) and positions.shape[2] <= _MOST_COMPARED


def lowest(
    score: Tensor,
    positions: Tensor,
    count: int,
    protected: Tensor | tuple[int, int] | None,
    pinned: Tensor | None,
    prefix: int,
) -> Tensor | None:
    """The slots that go, in one launch (:mod:`kvpolicy.ops.triton.rank_slots`).

    That no score is NaN is asserted on the device. What is protected is a mask, or positions before
    a first and from a last on.

    Returns:
        Slots, int64 ``[B, H, count]``; None where no kernel serves: not on a GPU, scores of another
        dtype, or so many slots that comparing each with each takes longer than to sort them.
    """
    if not ranks(positions) or score.dtype not in (torch.float32, torch.int32):
        return None
    return _lowest(score, positions, count, protected, pinned, prefix)


def _lowest(
    score: Tensor,
    positions: Tensor,
    count: int,
    protected: Tensor | tuple[int, int] | None,
    pinned: Tensor | None,
    prefix: int,
) -> Tensor:
    from kvpolicy.ops.triton.rank_slots import lowest_slots

    return lowest_slots(score, positions, count, protected, pinned, prefix)


def _serves(keys: Tensor, values: Tensor) -> bool:
    """Whether there is a kernel for such tensors."""
    if keys.dtype not in _DTYPES or max(keys.shape[3], values.shape[3]) > _WIDEST:
        return False
    return _on_gpu(keys)


def _on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor lies where kernels run."""
    # Tensors can say that they lie on a GPU where there is none: those that only have a shape.
    return _TRITON and tensor.is_cuda and torch.cuda.is_available()


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
    from kvpolicy.ops.triton.decode_slots import step_slots

    output, mass = step_slots(
        *(query, keys, values, positions, slots, key, value, position, held, scale, need_mass)
    )
    return output, mass, True


@torch.library.custom_op(
    "kvpolicy::step",
    mutates_args=("keys", "values", "positions", "mass"),
    schema="(Tensor query, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, "
    "Tensor(d!)? mass, Tensor slots, Tensor key, Tensor value, Tensor position, float scale) "
    "-> Tensor",
)
def step_op(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    mass: Tensor | None,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    """Write a token and attend to it, for a compiler; the mass goes into ``mass``.

    Position and mass are tensors that stay where they are. NaN is asserted, as by :func:`writer`.

    Returns:
        The output ``[B, G * H, 1, Dv]``.
    """
    from kvpolicy.ops.triton.decode_slots import step_slots

    held = keys.shape[2]
    return step_slots(
        *(query, keys, values, positions, slots, key, value, position, held, scale),
        *(mass is not None, mass),
    )[0]


@step_op.register_fake
def _step_shape(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    mass: Tensor | None,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    """What comes out, for a compiler."""
    return query.new_empty(query.shape[0], query.shape[1], 1, values.shape[3])


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
