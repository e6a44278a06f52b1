"""Kernels for a GPU, where there is Triton. It is imported when a kernel is first wanted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["decode", "decode_op", "lowest", "sane_on", "step_op", "stepper", "writer"]

_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 256
#: Slots of a head up to which each is compared with each. A guess, until somebody has measured it.
_MOST_COMPARED = 2048
#: Of each device: 0 once a decision was to be made from NaN. After that its process is lost anyway.
_RANKED: dict[torch.device, Tensor] = {}


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
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]] | None:
    """The kernel that writes a token and attends to it in one launch, for one store.

    It takes what that of the CPU takes (:mod:`kvpolicy.ops.cpu.native`): query, keys, values,
    positions, slots, key, value, position, slots held, scale, and whether the mass is wanted. It
    gives output, mass, and a tensor that is 0 once a mass was NaN.

    Args:
        keys: the store's, ``[B, H, S, D]``.
        values: the store's, ``[B, H, S, Dv]``.

    Returns:
        The kernel; None where none serves.
    """
    if values.dtype != keys.dtype or not _serves(keys, values):
        return None
    return partial(_write_and_attend, sane_on(keys.device))


def stepper(sane: Tensor) -> Callable[..., Tensor]:
    """The same for compiled code, as an operator whose position and mass are tensors that stay.

    It takes query, keys, values, positions, mass (or None), slots, key, value, position and scale.

    Args:
        sane: of :func:`sane_on`; becomes 0 where the mass is NaN.
    """
    return partial(step_op, sane)


def lowest(
    score: Tensor,
    positions: Tensor,
    count: int,
    protected: Tensor | None,
    pinned: Tensor | None,
    prefix: int,
) -> Tensor | None:
    """The slots that go, in one launch (:mod:`kvpolicy.ops.triton.rank_slots`).

    That no score is NaN is asserted on the device.

    Returns:
        Slots, int64 ``[B, H, count]``; None where no kernel serves: not on a GPU, scores of another
        dtype, or so many slots that comparing each with each takes longer than to sort them.
    """
    if not _on_gpu(positions) or score.dtype not in (torch.float32, torch.int32):
        return None
    if positions.shape[2] > _MOST_COMPARED:
        return None
    device = positions.device
    if device not in _RANKED:
        _RANKED[device] = sane_on(device)
    victims = _lowest(score, positions, count, protected, pinned, prefix, _RANKED[device])
    torch._assert_async(_RANKED[device])
    return victims


def _lowest(
    score: Tensor,
    positions: Tensor,
    count: int,
    protected: Tensor | None,
    pinned: Tensor | None,
    prefix: int,
    sane: Tensor,
) -> Tensor:
    from kvpolicy.ops.triton.rank_slots import lowest_slots

    return lowest_slots(score, positions, count, protected, pinned, prefix, sane)


def sane_on(device: torch.device) -> Tensor:
    """What a kernel sets to 0 where a mass is NaN, int32 ``[1]``, to be asserted on the device."""
    with torch.inference_mode(False):
        return torch.ones(1, dtype=torch.int32, device=device)


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
    sane: Tensor,
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
) -> tuple[Tensor, Tensor | None, Tensor]:
    from kvpolicy.ops.triton.decode_slots import step_slots

    output, mass = step_slots(
        *(query, keys, values, positions, slots, key, value, position, held, scale),
        *(sane, need_mass),
    )
    return output, mass, sane


@torch.library.custom_op(
    "kvpolicy::step",
    mutates_args=("sane", "keys", "values", "positions", "mass"),
    schema="(Tensor(a!) sane, Tensor query, Tensor(b!) keys, Tensor(c!) values, "
    "Tensor(d!) positions, Tensor(e!)? mass, Tensor slots, Tensor key, Tensor value, "
    "Tensor position, float scale) -> Tensor",
)
def step_op(
    sane: Tensor,
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

    Returns:
        The output ``[B, G * H, 1, Dv]``.
    """
    from kvpolicy.ops.triton.decode_slots import step_slots

    held = keys.shape[2]
    return step_slots(
        *(query, keys, values, positions, slots, key, value, position, held, scale),
        *(sane, mass is not None, mass),
    )[0]


@step_op.register_fake
def _step_shape(
    sane: Tensor,
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
