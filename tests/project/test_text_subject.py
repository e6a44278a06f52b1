"""The example of a subject of one's own: a tiny language model on a book."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.processes import run_command

pytest.importorskip("typer", reason="ablations need the extra 'lab'")
pytest.importorskip("pyarrow", reason="ablations need the extra 'lab'")

from kvpolicy.errors import ParameterError
from kvpolicy.lab.compare.comparison import compare
from kvpolicy.lab.run.run_folder import open_run
from kvpolicy.lab.run.subject import load_subject

EXAMPLES = Path(__file__).parents[2] / "examples"
SUBJECT = "text_subject.subject:Alice"


@pytest.mark.slow
def test_an_ablation_of_text_finds_what_a_cache_costs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    done = run_command(
        *("ablate", "--subject", SUBJECT),
        *("--policies", "streaming_llm,h2o", "--budgets", "1/2,1/16", "--seeds", "0,1"),
        *("--option", "pieces=16", "--executor", "inline", "--out", "run"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    run = open_run(tmp_path / "run")
    entries = {(e.label, e.budget): e for e in compare(list(run.finished()), run.subject.metrics)}
    assert len(entries) == 5
    full = entries["full", None].findings["bits_per_byte"].estimate
    assert 1.5 < full.value < 3, "the model has learned something: a uniform guess is 7 bits"
    for policy in ("streaming_llm", "h2o"):
        little, much = (entries[policy, b].findings["bits_per_byte"] for b in ("1/16", "1/2"))
        assert little.clear
        assert little.difference.low > 0
        assert little.difference.value > much.difference.value
        assert entries[policy, "1/16"].cells[0].record.stats.peak_tokens == (1 + 15,) * 3
    assert "bits per byte" in (tmp_path / "run" / "table.md").read_text()
    assert not list((tmp_path / "run" / "plots").glob("images*")), "text has no contact sheet"
    assert json.loads((tmp_path / "run" / "subject.json").read_text())["rows"] is None


def test_what_ships_is_small_and_whole(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert (EXAMPLES / "text_subject" / "weights.safetensors").stat().st_size < 350_000
    subject = load_subject(SUBJECT, {"pieces": 4})
    assert subject.pieces.shape[1] == 256
    with pytest.raises(ParameterError, match="pieces=0"):
        load_subject(SUBJECT, {"pieces": 0})
