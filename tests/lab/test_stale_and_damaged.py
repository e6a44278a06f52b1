"""A figure stands only for the code, versions and files that it was measured with."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer", reason="ablations need the extra 'lab'")
pytest.importorskip("pyarrow", reason="ablations need the extra 'lab'")

from kvpolicy.decoding import DECODERS
from kvpolicy.errors import ParameterError
from kvpolicy.lab.run import provenance
from kvpolicy.lab.run.executors import Inline
from kvpolicy.lab.run.plan import Plan
from kvpolicy.lab.run.run_folder import open_run
from kvpolicy.lab.run.runner import prepare, run
from kvpolicy.lab.run.worker import _made
from kvpolicy.lab.search.tune import tune

HERE = Path(__file__).parents[1] / "support"
POLICY = """
import kvpolicy


class Mine(kvpolicy.ScoredPolicy):
    def score(self, view):
        return -view.age{}
"""


class Counter:
    """A watcher that counts what is measured."""

    def begun(self, waiting, finished):
        self.waiting, self.done_before = len(waiting), len(finished)
        self.reasons = getattr(self, "reasons", [])

    def damaged(self, item):
        self.reasons = [*getattr(self, "reasons", []), item.reason]

    def done(self, record): ...

    def failed(self, failure):
        raise AssertionError(failure.traceback)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """Modules of this test's own, and no digest from a test before."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    (tmp_path / "code").mkdir()
    forget()
    yield
    forget()


def forget():
    """As a new process would know nothing."""
    for cached in (provenance.versions, provenance._kvpolicy, provenance._package, _made):
        cached.cache_clear()
    for name in ("mine", "theirs"):
        sys.modules.pop(name, None)


def write(folder: Path, name: str, text: str) -> None:
    (folder / "code" / f"{name}.py").write_text(text)
    shutil.rmtree(folder / "code" / "__pycache__", ignore_errors=True)
    forget()


def sweep(folder: Path, stale="refuse", threads=1, **fields):
    wanted = Plan(
        **{"subject": "toy_subject:Toy", "policies": ["linear", "h2o"], "budgets": ["1/2"]} | fields
    )
    watcher = Counter()
    run(prepare(wanted), folder, Inline(), threads, watcher, stale)
    return watcher


def test_what_has_not_changed_is_not_measured_again(tmp_path):
    assert sweep(tmp_path / "run").waiting == 3
    again = sweep(tmp_path / "run")
    assert (again.waiting, again.done_before) == (0, 3)


def changed_policy(tmp_path, monkeypatch):
    write(tmp_path, "mine", POLICY.format(" * 2"))
    return "the code of the policy is another", {"policies": ["mine:Mine"]}, 1


DECODER = """
import kvpolicy


class Mine(kvpolicy.Sequential):
    pass{}
"""


def test_other_code_of_a_decoder_is_said(tmp_path, monkeypatch):
    def sweep_with_mine(stale="refuse"):
        kind = importlib.import_module("theirs").Mine
        monkeypatch.setitem(DECODERS._items, "mine", kind)
        monkeypatch.setattr(kind, "key", "mine")
        fields = {"policies": ["linear", "linear@mine"], "subject": "toy_subject:Drawing"}
        return sweep(tmp_path / "run", stale, **fields)

    write(tmp_path, "theirs", DECODER.format(""))
    assert sweep_with_mine().waiting == 3
    write(tmp_path, "theirs", DECODER.format("  # in a loop"))
    with pytest.raises(ParameterError, match="the code of the decoder is another"):
        sweep_with_mine()
    assert sweep_with_mine("anew").waiting == 1
    assert sweep_with_mine().waiting == 0


def changed_subject(tmp_path, monkeypatch):
    text = (HERE / "toy_subject.py").read_text()
    write(tmp_path, "theirs", text.replace("1 + noise", "2 + noise"))
    return "the code of the subject is another", {"subject": "theirs:Toy"}, 1


def changed_version(tmp_path, monkeypatch):
    found = dict(provenance.versions())
    monkeypatch.setattr(provenance, "versions", lambda: found | {"torch": "1.0"})
    return "torch was .*, is 1.0", {}, 1


