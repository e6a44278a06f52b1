"""Train ``fashion-ar``, the autoregressive image model that ships with kvpolicy.

A class-conditional model of Fashion-MNIST, one token a pixel, read row by row::

    [class] [pixel 0] [pixel 1] ... [pixel 783]

Tokens 0..15 are grey levels (``pixel // 16``), 16..25 the ten classes, 26 "any class" (given for a
tenth of the training images, so that the model can also be used without a condition). The network
is transformers' own ``LlamaForCausalLM``, unchanged; only the training is special, because it has
to fit on two CPU cores in about an hour:

* forward and backward compiled, in bfloat16, with float32 master weights;
* where the CPU has AMX tiles, a faster backward pass of attention (``fashion_ar_amx.py``);
* Muon for the hidden matrices, AdamW for embedding, head and norms;
* constant learning rate, then a linear decay to zero over the last part (``--cooldown``).

Every batch is a pure function of ``(seed, step)`` and checkpoints are replaced atomically, so that
the same command, run again, continues where the last one stopped. With ``--minutes`` the number of
steps is settled on the way, from the measured speed; the log records it, and the same number given
as ``--steps`` repeats the run.

    python examples/training/train_fashion_ar.py --out runs/fashion-ar --minutes 80
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import fashion_ar_amx
import torch
import torch.nn.functional as F
import typer
from fashion_mnist import ANY_CLASS, FOLDER, VOCAB, read_tokens
from runs import replace_checkpoint, replace_folder, require_same, write_log
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

ANY_CLASS_SHARE = 0.1
HELD_OUT = 2_000


# -- data ------------------------------------------------------------------------------------------


def batch_at(step: int, *, data: Tensor, batch: int, seed: int) -> Tensor:
    """The tokens of one step, int64 [B, 785]; each epoch is a seeded permutation of the images."""
    epoch, index = divmod(step, len(data) // batch)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed * 7_919 + epoch))
    tokens = data[order[index * batch : (index + 1) * batch]].long()
    draws = torch.Generator().manual_seed(seed * 1_000_003 + step)
    tokens[torch.rand(batch, generator=draws) < ANY_CLASS_SHARE, 0] = ANY_CLASS
    return tokens


# -- optimiser -------------------------------------------------------------------------------------


def orthogonalise(update: Tensor, iterations: int = 5) -> Tensor:
    """Replace the singular values of a matrix by about 1 (Newton-Schulz, quintic).

    Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is orthogonalised; for the hidden matrices only."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
                buffer.lerp_(param.grad, 1 - group["momentum"])
                update = orthogonalise(param.grad.lerp(buffer, group["momentum"]))
                # One step moves every output by about `lr`, whatever the matrix's shape.
                scale = math.sqrt(max(1.0, param.shape[0] / param.shape[1]))
                param.add_(update, alpha=-group["lr"] * scale)


# -- the run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What determines the weights; stored with every checkpoint and compared on resuming."""

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
    cooldown: float
    ema: float
    seed: int
    validation: bool

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=VOCAB,
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

    def rate_at(self, step: int, total: int | None) -> float:
        """Learning rate at a step, as a share of the peak."""
        rising = min(1.0, (step + 1) / self.warmup)
        if total is None:
            return rising
        return min(rising, (total - step) / (self.cooldown * total))


