"""An ablation loses nothing that has finished, whatever happens to it."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import date
from pathlib import Path

import pytest
from support.processes import run_command

pytest.importorskip("typer", reason="ablations need the extra 'lab'")
pytest.importorskip("pyarrow", reason="ablations need the extra 'lab'")

from kvpolicy.errors import BudgetError, ParameterError, RunFolderError, UnknownNameError
from kvpolicy.lab.run.executors import Inline, Processes, make_executor
from kvpolicy.lab.run.plan import Plan
from kvpolicy.lab.run.run_folder import open_run
from kvpolicy.lab.run.runner import prepare, run

HERE = Path(__file__).parents[1] / "support"


class Quiet:
    """A watcher that remembers."""

    def __init__(self):
        self.records, self.failures, self.reasons = [], [], []

    def begun(self, waiting, finished):
        self.waiting, self.finished = list(waiting), list(finished)

    def done(self, record):
        self.records.append(record)

    def damaged(self, item):
        self.reasons.append(item.reason)

    def failed(self, failure):
        self.failures.append(failure)


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    """The toy subject can be imported here, and in workers."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)


def plan(diary: Path | None = None, **fields) -> Plan:
    options = {"diary": str(diary)} if diary else {}
    return Plan(
        **{
            "subject": "toy_subject:Toy",
            "policies": ["linear", "h2o", "random"],
            "budgets": ["1/2", "1/4"],
            "seeds": [0, 1],
            "options": options | fields.pop("options", {}),
        }
        | fields
    )


def sweep(wanted: Plan, folder: Path, executor=None) -> Quiet:
    watcher = Quiet()
    run(prepare(wanted), folder, executor or Inline(), 1, watcher)
    return watcher


