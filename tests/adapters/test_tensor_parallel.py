"""transformers' tensor parallelism: each process holds its own heads' tokens, and decides alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import tensor_parallel_jobs as jobs
from support import tiny_models
from support.paths import TESTS

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
    worker = Path(jobs.__file__)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*torchrun, f"--nproc-per-node={RANKS}", worker, models, out],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TESTS)},
    )
    assert run.returncode == 0, run.stderr[-8000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.slow
def test_processes_decide_as_one_would(tmp_path):
    """One test, because the processes take half a minute to start and to run every policy."""
    assert kvpolicy.create("tova").mixes_heads
    alone = {name: jobs.results(tiny_models.llama(heads)) for name, heads in MODELS.items()}
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
    assert len(alone) == len(jobs.policies()) * len(jobs.SETTINGS) >= 21
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
