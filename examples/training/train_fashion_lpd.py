"""Train ``fashion-lpd``, the image model that ships with kvpolicy for any order of pixels.

The tokens are fashion-ar's, and so is the network: transformers' own ``LlamaForCausalLM``, which
starts from fashion-ar's weights. What is new is how a pixel is asked for (position query tokens,
arXiv:2507.01957, section 3.2)::

    content   [class] [pixel s(0)] [pixel s(1)] ...      s: any order of the 784 pixels
    queries           [query s(0)] [query s(1)] ...      what is asked for, group by group

* A content token is its grey level's embedding, a query token one learned vector; to both is added
  a learned embedding of the row and one of the column, which start at zero.
* Rotary positions are places on the grid, whatever the order: 0 for the class, ``i + 1`` for pixel
  ``i``. The query for pixel ``i`` has position ``i``: in raster order, that is where fashion-ar
  predicts pixel ``i`` from, and why its weights are a good start.
* Content sees the content of earlier groups and of its own. A query sees the content of earlier
  groups and the queries of its own group, and leaves nothing behind.

Both streams run in one pass, so that one pass trains all 784 predictions. Every batch draws its
groups and what kind of order it has (``SHARES``): half of them the one that the decoder draws in by
default; else every image has its own, locality-aware or uniformly random, or comes in raster order.

Batches are a pure function of ``(seed, step)`` and checkpoints are replaced atomically, so that the
same command, run again, continues. Where the learning rate begins to fall, the checkpoint is kept
as ``plateau.pt``: a longer run can start from there (``--start plateau.pt``).

    python examples/training/train_fashion_lpd.py --out runs/fashion-lpd --minutes 50
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from fashion_mnist import COLS, FOLDER, ROWS, read_tokens
from runs import replace_checkpoint, replace_folder, require_same, write_log
from safetensors.torch import save
from torch import Tensor
from train_fashion_ar import HELD_OUT, Muon, batch_at

from kvpolicy import Parallel, RasterLayout
from kvpolicy.layout import group_sizes
from kvpolicy_adapters import zoo
from kvpolicy_adapters.zoo.fashion_lpd_model import FashionLPDModel

PIXELS = ROWS * COLS
GRID = RasterLayout(rows=ROWS, cols=COLS, prefix=1)
#: Of how many batches the order is of this kind.
SHARES = {"decoder": 0.5, "locality": 0.2, "random": 0.15, "raster": 0.15}
#: Passes in which an image comes, drawn anew for every batch that is not raster.
PASSES = {
    "decoder": (32, 48, 48, 64, 128),
    "locality": (32, 48, 64, 128),
    "random": (32, 48, 64, 128, 784),
}
#: Locality-aware orders of each number of passes; turned and mirrored, eight times as many.
ORDERS = 64
REPULSION = 2


# -- orders ----------------------------------------------------------------------------------------


@cache
def locality_order(passes: int, seed: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """A locality-aware order as the decoder draws in, int64 [784], and its groups."""
    decoder = Parallel(passes=passes, repulsion=REPULSION, order_seed=seed)
    layout = decoder.ordered(GRID)
    return np.array(layout.order), layout.groups


def turned(order: np.ndarray, symmetry: int) -> np.ndarray:
    """An order under one of the eight symmetries of the square."""
    row, col = np.divmod(order, COLS)
    if symmetry & 1:
        row = ROWS - 1 - row
    if symmetry & 2:
        col = COLS - 1 - col
    if symmetry & 4:
        row, col = col, row
    return row * COLS + col


def orders_at(step: int, *, batch: int, seed: int) -> tuple[Tensor, tuple[int, ...]]:
    """Orders, int64 [B, 784], and the group sizes that all of them share."""
    draw = np.random.default_rng((seed, step))
    kind = str(draw.choice(list(SHARES), p=list(SHARES.values())))
    if kind == "raster":
        return torch.arange(PIXELS).expand(batch, -1), (1,) * PIXELS
    passes = int(draw.choice(PASSES[kind]))
    if kind == "random":
        orders = [draw.permutation(PIXELS) for _ in range(batch)]
        return torch.from_numpy(np.stack(orders)), group_sizes(PIXELS, passes)
    order, groups = locality_order(passes, 0)
    if kind == "decoder":
        return torch.from_numpy(order).expand(batch, -1), groups
    orders = [
        turned(locality_order(passes, int(draw.integers(ORDERS)))[0], int(draw.integers(8)))
        for _ in range(batch)
    ]
    return torch.from_numpy(np.stack(orders)), groups


# -- one pass over both streams --------------------------------------------------------------------

CHUNK = 112
#: No group is larger.
REACH = 40


def masks_of(groups: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """For each chunk of 112 rows, what its content and its queries may not see: -inf, else 0.

    Content rows ``[112, columns of content]``; query rows ``[112, columns of content and then of
    queries near by]``. Index 0 of the content is the class; index j the pixel that came as j - 1.
    """
    if max(groups) > REACH:
        raise typer.BadParameter(f"groups of up to {REACH} tokens, not {max(groups)}")
    group = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    content = torch.cat([torch.tensor([-1]), group[:-1]])
    masks = []
    for start, end, last, near in chunks():
        own, asked = content[start:end, None], group[start:end, None]
        hidden = torch.cat([content[None, :end] >= asked, group[None, near:last] != asked], dim=1)
        masks.append((_minus_infinity(content[None, :last] > own), _minus_infinity(hidden)))
    return masks


def chunks() -> list[tuple[int, int, int, int]]:
    """Of each chunk: first row, end, end of the columns in reach, and the first query in reach."""
    return [
        (start, start + CHUNK, min(PIXELS, start + CHUNK + REACH), max(0, start - REACH))
        for start in range(0, PIXELS, CHUNK)
    ]


def _minus_infinity(where: Tensor) -> Tensor:
    return torch.zeros(where.shape).masked_fill_(where, -math.inf)


def attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    """Attention of queries [B, H, G, R, D] to keys [B, H, C, D]; [B, H, G, R, D]."""
    batch, heads, per, rows, dim = query.shape
    flat = query.reshape(batch * heads, per * rows, dim)
    scores = torch.bmm(flat, key.reshape(batch * heads, -1, dim).transpose(1, 2))
    scores = scores.view(batch * heads, per, rows, -1).float() + hidden
    weights = scores.softmax(-1).to(value.dtype).view(batch * heads, per * rows, -1)
    out = torch.bmm(weights, value.reshape(batch * heads, -1, dim))
    return out.view(batch, heads, per, rows, dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of [B, H, T, D]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def logits_of(
    model: FashionLPDModel, tokens: Tensor, orders: Tensor, masks: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Logits [B, 784, 27] of the pixels in order of arrival, given the groups before each.

    Args:
        model: the model.
        tokens: class and pixels in raster order, int64 [B, 785].
        orders: raster index of each arrival, int64 [B, 784].
        masks: of :func:`masks_of`.
    """
    net, config = model.llama.model, model.llama.config
    batch = len(tokens)
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    arrived = tokens[:, 1:].gather(1, orders)
    x = torch.cat(
        [
            model.embed_class(tokens[:, :1]),
            model.embed_pixels(arrived[:, :-1], orders[:, :-1]),
            model.embed_queries(orders),
        ],
        dim=1,
    )
    places = torch.cat([torch.zeros_like(orders[:, :1]), orders[:, :-1] + 1, orders], dim=1)
    cos, sin = net.rotary_emb(x, places)
    cos, sin = cos[:, None], sin[:, None]
    for index, layer in enumerate(net.layers):
        attention, last_layer = layer.self_attn, index == len(net.layers) - 1
        normed = layer.input_layernorm(x)
        key = attention.k_proj(normed).view(batch, -1, kv_heads, dim).transpose(1, 2)
        value = attention.v_proj(normed).view(batch, -1, kv_heads, dim).transpose(1, 2)
        key = rotate(key, cos, sin)
        if last_layer:  # nobody reads what content has become
            x, normed = x[:, PIXELS:], normed[:, PIXELS:]
        query = attention.q_proj(normed).view(batch, -1, heads, dim).transpose(1, 2)
        query = rotate(query, cos[:, :, -query.shape[2] :], sin[:, :, -query.shape[2] :])
        query = (query * dim**-0.5).view(batch, kv_heads, heads // kv_heads, -1, dim)
        content, asked = [], []
        for (start, end, last, near), (unseen, hidden) in zip(chunks(), masks, strict=True):
            if not last_layer:
                rows = query[:, :, :, start:end]
                content.append(attend(rows, key[:, :, :last], value[:, :, :last], unseen))
            rows = query[:, :, :, query.shape[3] - PIXELS :][:, :, :, start:end]
            columns = [
                torch.cat([whole[:, :, :end], whole[:, :, PIXELS + near : PIXELS + last]], dim=2)
                for whole in (key, value)
            ]
            asked.append(attend(rows, columns[0], columns[1], hidden))
        out = torch.cat(content + asked, dim=3)
        x = x + attention.o_proj(out.flatten(1, 2).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: Tensor = model.llama.lm_head(net.norm(x))
    return logits.float()


def loss_of(
    model: FashionLPDModel, tokens: Tensor, orders: Tensor, masks: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Nats of each pixel in order of arrival, [B, 784]."""
    logits = logits_of(model, tokens, orders, masks)
    arrived = tokens[:, 1:].gather(1, orders)
    return F.cross_entropy(logits.transpose(1, 2), arrived, reduction="none")


@torch.no_grad()
def bits_per_pixel(
    model: FashionLPDModel, tokens: Tensor, passes: int | None, *, seed: int = 0, batch: int = 8
) -> float:
    """Mean of ``-log2 p``, the class given: raster order for None, else the order of a seed."""
    order, groups = np.arange(PIXELS), (1,) * PIXELS
    if passes is not None:
        order, groups = locality_order(passes, seed)
    masks, total = masks_of(groups), 0.0
    for part in tokens.split(batch):
        orders = torch.from_numpy(order).expand(len(part), -1)
        total += loss_of(model, part.long(), orders, masks).double().sum().item()
    return total / (len(tokens) * PIXELS) / math.log(2)


def measured(model: FashionLPDModel, tokens: Tensor) -> dict[str, float]:
    """Bits per pixel in raster order, as the decoder draws, and in an order never trained on."""
    return {
        "raster": round(bits_per_pixel(model, tokens, None), 4),
        "passes_48": round(bits_per_pixel(model, tokens, 48), 4),
        "other_48": round(bits_per_pixel(model, tokens, 48, seed=ORDERS), 4),
    }


# -- the run ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What determines the weights; stored with every checkpoint and compared on resuming."""

    batch: int
    muon_lr: float
    adam_lr: float
    warmup: int
    cooldown: float
    ema: float
    seed: int

    def rate_at(self, step: int, total: int | None) -> float:
        """Learning rate at a step, as a share of the peak."""
        rising = min(1.0, (step + 1) / self.warmup)
        if total is None:
            return rising
        return min(rising, (total - step) / (self.cooldown * total))


class Run:
    """Weights, optimisers and clock of one training run, and how they are saved."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        start = zoo.load("fashion-ar").model
        torch.manual_seed(recipe.seed)
        self.master = FashionLPDModel.from_raster(start).requires_grad_(True)
        self.ema = FashionLPDModel.from_raster(start).requires_grad_(False)
        self.fast = FashionLPDModel.from_raster(start).bfloat16().requires_grad_(True)
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
        orders, groups = orders_at(self.step, batch=len(tokens), seed=self.recipe.seed)
        with torch.no_grad():
            for fast, master in zip(self.fast.parameters(), self.master.parameters(), strict=True):
                fast.copy_(master)
                fast.grad = None
        loss = loss_of(self.fast, tokens, orders, masks_of(groups)).mean()
        loss.backward()
        for fast, master in zip(self.fast.parameters(), self.master.parameters(), strict=True):
            assert fast.grad is not None
            master.grad = fast.grad.float()
        share = self.recipe.rate_at(self.step, self.total)
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * share
            optimiser.step()
        self.step += 1
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
            "total": self.total,
            "seconds": self.seconds,
            "master": self.master.state_dict(),
            "ema": self.ema.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        replace_checkpoint(self.out / name, state)

    def load(self, path: Path, *, same_recipe: bool) -> None:
        """Go on from a checkpoint; one of another recipe gives weights and optimisers only."""
        state = torch.load(path, weights_only=True)
        if same_recipe:
            require_same(path, state["recipe"], asdict(self.recipe))
        self.step, self.seconds = state["step"], state["seconds"]
        self.total = state["total"] if same_recipe else None
        self.master.load_state_dict(state["master"])
        self.ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)

    def export(self, folder: Path) -> None:
        """Write the averaged weights as bfloat16, and the configuration of the network."""
        weights = {n: p.detach().bfloat16() for n, p in self.ema.state_dict().items()}

        def write(fresh: Path) -> None:
            (fresh / "model.safetensors").write_bytes(save(weights))
            self.ema.llama.config.save_pretrained(fresh)

        replace_folder(folder, write)

    def log(self, **entry: Any) -> None:
        write_log(self.out, self.step, self.seconds, **entry)


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, log and export.")],
    data: Annotated[Path, typer.Option(help="Folder with the four gzipped IDX files.")] = FOLDER,
    steps: Annotated[int | None, typer.Option(help="Length of the run.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Or: time that the run may take.")] = None,
    start: Annotated[Path | None, typer.Option(help="A checkpoint of another run.")] = None,
    batch: int = 4,
    muon_lr: float = 0.008,
    adam_lr: float = 3e-3,
    warmup: int = 30,
    cooldown: Annotated[float, typer.Option(help="Share of the steps with falling rate.")] = 0.5,
    ema: float = 0.98,
    seed: int = 0,
    log_every: int = 50,
    save_every: int = 50,
    eval_every: int = 250,
    threads: int = 1,
) -> None:
    """Train fashion-lpd; the same command, run again, continues."""
    if (steps is None) == (minutes is None):
        raise typer.BadParameter("give either --steps or --minutes")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(batch, muon_lr, adam_lr, warmup, cooldown, ema, seed)
    tokens = read_tokens(data, "train")
    train, held_out = tokens[:-HELD_OUT], tokens[-HELD_OUT:]
    run = Run(recipe, out)
    resumed = (out / "checkpoint.pt").exists()
    if resumed or start is not None:
        path = out / "checkpoint.pt" if resumed or start is None else start
        run.load(path, same_recipe=resumed)
    run.total = run.total or steps
    size = sum(param.numel() for param in run.master.parameters())
    run.log(
        event="resume" if resumed else "start", parameters=size, recipe=asdict(recipe),
        shares=SHARES, passes=PASSES, threads=threads,
    )  # fmt: skip

    losses = []
    while run.total is None or run.step < run.total:
        begun = time.perf_counter()
        losses.append(run.train_step(batch_at(run.step, data=train, batch=batch, seed=seed)))
        run.seconds += time.perf_counter() - begun
        if run.total is None and run.seconds > 60 * (minutes or 0) * (1 - cooldown):
            run.total = math.ceil(run.step / (1 - cooldown))
            run.log(event="length settled", total=run.total)
            run.save("plateau.pt")
        if run.step % log_every == 0:
            share = recipe.rate_at(run.step, run.total)
            run.log(bits=round(sum(losses) / len(losses), 4), rate=round(share, 4))
            losses.clear()
        if run.step % save_every == 0:
            run.save()
        if run.step % eval_every == 0:
            run.export(out / "export")
            run.log(**measured(run.ema, held_out[:32]))
    run.save()
    run.export(out / "export")
    run.log(event="done", **measured(run.ema, held_out[:400]))


if __name__ == "__main__":
    typer.run(main)
