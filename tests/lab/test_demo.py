"""The main job, as a newcomer runs it, and what it has to show."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.processes import Done, run_command

import kvpolicy

pytest.importorskip("typer", reason="the demo needs the extra 'lab'")

from support.toy_subject import Drawing
from typer.testing import CliRunner

from kvpolicy.cli import app
from kvpolicy.lab.compare.bootstrap import paired_bootstrap
from kvpolicy.lab.compare.comparison import Entry, Estimate, Finding
from kvpolicy.lab.run import demo, executors
from kvpolicy.lab.run.run_folder import open_run
from kvpolicy.lab.run.subject import Metric, Setting, load_subject

KEYS = {
    "policy",
    "budget",
    "peak_tokens",
    "cache_bytes",
    "bits_per_pixel",
    "delta_bits",
    "delta_low",
    "delta_high",
    "frechet",
    "class_accuracy",
    "images_per_second",
}


def command(*arguments: str, cwd: Path, **how) -> Done:
    return run_command(*arguments, folder=cwd, **how)


def test_list_prints_the_registry(tmp_path):
    done = command("list", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in kvpolicy.available():
        assert name in done.stdout
    assert "anchors" in done.stdout
    assert "2512.04857" in done.stdout
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line[1:2].isalpha()}
    assert "as its parts" in lines["compose"]
    assert " mass " in lines["h2o"]
    assert " none " in lines["knorm"]


def test_the_version_is_that_of_the_package(tmp_path):
    done = command("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"kvpolicy {version('kvpolicy')}\n"), done.stderr


def test_help_everywhere(tmp_path):
    for arguments in (("--help",), ("demo", "--help"), ("list", "--help")):
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 0
        assert "Usage" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--policies", "linar"), "did you mean 'linear'"),
        (("--budget", "1/50"), "the smallest budget that works is"),
        (("--budget", "a sixth"), "budget='a sixth' is not a budget"),
    ],
)
def test_wrong_requests_fail_before_any_work_in_one_line(tmp_path, arguments, said):
    done = command("demo", *arguments, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_small_demo_writes_what_it_says(tmp_path):
    done = command(
        *("demo", "--images", "10", "--scored", "8", "--policies", "linear", "--out", "out"),
        cwd=tmp_path,
        offline=True,
    )
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["policy"] for row in rows] == ["full", "linear"]
    full, linear = rows
    assert full.keys() == linear.keys() == KEYS
    assert linear["budget"] == "1/6"
    assert linear["peak_tokens"] == 1 + 130
    assert full["delta_bits"] == 0
    assert linear["delta_low"] <= linear["delta_bits"] <= linear["delta_high"]
    cells = {cell.cell.policy: cell for cell in open_run(tmp_path / "out").finished()}
    pairs = cells["linear"].scores()["bits"] - cells["full"].scores()["bits"]
    given = tuple(linear[f"delta_{part}"] for part in ("bits", "low", "high"))
    assert given == pytest.approx(paired_bootstrap(pairs), rel=1e-9)  # the one bootstrap
    assert linear["delta_bits"] == pytest.approx(linear["bits_per_pixel"] - full["bits_per_pixel"])
    assert linear["cache_bytes"] / full["cache_bytes"] == pytest.approx(131 / 785)
    assert all(math.isfinite(row[key]) for row in rows for key in KEYS - {"policy", "budget"})
    for name in ("images.png", "retention.png"):
        header = (tmp_path / "out" / name).read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", header[16:])
        assert width > 800
        assert height > 300
    for shown in ("linear", f"{linear['bits_per_pixel']:.4f}", f"{full['bits_per_pixel']:.4f}"):
        assert shown in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80

    # It is a run: what is there is not measured again, and the figures are the same. In a terminal
    # that does not have all our letters, too.
    kept = [cell.folder / "cell.json" for cell in cells.values()]
    inodes = [file.stat().st_ino for file in kept]
    for name in ("images.png", "retention.png"):
        (tmp_path / "out" / name).unlink()
    done = command(
        *("demo", "--images", "10", "--scored", "8", "--policies", "linear", "--out", "out"),
        cwd=tmp_path,
        encoding="ascii",
    )
    assert done.returncode == 0, done.stderr
    assert "Fr?chet" in done.stdout
    assert (tmp_path / "out" / "images.png").exists()
    assert (tmp_path / "out" / "retention.png").exists()
    assert json.loads((tmp_path / "out/results.json").read_text()) == rows
    assert [file.stat().st_ino for file in kept] == inodes


def test_without_the_full_cache_no_difference_is_made_up():
    made = demo.plan(["linear"], "1/6", images=10, scored=8, seed=0)
    names = ("peak_tokens", "cache_bytes", "bits_per_pixel", "frechet", "class_accuracy")
    figures = {name: Finding(Estimate(1.0)) for name in (*names, "images_per_second")}
    found = {cell.policy: SimpleNamespace(cell=cell) for cell in made.cells()}
    entries = [Entry(n, c.cell.budget, (c,), figures) for n, c in found.items()]
    full, linear = demo.rows(entries)
    assert (full.delta_bits, full.delta_low, full.delta_high) == (0, 0, 0)
    assert (linear.delta_bits, linear.delta_low, linear.delta_high) == (None, None, None)


def test_a_demo_of_another_subject_measures_that_ones_figures(tmp_path):
    made = demo.plan(
        ["linear"], "1/6", images=20, scored=8, seed=2, subject="clipart-ar", options={"cfg": 1.5}
    )
    assert made.options == {"images": 20, "scored": 8, "draw_seed": 2, "cfg": 1.5}
    assert set(made.metrics) >= {"bits_per_code", "divergence", "peak_tokens"}
    assert not {"frechet", "class_accuracy"} & set(made.metrics)
    figures = {name: Finding(Estimate(1.0)) for name in made.metrics}
    figures["bits_per_code"] = Finding(Estimate(2.0), Estimate(0.5, 0.4, 0.6))
    cell = SimpleNamespace(cell=made.cells()[1])
    rows = demo.rows([Entry("linear", "1/6", (cell,), figures)], "clipart-ar")
    demo.write_rows(rows, tmp_path / "results.json")
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row.keys() == KEYS - {"bits_per_pixel", "frechet", "class_accuracy"} | {
        "bits_per_code",
        "divergence",
    }
    assert (row["bits_per_code"], row["delta_bits"], row["divergence"]) == (2.0, 0.5, 1.0)
    drawn = demo.decoder_plan(["sjd"], "1/6", images=100, seed=0, subject="clipart-ar")
    assert drawn.metrics == ("passes", "images_per_second", "divergence")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("--subject", "clipart"),
            "the demo knows no subject 'clipart'; did you mean 'clipart-ar'",
        ),
        (("--option", "images=3"), "the demo has its own --images"),
        (("--option", "batsch=3", "--policies", "linear"), "no option 'batsch'; did you mean"),
    ],
)
def test_a_subject_that_the_demo_can_not_show_is_refused(tmp_path, arguments, says):
    done = CliRunner().invoke(app, ["demo", *arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code != 0
    assert says in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_the_demo_is_a_plan_in_which_a_seed_draws_other_images():
    made = demo.plan(demo.POLICIES, "1/6", images=200, scored=256, seed=0)
    assert [cell.policy for cell in made.cells()] == list(demo.POLICIES)
    assert {"linear", "linear2d"} < set(demo.POLICIES)
    assert made.trace
    other = demo.plan(["linear"], "1/6", images=200, scored=256, seed=3)
    assert other.options == {"images": 200, "scored": 256, "draw_seed": 3}
    assert other.seeds == (0,)  # the same real images


def test_decoders_are_compared_one_image_at_a_time():
    made = demo.decoder_plan(["sequential", "sjd:window=8"], "1/4", images=10, seed=2)
    labels = [(cell.label, cell.budget) for cell in made.cells()]
    assert labels == [("full", None), ("linear", "1/4"), ("linear@sjd:window=8", "1/4")]
    assert made.options == {"images": 10, "batch": 1, "draw_seed": 2}
    assert "frechet" not in made.metrics
    assert "frechet" in demo.decoder_plan(["sjd"], "1/4", images=100, seed=0).metrics


def test_decoders_are_as_fast_as_the_full_cache_is_slow():
    made = demo.decoder_plan(["sequential", "sjd:window=8"], "1/4", images=10, seed=0)

    def entry(cell, passes, speed):
        figures = {"passes": passes, "images_per_second": speed, "class_accuracy": 0.5}
        found = {name: Finding(Estimate(value)) for name, value in figures.items()}
        return Entry(cell.label, cell.budget, (SimpleNamespace(cell=cell),), found)

    figures = ((784, 0.5), (784, 0.4), (80, 2.0))
    entries = [entry(c, *f) for c, f in zip(made.cells(), figures, strict=True)]
    rows = demo.decoder_rows(entries)
    assert [row.drawn_by for row in rows] == ["full", "linear", "linear@sjd:window=8"]
    assert [
        (row.passes, row.seconds, row.times_as_fast, row.figures["frechet"]) for row in rows
    ] == [
        (784, 2.0, 1.0, None),
        (784, 2.5, 0.8, None),
        (80, 0.5, 4.0, None),
    ]
    assert [row.times_as_fast for row in demo.decoder_rows(entries[1:])] == [None, None]
    # Another model's rows are as fast as fashion-ar's full cache, and not their own, is slow.
    others = demo.decoder_rows(entries, baseline=rows[:1])
    assert [row.times_as_fast for row in others] == [1.0, 0.8, 4.0]
    assert {row.times_as_fast for row in demo.decoder_rows(entries, baseline=rows[1:])} == {None}


def test_decoders_of_groups_draw_with_fashion_lpd():
    assert demo.by_line_or_group(["lpd:passes=48", "sequential", "lpd"]) == (
        ["sequential"],
        ["lpd:passes=48", "lpd"],
    )
    made = demo.group_plan(["lpd:passes=48", "lpd:passes=32"], "1/4", images=10, seed=2)
    assert made.subject == "fashion-lpd"
    assert [(cell.label, cell.budget) for cell in made.cells()] == [
        ("full", None),
        ("full@lpd:passes=48", None),
        ("full@lpd:passes=32", None),
        ("ahead@lpd:passes=48", "1/4"),
        ("ahead@lpd:passes=32", "1/4"),
    ]
    options = {"images": 10, "batch": 1, "cfg": 1.5, "temperature": 1.0, "draw_seed": 2}
    assert made.options == options


class Drawn(Drawing):
    """Draws nothing, a little faster by speculation, and says what fashion-ar would."""

    def __init__(self, **options):
        super().__init__()
        self.metrics = tuple(
            Metric(name=name, label=name, array="bits" if name == "passes" else None)
            for name in ("bits_per_pixel", "class_accuracy", "passes", "images_per_second")
        )

    def measure(self, setting, seed, wanted):
        measured = super().measure(setting, seed, wanted)
        speed = 1.0 if isinstance(setting.decoder, kvpolicy.Sequential) else 4.0
        measured.arrays["bits"][:] = 784 / speed
        figures = {"class_accuracy": 0.5, "images_per_second": speed}
        return replace(measured, figures=figures)


class InGroups(Drawn):
    """Draws nothing, in groups."""

    def layout_under(self, decoder):
        plain = isinstance(decoder, kvpolicy.Sequential)
        return self.layout if plain else decoder.ordered(self.layout)


def run(monkeypatch, *arguments, **plan):
    """The demo's decoders in this process, of plans that are changed: by default, on toys."""

    def change(name, update):
        whole = getattr(demo, name)
        monkeypatch.setattr(demo, name, lambda *a, **k: whole(*a, **k).model_copy(update=update))

    change("decoder_plan", plan or {"subject": f"{__name__}:Drawn"})
    change("group_plan", {"subject": f"{__name__}:InGroups"})
    monkeypatch.setattr(executors, "Processes", lambda workers: executors.Inline())
    return CliRunner().invoke(app, ["demo", *arguments], env={"COLUMNS": "80"})


