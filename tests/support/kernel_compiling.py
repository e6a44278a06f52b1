"""Compiles the Triton kernel for a GPU that is not here; prints the bytes of its machine code."""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvpolicy.ops.triton.decode_slots import _decode

#: Compute capability 9.0 and threads of a warp.
TARGET = GPUTarget("cuda", 90, 32)
HALF, WHOLE = "*bf16", "*i32"


def main(kind: str) -> None:
    step = kind == "step"
    pointers = dict.fromkeys(("query", "keys", "values", "output", "key", "value"), HALF)
    pointers |= {"mass": "*fp32", "scores": "*fp32", "into": "*i64", "sane": WHOLE, "scale": "fp32"}
    pointers["visible"] = WHOLE if step else "*i1"
    constants = {"GROUP": 1, "ROWS": 1, "WIDE_K": 64, "WIDE_V": 64, "BLOCK": 64, "MASKED": True}
    constants |= {"WRITE": step, "FROM_TENSOR": False, "MASS": True, "WIDEN": False}
    names = _decode.arg_names
    source = ASTSource(
        fn=_decode,
        signature={
            name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
        },
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=TARGET, options={"num_warps": 4})
    print(len(compiled.asm["cubin"]))


main(sys.argv[1])
