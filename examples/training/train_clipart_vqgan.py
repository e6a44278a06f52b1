"""Train the VQGAN of ``clipart-ar``: 96 x 96 pictures in colour as 24 x 24 codes, and back.

The network is :class:`kvpolicy_adapters.images.vqgan.VQGAN`, small; only the training is here:

* what is lost: absolute differences of pixels, of their colour, and of neighbouring pixels on three
  scales, for clip art is edges and flat areas (no adversarial loss: there is nothing to make up);
* codes begin as brightness and colour of their patch and are let go over the first 400 steps: left
  alone, every code told brightness only, because a grey picture is already right at its edges;
* codes are not learned: they are the points of a fixed grid, 8 x 5 x 5 x 5 (finite scalar
  quantization, arXiv:2309.15505), none of which can fall out of use for good;
* drawings are flipped, shifted, scaled, and turned in hue.

Batches are a function of seed and step, and checkpoints are replaced in one move, so the same
command, run again, goes on.

    python examples/training/train_clipart_vqgan.py --out runs/clipart-vqgan --steps 1500
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from clipart import FOLDER, SIZE, Pixels, read_clipart, sheet
from PIL import Image
from runs import replace_checkpoint, write_log
from torch import Tensor

from kvpolicy_adapters.images.vqgan import VQGAN, VQGANConfig, from_pixels, to_pixels
from kvpolicy_adapters.images.vqgan_checkpoint import save_vqgan

LEVELS = (8, 5, 5, 5)
LED = 400  # steps over which codes are let go
CONFIG = VQGANConfig(
    channels=32,
    multipliers=(1, 1, 3),
    blocks=1,
    latent=64,
    codes=math.prod(LEVELS),
    code_size=len(LEVELS),
    attends=(),
    unit_codes=False,
    groups=8,
)


def augment(
    picture: Pixels, draws: np.random.Generator, *, flip: float = 0.5, hue: float = 0.5
) -> Pixels:
    """A picture moved and scaled on its white ground, flipped and of another hue at times."""
    image = Image.fromarray(picture)
    if draws.random() < flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    size = int(draws.integers(SIZE * 3 // 4, SIZE * 9 // 8))
    left, top = (int(draws.integers(min(0, SIZE - size), max(0, SIZE - size) + 1)) for _ in "xy")
    ground = Image.new("RGB", (SIZE, SIZE), "white")
    ground.paste(image.resize((size, size), Image.Resampling.BILINEAR), (left, top))
    if draws.random() < hue:
        angle, saturation, value = ground.convert("HSV").split()
        turn = int(draws.integers(256))
        angle = angle.point([(level + turn) % 256 for level in range(256)])
        ground = Image.merge("HSV", (angle, saturation, value)).convert("RGB")
    return np.asarray(ground)


def batch_at(step: int, *, images: Pixels, batch: int, seed: int) -> Tensor:
    """The pictures of one step, ``[batch, 3, 96, 96]`` from -1 to 1."""
    epoch, index = divmod(step, len(images) // batch)
    order = np.random.default_rng((seed, 0, epoch)).permutation(len(images))
    draws = np.random.default_rng((seed, 1, step))
    chosen = images[order[index * batch : (index + 1) * batch]]
    return from_pixels(torch.from_numpy(np.stack([augment(one, draws) for one in chosen])))


def grid() -> Tensor:
    """The codebook: every combination of evenly spaced numbers from -1 to 1, ``[codes, 4]``."""
    steps = [torch.linspace(-1, 1, levels) for levels in LEVELS]
    return torch.cartesian_prod(*steps)


def quantise(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors ``[B, 4, h, w]`` as the nearest of the grid (gradients go straight through), and how
    far beyond the grid the vectors were."""
    steps = torch.tensor(LEVELS).view(1, -1, 1, 1) - 1
    inside = hidden.clamp(-1, 1)
    nearest = ((inside + 1) / 2 * steps).round() / steps * 2 - 1
    return inside + (nearest - inside).detach(), (hidden - inside).square().mean()


