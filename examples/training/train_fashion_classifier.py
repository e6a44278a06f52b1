"""Train the classifier that judges fashion-ar's images: a few minutes on two CPU cores.

It sees what the image model makes, 16 grey levels a pixel, shifted by up to one pixel and mirrored
at random. The last 2,000 training images are held out to watch it; the test images decide nothing.

    python examples/training/train_fashion_classifier.py --out runs/fashion-classifier
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from fashion_mnist import COLS, FOLDER, GREYS, ROWS, read_tokens
from safetensors.torch import save
from torch import Tensor

from kvpolicy_adapters.zoo.classifier import FashionClassifier

HELD_OUT = 2_000
SHIFT = 1


def augment(pixels: Tensor, draws: torch.Generator) -> Tensor:
    """Shift each image [n, 784] by up to one pixel (black comes in), mirror every second one."""
    n = len(pixels)
    planes = F.pad(pixels.view(n, ROWS, COLS), [SHIFT] * 4)
    down, right = torch.randint(2 * SHIFT + 1, (2, n, 1, 1), generator=draws)
    columns = torch.arange(COLS).expand(n, 1, COLS)
    mirrored = torch.rand(n, 1, 1, generator=draws) < 0.5
    columns = torch.where(mirrored, COLS - 1 - columns, columns) + right
    rows = torch.arange(ROWS).view(1, ROWS, 1) + down
    return planes[torch.arange(n).view(n, 1, 1), rows, columns].flatten(1)


@torch.no_grad()
def accuracy(model: FashionClassifier, tokens: Tensor) -> float:
    model.eval()
    right = [
        model(part[:, 1:]).argmax(1) == part[:, 0].long() - GREYS for part in tokens.split(500)
    ]
    model.train()
    return float(torch.cat(right).float().mean())


def main(
    out: Annotated[Path, typer.Option(help="Folder for the weights and the log.")],
    data: Annotated[Path, typer.Option(help="Folder with the four gzipped IDX files.")] = FOLDER,
    epochs: int = 12,
    batch: int = 128,
    rate: float = 4e-3,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Train the classifier and write ``classifier.safetensors``."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    tokens = read_tokens(data, "train")
    train, held_out = tokens[:-HELD_OUT], tokens[-HELD_OUT:]
    model = FashionClassifier().to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * (len(train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.2)
    begun = time.perf_counter()
    for epoch in range(epochs):
        draws = torch.Generator().manual_seed(seed * 1_000 + epoch)
        losses = []
        for index in torch.randperm(len(train), generator=draws).split(batch):
            if len(index) < batch:
                continue
            chosen = train[index]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(augment(chosen[:, 1:], draws))
            loss = F.cross_entropy(
                logits.float(), chosen[:, 0].long() - GREYS, label_smoothing=0.05
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
        entry = {
            "epoch": epoch + 1,
            "seconds": round(time.perf_counter() - begun, 1),
            "loss": round(float(torch.stack(losses).mean()), 4),
            "validation_accuracy": accuracy(model, held_out),
        }
        with (out / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)
    fresh = out / "classifier.safetensors.new"
    fresh.write_bytes(save({name: t.contiguous() for name, t in model.state_dict().items()}))
    os.replace(fresh, out / "classifier.safetensors")


if __name__ == "__main__":
    typer.run(main)
