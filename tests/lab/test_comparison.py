"""What is said of a run: intervals that cover, pairs that are pairs, tables that can be read."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.processes import Done, run_command

pytest.importorskip("typer", reason="ablations need the extra 'lab'")
pytest.importorskip("pyarrow", reason="ablations need the extra 'lab'")

from pyarrow import parquet as pq

from kvpolicy.lab.compare.bootstrap import paired_bootstrap
from kvpolicy.lab.compare.comparison import compare
from kvpolicy.lab.compare.frechet import FrechetTo, frechet_distance
from kvpolicy.lab.run.plan import Cell
from kvpolicy.lab.run.run_folder import CellRecord, CellStats
from kvpolicy.lab.run.subject import Metric
from kvpolicy.lab.show.tables import latex_table, markdown_table, results_parquet, summary_csv

HERE = Path(__file__).parents[1] / "support"
BITS = Metric(name="bits", label="bits per pixel", array="bits", items="item", about="of images")
ACCURACY = Metric(name="seen", label="accuracy", better="higher", array="seen")
SPEED = Metric(name="speed", label="speed", better="higher", timing=True)
TOKENS = Metric(name="tokens", label="tokens", better=None)


class FakeCell:
    """A finished cell without a folder."""

    def __init__(self, policy, budget, seed, arrays, parameters=None, **metrics):
        self.cell = Cell(
            subject="s", policy=policy, parameters=parameters or {}, budget=budget, seed=seed
        )
        stats = CellStats(
            budgets=(8,), peak_tokens=(9,), bytes=1000, overhead_bytes=10, evictions=(3,)
        )
        self.record = CellRecord(
            cell=self.cell,
            id=self.cell.id,
            parameters=parameters or {},
            metrics={name: float(value.mean()) for name, value in arrays.items()} | metrics,
            stats=stats,
            seconds=1.0,
        )
        self.arrays = arrays

    def scores(self):
        return self.arrays


def cells(*losses: float, seeds=(0, 1), n=100, noise=0.01):
    """A full cache, and policies p0, p1, … that lose so much on every item."""
    made = []
    for seed in seeds:
        base = np.random.default_rng(seed).normal(1, 0.5, n)
        own = np.random.default_rng([seed, 1])
        arrays = {"bits": base, "item": np.arange(n) + seed * n}
        made.append(FakeCell("full", None, seed, arrays, speed=1.0))
        for number, loss in enumerate(losses):
            bits = base + loss + own.normal(0, noise, n)
            arrays = {"bits": bits, "item": np.arange(n) + seed * n}
            made.append(FakeCell(f"p{number}", "1/4", seed, arrays, speed=2.0 + seed))
    return made


def test_seeds_are_pooled_and_differences_are_paired():
    run = cells(0.02)
    full, policy = compare(run, [BITS, SPEED])
    assert (full.label, full.budget, len(full.cells)) == ("full", None, 2)
    pooled = np.concatenate([c.arrays["bits"] for c in run if c.cell.policy == "p0"])
    finding = policy.findings["bits"]
    assert finding.estimate.value == pytest.approx(pooled.mean())
    # Between images the bits vary by 0.5; between pairs by 0.01.
    wide = finding.estimate.high - finding.estimate.low
    assert wide == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(200), rel=0.2)
    narrow = finding.difference.high - finding.difference.low
    assert narrow == pytest.approx(2 * 1.96 * 0.01 / math.sqrt(200), rel=0.2)
    assert finding.difference.low < 0.02 < finding.difference.high
    assert finding.clear
    assert full.findings["bits"].difference is None
    assert policy.findings["speed"].estimate.value == 2.5
    assert not policy.findings["speed"].clear


def test_intervals_are_those_of_the_paired_bootstrap():
    run = cells(0.02, seeds=(0,))
    difference = run[1].arrays["bits"] - run[0].arrays["bits"]
    mean, low, high = paired_bootstrap(difference)
    found = compare(run, [BITS])[1].findings["bits"].difference
    # There is one bootstrap: they agree to rounding, which two of them did not.
    assert (found.value, found.low, found.high) == pytest.approx((mean, low, high), rel=1e-9)


def test_noise_is_seldom_called_a_difference():
    """Under no difference, Holm's correction errs in one run of twenty at most, over all rows."""
    wrong = 0
    for trial in range(60):
        run = cells(*[0.0] * 8, seeds=(trial,), n=40)
        wrong += any(entry.findings["bits"].clear for entry in compare(run, [BITS]))
    assert wrong <= 8  # 3 expected; more than 8 in 60 has a chance below 1%


