"""A long generation at a fixed budget: memory stays flat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvpolicy
from kvpolicy.testing.soak import MOST_MEMORY, soak

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc"
)

# In a process of its own, which holds nothing but torch and kvpolicy: one that has freed a lot of
# memory before takes a leak from that, and grows no more than without.
SOAK = """
import json, sys, torch, kvpolicy
from dataclasses import asdict
from kvpolicy.testing.soak import soak

class Hoards(kvpolicy.CumulativeMass):
    def observe(self, report):
        super().observe(report)
        self.hoard = [*getattr(self, "hoard", []), report.mass.repeat(1, 1, 30, 1)]

class Leaks(kvpolicy.policies.H2O):
    def observers(self, shape):
        return (Hoards(shape),)

torch.set_num_threads(1)
steps, *names = sys.argv[1:]
soaked = [soak(Leaks() if name == "leaks" else name, steps=int(steps)) for name in names]
print(json.dumps([asdict(each) for each in soaked]))
"""


def soaked(steps: int, *names: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", SOAK, str(steps), *names],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_thousands_of_steps_grow_by_less_than_a_hundredth_and_a_leak_by_more():
    """A few kilobytes a step, which is the least that so many steps tell."""
    names = ["linear", "streaming_llm", "h2o", "snapkv"]
    *sound, leaking = soaked(4_000, *names, "leaks")
    assert [each["policy"] for each in sound] == names
    for each in sound:
        assert each["evictions"] > 3_900
        assert each["growth"] < MOST_MEMORY, each
    assert leaking["growth"] > MOST_MEMORY


def test_too_few_steps_tell_nothing():
    with pytest.raises(kvpolicy.ParameterError, match="steps=10 must be at least 1000"):
        soak("h2o", steps=10)
