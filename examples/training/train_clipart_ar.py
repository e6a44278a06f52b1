"""Train ``clipart-ar``: pictures in colour from words, one VQ code a token, row by row.

A sequence is nine tokens of prompt and 24 x 24 codes of a VQGAN (``train_clipart_vqgan.py``), with
a line break behind each row or without: :mod:`kvpolicy_adapters.zoo.clipart_tokens` says which
token is which. One model learns both, in turns, a batch of the one and a batch of the other. The
network is transformers' own ``LlamaForCausalLM``, unchanged.

* Prompts: a tenth of the pictures come without words, for guidance; of the others half with all
  words, half with some of them, because nobody says "signs and symbols flags europe france".
* Each drawing comes in eight variants, of which each pass over the drawings takes one: as it is,
  and moved and scaled, some of them flipped or of another hue. They are encoded when first asked
  for.
* Muon for the hidden matrices, AdamW for the rest; the learning rate stays where it is, and falls
  to zero over the last ``--falling`` steps.

Every batch is a pure function of ``(seed, step)`` and checkpoints are replaced in one move, so that
the same command, run again, goes on. Where the rate begins to fall, the checkpoint is kept as
``plateau.pt``: a longer run goes on from there (``--start plateau.pt``, into another folder).

    python clipart.py --out runs/clipart
    python train_clipart_vqgan.py --out runs/clipart-vqgan --steps 1500
    python train_clipart_ar.py --clipart runs/clipart --out runs/clipart-ar \\
        --vqgan runs/clipart-vqgan/vqgan.safetensors --steps 4000 --falling 1200
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from clipart import Clipart, Pixels, read_saved
from runs import replace_checkpoint, replace_folder, require_same, write_log
from torch import Tensor
from train_clipart_vqgan import augment
from train_fashion_ar import Muon
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from kvpolicy_adapters.images.vqgan import VQGAN, from_pixels
from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan
from kvpolicy_adapters.zoo.clipart_tokens import MAX_WORDS, ClipartTokens

VARIANTS = 8  # of each drawing, the first as it is
WORDLESS, WHOLE = 0.1, 0.45  # shares of prompts without words, and with all of them
PIECE = 25  # pictures encoded at a time
CHUNK = 117  # queries attended at a time: what lies in their future is not computed


# -- data ------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(vqgan: VQGAN, images: Pixels) -> Tensor:
    """Codes, int16 [n, 24, 24]."""
    return vqgan.encode(from_pixels(torch.from_numpy(images)), PIECE).to(torch.int16)


class Codes:
    """The drawings of a split as codes, a variant at a time; what was encoded is kept in a folder.

    Args:
        vqgan: what encodes.
        images: [n, 96, 96, 3].
        kept: how the files begin in which codes are kept.
        seed: of the variants.
    """

    def __init__(self, vqgan: VQGAN, images: Pixels, kept: Path, seed: int) -> None:
        self.vqgan, self.images, self.kept, self.seed = vqgan, images, kept, seed
        self.read: dict[int, Tensor] = {}

    def variant(self, number: int) -> Tensor:
        """Codes of all drawings, int16 [n, 24, 24]."""
        if number not in self.read:
            path = self.kept.with_name(f"{self.kept.name}-{number}.npy")
            if not path.exists():
                images = self.images
                if number:
                    draws = np.random.default_rng((self.seed, 2, number))
                    images = np.stack([augment(one, draws, flip=0.3, hue=0.1) for one in images])
                with path.with_suffix(".new").open("wb") as file:
                    np.save(file, encode(self.vqgan, images).numpy())
                os.replace(path.with_suffix(".new"), path)
            self.read[number] = torch.from_numpy(np.load(path))
        return self.read[number]


def said(words: tuple[str, ...], draws: np.random.Generator) -> tuple[str, ...]:
    """The words of a drawing that its prompt says: all, some, or none of them."""
    share = draws.random()
    if share < WORDLESS or not words:
        return ()
    if share < WORDLESS + WHOLE:
        return words
    kept = draws.random(len(words)) < 0.5
    kept[draws.integers(len(words))] = True
    return tuple(word for word, keep in zip(words, kept, strict=True) if keep)


@dataclass(frozen=True)
class Batches:
    """What each step learns from: prompts and codes of the drawings that are trained on."""

    tokens: ClipartTokens
    words: list[tuple[str, ...]]
    codes: Codes
    batch: int
    seed: int

    def at(self, step: int) -> Tensor:
        """Tokens of a step, int64 [B, 585] or, at odd steps, [B, 609] with line breaks."""
        epoch, index = divmod(step, len(self.words) // self.batch)
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.words))
        chosen = order[index * self.batch : (index + 1) * self.batch]
        draws = np.random.default_rng((self.seed, 1, step))
        breaks = bool(step % 2)
        prompts = [
            self.tokens.prefix(said(self.words[one], draws), line_breaks=breaks) for one in chosen
        ]
        codes = self.codes.variant(epoch % VARIANTS)[chosen].long()
        picture = self.tokens.picture(codes, line_breaks=breaks)
        return torch.cat([torch.tensor(prompts), picture], dim=1)


# -- model -----------------------------------------------------------------------------------------


@cache
def future(length: int) -> Tensor:
    """What each of ``length`` queries may not see of as many keys."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention by matrix products, whose backward pass is faster on a CPU than SDPA's."""
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    groups, rows = heads // kv_heads, batch * kv_heads
    query = (query * dim**-0.5).view(batch, kv_heads, groups, length, dim)
    parts = []
    for start in range(0, length, CHUNK):
        end = min(length, start + CHUNK)
        asked = query[:, :, :, start:end].reshape(rows, -1, dim)
        keys, values = (x[:, :, :end].reshape(rows, end, dim) for x in (key, value))
        scores = torch.bmm(asked, keys.transpose(1, 2)).view(-1, end - start, end)
        with torch.no_grad():  # what gets no weight gets no gradient either
            scores[..., start:].masked_fill_(future(end - start), -math.inf)
        weights = scores.softmax(-1)
        out = torch.bmm(weights.view(rows, -1, end), values)
        parts.append(out.view(batch, heads, end - start, dim))
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register("clipart_matmul", attend)