def test_an_item_that_two_seeds_have_measured_counts_once():
    once = cells(0.1, seeds=(0,))
    again = [FakeCell(c.cell.policy, c.cell.budget, 1, dict(c.arrays), speed=1.0) for c in once]
    twice = once + again
    one, two = compare(once, [BITS])[1], compare(twice, [BITS])[1]
    assert two.findings["bits"].estimate == one.findings["bits"].estimate
    assert two.findings["bits"].difference == one.findings["bits"].difference


def test_other_items_are_not_paired():
    run = cells(0.1, seeds=(0,))
    run[1].arrays["item"] = run[1].arrays["item"] + 1
    finding = compare(run, [BITS])[1].findings["bits"]
    assert finding.difference is None
    assert not finding.clear


def test_a_seed_that_full_lacks_is_left_out_of_the_pairs():
    run = cells(0.1)
    run = [c for c in run if (c.cell.policy, c.cell.seed) != ("full", 1)]
    finding = compare(run, [BITS])[1].findings["bits"]
    expected = run[1].arrays["bits"] - run[0].arrays["bits"]
    assert finding.difference.value == pytest.approx(expected.mean())


def test_one_item_has_no_interval():
    run = cells(0.1, seeds=(0,), n=1)
    finding = compare(run, [BITS])[1].findings["bits"]
    assert finding.estimate.low is None
    assert not finding.clear


def test_a_statistic_is_resampled_whole_and_centred():
    random = np.random.default_rng(0)
    frechet = FrechetTo(np.zeros(4), np.eye(4))
    metric = Metric(name="f", label="f", array="f", statistic=frechet)
    near, far = random.normal(0, 1, (200, 4)), random.normal(1, 1, (200, 4))
    full = FakeCell("full", None, 0, {"f": near})
    other = FakeCell("p", "1/4", 0, {"f": far})
    entries = compare([full, other], [metric])
    finding = entries[1].findings["f"]
    value = frechet_distance(np.zeros(4), np.eye(4), far.mean(0), np.cov(far, rowvar=False))
    assert finding.estimate.value == pytest.approx(value)
    assert finding.estimate.low < value < finding.estimate.high
    assert finding.clear


def test_frechet_to_refuses_what_it_can_not_compare():
    frechet = FrechetTo(np.zeros(4), np.eye(4))
    for wrong in (np.zeros((1, 4)), np.zeros((3, 5)), np.full((3, 4), np.nan)):
        with pytest.raises(ValueError, match="features"):
            frechet(wrong)


# --- Tables ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    made = cells(0.02, 0.0)
    nasty = {"a": "<b>&|_%$#\\"}
    arrays = {name: a + 0.5 if name == "bits" else a for name, a in made[0].arrays.items()}
    return [*made, FakeCell("=p_2", "1/8", 0, arrays, nasty, speed=1.0)]


METRICS = (BITS, SPEED, TOKENS)


def test_markdown_marks_what_is_not_noise(run):
    table = markdown_table(compare(run, METRICS), METRICS)
    rows = {row.split(" | ")[1]: row for row in table.splitlines()[2:6]}
    assert "†" in rows["p0"]
    assert "†" not in rows["p1"]
    assert "**" in rows["p1"]  # the better of two at this budget
    assert "+0.02" in rows["p0"]
    (nasty,) = (row for name, row in rows.items() if "=p" in name)
    assert "\\<b\\>&\\|\\_%$#\\\\" in nasty
    assert len({line.count(" | ") for line in table.splitlines()[:6]}) == 1


def test_latex_is_escaped_and_balanced(run):
    table = latex_table(compare(run, METRICS), METRICS)
    assert r"<b>\&|\_\%\$\#\textbackslash{}" in table
    assert table.count("{") == table.count("}")
    assert r"$^{\dagger}$" in table
    body = table.partition("\\toprule")[2].partition("\\bottomrule")[0]
    assert {line.count(" & ") for line in body.splitlines() if line.endswith("\\\\")} == {4}
    assert all(ord(letter) < 256 for letter in table)


