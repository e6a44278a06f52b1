"""Pack a trained fashion-lpd into the folder that ships, and measure it.

    python examples/training/pack_fashion_lpd.py runs/fashion-lpd \\
        adapters/kvpolicy_adapters/zoo/fashion_lpd

What the card says about the weights is measured here, on the files as packed. MODEL_CARD.md, for
people, is written by hand.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from train_fashion_lpd import ORDERS, bits_per_pixel
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy_adapters import zoo
from kvpolicy_adapters.zoo.fashion_lpd import LPD_FILES, LPDCard
from kvpolicy_adapters.zoo.fashion_lpd_model import FashionLPDModel


@torch.inference_mode()
def main(
    run: Annotated[Path, typer.Argument(help="--out of train_fashion_lpd.py")],
    out: Annotated[Path, typer.Argument(help="the folder that ships")],
    scored: Annotated[int, typer.Option(help="Test images that bits are measured on.")] = 1_000,
    machine: str = "one core of an AMD EPYC (Zen 4), shared with other jobs, no GPU",
) -> None:
    """Pack, measure, and write card.json."""
    out.mkdir(parents=True, exist_ok=True)
    for name in LPD_FILES:
        (out / name).write_bytes((run / "export" / name).read_bytes())
    config = json.loads((out / "config.json").read_text())
    model = FashionLPDModel(LlamaForCausalLM(LlamaConfig(**config)))
    model.load_state_dict(load_file(out / "model.safetensors"))
    model.float().eval()
    test = zoo.load("fashion-ar").test_tokens(scored)
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    recipe = next(entry["recipe"] for entry in entries if "recipe" in entry)
    card = LPDCard(
        name="fashion-lpd",
        architecture=(
            f"transformers' LlamaForCausalLM, {config['num_hidden_layers']} layers, width "
            f"{config['hidden_size']}, as fashion-ar; a position query and learned rows and columns"
        ),
        parameters=sum(param.numel() for param in model.parameters()),
        model_bytes=(out / "model.safetensors").stat().st_size,
        data="Fashion-MNIST, the first 58,000 training images, pixel // 16",
        data_licence="MIT, Copyright (c) 2017 Zalando SE",
        weights_licence="Apache-2.0",
        started_from="fashion-ar, as it ships",
        steps=entries[-1]["step"],
        batch=recipe["batch"],
        training_minutes=round(entries[-1]["seconds"] / 60, 1),
        machine=machine,
        scored=scored,
        bits_per_pixel_raster=round(bits_per_pixel(model, test, None), 4),
        bits_per_pixel_48=round(bits_per_pixel(model, test, 48), 4),
        bits_per_pixel_other_48=round(bits_per_pixel(model, test, 48, seed=ORDERS), 4),
        files={name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in LPD_FILES},
    )
    (out / "card.json").write_text(card.model_dump_json(indent=2) + "\n")
    print(card.model_dump_json(indent=2))


if __name__ == "__main__":
    typer.run(main)