def changed_kvpolicy(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_kvpolicy", lambda: "another")
    return "the code of kvpolicy is another", {}, 1


def changed_threads(tmp_path, monkeypatch):
    return "threads were 1, are 2", {}, 2


@pytest.mark.parametrize(
    "change",
    [changed_policy, changed_subject, changed_version, changed_kvpolicy, changed_threads],
    ids=lambda change: change.__name__,
)
def test_other_code_versions_or_threads_are_said_and_measured_anew_or_kept(
    tmp_path, monkeypatch, change
):
    write(tmp_path, "mine", POLICY.format(""))
    write(tmp_path, "theirs", (HERE / "toy_subject.py").read_text())
    fields = {"changed_policy": {"policies": ["mine:Mine"]}}.get(change.__name__, {})
    fields |= {"changed_subject": {"subject": "theirs:Toy"}}.get(change.__name__, {})
    folder = tmp_path / "run"
    count = sweep(folder, **fields).waiting
    with monkeypatch.context() as patch:
        said, fields, threads = change(tmp_path, patch)
        with pytest.raises(ParameterError, match=f"(?s){said}.*--stale.*--keep-stale"):
            sweep(folder, threads=threads, **fields)
        before = {cell.record.id: cell.record for cell in open_run(folder).finished()}
        assert sweep(folder, "keep", threads=threads, **fields).waiting == 0
        stale = 1 if change is changed_policy else count  # the full cache is not theirs
        assert sweep(folder, "anew", threads=threads, **fields).waiting == stale
        assert sweep(folder, threads=threads, **fields).waiting == 0
        after = {cell.record.id: cell.record for cell in open_run(folder).finished()}
    assert sum(before[name].made_by != after[name].made_by for name in before) == stale
    if change is changed_subject:  # and it is the new code that was measured
        assert all(after[n].metrics["bits"] > before[n].metrics["bits"] + 0.9 for n in before)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["cell.json", "scores.safetensors", "images.safetensors"])
@pytest.mark.parametrize("harm", [Path.unlink, cut, turn_a_bit])
def test_a_lost_or_damaged_file_is_named_and_its_cell_measured_again(tmp_path, name, harm):
    folder = tmp_path / "run"
    sweep(folder)
    cells = list(open_run(folder).finished())
    wanted = {name: array.tobytes() for name, array in cells[1].scores().items()}
    inodes = {cell.record.id: cell.folder.stat().st_ino for cell in cells}
    harm(cells[1].folder / name)
    if (name, harm) == ("cell.json", turn_a_bit):  # the last letter is an end of line
        cut(cells[1].folder / name)
    (damaged,) = open_run(folder).damaged()
    assert damaged.cell == cells[1].cell
    assert str(cells[1].folder / name) in damaged.reason
    watcher = sweep(folder)
    assert watcher.waiting == 1
    assert name in watcher.reasons[0]
    again = list(open_run(folder).finished())
    assert {name: array.tobytes() for name, array in again[1].scores().items()} == wanted
    for cell in (again[0], again[2]):
        assert cell.folder.stat().st_ino == inodes[cell.record.id]
    assert not list((folder / "cells").glob("*.new"))


def test_a_damaged_failure_costs_no_new_one(tmp_path):
    folder = tmp_path / "run"
    options = {"broken": "h2o", "mark": str(tmp_path / "mark")}
    with pytest.raises(AssertionError, match="broken until"):
        sweep(folder, options=options)
    (file,) = (folder / "failures").iterdir()
    file.write_text("{")
    assert str(file) in open_run(folder).failures()[0].error
    with pytest.raises(AssertionError, match="broken until"):
        sweep(folder, options=options)
    assert "broken until" in open_run(folder).failures()[0].error


def test_tune_says_what_is_stale_and_measures_what_is_damaged(tmp_path, monkeypatch):
    pytest.importorskip("optuna", reason="tune needs optuna")

    def search(stale="refuse"):
        tries = []
        tune(
            *(tmp_path / "run", "toy_subject:Toy", {"optimum": 5}, "linear", "1/2"),
            trials=3,
            unseen=[1],
            threads=1,
            tell_space=lambda space: None,
            tell=tries.append,
            stale=stale,
        )
        return [tried.fresh for tried in tries]

    assert search() == [True] * 3
    assert search() == [False] * 3
    cell = next(c for c in open_run(tmp_path / "run").path.glob("cells/linear*s0*"))
    turn_a_bit(cell / "scores.safetensors")
    assert sum(search()) == 1
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "_kvpolicy", lambda: "another")
        with pytest.raises(ParameterError, match="the code of kvpolicy is another"):
            search()
        assert search("keep") == [False] * 3
        assert search("anew") == [True] * 3
        assert search() == [False] * 3


def test_images_that_are_none_are_refused(tmp_path, monkeypatch):
    import toy_subject

    measure = toy_subject.Toy.measure
    four = np.zeros((2, 4, 4, 4), np.uint8)  # colours
    for number, wrong in enumerate((np.zeros((2, 4, 4)), np.zeros((2, 4), np.uint8), [[0]], four)):

        def with_images(self, *given, wrong=wrong):
            return replace(measure(self, *given), images=wrong)

        monkeypatch.setattr(toy_subject.Toy, "measure", with_images)
        with pytest.raises(AssertionError, match=r"images must be uint8 \[n, rows, cols\], or"):
            sweep(tmp_path / str(number))


def test_arrays_that_hold_no_numbers_are_refused_by_name(tmp_path, monkeypatch):
    import toy_subject

    measure = toy_subject.Toy.measure
    for wrong in (np.array(["a", "b"]), np.array([None, 1]), np.array([1j])):

        def with_words(self, *given, wrong=wrong):
            measured = measure(self, *given)
            return type(measured)(dict(measured.arrays) | {"words": wrong}, measured.stats)

        monkeypatch.setattr(toy_subject.Toy, "measure", with_words)
        with pytest.raises(AssertionError, match="array 'words' holds"):
            sweep(tmp_path / str(wrong.dtype))
