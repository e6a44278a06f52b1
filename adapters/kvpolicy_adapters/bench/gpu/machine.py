"""What the machine is, and how fast it copies and multiplies."""

from __future__ import annotations

import torch

from kvpolicy import ParameterError
from kvpolicy.lab.bench.machine import survey
from kvpolicy_adapters.bench.gpu.part import Finding, Setting, Tell

__all__ = ["look_at_machine", "look_for_gpu"]


def look_for_gpu(setting: Setting, tell: Tell) -> None:
    """Refuse a device that is not there.

    Raises:
        ParameterError: torch sees no GPU, or not this one.
    """
    if not setting.cuda:
        return
    if not torch.cuda.is_available():
        raise ParameterError(
            f"--device {setting.device}: torch {torch.__version__} sees no GPU here; --device cpu "
            f"--tiny runs the whole chain on a CPU, and measures nothing"
        )
    number = torch.device(setting.device).index
    if number is not None and number >= torch.cuda.device_count():
        raise ParameterError(
            f"--device {setting.device}: torch sees {torch.cuda.device_count()} GPUs, from cuda:0 "
            f"on"
        )


def look_at_machine(setting: Setting, tell: Tell) -> None:
    """Names, sizes and speeds."""
    if not setting.cuda:
        tell(Finding("CPU", {"torch": torch.__version__}))
        return
    device = torch.cuda.get_device_properties(setting.device)
    found = survey(setting.device, setting.torch_dtype)
    tell(
        Finding(
            device.name,
            {
                "memory GB": device.total_memory / 1e9,
                "capability": f"{device.major}.{device.minor}",
                "multiprocessors": device.multi_processor_count,
                "copy GB/s": found.copy / 1e9,
                f"{setting.dtype} TFLOP/s": found.matmul / 1e12,
                "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
            },
        )
    )
