"""A decoder is an axis of an ablation, like a budget; what can't draw with one is refused."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("typer", reason="the lab needs its extra")

from typer.testing import CliRunner

from kvpolicy.cli import app
from kvpolicy.errors import ParameterError
from kvpolicy.lab.compare.comparison import compare
from kvpolicy.lab.run.plan import Cell, Plan
from kvpolicy.lab.run.runner import prepare, run

DRAWING, TOY = "support.toy_subject:Drawing", "support.toy_subject:Toy"


def plan(subject=DRAWING, **fields):
    fields = {"policies": ["linear"], "budgets": ["1/4"]} | fields
    return Plan(subject=subject, **fields)


def test_cells_of_every_decoder():
    cells = plan(decoders=["sequential", "sjd:draft=left:window=8"]).cells()
    assert [(cell.label, cell.budget) for cell in cells] == [
        ("full", None),
        ("full@sjd:window=8:draft=left", None),
        ("linear", "1/4"),
        ("linear@sjd:window=8:draft=left", "1/4"),
    ]
    assert len({cell.id for cell in cells}) == 4
    assert [cell.is_baseline for cell in cells] == [True, False, False, False]


def test_the_baseline_is_there_whatever_the_decoders_are():
    labels = [cell.label for cell in plan(decoders=["sjd"]).cells()]
    assert labels == ["full", "full@sjd", "linear@sjd"]


def test_a_policy_may_have_a_decoder_of_its_own():
    labels = [cell.label for cell in plan(policies=["linear", "linear@sjd:window=8"]).cells()]
    assert labels == ["full", "linear", "linear@sjd:window=8"]
    labels = [cell.label for cell in plan(policies=["full@sjd", "linear"]).cells()]
    assert labels == ["full", "full@sjd", "linear"]


def test_cells_of_runs_that_knew_no_decoder_keep_their_folders():
    cell = Cell(subject="toy", policy="linear", budget="1/4", seed=0)
    assert cell.id == "linear-1_4-s0-b8a22ed8ab"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"decoders": ["sjdd"]}, "did you mean 'sjd'"),
        ({"decoders": ["sjd:window=0"]}, "window"),
        ({"decoders": []}, "decoders"),
        ({"policies": ["linear@sjdd"]}, "did you mean 'sjd'"),
        ({"policies": ["linear@"]}, "no decoder is called ''"),
        (
            {"policies": ["linear@sjd", {"name": "linear", "decoders": ["sjd"]}]},
            "stands there twice",
        ),
    ],
)
def test_wrong_decoders_are_refused_with_the_plan(fields, says):
    with pytest.raises(ParameterError, match=says):
        plan(**fields)


def test_a_subject_that_does_not_draw_is_refused():
    with pytest.raises(ParameterError, match=r"does not draw with decoders.*'sjd'"):
        prepare(plan(TOY, decoders=["sequential", "sjd"]))
    assert prepare(plan(TOY)).cells


def test_a_window_that_the_subject_can_not_fill_is_refused():
    with pytest.raises(ParameterError, match="window=300 is longer than the 257 tokens"):
        prepare(plan(decoders=["sjd:window=300"]))


def test_a_run_is_compared_with_the_full_cache_token_by_token(tmp_path):
    prepared = prepare(plan(decoders=["sequential", "sjd:window=8"]))
    folder = run(prepared, tmp_path / "run")
    entries = compare(list(folder.finished()), prepared.metrics)
    assert [entry.is_full for entry in entries] == [True, False, False, False]
    found = {entry.label: entry.findings["bits"] for entry in entries}
    assert found["full"].difference is None
    assert found["full@sjd:window=8"].difference.value == pytest.approx(-0.08)
    gain = found["linear@sjd:window=8"].estimate.value - found["linear"].estimate.value
    assert gain == pytest.approx(-0.08)


def test_from_the_command_line(tmp_path):
    result = CliRunner().invoke(
        app,
        [
            *("ablate", "--subject", DRAWING, "--policies", "linear,linear@sjd:window=16"),
            *("--decoders", "sequential,sjd:window=8", "--budgets", "1/4"),
            *("--executor", "inline", "--out", str(tmp_path / "run")),
        ],
    )
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert written["decoders"] == ["sequential", "sjd:window=8"]
    table = (tmp_path / "run" / "table.md").read_text()
    for label in ("full@sjd:window=8", "linear@sjd:window=8", "linear@sjd:window=16"):
        assert f"| {label} |" in table
    from pyarrow import parquet

    rows = parquet.read_table(tmp_path / "run" / "results.parquet").to_pylist()
    assert {row["decoder"] for row in rows} == {"sequential", "sjd:window=8", "sjd:window=16"}
    assert (tmp_path / "run" / "plots" / "images-1_4.png").exists()
    assert not (tmp_path / "run" / "plots" / "images-all.png").exists()
