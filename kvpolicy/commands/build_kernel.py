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
    """
    from kvpolicy.ops.cpu import native
    from kvpolicy.ops.cpu.build import build

    path = build(compiler)
    console.print(str(path), soft_wrap=True, highlight=False)
    ratios = native.figures().get("times_as_fast", {})
    used = ", ".join(f"{name} {ratio:g}" for name, ratio in ratios.items() if native.uses(name))
    left = ", ".join(f"{name} {ratio:g}" for name, ratio in ratios.items() if not native.uses(name))
    if ratios:
        console.print(f"times as fast as torch, one thread: {used}", highlight=False)
        console.print(f"left to torch: {left or 'nothing'}", highlight=False)
        console.print(f"skinny products: up to {native.most_rows()} rows", highlight=False)