def loss_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Nats of each token behind the prompt, [B, 576] or [B, 600]."""
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, MAX_WORDS:]).float()
    said = tokens[:, MAX_WORDS + 1 :]
    return F.cross_entropy(logits.flatten(0, 1), said.flatten(), reduction="none").view_as(said)


@torch.no_grad()
def bits_per_code(
    model: LlamaForCausalLM,
    tokens: ClipartTokens,
    words: list[tuple[str, ...]],
    codes: Tensor,
    *,
    line_breaks: bool,
    batch: int = 20,
) -> float:
    """Mean of ``-log2 p`` of the codes (line breaks not counted), all words given."""
    total = 0.0
    for first in range(0, len(words), batch):
        prompts = [
            tokens.prefix(some, line_breaks=line_breaks) for some in words[first : first + batch]
        ]
        picture = tokens.picture(codes[first : first + batch].long(), line_breaks=line_breaks)
        nats = loss_of(model, torch.cat([torch.tensor(prompts), picture], dim=1))
        total += nats[picture != tokens.line_break].double().sum().item()
    return total / codes.numel() / math.log(2)


# -- the run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What determines the weights; stored with every checkpoint and compared on resuming."""

    vqgan: str  # SHA-256 of its file: codes of another one mean something else
    vocabulary: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    rope_theta: float
    batch: int
    muon_lr: float
    adam_lr: float
    warmup: int
    ema: float
    seed: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )


