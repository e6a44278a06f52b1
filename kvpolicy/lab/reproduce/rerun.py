"""Measure rows of a published table: one batch of images each, pixels included."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from kvpolicy.errors import ParameterError, first_line, near_matches
from kvpolicy.lab.draw.draw import Asked, DrawTask, loaded_model, ran_out
from kvpolicy.lab.draw.image_model import ModelSource, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.reproduce.published import Row
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.provenance import versions
from kvpolicy.lab.run.runner import alone, writing

__all__ = ["OURS", "Measured", "Results", "command_of", "rerun", "sources_of"]

_PROMPT = "A red fox in the snow"
#: The caches that a row of the full cache is measured with: ours, and those of transformers, which
#: an image model takes by its option ``cache``.
OURS, _CACHES = "kvpolicy", ("kvpolicy", "dynamic", "static")


class Measured(BaseModel):
    """One row, measured.

    Attributes:
        model: key of the published model.
        budget: as published; None for the full cache.
        cache: ``kvpolicy``, or one of transformers', which the full cache is compared with.
        batch: images in the batch.
        seconds: of drawing it, pixels included.
        memory_gb: peak memory of the device; None on a processor, which does not say.
        cache_gb: keys and values allocated for the batch.
        peak_tokens: most that a head held, prefix included, mean over layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    budget: str | None
    batch: int
    seconds: float
    memory_gb: float | None
    cache_gb: float
    peak_tokens: float
    cache: str = OURS


class Results(BaseModel):
    """``results.json``: what was measured, on what.

    Attributes:
        policy: whose table it is.
        device: what computed.
        versions: of Python and the packages that compute.
        tiny: whether the model was a tiny one with random weights, whose figures mean nothing.
        rows: in the table's order.
        left_out: what could not be measured, and why; it is tried again by the next call.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str
    device: str
    versions: dict[str, str]
    tiny: bool
    rows: tuple[Measured, ...] = ()
    left_out: dict[str, str] = {}


def sources_of(
    table: Sequence[Row],
    files: Mapping[str, str],
    vqs: Mapping[str, str],
    device: str,
    dtype: str | None,
) -> dict[str, ModelSource]:
    """Where the models of a table come from, for those for which files are given.

    Args:
        table: the rows.
        files: a model's key, and what ``--model`` would say.
        vqs: a model's key, and its decoder's file.
        device: where to compute.
        dtype: of the weights.

    Raises:
        ParameterError: a key is no model of the table, or a decoder's file is missing.
    """
    models = {row.model.key: row.model for row in table}
    for key in (*files, *vqs):
        if key not in models:
            raise ParameterError(f"the table has no model {key!r}; {near_matches(key, models)}")
    found = {}
    for key, file in files.items():
        if models[key].vq is not None and key not in vqs:
            raise ParameterError(f"{key} needs --vq {key}={models[key].vq}")
        found[key] = ModelSource.parse(file, vq=vqs.get(key), device=device, dtype=dtype)
    return found


def command_of(row: Row, policy: str) -> str:
    """The command that draws a row's pictures, for evaluators of quality."""
    model = row.model
    words = ["kvpolicy", "draw", "--model", model.example]
    words += ["--vq", model.vq] if model.vq else []
    words += ["--classes", "0-999", "--per-class", "50"] if model.classes else []
    words += [] if model.classes else ["--prompts", "prompts.txt"]
    words += ["--policy", policy if row.budget else "full"]
    words += ["--budget", row.budget] if row.budget else []
    words += ["--batch", str(model.batch), "--device", "cuda", "--npz"]
    words += ["--out", f"{model.key}-{(row.budget or 'full').replace('/', '-')}"]
    return shlex.join(words)


