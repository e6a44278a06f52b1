"""kvpolicy bench --decoders: images in turn, and how many times as fast as one by one."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

pytest.importorskip("typer", reason="the bench needs the extra 'lab'")

from support.toy_subject import Drawing as Toy
from typer.testing import CliRunner

from kvpolicy import LayoutError, Sequential
from kvpolicy.cli import app
from kvpolicy.errors import BudgetError, ParameterError, UnknownNameError
from kvpolicy.lab.bench.drawing import Drawing, drawers, images_of_turn
from kvpolicy.lab.run.subject import load_subject

NAME = f"{__name__}:Clock"


class Clock(Toy):
    """Takes a second a pass, two under the full cache; speculation twice that in odd rounds."""

    asked: ClassVar[list] = []

    def __init__(self, batch: int = 250) -> None:
        super().__init__()
        self.batch = batch

    def score(self, setting, images, advance, *, first=0): ...

    def reference(self): ...

    def generate(self, setting, images, seed, advance):
        self.asked.append((setting.decoder.label, images, seed))
        plain = isinstance(setting.decoder, Sequential)
        passes = 256 if plain else 256 // setting.decoder.window
        slow = 2 if seed // 1000 % 2 and not plain else 1
        seconds = images * passes * slow * (2 if setting.budget is None else 1)
        return SimpleNamespace(seconds=seconds, passes=np.full(images, passes))


class InGroups(Clock):
    """The same in groups, which come when the decoder says."""

    def layout_under(self, decoder):
        return self.layout if isinstance(decoder, Sequential) else decoder.ordered(self.layout)

    def generate(self, setting, images, seed, advance):
        self.asked.append((setting.policy.label, setting.decoder.label))
        passes = getattr(setting.decoder, "passes", 256)
        return SimpleNamespace(seconds=images * passes, passes=np.full(images, passes))


@pytest.fixture(autouse=True)
def _nothing_asked():
    Clock.asked.clear()


def subject(batch=1):
    return load_subject(NAME, {"batch": batch})


def test_ratios_are_to_the_same_policys_sequential_decoding_in_the_same_rounds():
    toy = subject()
    who = drawers(toy, NAME, ["linear", "full"], ["sjd:window=8", "sjd:window=4"], "1/4")
    assert [(one.name, one.setting.budget) for one in who] == [
        ("linear", "1/4"),
        ("linear@sjd:window=8", "1/4"),
        ("linear@sjd:window=4", "1/4"),
        ("full", None),
        ("full@sjd:window=8", None),
        ("full@sjd:window=4", None),
    ]
    told = []
    job = Drawing(toy, who, 1, 7, told.append)
    job.run(3, None)
    assert len(told) == 4 * 6
    found = {one.name: one for one in job.summary()}
    assert found["linear"].faster.value == 1
    eight = found["full@sjd:window=8"]
    assert (eight.passes, eight.seconds) == (32, 64)
    assert (eight.faster.value, eight.faster.low, eight.faster.high) == (8, 4, 8)
    # A batch to warm up, then three rounds of ten images, in each of which another one begins.
    assert [images for _, images, _ in Clock.asked] == [1] * 6 + [10] * 18
    firsts = [Clock.asked[6 * number][0] for number in (1, 2, 3)]
    assert firsts == ["sequential", "sjd:window=8", "sjd:window=4"]


def test_turns_are_of_whole_batches():
    assert [images_of_turn(batch) for batch in (1, 4, 8, 10, 25)] == [10, 12, 16, 10, 25]


def test_an_interrupted_round_does_not_count():
    toy = subject()
    who = drawers(toy, NAME, ["linear"], ["sjd:window=8"], "1/4")

    def interrupt(count):
        if len(Clock.asked) == 2 + 4:  # in the last turn of the second round
            raise KeyboardInterrupt

    job = Drawing(toy, who, 1, 0, interrupt)
    job.run(3, None)
    assert (job.finished, job.interrupted, len(job.turns)) == (1, True, 2)
    assert job.summary()[1].faster.value == 8


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"policies": []}, ParameterError, "name at least one policy"),
        ({"policies": ["linar"]}, UnknownNameError, "did you mean 'linear'"),
        ({"decoders": ["sjdd"]}, UnknownNameError, "did you mean 'sjd'"),
        ({"decoders": ["sjd:window=300"]}, ParameterError, "longer than the 257 tokens"),
        ({"decoders": ["lpd"]}, LayoutError, "--subject fashion-lpd --policies ahead"),
        ({"budget": "1/50"}, BudgetError, "smallest budget that works"),
    ],
)
def test_what_can_not_draw_is_refused(given, error, says):
    given = {"policies": ["linear"], "decoders": ["sjd"], "budget": "1/4"} | given
    with pytest.raises(error, match=says):
        drawers(subject(), NAME, **given)


def test_groups_are_drawn_in_their_own_order():
    name = f"{__name__}:InGroups"
    toy = load_subject(name, {"batch": 1})
    (_, groups) = drawers(toy, name, ["near"], ["lpd:passes=16"], "1/4")
    assert groups.name == "near@lpd:passes=16"
    with pytest.raises(LayoutError, match=r"'linear'.*near"):  # whose lines groups have not
        drawers(toy, name, ["linear"], ["lpd:passes=16"], "1/4")
    with pytest.raises(BudgetError, match="up to 79 tokens come at once"):
        drawers(toy, name, ["near"], ["lpd:passes=5"], "1/4")


def test_a_subject_that_draws_nothing_is_refused():
    toy = load_subject("support.toy_subject:Toy")
    with pytest.raises(ParameterError, match=r"'toy' does not draw images.*try fashion-ar"):
        drawers(toy, "toy", ["linear"], ["sjd"], "1/4")


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})


def test_from_the_command_line(tmp_path):
    out = tmp_path / "out"
    done = run(
        *("--decoders", "sjd:window=8", "--subject", NAME, "--budget", "1/4"),
        *("--rounds", "1", "--out", str(out)),
    )
    assert done.exit_code == 0, done.output
    written = json.loads((out / "results.json").read_text())
    assert [one["name"] for one in written["drawn"]] == ["linear", "linear@sjd:window=8"]
    assert written["drawn"][1]["faster"] == {"value": 8.0, "low": 8.0, "high": 8.0}
    assert written["batch"] == 1
    assert (
        "| linear@sjd:window=8 | 32 | 32.000 | 0.03 | 8.00 [8.00, 8.00] |"
        in (out / "tables.md").read_text()
    )
    assert "8.00 [8.00, 8.00]" in done.output


def test_groups_are_drawn_under_ahead_unless_told_otherwise(tmp_path):
    where = ("--subject", f"{__name__}:InGroups", "--rounds", "1", "--out", str(tmp_path / "out"))
    done = run("--decoders", "lpd:passes=16", *where)
    assert done.exit_code == 0, (done.output, done.exception)
    assert set(Clock.asked) == {("ahead", "sequential"), ("ahead", "lpd:passes=16")}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--decoders", "sjd", "--layers", "1"], "--layers is for steps"),
        (["--decoders", "sjd", "--largest-batch", "1"], "--largest-batch is for steps"),
        (["--subject", "fashion-ar"], "give --decoders, too"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, says, tmp_path):
    done = run(*arguments, "--out", str(tmp_path / "out"))
    assert done.exit_code != 0
    assert says in str(done.exception) + " ".join(done.output.split())
    assert not (tmp_path / "out").exists()
