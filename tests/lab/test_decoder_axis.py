"""A decoder is an axis of an ablation, like a budget; what can't draw with one is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("typer", reason="the lab needs its extra")

from typer.testing import CliRunner

from kvpolicy.cli import app
from kvpolicy.errors import ParameterError
from kvpolicy.lab.compare.comparison import compare
from kvpolicy.lab.run import outputs
from kvpolicy.lab.run.outputs import image_sheets
from kvpolicy.lab.run.plan import Cell, Plan
from kvpolicy.lab.run.runner import prepare, run
from kvpolicy.lab.run.subject import Metric

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


@pytest.mark.parametrize(
    ("decoders", "says"), [(["sequential"], True), (["sequential", "sjd:window=8"], False)]
)
def test_a_sheet_promises_the_same_images_down_a_column_of_one_decoder_only(
    tmp_path, decoders, says
):
    prepared = prepare(plan(decoders=decoders))
    folder = run(prepared, tmp_path / "run")
    passes = Metric(name="bits", label="bits", array="bits")
    entries = compare(list(folder.finished()), prepared.metrics)
    (sheet,) = image_sheets(entries, folder.subject.class_names, passes).values()
    words = [text.get_text() for text in sheet.texts]
    (title,) = (text for text in words if text.startswith("Drawn"))
    assert title.startswith("Drawn at a budget of 1/4 (top: full cache)")
    assert title.endswith("same seed down each column") is says


def test_a_large_difference_is_remarked_without_decimals(tmp_path):
    folder = run(prepare(plan(decoders=["sequential"])), tmp_path / "run")
    entries = compare(list(folder.finished()), prepare(plan(decoders=["sequential"])).metrics)
    other = next(entry for entry in entries if not entry.is_full)
    shown = {}
    for value in (-736.0, 0.0125):
        finding = other.findings["bits"]
        difference = replace(finding.difference, value=value)
        told = replace(other, findings={"bits": replace(finding, difference=difference)})
        shown[value] = outputs._remark(told, Metric(name="bits", label="bits", array="bits"))
    assert shown == {-736.0: "-736 bits", 0.0125: "+0.013 bits"}


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
