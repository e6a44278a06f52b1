"""The folder of a run: whole or not at all, and refused where another plan has run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvpolicy.errors import ParameterError

pytest.importorskip("safetensors", reason="a run folder needs the extra 'lab'")

from kvpolicy.lab.run.files import whole_folder, write_whole
from kvpolicy.lab.run.plan import Plan, read_plan
from kvpolicy.lab.run.run_folder import CellRecord, CellStats, RunFolder, open_run

PLAN = Plan(
    subject="toy",
    policies=["linear", {"name": "h2o", "parameters": {"recent": [0.25, 0.5]}}],
    budgets=["1/4", "0.125"],
    seeds=[0, 1],
)
STATS = CellStats(budgets=(1,), peak_tokens=(2,), bytes=3, overhead_bytes=4, evictions=(5,))


def record(cell, **metrics):
    return CellRecord(
        cell=cell, id=cell.id, parameters={}, metrics=metrics, stats=STATS, seconds=1.5
    )


def test_the_baseline_has_one_cell_a_seed():
    cells = PLAN.cells()
    assert [cell.entry for cell in cells[:2]] == [("full", None)] * 2
    assert len(cells) == 2 + 3 * 2 * 2
    assert len({cell.id for cell in cells}) == len(cells)
    assert cells[-1].label == "h2o(recent=0.5)"
    assert {cell.budget for cell in cells[2:]} == {"1/4", "1/8"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"policies": []}, "policies"),
        ({"budgets": ["a sixth"]}, "budget='a sixth' is not a budget"),
        ({"seeds": [-1]}, "must not be negative"),
        ({"polices": ["linear"]}, "no parameter 'polices'"),
        ({"policies": ["h2o", "h2o"]}, "stands there twice"),
    ],
)
def test_a_wrong_plan_says_which_field(fields, said):
    with pytest.raises(ParameterError, match=said):
        Plan(**({"subject": "toy", "policies": ["linear"]} | fields))


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_plan_is_read_from_a_file(tmp_path, suffix):
    file = tmp_path / f"plan.{suffix}"
    file.write_text(PLAN.text())  # JSON is YAML
    assert read_plan(file) == PLAN


@pytest.mark.parametrize(
    ("name", "text"),
    [("plan.json", "{"), ("plan.yaml", "a: [b"), ("plan.yaml", "- a"), ("plan.txt", "{}")],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ParameterError, match="plan"):
        read_plan(tmp_path / name)


def test_a_kept_cell_is_read_again(tmp_path):
    run = RunFolder.begin(tmp_path / "run", PLAN)
    cell = run.plan.cells()[3]
    run.fail(cell, "ValueError: no", "Traceback ...")
    assert [failure.cell for failure in run.failures()] == [cell]
    images = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    run.keep(record(cell, bits=0.5), {"bits": np.array([0.25, 0.75])}, images)

    run = open_run(tmp_path / "run")
    (found,) = run.finished()
    assert found.cell == cell
    assert found.record.metrics == {"bits": 0.5}
    assert found.scores()["bits"].tolist() == [0.25, 0.75]
    assert (found.images() == images).all()
    assert found.trace_path is None
    assert run.failures() == []
    assert [event["event"] for event in run.log()] == ["failed", "finished"]


def test_another_plan_in_the_same_folder_is_refused_with_the_difference(tmp_path):
    RunFolder.begin(tmp_path, PLAN)
    RunFolder.begin(tmp_path, PLAN)
    with pytest.raises(ParameterError, match=r"(?s)another plan.*-    1\n.*\+    2\n"):
        RunFolder.begin(tmp_path, PLAN.model_copy(update={"seeds": (0, 2)}))


def test_the_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ParameterError, match="not empty"):
        RunFolder.begin(tmp_path, PLAN)
    with pytest.raises(ParameterError, match="no plan"):
        open_run(tmp_path)


def test_a_folder_that_could_not_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="full"), whole_folder(tmp_path / "cell") as fresh:
        (fresh / "half").write_text("...")
        raise OSError("full")
    assert not list(tmp_path.iterdir())
    (tmp_path / "cell.new").mkdir()  # as a crash leaves it
    (tmp_path / "cell.new" / "half").write_text("...")
    with whole_folder(tmp_path / "cell") as fresh:
        (fresh / "all").write_text("...")
    assert [path.name for path in tmp_path.rglob("*")] == ["cell", "all"]


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", "old")

    def full(handle):
        raise OSError(28, "full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="full"):
        write_whole(tmp_path / "a", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_line_that_a_crash_cut_off_costs_no_other(tmp_path):
    run = RunFolder.begin(tmp_path, PLAN)
    run.note("begun", cell="a")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write(json.dumps({"event": "begun", "cell": "b"})[:-4])
    run.note("begun", cell="c")
    assert [event["cell"] for event in run.log()] == ["a", "c"]
