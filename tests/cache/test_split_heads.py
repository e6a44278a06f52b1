"""Staging where processes share a layer's heads: each takes back and keeps as one alone would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import split_heads
from support.processes import run_together

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of torch has no gloo, over which the processes talk",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What two processes report, by rank."""
    folder = tmp_path_factory.mktemp("split")
    ranks = split_heads.RANKS
    run_together(Path(split_heads.__file__), ranks, str(folder), folder=folder)
    return [json.loads(Path(folder, f"{n}.json").read_text("utf-8")) for n in range(ranks)]


@pytest.mark.parametrize("name", split_heads.POLICIES)
def test_processes_take_back_what_one_would(found, name):
    alone = split_heads.decode(name, split_heads.Model(), staged=False)
    share = split_heads.HEADS // split_heads.RANKS
    for rank, report in enumerate(found):
        got = report[name]
        assert got["tokens"] == alone["tokens"]
        assert got["passes"] < alone["passes"], "some guesses are right"
        assert got["accepted"] == alone["accepted"] < got["staged"], "and some are not"
        for mine, whole in zip(got["positions"], alone["positions"], strict=True):
            of_rank = torch.tensor(whole)[:, rank * share : (rank + 1) * share]
            assert torch.equal(torch.tensor(mine), of_rank)
