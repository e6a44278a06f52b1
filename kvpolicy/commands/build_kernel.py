"""``kvpolicy build-kernel``: the CPU kernel, for this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpolicy.commands.console import console

__all__ = ["build_kernel"]


def build_kernel(
    compiler: Annotated[
        str | None, typer.Option(help="C++ compiler; by default $CXX, c++, g++ or clang++.")
    ] = None,
) -> None:
    """Compile the CPU kernel for this machine, in some seconds; every later run uses it.

    It lies in ~/.cache/kvpolicy/kernels, or $KVPOLICY_KERNELS; KVPOLICY_NATIVE=0 turns it off.
    Where there is no compiler, the kernel that came with the installation is measured instead.
    """
    from kvpolicy.ops.cpu import native
    from kvpolicy.ops.cpu.build import build

    path = build(compiler)
    console.print(str(path), soft_wrap=True, highlight=False)
    report = native.measured(path)
    kept = {name: r >= native.SLOWEST for name, r in report["times_as_fast"].items()}
    used, left = (
        ", ".join(f"{n} {r:g}" for n, r in report["times_as_fast"].items() if kept[n] is wanted)
        for wanted in (True, False)
    )
    console.print(f"times as fast as torch, one thread: {used}", soft_wrap=True, highlight=False)
    console.print(f"left to torch: {left or 'nothing'}", soft_wrap=True, highlight=False)
    console.print(f"skinny products: up to {report['most_rows']} rows", highlight=False)
