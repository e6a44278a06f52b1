"""Draw every item that has not been drawn: here, batch by batch, or by workers elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
import time
import traceback
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from kvpolicy.cache.cache import PolicyCache
from kvpolicy.decoding import Decoder, Sequential
from kvpolicy.errors import ModelError, ParameterError, first_line
from kvpolicy.lab.draw.batch_size import BatchSize
from kvpolicy.lab.draw.folder import DrawFolder, DrawPlan
from kvpolicy.lab.draw.image_model import ImageModel, ModelSource, Sampler, load_image_model
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.executor import Executor
from kvpolicy.lab.run.provenance import versions
from kvpolicy.lab.run.runner import alone, writing
from kvpolicy.lab.run.subject import Setting, layout_under
from kvpolicy.lab.run.worker import Raised, threads_of_torch
from kvpolicy.named import make_policy

__all__ = ["Asked", "DrawTask", "Picture", "Pictures", "Watcher", "draw", "loaded_model", "ran_out"]

#: Images of a worker's task, where no batch was asked for; what a lost worker costs.
_TASK = 32
_OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator")


class Watcher(Protocol):
    """Who wants to know how drawing goes."""

    def begun(self, finished: int, total: int) -> None:
        """How many images an earlier run has drawn already, of how many."""

    def drew(self, count: int, batch: int) -> None:
        """So many images more lie safe in the folder; ``batch`` is how many come at a time."""


@dataclass(frozen=True)
class Asked:
    """What is drawn, but for the items.

    Attributes:
        source: the model.
        policy: its name.
        parameters: of the policy that differ from its defaults.
        budget: in any spelling; None for everything.
        sampler: how tokens are drawn.
        seed: of all random numbers.
    """

    source: ModelSource
    policy: str
    parameters: dict[str, Any]
    budget: str | None
    sampler: Sampler
    seed: int = 0

    @property
    def setting(self) -> Setting:
        """Policy, budget and decoder, made.

        Raises:
            UnknownNameError: nothing has this name.
            ParameterError: a parameter is out of range.
        """
        policy = make_policy(self.policy, self.parameters)
        return Setting(policy, self.budget, Decoder.parse(self.sampler.decoder))

    @property
    def own_chance(self) -> bool:
        """Whether each picture is drawn with its own numbers; a batch of others shares them."""
        return isinstance(self.setting.decoder, Sequential)

    def plan(self, items: Sequence[Item], batch: int | None = None) -> DrawPlan:
        """What a folder says of it."""
        listed = [(item.path, item.row, item.sample, item.prompt) for item in items]
        path = self.source.path
        file = None if path is None else Path(path)
        return DrawPlan(
            model=self.source.name if path is None else f"{self.source.name}:{path}",
            model_bytes=file.stat().st_size if file is not None and file.is_file() else None,
            vq=self.source.vq,
            options=dict(self.source.options),
            policy=self.policy,
            parameters=make_policy(self.policy, self.parameters).model_dump(mode="json"),
            budget=self.budget,
            sampler=self.sampler.model_dump(),
            seed=self.seed,
            dtype=self.source.dtype,
            batch=None if self.own_chance else batch or _TASK,
            items=hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
            count=len(items),
        )


@dataclass(frozen=True)
class Picture:
    """One image as it goes into its file, and what its line says."""

    path: str
    png: bytes
    about: dict[str, Any]


@dataclass(frozen=True)
class Pictures:
    """What a task gives.

    Attributes:
        pictures: in the order of the items.
        seconds: that drawing took, pixels included.
        image_bytes: of the caches of one image.
    """

    pictures: tuple[Picture, ...]
    seconds: float
    image_bytes: int


@dataclass(frozen=True)
class DrawTask:
    """Items that a worker draws; see :class:`kvpolicy.lab.run.executor.Job`."""

    id: str
    asked: Asked
    items: tuple[Item, ...]
    threads: int | None = None

    @property
    def gpus(self) -> int:
        """Devices that the worker needs to itself."""
        return int(self.asked.source.device.startswith("cuda"))

    def perform(self) -> Pictures | Raised:
        """Draw; in halves where memory runs out."""
        try:
            return self._in_halves(self.items)
        except Exception as error:
            about = " ".join(f"{type(error).__name__}: {error}".split())
            return Raised(about[:500], traceback.format_exc())

    def draw(self) -> Pictures:
        """Draw all items at once."""
        return self._batch(self.items)

    def _in_halves(self, items: tuple[Item, ...]) -> Pictures:
        try:
            return self._batch(items)
        except (RuntimeError, MemoryError) as error:
            if len(items) == 1 or not ran_out(error) or not self.asked.own_chance:
                raise
        half = len(items) // 2
        first, second = self._in_halves(items[:half]), self._in_halves(items[half:])
        return Pictures(
            first.pictures + second.pictures, first.seconds + second.seconds, second.image_bytes
        )

    def _batch(self, items: tuple[Item, ...]) -> Pictures:
        asked = self.asked
        begun = time.perf_counter()
        with nullcontext() if self.threads is None else threads_of_torch(self.threads):
            drawn = loaded_model(asked.source).draw(items, asked.setting, asked.sampler, asked.seed)
            pngs = [_png(image) for image in drawn.images]
        seconds = time.perf_counter() - begun
        peaks = [peak for stats in drawn.stats for peak in stats.peak_tokens]
        common = {
            "model": asked.source.name,
            "policy": asked.policy,
            "budget": asked.budget,
            "decoder": asked.sampler.decoder,
            "seed": asked.seed,
            "batch": len(items),
            "seconds": round(seconds / len(items), 4),
            "peak_tokens": round(sum(peaks) / len(peaks), 2),
            "versions": versions(),
        }
        pictures = tuple(
            Picture(item.path, png, {**_asked_for(item), "sample": item.sample, **common})
            for item, png in zip(items, pngs, strict=True)
        )
        image_bytes = sum(stats.bytes for stats in drawn.stats) // len(items)
        return Pictures(pictures, seconds, image_bytes)


def draw(
    asked: Asked,
    items: Sequence[Item],
    path: Path,
    watcher: Watcher,
    *,
    batch: int | None = None,
    executor: Executor | None = None,
    threads: int | None = None,
) -> tuple[DrawFolder, list[Raised]]:
    """Draw what has not been drawn, and keep each batch as it ends.

    End it at any moment, in any way: what lies in the folder stays, and the same call goes on.

    Args:
        asked: model, policy, budget, sampler, seed.
        items: which images.
        path: the folder.
        watcher: is told how it goes.
        batch: images at a time; None to find it.
        executor: whose workers draw; None to draw in this process.
        threads: of torch; None for its own number.

    Returns:
        The folder, and what went wrong in workers.

    Raises:
        ParameterError: an item can't be drawn, or the folder is another's; before anything runs.
        BudgetError: the budget is too small for the policy.
        ModelError: not even one image at a time has room.
        RunFolderError: the folder can't be written, or another run is at work in it.
    """
    model = loaded_model(asked.source)
    check(model, asked, items)
    plan = asked.plan(items, batch)
    failures: list[Raised] = []
    with alone(path):
        with writing(path):
            folder = DrawFolder(path, plan, items)
        waiting = [item for item in items if item.path not in folder.finished]
        watcher.begun(len(items) - len(waiting), len(items))
        by_path = {item.path: item for item in waiting}
        if plan.batch is not None:
            # A picture is its batch's: what is missing is drawn with all that were beside it.
            batch = plan.batch
            whole = [items[first : first + batch] for first in range(0, len(items), batch)]
            waiting = [
                item for some in whole if any(one.path in by_path for one in some) for item in some
            ]

        def keep(done: Pictures) -> int:
            fresh = [picture for picture in done.pictures if picture.path in by_path]
            with writing(path):
                for picture in fresh:
                    folder.keep(by_path[picture.path], picture.png, picture.about)
            return len(fresh)

        if executor is not None:
            size = batch or _TASK
            tasks = [
                DrawTask(waiting[first].path, asked, tuple(waiting[first : first + size]), threads)
                for first in range(0, len(waiting), size)
            ]
            with closing(executor.run(tasks)) as outcomes:
                for _, outcome in outcomes:
                    if isinstance(outcome, Pictures):
                        watcher.drew(keep(outcome), size)
                    elif isinstance(outcome, Raised):
                        failures.append(outcome)
            return folder, failures

        sizes = BatchSize(batch)
        while waiting:
            some = tuple(waiting[: sizes.size])
            try:
                done = DrawTask(some[0].path, asked, some, threads).draw()
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                if plan.batch is not None:
                    raise ModelError(
                        f"{len(some)} images at a time have no room on {asked.source.device}, and "
                        f"decoder {asked.sampler.decoder!r} draws a batch as one; take a smaller "
                        f"--batch and another folder"
                    ) from error
                if not sizes.ran_out(len(some)):
                    raise ModelError(
                        f"one image at a time has no room on {asked.source.device} "
                        f"({first_line(error)}); a smaller --budget or --dtype bfloat16 "
                        f"takes less"
                    ) from error
                continue
            kept = keep(done)
            del waiting[: len(some)]
            on_cpu = asked.source.device == "cpu"
            sizes.went_well(len(some), done.seconds, done.image_bytes, on_cpu)
            watcher.drew(kept, sizes.size)
    return folder, failures


def check(model: ImageModel, asked: Asked, items: Sequence[Item]) -> None:
    """Refuse what can't be drawn, before anything is.

    Raises:
        ParameterError: there are no items, or one can't be drawn.
        LayoutError: the model can't draw with this decoder, or the policy not in its order.
        BudgetError: the budget is too small for the policy on this layout.
    """
    if not items:
        raise ParameterError("nothing to draw: give --classes or --prompts")
    setting = asked.setting
    layout = layout_under(model, setting.decoder)
    PolicyCache(setting.policy, setting.budget, layout=layout, num_layers=model.num_layers)
    for item in items:
        model.check(item, asked.sampler)


@lru_cache(maxsize=1)
def loaded_model(source: ModelSource) -> ImageModel:
    """The model, loaded once a process."""
    return load_image_model(source)


def ran_out(error: BaseException) -> bool:
    """Whether an exception of torch's says that memory has run out."""
    return isinstance(error, MemoryError) or any(word in str(error) for word in _OUT_OF_MEMORY)


def _asked_for(item: Item) -> dict[str, Any]:
    if item.prompt is None:
        return {"class": item.row}
    return {"prompt": item.prompt, "prompt_number": item.row}


def _png(image: np.ndarray[Any, Any]) -> bytes:
    written = io.BytesIO()
    Image.fromarray(image).save(written, "PNG")
    return written.getvalue()
