"""Published tables: what stands in them, and the whole way to a row on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.processes import run_command
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the extra 'lab'")

from kvpolicy import PolicyCache, RasterLayout
from kvpolicy.cli import app
from kvpolicy.errors import ParameterError, UnknownNameError
from kvpolicy.lab.draw.image_model import IMAGE_MODELS, Drawn, ModelSource
from kvpolicy.lab.reproduce.published import LINEAR, table_of
from kvpolicy.lab.reproduce.rerun import command_of, rerun, sources_of


def test_published_figures_agree_with_each_other():
    """Speed-up is a ratio of the seconds, throughput the batch over them: no typing error."""
    full = {row.model.key: row for row in LINEAR if row.budget is None}
    assert len(full) == 6
    assert sum(row.budget is not None for row in LINEAR) == 11
    for row in LINEAR:
        assert row.speedup == pytest.approx(full[row.model.key].seconds / row.seconds, abs=0.02)
        assert row.images_per_second == pytest.approx(row.model.batch / row.seconds, abs=0.011)
        assert row.memory_gb <= full[row.model.key].memory_gb
    saved = {(row.model.key, row.budget): 1 - row.memory_gb / full[row.model.key].memory_gb
             for row in LINEAR}  # fmt: skip
    assert saved["llamagen-xl", "1/6"] == pytest.approx(0.6761, abs=1e-3)
    assert saved["janus-pro-7b", "1/6"] == pytest.approx(0.3966, abs=1e-3)


def test_what_is_given_must_be_in_the_table():
    with pytest.raises(UnknownNameError, match="'h2o' can be reproduced"):
        table_of("h2o")
    with pytest.raises(ParameterError, match="no model 'llamagen-x'; did you mean 'llamagen-xl'"):
        sources_of(LINEAR, {"llamagen-x": "llamagen:a.pt"}, {}, "cpu", None)
    with pytest.raises(ParameterError, match=r"llamagen-xl needs --vq llamagen-xl=vq_ds16_c2i\.pt"):
        sources_of(LINEAR, {"llamagen-xl": "llamagen:a.pt"}, {}, "cpu", None)
    (source,) = sources_of(LINEAR, {"janus-pro-1b": "a/folder"}, {}, "cpu", None).values()
    assert (source.name, source.path) == ("checkpoint", "a/folder")


def test_every_row_has_its_command():
    commands = [command_of(row, "linear") for row in LINEAR]
    assert len(set(commands)) == len(LINEAR)
    assert commands[2] == (
        "kvpolicy draw --model llamagen:c2i_XL_384.pt --vq vq_ds16_c2i.pt --classes 0-999 "
        "--per-class 50 --policy linear --budget 1/6 --batch 256 --device cuda --npz "
        "--out llamagen-xl-1-6"
    )


class Small:
    """Has room for so many images; serves one of transformers' caches."""

    name, num_layers = "small", 1
    layout = RasterLayout(rows=2, cols=2)
    room = 4

    def __init__(self, source):
        self.asked = dict(source.options).get("cache", "kvpolicy")
        if self.asked == "static":
            raise ParameterError("small has no static cache")
        if source.path == "says":
            self.cache = self.asked

    def check(self, item, sampler): ...

    def draw(self, items, setting, sampler, seed):
        if len(items) > self.room and setting.policy.label == "full":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        stats = PolicyCache("full", None, layout=self.layout, num_layers=1).stats()
        return Drawn(np.zeros((len(items), 2, 2), np.uint8), (stats,))


def small(table, path, folder, batch):
    if "small" not in IMAGE_MODELS.names():
        IMAGE_MODELS.add("small", Small)
    told = {}
    sources = {table[0].model.key: ModelSource("small", path)}
    results = rerun("linear", table, sources, folder, told.__setitem__, batch=batch)
    assert list(told) == [
        "LlamaGen-XL, full cache",
        "LlamaGen-XL, full cache of transformers (dynamic)",
        "LlamaGen-XL, full cache of transformers (static)",
        "LlamaGen-XL, 1/4",
        "LlamaGen-XL, 1/6",
    ]
    return results


def test_what_can_not_be_measured_is_named(tmp_path):
    """A cache that a model does not serve, or says nothing of, and a row without room."""
    table = LINEAR[:3]
    results = small(table, "says", tmp_path / "says", 4)
    assert [(row.budget, row.cache) for row in results.rows] == [
        (None, "kvpolicy"), (None, "dynamic"), ("1/4", "kvpolicy"), ("1/6", "kvpolicy")
    ]  # fmt: skip
    static = "LlamaGen-XL, full cache of transformers (static)"
    assert results.left_out == {static: "small has no static cache"}
    held = json.loads((tmp_path / "says/results.json").read_text())
    assert held["left_out"] == results.left_out
    # What was left out is tried again, and the rest is kept.
    assert small(table, "says", tmp_path / "says", 4) == results

    silent = small(table, None, tmp_path / "silent", 4)
    assert {row.cache for row in silent.rows} == {"kvpolicy"}
    dynamic = "LlamaGen-XL, full cache of transformers (dynamic)"
    assert "'small' draws with no cache of transformers" in silent.left_out[dynamic]

    crowded = small(table, "says", tmp_path / "crowded", 5)
    assert [row.budget for row in crowded.rows] == ["1/4", "1/6"]
    assert len(crowded.left_out) == 3
    assert crowded.left_out["LlamaGen-XL, full cache"].startswith("out of memory: CUDA")


def test_the_commands_are_understood(tmp_path, monkeypatch):
    """Each draws under its row's budget; the full cache's rows under none."""
    (tmp_path / "prompts.txt").write_text("a fox\n")
    monkeypatch.chdir(tmp_path)
    found = []

    def take(asked, items, *others):
        found.append(asked.budget)
        raise ParameterError("enough")

    monkeypatch.setattr("kvpolicy.commands.draw._draw", take)
    for row in LINEAR:
        result = CliRunner().invoke(app, command_of(row, "linear").split()[1:])
        assert isinstance(result.exception, ParameterError), result.output
    assert found == [row.budget for row in LINEAR]


@pytest.mark.slow
def test_the_whole_way_on_a_tiny_model(tmp_path):
    done = run_command("reproduce", "linear", "--tiny", "--batch", "2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs/reproduce/results.json").read_text())
    assert results["tiny"] is True
    rows = results["rows"]
    assert [row["budget"] for row in rows] == [None, None, None, "1/4", "1/6"]
    assert [row["cache"] for row in rows[:3]] == ["kvpolicy", "dynamic", "static"]
    # The class, and the budget.
    assert [row["peak_tokens"] for row in rows] == [324, 324, 324, 82, 55]
    assert rows[0]["cache_gb"] > 3 * rows[3]["cache_gb"]
    assert rows[2]["cache_gb"] == pytest.approx(rows[0]["cache_gb"], rel=0.01)
    assert results["left_out"] == {}
    assert "LlamaGen-XL" in done.stdout
    assert "7.57×" in done.stdout

    # What has been measured is not measured again.
    told = []
    table = [row for row in LINEAR if row.model.key == "llamagen-xl"]
    sources = {"llamagen-xl": ModelSource("nothing could load this")}
    found = rerun(
        "linear",
        table,
        sources,
        tmp_path / "runs/reproduce",
        lambda label, measured: told.append(measured.seconds),
        batch=2,
        tiny=True,
    )
    assert told == [row["seconds"] for row in rows]
    assert len(found.rows) == 5
    with pytest.raises(ParameterError, match="another --out"):
        rerun("linear", table, sources, tmp_path / "runs/reproduce", print, batch=2)
