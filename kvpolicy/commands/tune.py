"""``kvpolicy tune``: search a policy's or a decoder's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.commands.arguments import STALE, find_own, pair, split, stale_from, whole_number
from kvpolicy.commands.console import console
from kvpolicy.lab.run.plan import SEQUENTIAL

__all__ = ["tune"]


def tune(
    subject: Annotated[str, typer.Option(help="fashion-ar, or package.module:name of your own.")],
    policy: Annotated[str, typer.Option(help="A name, or package.module:Class.")],
    out: Annotated[Path, typer.Option(help="Folder of the search; made, or gone on with.")],
    budget: Annotated[str, typer.Option(help="Budget: 1/6, 25%, 130, '4 lines'.")] = "1/6",
    decoder: Annotated[
        str,
        typer.Option(help="Search its parameters, not the policy's: sjd, or sjd:draft=above."),
    ] = SEQUENTIAL,
    metric: Annotated[
        str | None,
        typer.Option(help="The subject's first one if none, or passes with --decoder."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Settings to measure.")] = 40,
    option: Annotated[
        list[str] | None, typer.Option(help="Of the subject, e.g. scored=128; repeatable.")
    ] = None,
    unseen: Annotated[
        str, typer.Option(help="Seeds whose items judge what was found; the search has seed 0's.")
    ] = "1,2",
    threads: Annotated[
        int, typer.Option(min=1, help="Threads; more than one pay for large models only.")
    ] = 1,
    stale: Annotated[bool | None, typer.Option("--stale/--keep-stale", help=STALE)] = None,
) -> None:
    """Search a policy's own parameters, and judge the best on items that the search has not seen.

    With --decoder those of what draws tokens, such as its window. Bounds are those of the fields
    and of the budget. However a search ends, the same
    command goes on; more trials go further.
    """
    from kvpolicy.lab.search import tune as lab
    from kvpolicy.lab.search.search_space import Space

    find_own(subject, policy)

    def tell_space(space: Space) -> None:
        for name, part in space.items():
            console.print(f"{name}: {part}", highlight=False, markup=False)

    def tell(tried: lab.Tried) -> None:
        mark = "*" if tried.value == tried.best else " "
        known = "" if tried.fresh else " (known)"
        console.print(
            f"{tried.number:4d} {mark} {tried.value:.4f} {_spell(tried.parameters)}{known}",
            highlight=False,
            markup=False,
        )

    try:
        found = lab.tune(
            out,
            subject,
            dict(pair(text, "--option", "scored=128") for text in option or []),
            policy,
            budget,
            trials=trials,
            unseen=[whole_number(text, "--unseen") for text in split(unseen)],
            threads=threads,
            tell_space=tell_space,
            tell=tell,
            stale=stale_from(stale),
            decoder=decoder,
            metric=metric,
        )
    except KeyboardInterrupt:
        typer.echo(f"stopped; every finished trial is safe in {out}: the same command goes on")
        raise SystemExit(130) from None
    whose = policy if decoder == SEQUENTIAL else f"{policy}@{decoder}"
    console.print(f"best: {whose}: {_spell(found.parameters)}", highlight=False, markup=False)
    console.print(f"on {found.items} unseen items, with 95% intervals:", highlight=False)
    for name, finding in (("best", found.best), ("defaults", found.default)):
        estimate, difference = finding.estimate, finding.difference
        line = f"  {name}: {estimate.value:.4f}"
        if estimate.low is not None and estimate.high is not None:
            line += f" ({estimate.low:.4f}…{estimate.high:.4f})"
        if difference is not None and difference.low is not None and difference.high is not None:
            line += (
                f", {difference.value:+.4f} ({difference.low:+.4f}…{difference.high:+.4f}) to full"
            )
        console.print(line, highlight=False, markup=False)
    if found.gain is not None:
        value, low, high = found.gain
        console.print(f"  best minus defaults: {value:+.4f} ({low:+.4f}…{high:+.4f})")
    console.print(f"wrote {out / 'best.json'}")


def _spell(parameters: dict[str, object]) -> str:
    return " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in parameters.items()
    )
