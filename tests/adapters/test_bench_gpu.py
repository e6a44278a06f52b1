"""The check of a GPU: each part in its own process, by the clock; and the whole chain, tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

from kvpolicy import PolicyCache, create
from kvpolicy.errors import ParameterError
from kvpolicy_adapters.bench.gpu import __main__ as command
from kvpolicy_adapters.bench.gpu import decisions, kernels
from kvpolicy_adapters.bench.gpu.guard import run_part
from kvpolicy_adapters.bench.gpu.part import Finding, Part, Setting

TINY = Setting("cpu", tiny=True, dtype="float32")
forks = pytest.mark.skipif(sys.platform != "linux", reason="parts here are not at a module's top")


def finds(setting, tell):
    tell(Finding("a", {"number": 1}))
    tell(Finding("a", {"number": 2}))
    tell(Finding("b", {"word": "x|y"}))


def refuses(setting, tell):
    tell(Finding("a", {"number": 1}))
    raise ParameterError("no such thing")


def breaks(setting, tell):
    raise ZeroDivisionError


def ends(setting, tell):
    os._exit(3)


def hangs(setting, tell):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    tell(Finding("child", {"process": child.pid}))
    time.sleep(600)


def is_gone(process):
    """Whether a process ends, or only waits for whoever adopts it to look at it."""
    for _ in range(300):
        try:
            with open(f"/proc/{process}/stat", encoding="ascii") as stat:
                if stat.read().split()[2] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def is_wrong(setting, tell):
    tell(Finding("a", {"number": 1}, "it is odd"))


@forks
@pytest.mark.parametrize(
    ("run", "state", "error", "found"),
    [
        (finds, "done", "", 2),
        (refuses, "failed", "no such thing", 1),
        (breaks, "failed", "ZeroDivisionError: no message", 0),
        (ends, "failed", "the process ended by itself, with status 3", 0),
    ],
)
def test_what_becomes_of_a_part(run, state, error, found):
    outcome = run_part(Part("part", 60, run), TINY, 60)
    assert (outcome.state, outcome.error, len(outcome.findings)) == (state, error, found)
    assert outcome.good is (run is finds)
    if run is finds:
        assert outcome.findings["a"].figures == {"number": 2}  # the newest counts


@forks
def test_a_part_that_hangs_is_ended_with_all_that_it_started():
    outcome = run_part(Part("part", 5, hangs), TINY, 60)
    assert outcome.state == "out of time"
    (child,) = outcome.findings.values()
    assert is_gone(child.figures["process"])


@forks
def test_a_command_that_is_killed_leaves_no_part_behind(tmp_path):
    """Its own process is gone at once; what it had begun ends itself, and what that had started."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "from kvpolicy_adapters.bench.gpu.guard import run_part\n"
        "from kvpolicy_adapters.bench.gpu.part import Part, Setting\n"
        "def hangs(setting, tell):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    print(child.pid, file=sys.stderr, flush=True)\n"
        "    time.sleep(600)\n"
        "run_part(Part('part', 600, hangs), Setting('cpu', True, 'float32'), 600)\n"
    )
    command = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    child = int(command.stderr.readline())
    command.kill()
    command.wait()
    assert is_gone(child)
    command.stderr.close()


def test_no_part_begins_without_time():
    outcome = run_part(Part("part", 60, finds), TINY, 1.0)
    assert (outcome.state, outcome.findings) == ("not begun", {})
    assert not outcome.good


@forks
def test_one_failure_is_a_line_and_not_the_end(monkeypatch, tmp_path, capsys):
    parts = [("one", refuses), ("two", is_wrong), ("three", finds)]
    monkeypatch.setattr(command, "PARTS", [Part(name, 60, run) for name, run in parts])
    out = tmp_path / "gpu.json"
    assert command.main(["--device", "cpu", "--tiny", "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "**one** (failed" in said
    assert "no such thing" in said
    assert "**two** (done, and wrong" in said
    assert "| a | 1 | it is odd |" in said
    assert "| b | - | x\\|y |" in said
    content = json.loads(out.read_text())
    assert [part["good"] for part in content["parts"]] == [False, False, True]
    monkeypatch.setattr(command, "PARTS", [Part("three", 60, finds)])
    assert command.main(["--device", "cpu", "--tiny", "--out", str(out)]) == 0


@forks
def test_without_a_gpu_it_is_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    said = capsys.readouterr().err
    assert "--device cuda: torch" in said
    assert "--device cpu --tiny" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cpu"], "--device cpu needs --tiny"),
        (["--device", "mps"], "give cuda, cuda:N, or cpu"),
        (["--minutes", "0"], "--minutes 0.0 must be above 0"),
        (["--llamagen", "nowhere"], "there is no nowhere"),
        (["--out", "nowhere/gpu.json"], "there is no folder nowhere"),
        (["--dtype", "float23"], "invalid choice"),
    ],
)
def test_options_that_can_not_be(options, said, capsys):
    with pytest.raises(SystemExit) as status:
        command.main(options)
    assert status.value.code == 2
    assert said in capsys.readouterr().err


def test_parts_take_six_minutes_together():
    assert sum(part.seconds for part in command.PARTS) <= 360


def test_decisions_that_differ_are_seen(monkeypatch):
    seeds = iter(range(1000))

    def cache(name):
        return PolicyCache(
            create("random", seed=next(seeds)), 22, layout=decisions._LAYOUT, num_layers=1
        )

    monkeypatch.setattr(decisions, "_cache", cache)
    monkeypatch.setattr(decisions, "_follow", lambda here, there: None)
    assert "chooses otherwise" in decisions._compare("random", TINY).wrong


def test_figures_of_a_kernel_that_are_wrong_are_named():
    figures = {"output": 1e-4, "mass": 0.5, "NaN not seen": 0, "written otherwise in place": 2}
    assert kernels._wrong(figures, 1e-3) == "mass 0.5, written otherwise in place 2"


@pytest.mark.slow
@forks
def test_the_whole_chain(tmp_path):
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--tiny", "--minutes", "60", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "kvpolicy_adapters.bench.gpu", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    run = [part for part in command.PARTS if not part.gpu_only]
    assert [part["part"] for part in content["parts"]] == [part.name for part in run]
    for part in content["parts"]:
        assert part["state"] == "done"
        assert part["findings"], part["part"]
        assert f"**{part['part']}** (done" in done.stdout
    assert "no time means anything" in done.stdout
