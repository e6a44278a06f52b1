"""``kvpolicy draw``: a folder of pictures, from one checkpoint under one policy."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from kvpolicy.commands.arguments import find_own, pair
from kvpolicy.commands.console import console
from kvpolicy.commands.progress import spell_seconds
from kvpolicy.commands.sweep import note
from kvpolicy.errors import ParameterError
from kvpolicy.named import read_settings

__all__ = ["draw"]

_WHAT, _HOW, _WHERE = "What is drawn", "How", "Where and how many at a time"


def draw(
    model: Annotated[
        str,
        typer.Option(
            help="fashion-ar, fashion-lpd, clipart-ar, llamagen:c2i_XL_384.pt, lpd:lpd_l_256.pth, "
            "or a checkpoint of Janus-Pro, Lumina-mGPT, Anole or Emu3: a folder, or a name on the "
            "hub.",
            rich_help_panel=_WHAT,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the pictures; made, or gone on with.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A .txt file (a prompt a line), .jsonl (GenEval's too), or DPG's folder of .txt.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="Of the model: 0-999, or 3,7.", rich_help_panel=_WHAT)
    ] = None,
    each: Annotated[
        int,
        typer.Option(
            "--each",
            "--per-class",
            "--per-prompt",
            min=1,
            help="Images of each class or prompt.",
            rich_help_panel=_WHAT,
        ),
    ] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="Of all random numbers.", rich_help_panel=_WHAT)
    ] = 0,
    vq: Annotated[
        str | None,
        typer.Option(
            help="The file that makes pixels of codes: vq_ds16_c2i.pt, vqgan.ckpt.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="A name, or package.module:Class.", rich_help_panel=_HOW)
    ] = "linear",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A parameter of the policy: recent_lines=2.", rich_help_panel=_HOW
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="1/6, 25%, 130 or '4 lines'; 1/6 if none, and everything for full.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    decoder: Annotated[
        str, typer.Option(help="How logits become tokens.", rich_help_panel=_HOW)
    ] = "sequential",
    cfg: Annotated[
        float | None, typer.Option(help="Guidance; 1 is none.", rich_help_panel=_HOW)
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="Divides the logits; 0: the likeliest.", rich_help_panel=_HOW),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Likeliest tokens to draw from; 0: all.", rich_help_panel=_HOW),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Their probability together; 1: all.", rich_help_panel=_HOW)
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of the model, e.g. grid=24 or size=256.", rich_help_panel=_HOW),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Another policy, mostly full, to draw the same images with, beside these.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    npz: Annotated[
        bool, typer.Option("--npz", help="Write samples.npz, as ADM's evaluator takes it.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.", rich_help_panel=_WHERE)] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; bfloat16 on a GPU if none.", rich_help_panel=_WHERE
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images at a time; found if none.", rich_help_panel=_WHERE),
    ] = None,
    executor: Annotated[
        str, typer.Option(help="inline, processes or ray.", rich_help_panel=_WHERE)
    ] = "inline",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of processes or ray.", rich_help_panel=_WHERE)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of torch, in each.", rich_help_panel=_WHERE)
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster that runs already.", rich_help_panel=_WHERE)
    ] = None,
) -> None:
    """Draw images from a part of the cache: classes or prompts in, a folder of PNGs out.

    However it ends, the same command goes on, and each image stays as it was: its random numbers
    are its own, whatever batch it is in.
    """
    from kvpolicy.lab.draw.draw import Asked
    from kvpolicy.lab.draw.image_model import ModelSource, Sampler
    from kvpolicy.lab.draw.items import class_items, classes_of
    from kvpolicy.lab.draw.outputs import write_grids, write_npz
    from kvpolicy.lab.run.executors import make_executor
    from kvpolicy.lab.run.runner import writing

    if (prompts is None) == (classes is None):
        raise ParameterError("give either --prompts or --classes")
    find_own(policy, *([compare] if compare else []))
    if prompts is not None:
        from kvpolicy.lab.draw.prompts import prompt_items

        items = prompt_items(prompts, each)
    else:
        items = class_items(classes_of(classes or ""), each)
    source = ModelSource.parse(
        model,
        vq=vq,
        device=device,
        dtype=dtype,
        options=tuple(sorted(pair(text, "--option", "grid=24") for text in option or [])),
    )
    sampler = Sampler(cfg=cfg, temperature=temperature, top_k=top_k, top_p=top_p, decoder=decoder)
    runs_on = None
    if executor != "inline":
        runs_on = make_executor(executor, workers, threads or 1, address)
        threads = threads or 1
    elif workers or address:
        raise ParameterError("--workers and --address are for --executor processes or ray")
    how: dict[str, Any] = {"batch": batch, "executor": runs_on, "threads": threads}

    if budget is None and policy != "full":
        budget = "1/6"
    asked = Asked(source, policy, read_settings(set_ or []), budget, sampler, seed)
    _draw(asked, items, out, policy, how)
    if compare is not None:
        least = None if compare == "full" else budget or "1/6"
        other = Asked(source, compare, {}, least, sampler, seed)
        _draw(other, items, out / compare, compare, how)
    with writing(out):
        written = write_grids(out, items)
        if written:
            note(f"wrote {len(written)} pictures for DPG's evaluator into {out / 'dpg'}")
        if compare is not None:
            note(f"wrote {_sheet(out, policy, compare, items)}")
        if npz:
            note(f"wrote {write_npz(out, items)}")


def _draw(asked: Any, items: Sequence[Any], out: Path, label: str, how: dict[str, Any]) -> None:
    """Draw with one policy, and say how it went.

    Raises:
        SystemExit: 130, after Ctrl-C; 1, where workers failed.
    """
    from kvpolicy.lab.draw.draw import draw as lab

    progress = _Progress(label)
    try:
        with progress:
            folder, failures = lab(asked, items, out, progress, **how)
    except KeyboardInterrupt:
        note(
            f"stopped: {progress.count} of {progress.total} images are safe in {out}; the same "
            f"command goes on from there"
        )
        raise SystemExit(130) from None
    for failure in failures:
        note(f"failed: {failure.error}")
    lines = list(folder.lines())
    if lines:
        peak = max(line["peak_tokens"] for line in lines)
        seconds = sum(line["seconds"] for line in lines)
        note(
            f"{label}: {len(lines)} image{'' if len(lines) == 1 else 's'} in {out}; a head held "
            f"{peak:g} tokens at most; {spell_seconds(seconds)} of drawing"
        )
    if failures:
        note("the same command tries what has failed again")
        raise SystemExit(1)


def _sheet(out: Path, policy: str, compare: str, items: Sequence[Any]) -> Path:
    """``compare.png``: the first images of both policies, one above the other."""
    from kvpolicy.lab.draw.outputs import read_image
    from kvpolicy.lab.show.pictures import contact_sheet

    shown = items[:10]
    rows = [
        (name, "", [read_image(folder / item.path) for item in shown])
        for name, folder in ((policy, out), (compare, out / compare))
    ]
    names = [str(item.row) if item.prompt is None else item.prompt for item in shown]
    path = out / "compare.png"
    contact_sheet(rows, names, "The same seeds").savefig(path, dpi=200)
    return path


class _Progress:
    """A bar on a terminal, a line now and then elsewhere; with the time that is left."""

    _PAUSE = 10.0  # seconds between lines

    def __init__(self, label: str) -> None:
        self.label = label
        self.count = self.total = 0
        self._drawn = 0
        self._begun = self._said = time.monotonic()
        self._bar = Progress(
            TextColumn(label),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[remark]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=None, remark="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begun(self, finished: int, total: int) -> None:
        """Learn how much there is to do."""
        self.count, self.total = finished, total
        self._begun = self._said = time.monotonic()
        self._bar.update(self._task, total=total, completed=finished)
        if finished:
            note(f"{self.label}: {finished} of {total} images are there already")

    def drew(self, count: int, batch: int) -> None:
        """Count images, and say how long the others will take."""
        self.count += count
        self._drawn += count
        now = time.monotonic()
        left = (now - self._begun) / self._drawn * (self.total - self.count)
        remark = f"{batch} at a time, about {spell_seconds(left)} left"
        self._bar.update(self._task, completed=self.count, remark=remark)
        if not console.is_terminal and (now - self._said > self._PAUSE or self.count == self.total):
            self._said = now
            print(f"{self.label}: {self.count} of {self.total}, {remark}", file=sys.stderr)