def test_csv_says_everything_and_no_formula(run):
    rows = list(csv.DictReader(io.StringIO(summary_csv(compare(run, METRICS), METRICS))))
    assert [row["label"] for row in rows[:3]] == ["full", "p0", "p1"]
    assert rows[3]["policy"] == "'=p_2"
    assert float(rows[1]["bits_delta"]) == pytest.approx(0.02, abs=0.005)
    assert rows[1]["bits_clear"] == "1"
    assert rows[2]["bits_clear"] == "0"
    assert rows[0]["bits_delta"] == ""


def test_parquet_has_a_row_a_cell_and_documented_columns(run):
    table = pq.read_table(io.BytesIO(results_parquet(run, METRICS)))
    assert table.num_rows == len(run)
    assert all(field.metadata[b"about"] for field in table.schema)
    row = table.to_pylist()[1]
    assert row["bits"] == run[1].record.metrics["bits"]
    assert row["budget"] == "1/4"
    assert table.column("budget")[0].as_py() is None
    assert json.loads(table.to_pylist()[-1]["parameters"]) == {"a": "<b>&|_%$#\\"}


# --- The command -----------------------------------------------------------------------------


def command(*arguments: str, cwd: Path) -> Done:
    return run_command("ablate", *arguments, folder=cwd, columns=100)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_a_plan_from_a_file_gives_every_output(tmp_path):
    plan = """
        subject: toy_subject:Toy
        options: {items: 30}
        policies:
          - linear
          - name: h2o
            parameters: {recent: [0.25, 0.5]}
        budgets: [1/2, 1/8]
        seeds: [0, 1]
    """
    (tmp_path / "plan.yaml").write_text(plan)
    own = ("--own", "toy_subject:Toy")
    done = command(
        "--plan", "plan.yaml", *own, "--executor", "inline", "--out", "run", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "left out: linear at 1/8" in done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["begun"] + ["done"] * 12
    for name in ("table.md", "table.tex", "summary.csv", "results.parquet", "environment.json"):
        assert (tmp_path / "run" / name).stat().st_size > 100, name
    for name in ("quality-budget", "quality-bytes", "pareto", "images-1_2", "images-1_8"):
        assert (tmp_path / f"run/plots/{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "</svg>" in (tmp_path / f"run/plots/{name}.svg").read_text()
    assert pq.read_table(tmp_path / "run" / "results.parquet").num_rows == 12
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"python", "torch", "kvpolicy", "numpy"} <= environment["versions"].keys()
    # The same folder with another plan is refused, and the difference shown.
    (tmp_path / "plan.yaml").write_text(plan.replace("[0, 1]", "[0, 2]"))
    own = ("--own", "toy_subject:Toy")
    done = command(
        "--plan", "plan.yaml", *own, "--executor", "inline", "--out", "run", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "another plan" in done.stderr
    assert "-    1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("toy")
def test_options_make_the_same_plan_and_a_dry_run_writes_nothing(tmp_path):
    done = command(
        *("--subject", "toy_subject:Toy", "--policies", "linear,h2o", "--budgets", "1/2,1/4"),
        *("--seeds", "0,1", "--set", "h2o.recent=0.25,0.5", "--out", "run", "--dry-run"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "14 cells, 14 to be measured" in done.stdout
    assert "h2o(recent=0.25)" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policies", "linear"), "--subject is missing"),
        (("--subject", "toy_subject:Toy"), "--policies is missing"),
        (("--plan", "a.yaml", "--seeds", "1"), "does not go together with --seeds"),
        (("--subject", "s", "--policies", "h2o", "--set", "h2.recent=1"), "did you mean 'h2o'"),
        (("--subject", "s", "--policies", "h2o", "--set", "recent=1"), "is not like linear."),
        (("--subject", "s", "--policies", "h2o", "--seeds", "one"), "not a whole number"),
        (("--subject", "fashion", "--policies", "h2o"), "did you mean 'fashion-ar'"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    """In this process: what is wrong is found before anything heavy is loaded."""
    from kvpolicy.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["kvpolicy", "ablate", *arguments, "--out", "run"])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("toy")
def test_failures_are_listed_with_where_their_traceback_is(tmp_path):
    done = command(
        *("--subject", "toy_subject:Toy", "--policies", "h2o", "--budgets", "1/2"),
        *("--option", "broken=h2o", "--option", "mark=m", "--executor", "inline", "--out", "run"),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "failed: h2o: ParameterError: this cell is broken" in done.stderr
    (failure,) = (tmp_path / "run" / "failures").iterdir()
    assert failure.name in done.stderr
    assert "wrote" in done.stderr
