"""Pack a trained fashion-ar and its classifier into the folder that ships, and measure both.

    python examples/training/pack_fashion_ar.py runs/fashion-ar runs/fashion-classifier \\
        adapters/kvpolicy_adapters/zoo/fashion_ar

Everything that the card says about the weights is measured here, on the files as packed: bits per
pixel of the first 1,000 test images, accuracy of the classifier on all 10,000, and the statistics
of its features that a Fréchet distance needs. MODEL_CARD.md, for people, is written by hand.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from fashion_mnist import FOLDER, GREYS, read_tokens
from safetensors.torch import load_file, save
from train_fashion_ar import bits_per_pixel
from transformers import LlamaForCausalLM

from kvpolicy_adapters.zoo.card import ModelCard
from kvpolicy_adapters.zoo.classifier import FashionClassifier
from kvpolicy_adapters.zoo.fashion import FILES, pack_pixels

SHIPPED, CALIBRATION = 1_000, 256


@torch.inference_mode()
def main(
    run: Annotated[Path, typer.Argument(help="--out of train_fashion_ar.py")],
    classifier: Annotated[Path, typer.Argument(help="--out of train_fashion_classifier.py")],
    out: Annotated[Path, typer.Argument(help="the folder that ships")],
    data: Annotated[Path, typer.Option(help="Folder with the four gzipped IDX files.")] = FOLDER,
    machine: str = "two CPU cores with AMX, no GPU",
) -> None:
    """Pack, measure, and write card.json."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (out / name).write_bytes((run / "export" / name).read_bytes())
    judged = load_file(classifier / "classifier.safetensors")
    (out / "classifier.safetensors").write_bytes(save(judged))

    test = read_tokens(data, "t10k")
    shipped = test[:SHIPPED]
    for name, part in (
        ("test", shipped),
        ("calibration", test[SHIPPED : SHIPPED + CALIBRATION]),
    ):
        images = {"labels": part[:, 0] - GREYS, "pixels": pack_pixels(part[:, 1:])}
        (out / f"{name}_images.safetensors").write_bytes(save(images))

    judge = FashionClassifier().eval()
    judge.load_state_dict(judged)
    features = torch.cat([judge.features(part[:, 1:]) for part in test.split(500)])
    right = judge.head(features).argmax(1) == test[:, 0] - GREYS
    moments = {"mean": features.double().mean(0), "covariance": features.double().T.cov()}
    (out / "reference.safetensors").write_bytes(save(moments))

    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    recipe = next(entry["recipe"] for entry in entries if "recipe" in entry)
    card = ModelCard(
        name="fashion-ar",
        architecture=(
            f"transformers' LlamaForCausalLM: {recipe['layers']} layers, width {recipe['width']}, "
            f"{recipe['heads']} query and {recipe['kv_heads']} KV heads of {recipe['head_dim']}, "
            f"MLP {recipe['hidden']}, RoPE theta {recipe['rope_theta']:g}, vocabulary 27"
        ),
        parameters=sum(param.numel() for param in model.parameters()),
        model_bytes=(out / "model.safetensors").stat().st_size,
        data="Fashion-MNIST, the first 58,000 training images, pixel // 16",
        data_licence="MIT, Copyright (c) 2017 Zalando SE",
        weights_licence="Apache-2.0",
        steps=entries[-1]["step"],
        batch=recipe["batch"],
        training_minutes=round(entries[-1]["seconds"] / 60, 1),
        machine=machine,
        bits_per_pixel=round(bits_per_pixel(model, shipped), 5),
        bits_per_pixel_64=round(bits_per_pixel(model, shipped[:64]), 5),
        classifier_accuracy=round(right.double().mean().item(), 4),
        classifier_accuracy_1000=round(right[:SHIPPED].double().mean().item(), 4),
        files={name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES},
    )
    (out / "card.json").write_text(card.model_dump_json(indent=2) + "\n")
    print(card.model_dump_json(indent=2))


if __name__ == "__main__":
    typer.run(main)
