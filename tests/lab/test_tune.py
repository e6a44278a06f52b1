"""kvpolicy tune: bounds from fields and budget, resuming, and unseen items as judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.processes import run_command

pytest.importorskip("typer", reason="tune needs the extra 'lab'")
pytest.importorskip("optuna", reason="tune needs the extra 'tune'")

from kvpolicy.errors import BudgetError, ParameterError
from kvpolicy.lab.run.subject import Subject, load_subject
from kvpolicy.lab.search.search_space import Choice, Range, search_space
from kvpolicy.lab.search.tune import tune

HERE = Path(__file__).parents[1] / "support"


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def toy(**options) -> Subject:
    return load_subject("toy_subject:Toy", options)


def search(
    folder: Path,
    policy="linear",
    trials=6,
    budget="3/4",
    unseen=(1, 2),
    subject="toy_subject:Toy",
    decoder="sequential",
    metric=None,
    **options,
):
    tried = []
    found = tune(
        folder,
        subject,
        options,
        policy,
        budget,
        trials=trials,
        unseen=unseen,
        threads=1,
        tell_space=lambda space: None,
        tell=tried.append,
        decoder=decoder,
        metric=metric,
    )
    return found, tried


def test_bounds_come_from_fields_and_budget():
    space = search_space("linear", "3/4", toy())  # 192 tokens, lines of 16
    assert space["anchors"] == Range(low=0, high=192 - 16, whole=True)
    assert space["recent_lines"] == Range(low=0, high=192 // 16 - 1, whole=True)
    assert search_space("h2o", "1/4", toy())["recent"] == Range(low=0, high=1, whole=False)
    space = search_space("pyramid", "1/4", toy())
    assert space["kernel"].high % 2 == 1
    assert space["window"].high > 8
    assert space["beta"].log


def test_what_is_searched_of_a_decoder_is_what_it_is_not_spelled_with():
    space = search_space("linear", "3/4", toy(), "sjd")
    assert space["window"] == Range(low=2, high=2 + 192, whole=True, log=True)
    assert space["draft"] == Choice(values=("above", "left", "last", "uniform"))
    assert space["coupled"] == Choice(values=(False, True))
    space = search_space("linear", "1/1", toy(), "sjd:draft=left:coupled=true")
    assert space == {"window": Range(low=2, high=257, whole=True, log=True)}  # all of the layout


def test_the_best_window_is_found_under_the_policy_as_it_is(tmp_path):
    drawing = {"subject": "toy_subject:Drawing", "metric": "bits", "longest": 90}
    drawing |= {"decoder": "sjd:draft=left:coupled=true", "trials": 20}
    found, tried = search(tmp_path / "run", **drawing)
    assert tried[0].parameters == {"window": 32}
    assert abs(found.parameters["window"] - 90) < 15
    assert found.gain[2] < 0
    files = (tmp_path / "run" / "cells").glob("*/cell.json")
    cells = [json.loads(file.read_text())["cell"] for file in files]
    assert len(cells) > 10
    assert {cell["decoder"] for cell in cells if cell["policy"] == "full"} == {"sequential"}
    assert {tuple(cell["parameters"]) for cell in cells} == {()}
    spelled = [cell["decoder"] for cell in cells if cell["policy"] == "linear"]
    assert all(decoder.endswith(":draft=left:coupled=true") for decoder in spelled)
    _, again = search(tmp_path / "run", **drawing)
    assert not any(try_.fresh for try_ in again)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"decoder": "sjd"}, ParameterError, "does not draw with decoders"),
        (
            {"decoder": "sjd", "subject": "toy_subject:Drawing"},
            ParameterError,
            "no metric 'passes'",
        ),
        (
            {"decoder": "sjd:window=300", "subject": "toy_subject:Drawing", "metric": "bits"},
            ParameterError,
            "longer than the 257 tokens",
        ),
        (
            {
                "decoder": "sjd:window=8:draft=left:coupled=true",
                "subject": "toy_subject:Drawing",
                "metric": "bits",
            },
            ParameterError,
            "no parameter that could be searched",
        ),
        ({"metric": "cache_bytes"}, ParameterError, "can't become better; take one of .*'bits'"),
        ({"policy": "random"}, ParameterError, "no parameter that could be searched"),
        ({"policy": "full"}, ParameterError, "a policy that evicts"),
        ({"budget": "1/50"}, BudgetError, "smallest budget that works"),
        ({"unseen": (0,)}, ParameterError, "unseen seeds"),
    ],
)
def test_what_can_not_be_searched_is_refused(tmp_path, arguments, error, said):
    with pytest.raises(error, match=said):
        search(tmp_path / "run", **arguments)


def test_the_best_is_found_and_judged_on_unseen_items(tmp_path):
    """The toy's ``optimum`` makes 40 anchors the best."""
    found, tried = search(tmp_path / "run", trials=30, optimum=40)
    assert len(tried) == 30
    assert tried[0].parameters == {"anchors": 16, "recent_lines": 1}  # a line of the toy's
    assert abs(found.parameters["anchors"] - 40) < 8
    assert found.searched == min(t.value for t in tried)
    assert found.items == 40
    value, low, high = found.gain
    assert low <= value <= high < 0
    assert found.best.difference.value < found.default.difference.value
    written = json.loads((tmp_path / "run" / "best.json").read_text())
    assert written["parameters"] == found.parameters
    assert written["gain_over_default"]["high"] == high


def test_an_interrupted_search_ends_where_an_undisturbed_one_does(tmp_path):
    diary = tmp_path / "diary"
    _, calm = search(tmp_path / "calm", trials=12, optimum=40)
    search(tmp_path / "run", trials=5, optimum=40, diary="")
    with pytest.raises(ParameterError, match="another plan"):
        search(tmp_path / "run", trials=5, optimum=41, diary="")
    _, tried = search(tmp_path / "run", trials=12, optimum=40, diary="")
    assert [t.parameters for t in tried] == [t.parameters for t in calm]
    assert [t.value for t in tried] == [t.value for t in calm]
    assert [t.fresh for t in tried] == [False] * 5 + [True] * 7
    assert not diary.exists()


def test_items_that_the_search_has_seen_are_no_judges(tmp_path):
    with pytest.raises(ParameterError, match="items that the search has seen"):
        search(tmp_path / "run", trials=1, repeat=True)


def test_a_setting_that_raises_says_so(tmp_path):
    with pytest.raises(ParameterError, match=r"this cell is broken.*failures"):
        search(tmp_path / "run", trials=2, broken="linear", mark=str(tmp_path / "mark"))


def test_the_command_prints_the_best_with_its_interval(tmp_path):
    done = run_command(
        *("tune", "--subject", "toy_subject:Toy", "--policy", "linear", "--budget", "3/4"),
        *("--trials", "3", "--option", "optimum=40", "--out", "out"),
        folder=tmp_path,
        columns=100,
    )
    assert done.returncode == 0, done.stderr
    assert "anchors: whole numbers from 0 to 176" in done.stdout
    assert "best minus defaults" in done.stdout
    assert "on 40 unseen items" in done.stdout
