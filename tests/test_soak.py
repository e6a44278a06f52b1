"""A long generation at a fixed budget: memory stays flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kvpolicy
from kvpolicy.testing.soak import MOST_MEMORY, soak

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc"
)

# In a process of its own, which holds nothing but torch and kvpolicy.
SOAK = """
import json, sys, torch
from dataclasses import asdict
from kvpolicy.testing.soak import soak
torch.set_num_threads(1)
print(json.dumps([asdict(soak(name, steps=20_000)) for name in sys.argv[1:]]))
"""


@pytest.mark.slow
def test_twenty_thousand_steps_grow_by_less_than_a_hundredth():
    names = ["linear", "streaming_llm", "h2o", "snapkv"]
    done = subprocess.run(
        [sys.executable, "-c", SOAK, *names], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    soaked = json.loads(done.stdout)
    assert [each["policy"] for each in soaked] == names
    for each in soaked:
        assert each["evictions"] > 19_900
        assert each["growth"] < MOST_MEMORY, each


def test_a_leak_of_a_few_kilobytes_a_step_is_seen():
    class Hoards(kvpolicy.CumulativeMass):
        def observe(self, report):
            super().observe(report)
            self.hoard = [*getattr(self, "hoard", [])[-9_999:], report.mass.repeat(1, 1, 30, 1)]

    class Leaks(kvpolicy.policies.H2O):
        def observers(self, shape):
            return (Hoards(shape),)

    assert soak(Leaks(), steps=2_500).growth > MOST_MEMORY
    assert soak("h2o", steps=1_500).growth < MOST_MEMORY


def test_too_few_steps_tell_nothing():
    with pytest.raises(kvpolicy.ParameterError, match="steps=10 must be at least 1000"):
        soak("h2o", steps=10)
