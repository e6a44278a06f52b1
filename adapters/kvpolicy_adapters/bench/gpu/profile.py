"""What one layer's step asks of the device: kernels, waits, and how much of the time it computes.

On a CPU the operations are counted that would launch a kernel; on a GPU the kernels are, as the
profiler has seen them.
"""

from __future__ import annotations

import time

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from kvpolicy import PolicyCache, RasterLayout, available, create
from kvpolicy_adapters.bench.gpu.launches import Launches
from kvpolicy_adapters.bench.gpu.part import Finding, Setting, Tell

__all__ = ["profile_steps"]

#: LlamaGen-B: 24 x 24 tokens, 12 heads of 64.
_GRID, _HEADS, _DIM = 24, 12, 64
#: Lines before anything is counted: the budget is full, and every line decides.
_BEFORE = 6


def profile_steps(setting: Setting, tell: Tell) -> None:
    """One row a policy: a step of one layer, without the model around it, over one line."""
    for name in ("full", "linear") if setting.tiny else available():
        tell(_profile(name, setting))


@torch.inference_mode()
def _profile(name: str, setting: Setting) -> Finding:
    grid = _GRID // 3 if setting.tiny else _GRID
    layout = RasterLayout(rows=grid, cols=grid, prefix=1)
    batch = 2 if setting.tiny else 64
    budget = None if name == "full" else setting.budget
    cache = PolicyCache(create(name), budget, layout=layout, num_layers=1)
    size = (batch, _HEADS, 1, _DIM)
    token = torch.randn(size, dtype=setting.torch_dtype, device=setting.device)
    for _ in range(layout.prefix + _BEFORE * grid):
        cache.attend(0, token, token, token)
    if not setting.cuda:
        with Launches() as counted:
            for _ in range(grid):
                cache.attend(0, token, token, token)
        figures = {"launches/step": counted.count / grid, "waits": counted.waits}
        return Finding(name, figures)
    torch.cuda.synchronize(setting.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        begun = time.perf_counter()
        for _ in range(grid):
            cache.attend(0, token, token, token)
        issued = time.perf_counter() - begun
        torch.cuda.synchronize(setting.device)
        wall = time.perf_counter() - begun
    events = seen.events() or []
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in kernels) * 1e-6
    # The last wait is ours.
    waits = sum(event.name.endswith("Synchronize") for event in events) - 1
    return Finding(
        name,
        {
            "launches/step": len(kernels) / grid,
            "waits": waits,
            "host us/step": issued / grid * 1e6,
            "device us/step": busy / grid * 1e6,
            "idle": f"{max(0.0, 1 - busy / wall):.0%}",
        },
        f"{waits} waits for the device" if waits > 0 else "",
    )