class Run:
    """Weights, optimisers and clock of one training run, and how they are saved."""

    def __init__(self, recipe: Recipe, out: Path, steps: int, falling: int) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.out, self.steps, self.falling = recipe, out, steps, falling
        self.master = LlamaForCausalLM(recipe.config())
        self.ema = LlamaForCausalLM(recipe.config()).eval()
        self.ema.load_state_dict(self.master.state_dict())
        self.fast = LlamaForCausalLM(recipe.config()).bfloat16()
        self.fast.set_attn_implementation("clipart_matmul")
        named = dict(self.master.named_parameters())
        hidden = [p for n, p in named.items() if p.ndim == 2 and ".layers." in n]
        rest = [p for n, p in named.items() if not (p.ndim == 2 and ".layers." in n)]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(hidden, lr=recipe.muon_lr),
            torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peaks = [recipe.muon_lr, recipe.adam_lr]
        self.step, self.seconds = 0, 0.0

    def rate(self) -> float:
        """Learning rate of the coming step, as a share of the peak."""
        rising = min(1.0, (self.step + 1) / self.recipe.warmup)
        return min(rising, (self.steps - self.step) / self.falling if self.falling else 1.0)

    def train_step(self, tokens: Tensor) -> float:
        """One step; returns the batch's bits per token."""
        with torch.no_grad():
            for fast, master in zip(self.fast.parameters(), self.master.parameters(), strict=True):
                fast.copy_(master)
                fast.grad = None
        loss = loss_of(self.fast, tokens).mean()
        loss.backward()
        for fast, master in zip(self.fast.parameters(), self.master.parameters(), strict=True):
            assert fast.grad is not None
            master.grad = fast.grad.float()
        share = self.rate()
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * share
            optimiser.step()
        self.step += 1
        # A short memory at first: an average over random weights helps nobody.
        decay = min(self.recipe.ema, self.step / (self.step + 10))
        with torch.no_grad():
            for ema, master in zip(self.ema.parameters(), self.master.parameters(), strict=True):
                ema.lerp_(master, 1 - decay)
        return loss.item() / math.log(2)

    def save(self, name: str = "checkpoint.pt") -> None:
        """Replace the checkpoint in one move."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "falls_from": self.steps - self.falling,
            "seconds": self.seconds,
            "master": self.master.state_dict(),
            "ema": self.ema.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        replace_checkpoint(self.out / name, state)

    def load(self, path: Path, *, resumes: bool) -> None:
        """Go on from a checkpoint, of this run or (``--start``) of another.

        Raises:
            BadParameter: it is of another recipe or shape, or of a rate that had begun to fall
                elsewhere than this run's does.
        """
        state = torch.load(path, weights_only=True)
        shape = ("vocabulary", "layers", "width", "heads", "kv_heads", "head_dim", "hidden")
        names = None if resumes else shape
        require_same(path, state["recipe"], asdict(self.recipe), names)
        fell, falls = state["falls_from"], self.steps - self.falling
        if state["step"] > fell and not (resumes and fell == falls):
            raise typer.BadParameter(
                f"{path} is at step {state['step']}, and its rate has been falling from {fell} on; "
                f"go on from plateau.pt beside it, with --start and another folder"
            )
        if state["step"] > falls and fell != falls:
            raise typer.BadParameter(
                f"{path} is at step {state['step']}; with --steps {self.steps} and --falling "
                f"{self.falling} the rate would have begun to fall at {falls}: give more --steps"
            )
        self.step, self.seconds = state["step"], state["seconds"]
        self.master.load_state_dict(state["master"])
        self.ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)

    def export(self, folder: Path) -> None:
        """Write the averaged weights as bfloat16, for ``LlamaForCausalLM.from_pretrained``."""
        copy = LlamaForCausalLM(self.recipe.config())
        copy.load_state_dict(self.ema.state_dict())
        replace_folder(folder, copy.bfloat16().save_pretrained)

    def log(self, **entry: Any) -> None:
        write_log(self.out, self.step, self.seconds, **entry)


def of_split(clipart: Clipart, indices: tuple[int, ...]) -> tuple[list[tuple[str, ...]], Pixels]:
    """Words and pictures of some drawings."""
    return [clipart.drawings[index].words for index in indices], clipart.images[list(indices)]


def main(
    clipart: Annotated[Path, typer.Option(help="Folder that clipart.py wrote.")],
    vqgan: Annotated[Path, typer.Option(help="vqgan.safetensors of train_clipart_vqgan.py.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, codes, log and export.")],
    steps: Annotated[int, typer.Option(help="Length of the run.")],
    falling: Annotated[int, typer.Option(help="Of these, the last ones, with falling rate.")] = 0,
    start: Annotated[Path | None, typer.Option(help="A checkpoint of another run.")] = None,
    layers: int = 6,
    width: int = 160,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    hidden: int = 416,
    rope_theta: float = 500.0,
    batch: int = 8,
    muon_lr: float = 0.012,
    adam_lr: float = 4e-3,
    warmup: int = 30,
    ema: float = 0.98,
    seed: int = 0,
    log_every: int = 20,
    save_every: int = 50,
    eval_every: int = 200,
    threads: int = 1,
) -> None:
    """Train clipart-ar; the same command, run again, continues."""
    if not 0 <= falling <= steps:
        raise typer.BadParameter(f"--falling {falling} of --steps {steps}")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    read = read_saved(clipart)
    coder = read_vqgan(vqgan).float()
    tokens = ClipartTokens(read.vocabulary, coder.config.codes)
    recipe = Recipe(
        hashlib.sha256(vqgan.read_bytes()).hexdigest(), tokens.size, layers, width, heads, kv_heads,
        head_dim, hidden, rope_theta, batch, muon_lr, adam_lr, warmup, ema, seed,
    )  # fmt: skip
    run = Run(recipe, out, steps, falling)
    resumes = (out / "checkpoint.pt").exists()
    if resumes or start is not None:
        run.load(out / "checkpoint.pt" if resumes or start is None else start, resumes=resumes)
    words, images = of_split(read, read.train)
    kept = out / f"codes-{recipe.vqgan[:8]}"
    batches = Batches(tokens, words, Codes(coder, images, kept, seed), batch, seed)
    held_words, held_images = of_split(read, read.held_out)
    held = encode(coder, held_images)
    size = sum(param.numel() for param in run.master.parameters())
    run.log(
        event="resume" if resumes else "start", parameters=size, recipe=asdict(recipe),
        drawings=len(words), steps=steps, falling=falling, threads=threads,
    )  # fmt: skip

    losses = []
    while run.step < steps:
        if run.step == steps - falling:
            run.save("plateau.pt")
        begun = time.perf_counter()
        losses.append(run.train_step(batches.at(run.step)))
        run.seconds += time.perf_counter() - begun
        if run.step % log_every == 0:
            run.log(bits=round(sum(losses) / len(losses), 4), rate=round(run.rate(), 4))
            losses.clear()
        if run.step % save_every == 0:
            run.save()
        if run.step % eval_every == 0:
            run.export(out / "export")
            run.log(held_out=_bits(run, tokens, held_words[:40], held[:40]))
    run.save()
    run.export(out / "export")
    run.log(event="done", held_out=_bits(run, tokens, held_words, held))


def _bits(
    run: Run, tokens: ClipartTokens, words: list[tuple[str, ...]], codes: Tensor
) -> dict[str, float]:
    """Bits per code of both grids."""
    return {
        name: round(bits_per_code(run.ema, tokens, words, codes, line_breaks=breaks), 4)
        for name, breaks in (("plain", False), ("line_breaks", True))
    }


if __name__ == "__main__":
    typer.run(main)
