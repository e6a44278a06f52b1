"""Pack a trained clipart-ar and its VQGAN into the folder that ships, and measure both.

    python examples/training/pack_clipart_ar.py --clipart runs/clipart --vqgan runs/clipart-vqgan \\
        --run runs/clipart-ar --out adapters/kvpolicy_adapters/zoo/clipart_ar

What the cards say about the weights is measured here, on the files as packed: card.json for
programs, MODEL_CARD.md for people.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from clipart import NAMES, read_saved
from clipart_ngrams import ngram_bits
from safetensors.torch import load_file, save
from train_clipart_ar import bits_per_code, encode, of_split
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy_adapters.images.vqgan import to_pixels
from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan
from kvpolicy_adapters.zoo.clipart import CLIPART_FILES, ClipartCard
from kvpolicy_adapters.zoo.clipart_tokens import ClipartTokens


def entries_of(folder: Path) -> list[dict[str, Any]]:
    """The log of a training run."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@torch.inference_mode()
def main(
    clipart: Annotated[Path, typer.Option(help="Folder that clipart.py wrote.")],
    vqgan: Annotated[Path, typer.Option(help="--out of train_clipart_vqgan.py.")],
    run: Annotated[Path, typer.Option(help="--out of train_clipart_ar.py.")],
    out: Annotated[Path, typer.Option(help="The folder that ships.")],
    weights: Annotated[Path | None, typer.Option(help="Another VQGAN's file than DIR's.")] = None,
    machine: str = "one core of an AMD EPYC (Zen 4), shared with other jobs, no GPU",
) -> None:
    """Pack, measure, and write card.json."""
    out.mkdir(parents=True, exist_ok=True)
    begun = [entry for entry in entries_of(run) if "recipe" in entry]
    recipe, falling = begun[0]["recipe"], begun[-1]["falling"]
    source = weights or vqgan / "vqgan.safetensors"
    if hashlib.sha256(source.read_bytes()).hexdigest() != recipe["vqgan"]:
        raise typer.BadParameter(f"{run} was trained on codes of another VQGAN than {source}")
    coder = read_vqgan(source).float()
    read = read_saved(clipart)
    # Rounded as it ships: the codes of the drawings are those of the network that was trained on.
    whole = load_file(source)
    small = {n: t.bfloat16() if t.is_floating_point() else t for n, t in whole.items()}
    (out / "vqgan.safetensors").write_bytes(save(small))
    painter = read_vqgan(out / "vqgan.safetensors").float()
    for name in ("config.json", "model.safetensors"):
        (out / name).write_bytes((run / "export" / name).read_bytes())
    splits = {"test": read.held_out, "calibration": read.calibration}
    said = {name: of_split(read, some) for name, some in splits.items()}
    # Prompts say what is drawn, and not who drew it.
    words = {
        name: [tuple(word for word in prompt if word not in NAMES) for prompt in prompts]
        for name, (prompts, _) in said.items()
    }
    codes = {name: encode(coder, pictures) for name, (_, pictures) in said.items()}
    (out / "drawings.safetensors").write_bytes(save(codes))
    vocabulary = [None if word in NAMES else word for word in read.vocabulary]
    about = {"vocabulary": vocabulary, **words}
    (out / "drawings.json").write_text(json.dumps(about, separators=(",", ":")) + "\n")

    config = json.loads((out / "config.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(load_file(out / "model.safetensors"))
    model.float().eval()
    tokens = ClipartTokens(vocabulary, coder.config.codes)
    bits = {
        breaks: bits_per_code(model, tokens, words["test"], codes["test"], line_breaks=breaks)
        for breaks in (False, True)
    }
    first = bits_per_code(model, tokens, words["test"][:20], codes["test"][:20], line_breaks=False)
    seen = [np.load(file) for file in sorted(run.glob(f"codes-{recipe['vqgan'][:8]}-*.npy"))]
    counted = ngram_bits(
        torch.from_numpy(np.concatenate(seen)).long(),
        codes["calibration"].long(),
        codes["test"].long(),
        coder.config.codes,
    )
    painted = to_pixels(painter.decode(codes["test"].long(), 25)).float()
    off = painted - torch.from_numpy(said["test"][1]).float()
    last = entries_of(run)[-1]
    card = ClipartCard(
        name="clipart-ar",
        architecture=(
            f"transformers' LlamaForCausalLM: {config['num_hidden_layers']} layers, width "
            f"{config['hidden_size']}, {config['num_attention_heads']} query and "
            f"{config['num_key_value_heads']} KV heads of {config['head_dim']}, MLP "
            f"{config['intermediate_size']}, vocabulary {config['vocab_size']}; a VQGAN, f = "
            f"{coder.config.scale}, {coder.config.codes} codes"
        ),
        parameters=sum(param.numel() for param in model.parameters()),
        vqgan_parameters=sum(param.numel() for param in coder.parameters()),
        data=f"Debian's openclipart-png, {len(read.train)} of {len(read.images)} drawings, 96 x 96",
        data_licence="public domain",
        weights_licence="Apache-2.0",
        steps=last["step"],
        batch=recipe["batch"],
        training_minutes=round(last["seconds"] / 60, 1),
        vqgan_steps=entries_of(vqgan)[-1]["step"],
        machine=machine,
        bits_per_code=round(bits[False], 4),
        bits_per_code_line_breaks=round(bits[True], 4),
        bits_per_code_20=round(first, 4),
        bits_of_counting=counted,
        reconstruction_error=round(off.abs().mean().item(), 3),
        reconstruction_psnr=round(10 * math.log10(255**2 / off.square().mean().item()), 2),
        files={
            name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in CLIPART_FILES
        },
    )
    (out / "card.json").write_text(card.model_dump_json(indent=2) + "\n")
    size = sum((out / name).stat().st_size for name in CLIPART_FILES) / 1e6
    (out / "MODEL_CARD.md").write_text(model_card(card, size, len(tokens.vocabulary), falling))
    print(card.model_dump_json(indent=2))


def model_card(card: ClipartCard, megabytes: float, words: int, falling: int) -> str:
    """MODEL_CARD.md: what card.json says, for people.

    Args:
        card: the facts.
        megabytes: all files together.
        words: how many a prompt may be made of.
        falling: steps of the training, the last ones, in which its rate fell.
    """
    counted = ", ".join(f"{name} {bits:.2f}" for name, bits in card.bits_of_counting.items())
    page = Path(__file__).with_name("clipart_card.md").read_text()
    return page.format(
        card=card, megabytes=megabytes, words=words, falling=falling, counted=counted
    )


if __name__ == "__main__":
    typer.run(main)