def digests(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and inode of every finished cell."""
    found = {}
    for cell in sorted((folder / "cells").glob("*")):
        if cell.name.endswith(".new"):
            continue
        names = {file.name for file in cell.iterdir()}
        assert names == {"cell.json", "scores.safetensors", "images.safetensors"}, cell.name
        content = b"".join(file.read_bytes() for file in sorted(cell.iterdir()))
        found[cell.name] = (hashlib.sha256(content).hexdigest(), cell.stat().st_ino)
    return found


def diary_counts(diary: Path, word: str) -> Counter:
    lines = diary.read_text().splitlines() if diary.exists() else []
    return Counter(line.split(" ", 2)[2] for line in lines if line.startswith(word))


def results(folder: Path) -> dict[str, dict]:
    """Everything that must be the same bit for bit: figures but timings, and arrays."""
    found = {}
    for cell in open_run(folder).finished():
        figures = {name: v for name, v in cell.record.metrics.items() if name != "speed"}
        arrays = {name: a.tobytes() for name, a in cell.scores().items()}
        found[cell.record.id] = (figures, arrays, cell.images().tobytes())
    return found


# --- Nothing finished is lost -----------------------------------------------------------------


def sweep_and_end(wanted: Plan, folder: Path) -> None:
    """In a process of its own, which the test kills."""
    sys.path.insert(0, str(HERE))
    sweep(wanted, folder)


@pytest.mark.slow
def test_ten_kills_lose_no_finished_cell_and_none_is_measured_twice(tmp_path):
    diary, folder = tmp_path / "diary", tmp_path / "run"
    # Cells that take no time of their own: kills hit the writing of them.
    wanted = plan(
        diary,
        budgets=["1/2", "1/4", "3/4", "3/8", "5/8", "7/8"],
        seeds=list(range(6)),
        options={"items": 2000},
    )
    count = len(wanted.cells())
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["kvpolicy.lab.run.runner", "test_ablate"])
    chance = random.Random(0)
    safe: dict[str, tuple[str, int]] = {}
    kills = landed = torn = 0
    while kills < 10 or len(safe) < count:
        before = len(diary.read_text().splitlines()) if diary.exists() else 0
        process = server.Process(target=sweep_and_end, args=(wanted, folder))
        process.start()
        if kills < 12 and len(safe) < count:
            # Not during imports: from the moment at which the first cell has begun.
            while process.is_alive() and (
                not diary.exists() or len(diary.read_text().splitlines()) == before
            ):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.03))
            landed += process.is_alive()
            process.kill()
            kills += 1
        process.join(60)
        torn += bool(list(folder.glob("cells/*.new")))
        assert process.exitcode in (0, -signal.SIGKILL)
        now = digests(folder)
        # What was finished at an earlier kill is there, the same bytes in the same place.
        assert {name: now.get(name) for name in safe} == safe
        safe = now
    assert kills >= 10
    assert landed >= 10, f"only {landed} of {kills} kills hit a sweep at work"
    assert torn >= 2, f"only {torn} of {kills} kills hit the writing of a cell"
    assert len(list(open_run(folder).finished())) == count
    # A cell is measured again only if a kill came before it had been written: each kill can cost
    # the one that was being measured, and no other.
    begun = diary_counts(diary, "begun")
    assert len(begun) == count
    assert sum(begun.values()) <= count + kills
    log = open_run(folder).log()
    finished = [event["cell"] for event in log if event["event"] == "finished"]
    assert len(finished) == len(set(finished))
    # And the results are those of a run that nobody disturbed.
    calm = tmp_path / "calm"
    sweep(wanted, calm)
    assert results(calm) == results(folder)


@pytest.mark.slow
def test_killing_the_command_ends_its_workers_and_loses_nothing(tmp_path):
    diary, folder = tmp_path / "diary", tmp_path / "run"
    asked = [
        *("ablate", "--subject", "toy_subject:Toy", "--policies", "linear,h2o,random"),
        *("--budgets", "1/2,1/4", "--seeds", "0,1", "--option", f"diary={diary}"),
        *("--option", "seconds=0.4", "--out", str(folder)),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvpolicy", *asked, "--workers", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    while not diary.exists() or len(diary.read_text().splitlines()) < 7:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(0.2)  # for orphans to notice
    written = diary.read_text()
    safe = digests(folder)
    assert 0 < len(safe) < 14
    time.sleep(1.0)
    assert diary.read_text() == written, "a worker has outlived the command"
    done = run_command(*asked, "--executor", "inline", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["finished"] == len(safe)
    assert {event["event"] for event in events} == {"begun", "done"}
    assert events[-1]["finished"] == events[-1]["total"] == 14
    now = digests(folder)
    assert len(now) == 14
    assert {name: now[name] for name in safe} == safe


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path, request):
    diary, folder = tmp_path / "diary", tmp_path / "run"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "kvpolicy", "ablate", "--subject", "toy_subject:Toy"),
            *("--policies", "linear", "--budgets", "1/2", "--option", "seconds=3600"),
            *("--option", f"diary={diary}", "--workers", "1", "--out", str(folder)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # What runs in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    request.addfinalizer(process.kill)  # should the test fail, its workers end too
    while not diary.exists() or "\n" not in diary.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    worker = int(diary.read_text().split()[1])
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "0 of 2 cells are finished" in said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


# --- A full disk ------------------------------------------------------------------------------


def test_a_file_that_may_not_grow_stops_the_sweep_cleanly(tmp_path):
    """Files may not grow beyond a limit: the system refuses the write, as on a full disk."""
    folder = tmp_path / "run"
    wanted = plan(tmp_path / "diary", options={"items": 100})
    small = 2000  # less than a cell's arrays, more than any other file
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, before[1]))
        with pytest.raises(RunFolderError, match="run the same command again"):
            sweep(wanted, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert digests(folder) == {}
    assert not list(folder.rglob("*.new"))
    sweep(wanted, folder)
    assert len(digests(folder)) == 14


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 200 kB."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(where)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root; the limit on files is tested anyway")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_loses_nothing(small_disk, tmp_path):
    diary, folder = tmp_path / "diary", small_disk / "run"
    wanted = plan(diary, options={"items": 500})
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 90_000)
    with pytest.raises(RunFolderError, match="No space left"):
        sweep(wanted, folder)
    safe = digests(folder)
    assert 0 < len(safe) < 14
    measured = diary_counts(diary, "ended")
    with pytest.raises(RunFolderError, match="No space left"):  # still full: still nothing lost
        sweep(wanted, folder)
    assert digests(folder) == safe
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True)
    sweep(wanted, folder)
    now = digests(folder)
    assert len(now) == 14
    assert {name: now[name] for name in safe} == safe
    # Each try that met the full disk cost the cell that could not be written, and no other.
    again = diary_counts(diary, "begun")
    assert sum(again.values()) == 14 + 2
    assert set(measured) <= set(again)


# --- Cells that raise, workers that die ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("executor", [Inline(), Processes(1)], ids=["inline", "processes"])
def test_a_cell_that_raises_is_listed_and_tried_again(tmp_path, executor):
    folder, mark = tmp_path / "run", tmp_path / "mark"
    wanted = plan(tmp_path / "diary", options={"broken": "h2o", "mark": str(mark)})
    watcher = sweep(wanted, folder, executor)
    assert len(watcher.records) == 10
    assert {failure.cell.policy for failure in watcher.failures} == {"h2o"}
    failures = open_run(folder).failures()
    assert len(failures) == 4
    assert "this cell is broken" in failures[0].error
    assert "toy_subject.py" in failures[0].traceback
    assert sweep(wanted, folder, executor).waiting == [failure.cell for failure in failures]
    assert open_run(folder).failures()[0].attempts == 2
    mark.touch()
    watcher = sweep(wanted, folder, executor)
    assert len(watcher.finished) == 10
    assert len(watcher.records) == 4
    assert open_run(folder).failures() == []
    assert max(diary_counts(tmp_path / "diary", "ended").values()) == 1


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_no_result(tmp_path):
    folder, mark = tmp_path / "run", tmp_path / "mark"
    wanted = plan(tmp_path / "diary", options={"kill": "h2o", "mark": str(mark)})
    watcher = sweep(wanted, folder, Processes(2))
    assert mark.exists(), "no worker was killed"
    assert len(watcher.records) == 14
    assert watcher.failures == []


@pytest.mark.slow
def test_a_cell_that_always_kills_its_worker_fails_alone(tmp_path):
    wanted = plan(policies=["h2o", "linear"], budgets=["1/2"], seeds=[0], options={"kill": "h2o!"})
    watcher = sweep(wanted, tmp_path / "run", Processes(1))
    assert [record.cell.policy for record in watcher.records] == ["full", "linear"]
    (failure,) = watcher.failures
    assert "SIGKILL" in failure.error


# --- The same results from everywhere -----------------------------------------------------------


@pytest.mark.slow
def test_processes_and_inline_agree_bit_for_bit(tmp_path):
    wanted = plan(tmp_path / "diary")
    sweep(wanted, tmp_path / "inline")
    sweep(wanted, tmp_path / "processes", Processes(2))
    one, two = results(tmp_path / "inline"), results(tmp_path / "processes")
    assert len(one) == 14
    assert one == two
    pids = {line.split()[1] for line in (tmp_path / "diary").read_text().splitlines()}
    assert len(pids) == 3


@pytest.mark.slow
def test_ray_agrees_bit_for_bit_and_survives_a_killed_worker(tmp_path):
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    diary = tmp_path / "diary"
    wanted = plan(diary, options={"seconds": 0.2})
    sweep(wanted, tmp_path / "inline")
    ours = str(os.getpid())
    diary.unlink()
    killed = []

    def kill_the_first_worker():
        while not killed:
            lines = diary.read_text().splitlines() if diary.exists() else []
            for line in lines:
                word, pid, _ = line.split(" ", 2)
                if word == "begun" and pid != ours:
                    os.kill(int(pid), signal.SIGKILL)
                    killed.append(int(pid))
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_the_first_worker, daemon=True)
    killer.start()
    watcher = sweep(wanted, tmp_path / "ray", make_executor("ray", 2, 1, None))
    killer.join(1)
    assert killed
    assert watcher.failures == []
    assert results(tmp_path / "ray") == results(tmp_path / "inline")
    begun, ended = diary_counts(diary, "begun"), diary_counts(diary, "ended")
    assert max(ended.values()) == 1
    assert sum(begun.values()) == 14 + 1
    pids = {line.split()[1] for line in diary.read_text().splitlines()}
    assert len(pids) >= 3, "two workers, and one that replaced the dead one"


@pytest.mark.slow
def test_a_ray_cluster_that_runs_already_is_used_and_left_running(tmp_path):
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        wanted = plan(tmp_path / "diary", options={"seconds": 0.3})
        sweep(wanted, tmp_path / "ray", make_executor("ray", None, 1, cluster.address))
        sweep(wanted, tmp_path / "inline")
        assert results(tmp_path / "ray") == results(tmp_path / "inline")
        lines = [line.split() for line in (tmp_path / "diary").read_text().splitlines()]
        assert len({pid for _, pid, *_ in lines} - {str(os.getpid())}) >= 2
        assert not ray.is_initialized()
        assert all(node.all_processes for node in cluster.list_all_nodes())
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_fashion_ar_gives_the_same_bits_in_every_executor(tmp_path):
    wanted = Plan(
        subject="fashion-ar",
        policies=["linear"],
        budgets=["1/6"],
        options={"scored": 2, "images": 10},
        metrics=["bits_per_pixel"],
    )
    sweep(wanted, tmp_path / "inline")
    sweep(wanted, tmp_path / "processes", Processes(2))
    one, two = (
        {c.record.id: c.scores()["bits"].tobytes() for c in open_run(tmp_path / name).finished()}
        for name in ("inline", "processes")
    )
    assert len(one) == 2
    assert one == two


# --- Wrong requests ------------------------------------------------------------------------------


def test_a_combination_that_can_not_be_is_left_out_and_said(tmp_path):
    wanted = plan(budgets=["1/2", "1/8"])
    prepared = prepare(wanted)
    assert [(item.label, item.budget) for item in prepared.left_out] == [("linear", "1/8")]
    assert "smallest budget that works" in prepared.left_out[0].reason
    assert len(prepared.cells) == len(wanted.cells()) - 2
    watcher = sweep(wanted, tmp_path / "run")
    assert len(watcher.records) == len(prepared.cells)
    assert open_run(tmp_path / "run").subject.left_out == prepared.left_out


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"policies": ["linar"]}, UnknownNameError, "did you mean 'linear'"),
        ({"budgets": ["1/50"]}, BudgetError, "smallest budget that works"),
        ({"options": {"item": 3}}, ParameterError, "did you mean 'items'"),
        ({"metrics": ["bit"]}, ParameterError, "did you mean 'bits'"),
        ({"subject": "toy_subject:Tox"}, UnknownNameError, "has no 'Tox'.*'Toy'"),
        ({"subject": "no_such_module:Toy"}, ParameterError, "can't be imported"),
        ({"subject": "types:SimpleNamespace"}, ParameterError, r"not a class with .* measure\(\)"),
        ({"options": {"items": math.nan}}, ParameterError, "items=nan is not finite"),
        ({"options": {"mark": "\ud800"}}, ParameterError, "mark='.ud800' is no text"),
        ({"options": {"mark": date(2026, 1, 2)}}, ParameterError, "mark=.*of type date"),
        (
            {"policies": [{"name": "h2o", "parameters": {"recent": [math.inf]}}]},
            ParameterError,
            r"recent\[0\]=inf is not finite",
        ),
        (
            {"policies": [{"name": "linear", "parameters": {"anchors": -1}}]},
            ParameterError,
            "anchors=-1",
        ),
    ],
)
def test_a_wrong_plan_fails_before_any_cell(tmp_path, fields, error, said):
    with pytest.raises(error, match=said):
        prepare(plan(tmp_path / "diary", **fields))
    assert not (tmp_path / "diary").exists()


def test_two_runs_in_one_folder_do_not_meet(tmp_path):
    folder = tmp_path / "run"
    wanted = plan(tmp_path / "diary", options={"seconds": 0.05})
    prepared = prepare(wanted)
    first = threading.Thread(target=run, args=(prepared, folder, Inline(), 1, Quiet()))
    first.start()
    while not (tmp_path / "diary").exists():
        time.sleep(0.001)
    with pytest.raises(RunFolderError, match="another run is at work"):
        sweep(wanted, folder)
    first.join()
    assert len(digests(folder)) == 14


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("process", {}, "did you mean 'processes'"),
        ("inline", {"workers": 2}, "has one"),
        ("inline", {"address": "auto"}, "needs executor 'ray'"),
    ],
)
def test_wrong_executors_are_refused(name, options, said):
    with pytest.raises(ParameterError, match=said):
        make_executor(name, options.get("workers"), 1, options.get("address"))
