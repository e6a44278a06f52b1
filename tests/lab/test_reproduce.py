"""Published tables: what stands in them, and the whole way to a row on a tiny model."""

from __future__ import annotations

import json

import pytest
from support.processes import run_command

pytest.importorskip("transformers", reason="needs the extra 'lab'")

from kvpolicy.errors import ParameterError, UnknownNameError
from kvpolicy.lab.draw.image_model import ModelSource
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


@pytest.mark.slow
def test_the_whole_way_on_a_tiny_model(tmp_path):
    done = run_command("reproduce", "linear", "--tiny", "--batch", "2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs/reproduce/results.json").read_text())
    assert results["tiny"] is True
    rows = results["rows"]
    assert [row["budget"] for row in rows] == [None, "1/4", "1/6"]
    assert [row["peak_tokens"] for row in rows] == [324, 82, 55]  # the class, and the budget
    assert rows[0]["cache_gb"] > 3 * rows[1]["cache_gb"]
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
        lambda row, measured: told.append(measured.seconds),
        batch=2,
        tiny=True,
    )
    assert told == [row["seconds"] for row in rows]
    assert len(found.rows) == 3
    with pytest.raises(ParameterError, match="another --out"):
        rerun("linear", table, sources, tmp_path / "runs/reproduce", print, batch=2)