def loss_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Nats per pixel, [B, pixels]: every pixel given all before it and the class."""
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


@torch.no_grad()
def bits_per_pixel(model: LlamaForCausalLM, tokens: Tensor, batch: int = 50) -> float:
    """Mean of ``-log2 p`` over all 784 pixels, the correct class given."""
    total = sum(loss_of(model, part.long()).double().sum().item() for part in tokens.split(batch))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1)) / math.log(2)


class Run:
    """Weights, optimisers and clock of one training run, and how they are saved."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.out = recipe, out
        self.master = LlamaForCausalLM(recipe.config())
        self.ema = LlamaForCausalLM(recipe.config()).eval()
        self.ema.load_state_dict(self.master.state_dict())
        self.fast = LlamaForCausalLM(recipe.config()).bfloat16()
        if fashion_ar_amx.available() and recipe.head_dim == fashion_ar_amx.HEAD_DIM:
            AttentionInterface.register("fashion_ar_amx", fashion_ar_amx.attention_forward)
            self.fast.set_attn_implementation("fashion_ar_amx")
        self.loss = torch.compile(lambda tokens: loss_of(self.fast, tokens).mean(), dynamic=False)
        named = dict(self.master.named_parameters())
        hidden = [p for n, p in named.items() if p.ndim == 2 and ".layers." in n]
        rest = [p for n, p in named.items() if not (p.ndim == 2 and ".layers." in n)]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(hidden, lr=recipe.muon_lr),
            torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.peaks = [recipe.muon_lr, recipe.adam_lr]
        self.step, self.total, self.seconds = 0, None, 0.0

    def train_step(self, tokens: Tensor) -> float:
        """One step; returns the batch's bits per pixel."""
        with torch.no_grad():
            for fast, master in zip(self.fast.parameters(), self.master.parameters(), strict=True):
                fast.copy_(master)
                fast.grad = None
        loss = self.loss(tokens)
        loss.backward()
        for fast, master in zip(self.fast.parameters(), self.master.parameters(), strict=True):
            master.grad = fast.grad.float()
        share = self.recipe.rate_at(self.step, self.total)
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

    def save(self) -> None:
        """Replace the checkpoint in one move."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "total": self.total,
            "seconds": self.seconds,
            "master": self.master.state_dict(),
            "ema": self.ema.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        replace_checkpoint(self.out / "checkpoint.pt", state)

    def load(self) -> bool:
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        require_same(path, state["recipe"], asdict(self.recipe))
        self.step, self.total, self.seconds = state["step"], state["total"], state["seconds"]
        self.master.load_state_dict(state["master"])
        self.ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        return True

    def export(self, folder: Path) -> None:
        """Write the averaged weights as bfloat16, for ``LlamaForCausalLM.from_pretrained``."""
        copy = LlamaForCausalLM(self.recipe.config())
        copy.load_state_dict(self.ema.state_dict())
        replace_folder(folder, copy.bfloat16().save_pretrained)

    def log(self, **entry: Any) -> None:
        write_log(self.out, self.step, self.seconds, **entry)


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, log and export.")],
    data: Annotated[Path, typer.Option(help="Folder with the four gzipped IDX files.")] = FOLDER,
    steps: Annotated[int | None, typer.Option(help="Length of the run.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Or: time that the run may take.")] = None,
    layers: int = 4,
    width: int = 160,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    hidden: int = 512,
    rope_theta: float = 500.0,
    batch: int = 16,
    muon_lr: float = 0.015,
    adam_lr: float = 4e-3,
    warmup: int = 30,
    cooldown: Annotated[float, typer.Option(help="Share of the steps with falling rate.")] = 0.55,
    ema: float = 0.99,
    seed: int = 0,
    validation: Annotated[bool, typer.Option(help="Hold out the last 2,000 images.")] = True,
    log_every: int = 50,
    save_every: int = 100,
    eval_every: int = 500,
    export_every: Annotated[float, typer.Option(help="Minutes between exports.")] = 10.0,
    threads: int = 2,
) -> None:
    """Train fashion-ar; the same command, run again, continues."""
    if (steps is None) == (minutes is None):
        raise typer.BadParameter("give either --steps or --minutes")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(
        layers, width, heads, kv_heads, head_dim, hidden, rope_theta, batch, muon_lr, adam_lr,
        warmup, cooldown, ema, seed, validation,
    )  # fmt: skip
    tokens = read_tokens(data, "train")
    train, held_out = tokens[:-HELD_OUT], tokens[-HELD_OUT:]
    if not validation:
        train = tokens
    run = Run(recipe, out)
    resumed = run.load()
    run.total = run.total or steps
    size = sum(param.numel() for param in run.master.parameters())
    run.log(
        event="resume" if resumed else "start", parameters=size, recipe=asdict(recipe),
        attention=run.fast.config._attn_implementation, threads=threads,
    )  # fmt: skip

    exported, losses = run.seconds, []
    while run.total is None or run.step < run.total:
        begun = time.perf_counter()
        losses.append(run.train_step(batch_at(run.step, data=train, batch=batch, seed=seed)))
        run.seconds += time.perf_counter() - begun
        if (
            run.total is None
            and minutes is not None
            and run.seconds > 60 * minutes * (1 - cooldown)
        ):
            run.total = math.ceil(run.step / (1 - cooldown))
            run.log(event="length settled", total=run.total)
        if run.step % log_every == 0:
            share = recipe.rate_at(run.step, run.total)
            run.log(bits=round(sum(losses) / len(losses), 4), rate=round(share, 4))
            losses.clear()
        if run.step % eval_every == 0:
            run.log(validation_bits=round(bits_per_pixel(run.ema, held_out[:200]), 4))
        if run.step % save_every == 0:
            run.save()
        if run.seconds - exported > 60 * export_every:
            exported = run.seconds
            run.export(out / "export")
    run.save()
    run.export(out / "export")
    run.log(
        event="done",
        validation_bits=round(bits_per_pixel(run.ema, held_out), 4),
        validation_bits_last=round(bits_per_pixel(run.master, held_out), 4),
    )


if __name__ == "__main__":
    typer.run(main)
