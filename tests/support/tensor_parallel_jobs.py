"""What each process of test_tensor_parallel does, one process a rank.

    tensor_parallel_jobs.py RANK RANKS PORT MODELS OUT

MODELS is a folder of saved models; OUT gets one file a rank. As torchrun would, it says in the
environment who this process is, and where the others meet.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvpolicy
import kvpolicy_adapters
from kvpolicy_adapters.transformers.cache_argument import as_argument
from support import tiny_models

IMAGE = kvpolicy.RasterLayout(rows=6, cols=5, prefix=6)
TEXT = kvpolicy.TextLayout(sinks=1, line_length=5)
#: Layout, tokens of the prompt, and how to generate.
SETTINGS = {
    "image": (IMAGE, 6, {}),
    "long text": (TEXT, 20, {}),
    "beams": (TEXT, 6, {"num_beams": 3}),
}
#: In the order of their names.
MODELS = ["grouped", "not grouped"]
NEW = 24
BUDGET = 13


def policies() -> list[str]:
    """Those that can evict and decide a head at a time."""
    mixing = {name for name in kvpolicy.available() if kvpolicy.create(name).mixes_heads}
    return sorted(set(kvpolicy.available()) - mixing - {"full"})


def generate(model, setting: str, cache=None):
    _, length, options = SETTINGS[setting]
    generator = torch.Generator().manual_seed(3)
    tokens = 1 + torch.rand(2, 60, generator=generator).argsort(-1)[:, :length]
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        **as_argument(cache),
        max_new_tokens=NEW,
        do_sample=False,
        # Two of a kind have keys of one length in the first layer, but for the last bits of a
        # product; and those differ with its shape, which is another one where processes share it.
        no_repeat_ngram_size=1,
        **options,
    )


def jobs(name: str) -> list[tuple[str, str]]:
    """Policies and settings of a model: each policy in one, in another one on another model.

    What a policy ranks and how tokens come do not know of each other, so their product, over both
    models, would say no more.
    """
    settings, begin = list(SETTINGS), MODELS.index(name)
    return [(each, settings[(begin + i) % 3]) for i, each in enumerate(policies())]


def results(model, name: str) -> dict:
    """Tokens, held positions ``[B, H, S]`` of each layer, and statistics, of every job."""
    found = {}
    for policy, setting in jobs(name):
        with kvpolicy_adapters.attach(
            model, policy=tiny_models.policy(policy), budget=BUDGET, layout=SETTINGS[setting][0]
        ) as cache:
            tokens = generate(model, setting, cache)
            positions = [cache.positions(layer).sort().values for layer in range(len(cache))]
        stats = cache.stats()
        found[f"{policy} {setting}"] = {
            "tokens": tokens.tolist(),
            "positions": [layer.tolist() for layer in positions],
            "bytes": stats.bytes,
            "evictions": stats.evictions,
        }
    return found


class Collectives(TorchDispatchMode):
    """Counts the times that processes wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def main(rank: str, ranks: str, port: str, models: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    report = {}
    for path in sorted(models.iterdir()):
        model = AutoModelForCausalLM.from_pretrained(
            path, distributed_config=DistributedConfig(tp_plan="auto")
        )
        found = results(model, path.name)
        with Collectives() as plain:
            generate(model, "image")
        with (
            Collectives() as ours,
            kvpolicy_adapters.attach(model, policy="h2o", budget=BUDGET, layout=IMAGE) as cache,
        ):
            generate(model, "image", cache)
        refused = ""
        try:
            with kvpolicy_adapters.attach(model, policy="tova", budget=BUDGET, layout=IMAGE):
                pass
        except kvpolicy.ParameterError as error:
            refused = str(error)
        report[path.name] = {
            "results": found,
            "refused": refused,
            "collectives": [plain.count, ours.count],
        }
    assert torch.distributed.get_rank() == int(rank)
    (out / f"{rank}.json").write_text(json.dumps(report))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(Path, sys.argv[4:]))
