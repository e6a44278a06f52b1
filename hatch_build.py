"""The build backend: hatchling, and the CPU kernels where there is a compiler for them.

A wheel for Linux on x86-64 carries them built, once for AVX2 and once for AVX-512; kvpolicy takes
at run time what the processor can do (``kvpolicy/ops/cpu/native.py``). They are for the torch that
they were built with. Without a compiler, or elsewhere, the wheel is pure Python, and one line says
so. ``KVPOLICY_NATIVE=0`` leaves them out.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import hatchling.build
from hatchling.build import *  # noqa: F403 (a backend is what a module of this name has)
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """As hatchling says; and where kernels are built, all that trying them needs, torch first."""
    needs = hatchling.build.get_requires_for_build_wheel(config_settings)
    if _why_not() is None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        needs += project["dependencies"]
    return needs


class KernelHook(BuildHookInterface):
    """Puts built kernels into a wheel, for as many instruction sets as this machine can try."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before a wheel is put together."""
        if version != "standard":  # an editable installation is the folder itself
            return
        why_not = _why_not()
        self.made = Path(tempfile.mkdtemp())
        built, why_not = (None, why_not) if why_not else _build(self.made)
        if why_not:
            self.app.display_warning(
                f"without CPU kernels: {why_not}; `kvpolicy build-kernel` builds them later"
            )
        if not built:
            return
        (self.made / "built.json").write_text(json.dumps(built))
        for path in (self.made / "built.json", *sorted(self.made.glob("*.so"))):
            build_data["force_include"][str(path)] = f"kvpolicy/ops/cpu/built/{path.name}"
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """When it has been."""
        if hasattr(self, "made"):
            shutil.rmtree(self.made)


def _why_not() -> str | None:
    """Why no kernels can be built here; None if they can."""
    if os.environ.get("KVPOLICY_NATIVE") == "0":
        return "KVPOLICY_NATIVE is 0"
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "they are built for Linux on x86-64 only"
    names = [os.environ.get("CXX") or "c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        return "there is no C++ compiler (c++, g++ or clang++)"
    return None


def _build(into: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What was built, for ``built.json``, and what went wrong."""
    try:
        import torch

        compiling = _compiling()
    except ImportError as error:
        return None, str(error)
    capability = torch.backends.cpu.get_cpu_capability()
    wide = ["x86-64-v4"] if capability.startswith(("AVX512", "AVX10")) else []
    names = ["x86-64-v3", *wide] if wide or capability == "AVX2" else []
    compiler = compiling.find_compiler()

    def build(name: str) -> tuple[str, str]:
        path = into / name / f"{name}.so"
        path.parent.mkdir()
        compiling.compile_library(compiler, name, path)
        # In a process of its own: what was built must load here, and compute what torch does.
        # Where a build is isolated, it is PYTHONPATH by which this process has found torch.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"KVPOLICY_NATIVE": "0", "PYTHONPATH": os.pathsep.join(paths)}
        trial = [sys.executable, "-m", "kvpolicy.ops.cpu.trial", "--only-compare", str(path)]
        done = compiling.run_in(path.parent, trial, env=environment)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise compiling.CompileError(f"the trial of {name} failed: {said[-1]}")
        path.rename(into / path.name)
        path.parent.rmdir()
        return name, hashlib.sha256((into / path.name).read_bytes()).hexdigest()

    try:
        with ThreadPoolExecutor() as pool:
            digests = dict(pool.map(build, names))
    except (compiling.CompileError, OSError) as error:
        for left in into.glob("*.so"):
            left.unlink()
        return None, str(error)
    if not digests:
        return None, f"this processor has no AVX2 (torch says {capability})"
    return {"torch": torch.__version__.partition("+")[0], "sha256": digests}, None


def _compiling() -> ModuleType:
    """``kvpolicy/ops/cpu/compiling.py``, without importing all of kvpolicy."""
    path = ROOT / "kvpolicy" / "ops" / "cpu" / "compiling.py"
    spec = importlib.util.spec_from_file_location("compiling", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