def rerun(
    policy: str,
    table: Sequence[Row],
    sources: Mapping[str, ModelSource],
    out: Path,
    tell: Callable[[str, Measured | str], None],
    *,
    batch: int | None = None,
    tiny: bool = False,
) -> Results:
    """Measure the rows whose models are there; what has been measured is kept.

    The full cache is ours (policy ``full``, one allocation, the same kernels), so that a speed-up
    is over the best that this machine does without evicting; those of transformers are measured
    beside it. One that a model can't be drawn with, or a row that has no room in memory, is left
    out, which the results say.

    Args:
        policy: whose table it is.
        table: its rows.
        sources: the models, by key.
        out: folder for ``results.json``; gone on with.
        tell: is told of each row, and its figures or why it is left out.
        batch: images at a time; as published, if none.
        tiny: whether the models are stand-ins.

    Raises:
        ParameterError: the folder holds results of another machine, versions or policy.
        RunFolderError: the folder can't be written.
    """
    device = next((source.device for source in sources.values()), "cpu")
    fresh = Results(policy=policy, device=_name(device), versions=versions(), tiny=tiny)
    file = out / "results.json"
    with alone(out):
        done: dict[tuple[str, str | None, str, int], Measured] = {}
        left_out: dict[str, str] = {}
        if file.exists():
            held = Results.model_validate_json(file.read_bytes())
            if held.model_copy(update={"rows": (), "left_out": {}}) != fresh:
                raise ParameterError(
                    f"{file} was measured by other versions, on another device or of another "
                    f"policy; take another --out"
                )
            done = {(row.model, row.budget, row.cache, row.batch): row for row in held.rows}
        for row in table:
            source = sources.get(row.model.key)
            if source is None:
                continue
            count = batch or row.model.batch
            for cache in (OURS,) if row.budget else _CACHES:
                key = (row.model.key, row.budget, cache, count)
                label = f"{row.model.label}, {row.budget or 'full cache'}"
                label += "" if cache == OURS else f" of transformers ({cache})"
                if key not in done:
                    try:
                        own = source if cache == OURS else _drawing_with(source, cache)
                        done[key] = _measure(row, policy, own, count, cache)
                    except _NotServed as error:
                        left_out[label] = first_line(error)
                    except (RuntimeError, MemoryError) as error:
                        if not ran_out(error):
                            raise
                        left_out[label] = f"out of memory: {first_line(error)}"
                    rows = tuple(done.values())
                    results = fresh.model_copy(update={"rows": rows, "left_out": left_out})
                    with writing(out):
                        write_whole(file, json.dumps(results.model_dump(), indent=2) + "\n")
                tell(label, done[key] if key in done else left_out[label])
    rows = tuple(done.values())
    return fresh.model_copy(update={"rows": rows, "left_out": left_out})


class _NotServed(Exception):
    """A model does not draw with one of transformers' caches."""


def _drawing_with(source: ModelSource, cache: str) -> ModelSource:
    """The source, drawing with a cache of transformers.

    Raises:
        _NotServed: its model can't. One that takes the option and says nothing of it (``cache``)
            would be measured with another cache than the row names.
    """
    source = replace(source, options=(*source.options, ("cache", cache)))
    try:
        served = getattr(loaded_model(source), "cache", OURS)
    except ParameterError as error:
        raise _NotServed(str(error)) from error
    if served != cache:
        raise _NotServed(f"image model {source.name!r} draws with no cache of transformers")
    return source


def _measure(row: Row, policy: str, source: ModelSource, batch: int, cache: str) -> Measured:
    """Draw a short batch, so that nothing is made for the first time, and then the real one."""
    prompt = None if row.model.classes else _PROMPT
    items = tuple(
        Item(f"{number}.png", number % 10 if prompt is None else 0, number, prompt)
        for number in range(batch)
    )
    name = policy if row.budget else "full"
    asked = Asked(source, name, {}, row.budget, Sampler())
    DrawTask("warm", asked, items[:1]).draw()
    on_gpu = source.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(source.device)
    drawn = DrawTask("timed", asked, items).draw()
    memory = torch.cuda.max_memory_allocated(source.device) / 1e9 if on_gpu else None
    return Measured(
        model=row.model.key,
        budget=row.budget,
        batch=batch,
        seconds=drawn.seconds,
        memory_gb=memory,
        cache_gb=drawn.image_bytes * batch / 1e9,
        peak_tokens=drawn.pictures[0].about["peak_tokens"],
        cache=cache,
    )


def _name(device: str) -> str:
    if device.startswith("cuda"):
        name: Any = torch.cuda.get_device_name(device)
        return str(name)
    return platform.processor() or platform.machine()
