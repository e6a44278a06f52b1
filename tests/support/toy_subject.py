"""A subject that costs nothing: its figures are arithmetic on the setting and the seed.

Every measurement leaves a line in the file that ``diary`` names, when it begins and when it ends,
so that a test can count them whatever happens to the process in between.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import torch

from kvpolicy import CacheStats, ParameterError, RasterLayout
from kvpolicy.budget.span import tokens_of
from kvpolicy.lab.run.subject import Measurement, Metric


class Toy:
    name = "toy"
    class_names = ("even", "odd")

    def __init__(
        self,
        diary: str = "",
        seconds: float = 0.0,
        broken: str = "",
        mark: str = "",
        items: int = 20,
        kill: str = "",
        optimum: int = 0,
        repeat: bool = False,
    ) -> None:
        self.layout = RasterLayout(rows=16, cols=16, prefix=1)
        self.num_layers = 2
        self.metrics = (
            Metric(name="bits", label="bits", array="bits", items="item"),
            Metric(
                name="spread",
                label="spread",
                better="higher",
                array="drawn",
                statistic=lambda rows: float(rows.std(0).sum()),
            ),
            Metric(name="speed", label="speed", better="higher", timing=True),
        )
        self.diary, self.seconds, self.items = diary, seconds, items
        self.broken, self.mark, self.kill = broken, mark, kill
        self.optimum, self.repeat = optimum, repeat

    def write(self, *words: object) -> None:
        if self.diary:
            with Path(self.diary).open("a") as diary:
                diary.write(" ".join(map(str, words)) + "\n")

    def measure(self, setting, seed, wanted):
        key = setting.policy.key
        name = f"{key}/{setting.budget}/{seed}/{setting.policy.model_dump_json()}"
        self.write("begun", os.getpid(), name)
        time.sleep(self.seconds)
        if self.broken == key and not Path(self.mark).exists():
            raise ParameterError("this cell is broken until the mark is there")
        if self.kill == key + "!":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kill == key and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        share = (
            1.0
            if setting.budget is None
            else float(np.divide(*map(int, setting.budget.split("/"))))
        )
        noise = np.random.default_rng(seed).normal(size=self.items)
        own = np.random.default_rng([seed, len(key)]).normal(size=self.items)
        loss = (
            0.0 if key == "full" else {"random": 0.5}.get(key, 0.0) + (1 - share) * len(key) / 100
        )
        if self.optimum:
            anchors = getattr(setting.policy, "anchors", self.optimum)
            anchors = tokens_of(anchors, self.layout)
            loss += abs(anchors - self.optimum) / 100
        drawn = np.random.default_rng(seed).normal(size=(self.items, 3)) * (1 + loss)
        images = np.random.default_rng(seed).integers(0, 255, (4, 8, 8), np.uint8)
        stats = CacheStats(
            policy=key,
            budgets=(int(256 * share),) * 2,
            peak_tokens=(int(256 * share) + 1,) * 2,
            bytes=int(256 * share) * 100,
            overhead_bytes=8,
            evictions=(0, 0),
            reports=(0, 0),
            seen=257,
        )
        self.write("ended", os.getpid(), name)
        return Measurement(
            arrays={
                "bits": 1 + noise + loss + 0.001 * own,
                "item": np.arange(self.items) + seed * self.items * (not self.repeat),
                "drawn": drawn,
                "torch": np.array([torch.rand(()).item()]),
            },
            stats=stats,
            figures={"speed": 1 / (time.perf_counter() + 1)},
            images=images,
        )


class Drawing(Toy):
    """Better by a hundredth for each token of its decoder's window, up to ``longest``."""

    draws = True

    def __init__(self, longest: int = 300, **options) -> None:
        super().__init__(**options)
        self.longest = longest

    def measure(self, setting, seed, wanted):
        measured = super().measure(setting, seed, wanted)
        window = getattr(setting.decoder, "window", 0)
        measured.arrays["bits"][:] -= (self.longest - abs(self.longest - window)) / 100
        return measured
