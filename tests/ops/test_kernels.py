"""The Triton kernel: its numbers in the interpreter, its place in attend, its way through dynamo.

There is no GPU where these tests run; how fast the kernel is they can't say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kvpolicy import attend
from kvpolicy.ops import attend as attention
from kvpolicy.ops import triton as kernels

TRIAL = [sys.executable, "-m", "kvpolicy.ops.triton.trial", "--device", "cpu"]
COMPILING = Path(__file__).parents[1] / "support" / "kernel_compiling.py"
#: What a case counts that must not be there at all; the others are errors.
EXACT = {
    *("mass of hidden slots", "written otherwise", "written otherwise in place"),
    *("NaN not seen", "chosen otherwise"),
}
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not to be had for this platform"
)


@pytest.fixture(scope="module")
def found():
    """What the cases give; the interpreter is chosen when Triton is imported, so elsewhere."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(TRIAL, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
@needs_triton
def test_against_float64(found):
    assert len(found) == 73
    assert sum(case["case"].startswith("step, ") for case in found) == 23
    for case in found:
        bound = 1e-3 if case["dtype"] == "torch.float32" else 1e-2
        for figure, value in case.items():
            if figure in EXACT:
                assert value == 0, case
            elif figure not in ("case", "dtype"):
                assert value < bound, case


@pytest.mark.slow
@needs_triton
def test_float32_is_multiplied_as_such(found):
    """Not as TensorFloat32, whose error is 1e-3 and more."""
    wide = [case for case in found if case["dtype"] == "torch.float32" and "output" in case]
    worst = max(case["output"] for case in wide)
    assert worst < 1e-5


def step(slots=9):
    query = torch.randn(2, 4, 1, 64)
    keys, values = torch.randn(2, 2, 2, slots, 64)
    return query, keys, values


def test_no_kernel_serves_on_a_cpu():
    assert kernels.decode(*step(), 0.125, None, True) is None


@pytest.mark.parametrize(
    ("terms", "asked"),
    [
        ({"need_mass": True}, True),
        ({"visible": torch.ones(1, 1, 1, 9, dtype=torch.bool)}, True),
        ({}, False),  # torch's own kernel
        ({"need_mass": True, "softcap": 30.0}, False),
        ({"need_mass": True, "sinks": torch.zeros(4)}, False),
        ({"need_mass": True, "bias": torch.zeros(1, 1, 1, 9)}, False),
    ],
)
def test_attend_asks_the_kernel_for_what_it_serves(monkeypatch, terms, asked):
    seen = []

    # As on a GPU, which is where it is asked for.
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)

    def kernel(query, keys, values, scale, visible, need_mass):
        seen.append((scale, visible, need_mass))
        return torch.zeros_like(query), torch.full((2, 2, 1, 9), 7.0)

    monkeypatch.setattr(attention, "decode", kernel)
    output, mass = attend(*step(), **terms)
    assert bool(seen) == asked
    if asked:
        assert seen == [(0.125, terms.get("visible"), terms.get("need_mass", False))]
        assert not output.any()
        assert (mass == 7).all()


@needs_triton
def test_a_compiler_takes_the_kernel_into_one_graph(found):
    """The trial compiles the operators with fullgraph, and compares what they give."""
    assert {"compiled", "compiled without mass", "compiled step"} <= {c["case"] for c in found}


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("kind", "asserts"), [("attend", 0), ("step", 1), ("rank", 1), ("rank by position", 1)]
)
def test_a_gpus_compiler_takes_the_kernel(kind, asserts):
    """Triton's interpreter runs Python that its compiler refuses: annotations were such a thing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(COMPILING), kind],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    size, found = map(int, run.stdout.split())
    assert size > 1000
    assert bool(found) == bool(asserts)


def test_the_operators_shapes_are_those_of_its_results(monkeypatch):
    monkeypatch.setattr(
        kernels,
        "_decode",
        lambda query, keys, values, scale, visible, need_mass: (
            torch.zeros(2, 4, 1, 64),
            torch.zeros(2, 2, 1, 9) if need_mass else None,
        ),
    )
    for need_mass in (True, False):
        torch.library.opcheck(kernels.decode_op, (*step(), 0.125, None, need_mass))
