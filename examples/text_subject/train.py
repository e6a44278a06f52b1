"""Train the model of `subject.py`: a few minutes on one processor.

    python -m text_subject.train

The text is Lewis Carroll's *Alice's Adventures in Wonderland* (1865), in the public domain.
"""

from __future__ import annotations

import argparse
import math

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from text_subject.subject import CONFIG, HERE, LENGTH, book


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    train, held_out = book()
    model = LlamaForCausalLM(CONFIG)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=4e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.05)
    offsets = torch.arange(LENGTH)
    for step in range(1, steps + 1):
        batch = train[torch.randint(len(train) - LENGTH, (16, 1)) + offsets]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits per byte in training")
    model.eval()
    count = len(held_out) // LENGTH
    pieces = held_out[: count * LENGTH].view(count, LENGTH)
    with torch.no_grad():
        held = model(pieces, labels=pieces).loss.item() / math.log(2)
    print(f"{held:.3f} bits per byte of the last quarter")
    weights = {name: w.to(torch.bfloat16) for name, w in model.state_dict().items()}
    weights.pop("lm_head.weight")  # tied to the embedding
    save_file(weights, HERE / "weights.safetensors")


if __name__ == "__main__":
    main()
