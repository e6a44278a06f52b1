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

    console.print(str(native.build(compiler)), soft_wrap=True, highlight=False)