def difference(painted: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of pixels, and of steps between neighbours on three scales."""
    off = painted.float() - images
    colour = off - off.mean(1, keepdim=True)
    loss = off.abs().mean() + 2 * colour.abs().mean()
    for _ in range(3):
        loss = loss + off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean()
        off = F.avg_pool2d(off, 2)
    return loss


def tint(images: Tensor) -> Tensor:
    """Brightness, blue and red less brightness of each patch, ``[B, 3, h, w]`` from -1 to 1."""
    red, green, blue = F.avg_pool2d(images, 4).unbind(1)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue
    return torch.stack([bright, blue - bright, red - bright], dim=1).clamp(-1, 1)


class Run:
    """Network, codes, optimiser and clock, and how they are saved."""

    def __init__(self, out: Path, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.out, self.rate, self.seed = out, rate, seed
        self.model = VQGAN(CONFIG).to(memory_format=torch.channels_last)
        self.model.codebook.data.copy_(grid())
        self.model.codebook.requires_grad_(False)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.seconds = 0, 0.0

    # Not compiled: with torch 2.13 on a CPU, compiled gradients were others, and learned nothing.

    def _encode(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model.to_codes(self.model.encoder(images)).float()

    def _paint(self, vectors: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model.decoder(self.model.from_codes(vectors)).float()

    def forward(self, images: Tensor) -> Tensor:
        hidden = self._encode(images.to(memory_format=torch.channels_last))
        vectors, beyond = quantise(hidden)
        led = max(0.0, 1 - self.step / LED) * (hidden[:, :3] - tint(images)).abs().mean()
        return difference(self._paint(vectors), images) + 0.25 * beyond + 2 * led

    def train_step(self, images: Tensor, total: int) -> float:
        """One step; returns the loss."""
        rising, falling = (self.step + 1) / 100, 2 * (1 - self.step / total)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * min(1.0, rising, falling)
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.forward(images)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def measure(self, images: Pixels) -> dict[str, float]:
        """Mean absolute error of 256 levels, signal to noise, and codes in use, of 2^entropy."""
        codes = torch.cat(
            [
                self.model.encode(from_pixels(torch.from_numpy(part)), 50)
                for part in np.array_split(images, max(1, len(images) // 50))
            ]
        )
        painted = to_pixels(self.model.decode(codes, 50)).float()
        off = painted - torch.from_numpy(images).float()
        share = torch.bincount(codes.flatten(), minlength=CONFIG.codes) / codes.numel()
        bits = -(share[share > 0] * share[share > 0].log2()).sum()
        return {
            "error": round(off.abs().mean().item(), 3),
            "psnr": round(10 * math.log10(255**2 / off.square().mean().item()), 2),
            "codes": round(2 ** bits.item(), 1),
        }

    def save(self) -> None:
        """Replace the checkpoint in one move."""
        state = {
            "config": {**asdict(CONFIG)},
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        replace_checkpoint(self.out / "checkpoint.pt", state)
        save_vqgan(self.model, self.out / "vqgan.safetensors.new")
        os.replace(self.out / "vqgan.safetensors.new", self.out / "vqgan.safetensors")

    def load(self) -> bool:
        """Go on from a checkpoint of the same shape, where there is one."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        if replace(CONFIG, **state["config"]) != CONFIG:
            raise typer.BadParameter(f"{path} has another shape: {state['config']}")
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        return True

    def log(self, **entry: Any) -> None:
        write_log(self.out, self.step, self.seconds, **entry)

    def show(self, images: Pixels) -> None:
        """A sheet of originals, and below each row what is left of them."""
        rows = []
        for row in np.array_split(images[:64], 4):
            painted = self.model.decode(self.model.encode(from_pixels(torch.from_numpy(row))))
            rows += [row, to_pixels(painted).numpy()]
        sheet(np.concatenate(rows)).save(self.out / "reconstructions.png")


def read(data: Path, out: Path) -> tuple[Pixels, Pixels]:
    """Training and held-out pictures; what was read is kept, for reading takes minutes."""
    kept = out / "clipart.npz"
    if not kept.exists():
        clipart = read_clipart(data)
        np.savez(
            kept,
            train=clipart.images[list(clipart.train)],
            held_out=clipart.images[list(clipart.held_out)],
        )
    with np.load(kept) as file:
        return file["train"], file["held_out"]


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, log, weights and sheet.")],
    steps: Annotated[int, typer.Option(help="Length of the run.")],
    data: Annotated[Path, typer.Option(help="Folder of openclipart-png.")] = FOLDER,
    batch: int = 8,
    rate: float = 1e-3,
    seed: int = 0,
    threads: int = 1,
    every: Annotated[int, typer.Option(help="Steps between measurements.")] = 250,
) -> None:
    """Train the VQGAN of clipart-ar; the same command, run again, continues."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = read(data, out)
    run = Run(out, rate, seed)
    resumed = run.load()
    size = sum(parameter.numel() for parameter in run.model.parameters())
    run.log(event="resume" if resumed else "start", parameters=size, drawings=len(train))
    losses: list[float] = []
    while run.step < steps:
        begun = time.perf_counter()
        losses.append(
            run.train_step(batch_at(run.step, images=train, batch=batch, seed=seed), steps)
        )
        run.seconds += time.perf_counter() - begun
        if run.step % every == 0 or run.step == steps:
            run.save()
            run.log(loss=round(sum(losses) / len(losses), 4), **run.measure(held_out[:100]))
            losses.clear()
            run.show(held_out)
    run.log(event="done", **run.measure(held_out))


if __name__ == "__main__":
    typer.run(main)
