"""Every policy's decisions on the device against those on the CPU, token by token.

Before each token the CPU's cache is put into the state of the device's, so that both decide from
the same numbers and no difference outlives its token. Nothing in a step may wait for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvpolicy import PolicyCache, RasterLayout, available, create
from kvpolicy_adapters.bench.gpu.part import Finding, Setting, Tell

__all__ = ["compare_decisions"]

_LAYOUT = RasterLayout(rows=8, cols=5, prefix=1)
_BUDGET, _BATCH, _HEADS, _GROUP, _DIM = 22, 2, 4, 2, 64
#: Tokens that are staged at the end, and how many of them are kept.
_STAGED, _KEPT = 4, 2
#: Outputs in float32 may differ by this, as norms.
_NEAR = 1e-4
#: Of heads and tokens, a share may choose otherwise: scores that differ by less than rounding.
_OTHERWISE = 0.01


def compare_decisions(setting: Setting, tell: Tell) -> None:
    """One row a policy."""
    for name in available():
        tell(_compare(name, setting))


@torch.inference_mode()
def _compare(name: str, setting: Setting) -> Finding:
    here, there = _cache(name), _cache(name)
    chance = torch.Generator().manual_seed(0)
    heads = otherwise = 0
    worst = 0.0
    for _ in range(_LAYOUT.length - _STAGED):
        _follow(here, there)
        expected, found = _token(here, there, chance, setting)
        worst = max(worst, _error(found, expected))
        same = (here.positions(0) == there.positions(0).cpu()).all(-1)
        heads, otherwise = heads + same.numel(), otherwise + int((~same).sum())
    _follow(here, there)
    with here.stage(_STAGED), there.stage(_STAGED):
        for _ in range(_STAGED):
            _token(here, there, chance, setting)
        here.commit(_KEPT)
        with _no_waiting(setting):
            there.commit(_KEPT)
        same = (here.positions(0) == there.positions(0).cpu()).all(-1)
    heads, otherwise = heads + same.numel(), otherwise + int((~same).sum())
    wrong = []
    if otherwise > _OTHERWISE * heads:
        wrong.append("chooses otherwise than the CPU")
    if not worst < _NEAR:
        wrong.append(f"outputs differ by {worst:.3g}")
    figures = {"heads x tokens": heads, "otherwise": otherwise, "output error": worst}
    return Finding(name, figures, "; ".join(wrong))


def _cache(name: str) -> PolicyCache:
    budget = None if name == "full" else _BUDGET
    return PolicyCache(create(name), budget, layout=_LAYOUT, num_layers=1)


def _token(
    here: PolicyCache, there: PolicyCache, chance: torch.Generator, setting: Setting
) -> tuple[Tensor, Tensor]:
    """One token in both caches; the outputs of the CPU and of the device."""
    new = [
        torch.randn(_BATCH, heads, 1, _DIM, generator=chance)
        for heads in (_GROUP * _HEADS, _HEADS, _HEADS)
    ]
    moved = [tensor.to(setting.device) for tensor in new]
    with _no_waiting(setting):
        found = there.attend(0, *moved)
    return here.attend(0, *new), found


@contextmanager
def _no_waiting(setting: Setting) -> Iterator[None]:
    """Inside, whatever waits for the device raises."""
    if not setting.cuda:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _follow(here: PolicyCache, there: PolicyCache) -> None:
    """Put the CPU's cache into the state of the device's."""
    if there.seen:
        here.load_state_dict(_moved(there.state_dict()))


def _moved(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, Mapping):
        return {name: _moved(value) for name, value in state.items()}
    return [_moved(value) for value in state] if isinstance(state, list) else state


def _error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found.cpu() - expected).norm() / expected.norm()).item()
