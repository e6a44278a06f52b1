"""The examples run, on random weights of a tiny size where they need a model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.processes import Done, run_script

pytest.importorskip("transformers", reason="the examples need transformers")

ROOT = Path(__file__).parents[2]
#: What each must say.
SAYS = {"text": "held at most 36 of 159 tokens; 13,056 bytes\nlayers that need no policy: 0, 2"}
SCRIPTS = {name: ROOT / "examples" / f"{name}.py" for name in SAYS}


def run(name: str, folder: Path, *options: str) -> Done:
    return run_script(SCRIPTS[name], "--tiny", *options, folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_on_a_tiny_model(name, tmp_path):
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
    assert not list(tmp_path.iterdir()), "a tiny run leaves nothing behind"


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_says_which_checkpoint_it_wants(name):
    words = SCRIPTS[name].read_text(encoding="utf-8").partition('"""\n\nfrom')[0]
    assert "Checkpoint: " in words
    assert "--tiny" in words


def test_the_table_of_parts_is_the_examples():
    """docs/compose.md shows what examples/which_part.py measures, row by row."""
    script = (ROOT / "examples" / "which_part.py").read_text(encoding="utf-8")
    rows = re.findall(r'^    "(.+)": "(linear.*)",$', script, re.MULTILINE)
    page = (ROOT / "docs" / "compose.md").read_text(encoding="utf-8")
    assert len(rows) >= 10
    for change, spelled in rows:
        assert f"| {change} | `{spelled}` |" in page


@pytest.mark.slow
def test_which_part_prints_its_table(tmp_path):
    script = ROOT / "examples" / "which_part.py"
    done = run_script(script, "--images", "2", "--rows", "2", "--markdown", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    heading, _, linear, changed = done.stdout.splitlines()
    assert heading == "| changed | spelled | over the full cache | over `linear` |"
    assert linear.startswith("| nothing: `linear` as it is | `linear` | ")
    assert changed.startswith("| protect: no anchors | `linear/protect=lines:1` | ")


def test_speculate_says_how_many_passes_it_took(tmp_path):
    script = ROOT / "examples" / "speculate.py"
    done = run_script(script, "--classes", "3", "--tokens", "40", "--window", "16", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"class 3: 40 tokens in (\d+) passes\n", done.stdout)
    assert found is not None, done.stdout
    assert 1 < int(found[1]) < 40


@pytest.mark.slow
def test_the_bits_of_groups_are_measured_once(tmp_path):
    script = ROOT / "examples" / "parallel_bits.py"
    options = ["--out", "cells.jsonl", "--images", "2", "--passes", "16"]
    options += ["--rows", "ahead,oracle:2:mass", "--budgets", "1/4"]
    once, again = (run_script(script, *options, folder=tmp_path) for _ in range(2))
    assert once.returncode == again.returncode == 0, once.stderr
    assert once.stdout == again.stdout
    assert re.search(r"^\| `ahead` \| \+0\.\d{4} \(", once.stdout, re.MULTILINE)
    assert once.stderr.count("s of a processor") == 3
    assert "s of a processor" not in again.stderr
