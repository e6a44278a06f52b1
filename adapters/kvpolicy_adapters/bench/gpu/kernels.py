"""The Triton kernels against float64: ``python -m kvpolicy.ops.triton.trial``, in few cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

from kvpolicy import ParameterError
from kvpolicy_adapters.bench.gpu.part import Finding, Setting, Tell

__all__ = ["compare_kernels"]

#: Errors, as norms, that numbers of each kind may have; what rounding an output to it makes.
_BOUNDS = {"torch.float32": 1e-3, "torch.bfloat16": 1e-2, "torch.float16": 1e-2}
#: Words that are no figures of a case.
_ABOUT = ("case", "dtype")
#: What a case counts that must not be there at all.
_NONE = (*("mass of hidden slots", "written otherwise", "NaN not seen", "chosen otherwise"),)


def compare_kernels(setting: Setting, tell: Tell) -> None:
    """Each case, and what is wrong with it.

    Raises:
        ParameterError: Triton is not installed, or a kernel could not run.
    """
    if find_spec("triton") is None:
        raise ParameterError("Triton is not installed: on a GPU torch's operators serve, slower")
    environment = dict(os.environ)
    if not setting.cuda:
        environment["TRITON_INTERPRET"] = "1"
    trial = subprocess.Popen(
        [sys.executable, "-m", "kvpolicy.ops.triton.trial", "--brief", "--device", setting.device],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert trial.stdout is not None
    assert trial.stderr is not None
    for line in trial.stdout:
        found: dict[str, Any] = json.loads(line)
        figures = {name: value for name, value in found.items() if name not in _ABOUT}
        errors = [value for name, value in figures.items() if not name.startswith(_NONE)]
        shown = {"worst error": max(errors, default=0.0), "bound": _BOUNDS[found["dtype"]]}
        tell(Finding(found["case"], shown, _wrong(figures, shown["bound"])))
    said = trial.stderr.read()
    if trial.wait():
        raise ParameterError(" / ".join(said.strip().splitlines()[-3:]) or "no message")


def _wrong(figures: dict[str, float], bound: float) -> str:
    """Which figures are not what they should be."""
    return ", ".join(
        f"{name} {value:.3g}"
        for name, value in figures.items()
        if value > (0 if name.startswith(_NONE) else bound)
    )
