"""A toy model whose heads processes share, decoded greedily with guesses that may be wrong.

    python tests/support/split_heads.py RANK FOLDER

Each process holds its own heads' weights and caches their tokens alone; outputs are summed over
processes in every layer (gloo), as tensor parallelism does. FOLDER gets one file a rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

import kvpolicy

RANKS, HEADS, DIM, LAYERS, VOCAB, BATCH = 2, 4, 8, 2, 13, 2
LAYOUT = kvpolicy.RasterLayout(rows=6, cols=5, prefix=2)
WINDOW = 4
POLICIES = {"h2o": {}, "linear": {"anchors": 2}}


class Model:
    """Two layers of attention, of which this process holds some heads.

    Args:
        rank: which share of the heads.
        size: number of shares.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        chance = torch.Generator().manual_seed(0)
        width, share = HEADS * DIM, HEADS // size
        self.size, self.first_head, self.heads = size, rank * share, share
        self.tokens = torch.randn(VOCAB, width, generator=chance)
        self.places = torch.randn(LAYOUT.length, width, generator=chance)
        mine = slice(self.first_head * DIM, (self.first_head + share) * DIM)
        weights = torch.randn(LAYERS, 4, width, width, generator=chance) / width**0.5
        self.inward, self.outward = weights[:, :3, :, mine], weights[:, 3, mine]

    def __call__(self, cache: kvpolicy.PolicyCache, ids: Tensor) -> Tensor:
        """The likeliest token behind each of ``ids`` ``[B, T]``."""
        count = ids.shape[1]
        x = self.tokens[ids] + self.places[cache.seen : cache.seen + count]
        for layer in range(LAYERS):
            new = [
                (x @ weight).unflatten(2, (self.heads, DIM)).transpose(1, 2)
                for weight in self.inward[layer]
            ]
            out = cache.attend(layer, *new).transpose(1, 2).flatten(2) @ self.outward[layer]
            if self.size > 1:
                distributed.all_reduce(out)
            x = x + 2 * out
        return (x @ self.tokens.T).argmax(-1)


def decode(name: str, model: Model, *, staged: bool) -> dict[str, Any]:
    """Tokens, held positions of each layer, and what was accepted.

    Args:
        name: the policy.
        model: this process's share.
        staged: whether the last two tokens are guessed to come again, and again.
    """
    cache = kvpolicy.PolicyCache(
        kvpolicy.create(name, **POLICIES[name]),
        12,
        layout=LAYOUT,
        num_layers=LAYERS,
        first_head=model.first_head,
    )
    ids = torch.tensor([[1, 2], [3, 4]])
    ids = torch.cat([ids, model(cache, ids)[:, -1:]], dim=1)
    while ids.shape[1] < LAYOUT.length:
        window = min(WINDOW, LAYOUT.length - ids.shape[1]) if staged else 1
        with cache.stage(WINDOW):
            guesses = ids[:, -2:].repeat(1, WINDOW)[:, 1 : 1 + window]
            found = model(cache, guesses)
            right = (guesses[:, 1:] == found[:, :-1]).all(0).to(torch.int64).cumprod(0)
            kept = 1 + int(right.sum())
            cache.commit(kept)
        ids = torch.cat([ids, found[:, :kept]], dim=1)
    stats = cache.stats()
    return {
        "tokens": ids.tolist(),
        "positions": [cache.positions(n).sort().values.tolist() for n in range(LAYERS)],
        "staged": stats.staged,
        "accepted": stats.accepted,
        "passes": stats.passes,
    }


def main(rank: int, folder: Path) -> None:
    """What one process does."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS
    )
    found = {name: decode(name, Model(rank, RANKS), staged=True) for name in POLICIES}
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
