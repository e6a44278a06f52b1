"""``kvpolicy offsets``: where a model's heads look, by where it lies from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.commands.arguments import find_own, pair
from kvpolicy.commands.console import console
from kvpolicy.lab.run.plan import SEQUENTIAL

__all__ = ["offsets"]


def offsets(
    subject: Annotated[
        str,
        typer.Option(
            help="fashion-lpd, fashion-ar, clipart-ar, or package.module:name of your own."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write, e.g. offsets.json.")],
    decoder: Annotated[
        str, typer.Option(help="In whose order tokens come, e.g. lpd:passes=48.")
    ] = SEQUENTIAL,
    images: Annotated[int, typer.Option(min=1, help="Real images that are scored.")] = 64,
    radius: Annotated[
        int,
        typer.Option(min=0, max=64, help="Rows and columns up to which offsets are told apart."),
    ] = 5,
    option: Annotated[
        list[str] | None, typer.Option(help="Of the subject, e.g. line_breaks=true; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the subject: which items.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads; more than one pay for large models only.")
    ] = 1,
) -> None:
    """Measure what each head gives to a token, by where it lies from the query, and write it.

    The policy ahead goes by it: --policy ahead --set offsets=offsets.json.
    """
    from kvpolicy.decoding import Decoder
    from kvpolicy.lab.run.subject import load_subject
    from kvpolicy.lab.run.worker import threads_of_torch
    from kvpolicy.lab.search.offsets import measure_offsets

    find_own(subject)
    loaded = load_subject(
        subject, dict(pair(text, "--option", "scored=128") for text in option or [])
    )
    with threads_of_torch(threads):
        found = measure_offsets(
            loaded,
            Decoder.parse(decoder),
            out,
            named=subject,
            images=images,
            radius=radius,
            seed=seed,
        )
    heads = sum(map(len, found.layers))
    console.print(
        f"{found.queries} queries of {heads} heads in {len(found.layers)} layers", highlight=False
    )
    console.print(f"wrote {out}", markup=False, highlight=False)
