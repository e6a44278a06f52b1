"""``kvpolicy reproduce``: a paper's table, row by row, beside what this machine measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kvpolicy.commands.console import console
from kvpolicy.commands.sweep import note
from kvpolicy.errors import ParameterError

__all__ = ["reproduce"]


def reproduce(
    policy: Annotated[str, typer.Argument(help="Whose table: linear.")],
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model's file: llamagen-xl=llamagen:c2i_XL_384.pt; repeatable."),
    ] = None,
    vq: Annotated[
        list[str] | None,
        typer.Option(help="Its decoder's: llamagen-xl=vq_ds16_c2i.pt; repeatable."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results.json; made, or gone on with.")
    ] = Path("runs/reproduce"),
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images at a time; the paper's if none.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights; bfloat16 on a GPU if none.")
    ] = None,
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="All of LlamaGen-XL's rows on a tiny model of random weights."),
    ] = False,
    commands: Annotated[
        bool, typer.Option("--commands", help="Print the commands that draw each row's pictures.")
    ] = False,
) -> None:
    """Print a paper's table beside what this machine measures, for the models that it is given.

    A row is one batch of images, pixels included. The speed-up that is measured is over our own
    full cache, and transformers' DynamicCache and StaticCache stand beside it. Where it is
    interrupted, the same command goes on.
    """
    from kvpolicy.lab.draw.image_model import ModelSource
    from kvpolicy.lab.reproduce.published import table_of
    from kvpolicy.lab.reproduce.rerun import command_of, rerun, sources_of

    table = table_of(policy)
    if tiny:
        if model or vq:
            raise ParameterError("--tiny brings its own model; leave --model and --vq out")
        key = table[0].model.key
        sources = {key: ModelSource("llamagen-tiny", device=device, dtype=dtype)}
        batch = batch or 4
        note("--tiny: random weights; its figures say that the way works, and nothing of the paper")
    else:
        sources = sources_of(table, _pairs(model, "--model"), _pairs(vq, "--vq"), device, dtype)
    results = None
    if sources:

        def tell(row: str, found: Any) -> None:
            said = f"left out: {found}" if isinstance(found, str) else f"{found.seconds:.2f} s"
            note(f"{row}: {said}")

        results = rerun(policy, table, sources, out, tell, batch=batch, tiny=tiny)
    console.print(_table(table, results))
    if commands:
        for row in table:
            console.print(command_of(row, policy), highlight=False, markup=False, soft_wrap=True)
    if results is None:
        note("nothing was measured: give --model llamagen-xl=llamagen:c2i_XL_384.pt and the like")
    else:
        note(f"wrote {out / 'results.json'}")


def _pairs(texts: Sequence[str] | None, option: str) -> dict[str, str]:
    found = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not (key and equals and value) or key in found:
            raise ParameterError(f"{option} {text!r} is not like llamagen-xl=FILE, each model once")
        found[key] = value
    return found


def _table(table: Sequence[Any], results: Any) -> Table:
    """Published and measured, side by side."""
    from kvpolicy.lab.reproduce.rerun import OURS

    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("model", no_wrap=True)
    headings = ("budget", "batch", "GB", "s", "speed-up", "FID", "here: GB", "s", "speed-up")
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    rows = () if results is None else results.rows
    measured = {(m.model, m.budget): m for m in rows if m.cache == OURS}

    def figures(here: Any) -> list[str]:
        full = measured.get((here.model, None))
        memory = here.cache_gb if here.memory_gb is None else here.memory_gb
        ratio = "" if full is None else f"{full.seconds / here.seconds:.2f}×"
        return [f"{memory:.2f}", f"{here.seconds:.2f}", ratio]

    for row in table:
        here = measured.get((row.model.key, row.budget))
        shown.add_row(
            row.model.label,
            row.budget or "full",
            str(row.model.batch if here is None else here.batch),
            f"{row.memory_gb:.2f}",
            f"{row.seconds:.2f}",
            f"{row.speedup:.2f}×",
            "" if row.fid is None else f"{row.fid:.2f}",
            *([] if here is None else figures(here)),
        )
        for other in rows:
            if other.cache != OURS and (other.model, other.budget) == (row.model.key, row.budget):
                empty = [""] * 4
                shown.add_row(
                    row.model.label, other.cache, str(other.batch), *empty, *figures(other)
                )
    return shown
