"""What counting predicts of clip art's codes: bits per code that a network has to beat.

Probabilities of a code by itself, behind the code on its left, below the one above, and given both.
Each backs off to the one before (a Dirichlet prior, ``(n(c, x) + a p(x)) / (n(c) + a)``), and ``a``
is what suits the calibration drawings best. Counted over the same variants of the training drawings
that ``train_clipart_ar.py`` has encoded.

    python examples/training/clipart_ngrams.py --clipart runs/clipart --run runs/clipart-ar \\
        --vqgan runs/clipart-vqgan/vqgan.safetensors
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from clipart import read_saved
from torch import Tensor

PRIORS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass(frozen=True)
class Counts:
    """How often each code was seen in each context.

    Attributes:
        keys: ``context * codes + code`` of all that were seen, sorted.
        seen: how often.
        contexts: how often each context was seen.
        codes: how many codes there are.
    """

    keys: Tensor
    seen: Tensor
    contexts: Tensor
    codes: int

    @staticmethod
    def of(contexts: Tensor, values: Tensor, codes: int) -> Counts:
        """Of contexts and codes, int64 ``[n]`` each."""
        keys, seen = (contexts * codes + values).unique(return_counts=True)
        totals = torch.bincount(contexts)
        return Counts(keys, seen.double(), totals.double(), codes)

    def probability(
        self, contexts: Tensor, values: Tensor, backoff: Tensor, prior: float
    ) -> Tensor:
        """Of each code in its context, float64 ``[n]``."""
        keys = contexts * self.codes + values
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        seen = torch.where(self.keys[place] == keys, self.seen[place], 0.0)
        known = contexts < len(self.contexts)
        total = torch.where(known, self.contexts[contexts * known], 0.0)
        return (seen + prior * backoff) / (total + prior)


def neighbours(codes: Tensor, count: int) -> dict[str, Tensor]:
    """Of codes ``[n, rows, cols]``, flat: the code, its contexts; beyond the edge is ``count``."""
    left = F.pad(codes, (1, 0), value=count)[:, :, :-1].flatten()
    above = F.pad(codes, (0, 0, 1, 0), value=count)[:, :-1].flatten()
    return {
        "unigram": torch.zeros_like(left),
        "left": left,
        "above": above,
        "left and above": left * (count + 1) + above,
        "code": codes.flatten(),
    }


def ngram_bits(train: Tensor, tuned: Tensor, test: Tensor, count: int) -> dict[str, float]:
    """Bits per code of ``test``, all ``[n, rows, cols]``; priors suit ``tuned`` best."""
    seen, known = neighbours(train, count), [neighbours(part, count) for part in (tuned, test)]
    found: dict[str, list[Tensor]] = {}
    bits = {}
    for name in ("unigram", "left", "above", "left and above"):
        counts = Counts.of(seen[name], seen["code"], count)
        if name == "unigram":
            backoff = [torch.full(part["code"].shape, 1 / count).double() for part in known]
        elif name == "left and above":
            backoff = [(a + b) / 2 for a, b in zip(found["left"], found["above"], strict=True)]
        else:
            backoff = found["unigram"]
        choices = [
            [
                counts.probability(part[name], part["code"], prior_of, prior)
                for part, prior_of in zip(known, backoff, strict=True)
            ]
            for prior in PRIORS
        ]
        found[name] = min(choices, key=lambda choice: -choice[0].log2().sum().item())
        bits[name] = round(-found[name][1].log2().mean().item(), 4)
    return bits


def main(
    clipart: Annotated[Path, typer.Option(help="Folder that clipart.py wrote.")],
    run: Annotated[Path, typer.Option(help="--out of train_clipart_ar.py.")],
    vqgan: Annotated[Path, typer.Option(help="vqgan.safetensors of train_clipart_vqgan.py.")],
) -> None:
    """Print bits per code of the held-out drawings."""
    # Not above: transformers takes seconds, and counting does not need it.
    from train_clipart_ar import encode

    from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan

    coder = read_vqgan(vqgan).float()
    read = read_saved(clipart)
    tuned, test = (
        encode(coder, read.images[list(some)]).long() for some in (read.calibration, read.held_out)
    )
    files = sorted(run.glob("codes-*.npy"))
    train = torch.cat([torch.from_numpy(np.load(file)).long() for file in files])
    found = ngram_bits(train, tuned, test, coder.config.codes)
    print(json.dumps({"pictures": len(train), "held_out": found}))


if __name__ == "__main__":
    typer.run(main)