def test_decoders_are_compared_in_a_folder_of_their_own(tmp_path, monkeypatch):
    out = tmp_path / "out"
    done = run(
        monkeypatch, "--decoders", "sequential,sjd:window=8", "--budget", "1/4", "--out", str(out)
    )
    assert done.exit_code == 0, (done.output, done.exception)
    rows = json.loads((out / "decoders" / "decoders.json").read_text())
    assert [(row["drawn_by"], row["budget"], row["passes"]) for row in rows] == [
        ("full", "1/1", 784),
        ("linear", "1/4", 784),
        ("linear@sjd:window=8", "1/4", 196),
    ]
    assert rows[2]["times_as_fast"] == 4
    assert (out / "decoders" / "images.png").exists()
    assert not (out / "results.json").exists()
    (row,) = [line for line in done.output.splitlines() if line.startswith("linear@sjd")]
    assert row.split() == ["linear@sjd:window=8", "196", "0.25", "4.00", "50%", "-"]
    assert max(map(len, done.output.splitlines())) <= 80


def test_groups_are_as_fast_as_fashion_ars_full_cache_is_slow(tmp_path, monkeypatch):
    done = run(
        monkeypatch, "--decoders", "lpd:passes=40", "--budget", "1/2", "--out", str(tmp_path)
    )
    assert done.exit_code == 0, (done.output, done.exception)
    by_line, by_group = (
        [(row["drawn_by"], row["times_as_fast"]) for row in json.loads(file.read_text())]
        for file in (tmp_path / "decoders/decoders.json", tmp_path / "groups/decoders.json")
    )
    assert by_line == [("full", 1), ("linear", 1)]
    assert by_group == [("full", 1), ("full@lpd:passes=40", 4), ("ahead@lpd:passes=40", 4)]
    assert (tmp_path / "groups/images.png").exists()
    assert "fashion-lpd: 10 images" in " ".join(done.output.split())
    assert max(map(len, done.output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--decoders", "sjdd"), "did you mean 'sjd'"),
        (("--decoders", ""), "name one at least"),
        (("--decoders", "lpd:passes=2", "--budget", "1/4"), "up to 255 tokens come at once"),
        (("--decoders", "sjd", "--policies", "linear"), "give one of them"),
        (("--decoders", "lpd", "--subject", "clipart-ar"), "leave --subject out"),
    ],
)
def test_wrong_decoders_are_refused_before_any_work(tmp_path, monkeypatch, arguments, says):
    done = run(monkeypatch, *arguments, "--out", str(tmp_path / "out"))
    assert done.exit_code != 0
    assert re.search(says, str(done.exception))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_demo_of_decoders_writes_what_it_says(tmp_path, monkeypatch):
    together = {"images": 10, "batch": 10, "draw_seed": 0}  # one by one takes ten times as long
    out = str(tmp_path / "out")
    done = run(monkeypatch, "--decoders", "sjd:window=32", "--out", out, options=together)
    assert done.exit_code == 0, (done.output, done.exception)
    rows = json.loads((tmp_path / "out/decoders/decoders.json").read_text())
    assert [row["drawn_by"] for row in rows] == ["full", "linear@sjd:window=32"]
    assert rows[0]["passes"] == 784
    assert rows[1]["passes"] < 784 / 3  # of ten together, each pass begins behind the slowest
    assert (tmp_path / "out/decoders/images.png").exists()
    assert not (tmp_path / "out/results.json").exists()
    assert max(map(len, done.output.splitlines())) <= 80


@pytest.mark.slow
def test_linear_at_a_sixth_loses_little_and_beats_the_others():
    """What the README says of them, on the first 32 of the demo's real test images."""
    subject = load_subject("fashion-ar")

    def bits(name: str) -> np.ndarray:
        budget = None if name == "full" else "1/6"
        scored = subject.score(Setting(kvpolicy.create(name), budget), 32, lambda count: None)
        if name != "full":
            assert scored.stats.peak_tokens == (131,) * subject.num_layers
        return scored.bits

    full, linear = bits("full"), bits("linear")
    assert paired_bootstrap(linear - full)[0] <= 0.045
    for other in ("h2o", "random", "streaming_llm"):
        difference, low, high = paired_bootstrap(bits(other) - linear)
        assert difference > 0, (other, difference, low, high)
