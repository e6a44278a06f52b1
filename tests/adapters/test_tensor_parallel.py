"""transformers' tensor parallelism: each process holds its own heads' tokens, and decides alone."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from support import tensor_parallel_jobs as jobs
from support import tiny_models
from support.processes import run_together

import kvpolicy

pytest.importorskip("transformers.distributed", reason="tensor parallelism of transformers")

RANKS = 2
#: KV heads of each model; four query heads.
MODELS = {"grouped": 2, "not grouped": 4}


def run_processes(folder: Path) -> list[dict]:
    """What two processes report, by rank."""
    models, out = folder / "models", folder / "out"
    out.mkdir()
    for name, heads in MODELS.items():
        tiny_models.llama(heads).save_pretrained(models / name)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])

    run_together(Path(jobs.__file__), RANKS, str(RANKS), port, str(models), str(out), folder=folder)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.slow
def test_processes_decide_as_one_would(tmp_path):
    """One test, because the processes take long to start and to run every policy."""
    assert kvpolicy.create("tova").mixes_heads
    alone = {n: jobs.results(tiny_models.llama(heads), n) for n, heads in MODELS.items()}
    run = [job for each in alone.values() for job in each]
    assert len(set(run)) == len(run) == 2 * len(jobs.policies()) >= 14
    assert {job.partition(" ")[2] for job in alone["grouped"]} == set(jobs.SETTINGS)
    for rank, report in enumerate(run_processes(tmp_path)):
        assert report.keys() == MODELS.keys()
        for name, heads in MODELS.items():
            check_decisions(report[name]["results"], alone[name], heads // RANKS, rank)
            plain, ours = report[name]["collectives"]
            assert ours == plain > 0, "a policy costs no communication"
            assert report[name]["refused"] == (
                "policy 'tova' decides for all heads of a layer together, but tensor parallelism "
                "gives each of 2 processes only its own heads; use a policy that decides per head, "
                "e.g. 'h2o', or load the model with device_map instead of tp_plan"
            )


def check_decisions(together: dict, alone: dict, share: int, rank: int) -> None:
    """Tokens are the single process's, and the slots are those of this rank's heads."""
    assert together.keys() == alone.keys()
    for job, expected in alone.items():
        got = together[job]
        assert got["tokens"] == expected["tokens"], job
        assert got["evictions"] == list(expected["evictions"]), job
        assert min(got["evictions"]) > 0
        assert got["bytes"] * RANKS == expected["bytes"], job
        for mine, whole in zip(got["positions"], expected["positions"], strict=True):
            mine_of_whole = torch.tensor(whole)[:, rank * share : (rank + 1) * share]
            assert torch.equal(torch.tensor(mine), mine_of_whole), job
