"""Compiles a Triton kernel for a GPU that is not here.

Prints the bytes of its machine code, and how often it calls what fails an assertion.
"""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvpolicy.ops.triton.asserting import ASSERTING
from kvpolicy.ops.triton.decode_slots import _decode
from kvpolicy.ops.triton.rank_slots import _lowest

#: Compute capability 9.0 and threads of a warp.
TARGET = GPUTarget("cuda", 90, 32)
HALF, WHOLE, BOOL = "*bf16", "*i32", "*i1"
ATTEND = dict.fromkeys(("query", "keys", "values", "output", "key", "value"), HALF)
ATTEND |= {"mass": "*fp32", "scores": "*fp32", "into": "*i64", "scale": "fp32"}
SIZES = {"GROUP": 1, "ROWS": 1, "WIDE_K": 64, "WIDE_V": 64, "BLOCK": 64, "MASKED": True}
SIZES |= {"FROM_TENSOR": False, "MASS": True, "WIDEN": False}
RANK = {"positions": WHOLE, "protected": BOOL, "pinned": BOOL, "victims": "*i64"}
#: By kind: the kernel, the types of what it is given (whole numbers but for these), and constants.
KINDS = {
    "attend": (_decode, {**ATTEND, "visible": BOOL}, {**SIZES, "WRITE": False}),
    "step": (_decode, {**ATTEND, "visible": WHOLE}, {**SIZES, "WRITE": True}),
    "rank": (
        _lowest,
        {**RANK, "score": "*fp32"},
        {"BLOCK": 64, "RANKS": False, "MASKED": True, "SPANNED": False, "PINNED": True},
    ),
    "rank by position": (
        _lowest,
        {**RANK, "score": "*fp32", "protected": "*fp32", "pinned": "*fp32"},
        {"BLOCK": 64, "RANKS": False, "MASKED": False, "SPANNED": True, "PINNED": False},
    ),
}


def main(kind: str) -> None:
    kernel, types, constants = KINDS[kind]
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={
            name: "constexpr" if name in constants else types.get(name, "i32") for name in names
        },
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    compiled = triton.compile(source, target=TARGET, options={"num_warps": 4, **ASSERTING})
    calls = compiled.asm["ptx"].count("__assertfail, ")
    print(len(compiled.asm["cubin"]), calls)


main(sys.argv[1])
