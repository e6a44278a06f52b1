"""``kvpolicy calibrate``: how layers should share a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvpolicy.commands.arguments import find_own, pair
from kvpolicy.commands.console import console

__all__ = ["calibrate"]


def calibrate(
    subject: Annotated[str, typer.Option(help="fashion-ar, or package.module:name of your own.")],
    policy: Annotated[str, typer.Option(help="A name, a composition, or package.module:Class.")],
    out: Annotated[Path, typer.Option(help="The file to write, e.g. budgets.json.")],
    budget: Annotated[str, typer.Option(help="Budget: 1/6, 25%, 130, '4 lines'.")] = "1/6",
    option: Annotated[
        list[str] | None, typer.Option(help="Of the subject, e.g. scored=128; repeatable.")
    ] = None,
    moves: Annotated[
        int, typer.Option(min=0, help="Moves from layer to layer to try in the end.")
    ] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Of the subject: which items.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads; more than one pay for large models only.")
    ] = 1,
) -> None:
    """Measure what each layer loses per token taken from it, and write budgets by layer.

    What it writes is a schedule: linear/schedule=calibrated:budgets.json is a policy.
    """
    from kvpolicy.lab.run.subject import load_subject
    from kvpolicy.lab.run.worker import threads_of_torch
    from kvpolicy.lab.search import calibrate as lab
    from kvpolicy.named import make_policy

    find_own(subject, policy)

    def tell(layers: Sequence[int], value: float) -> None:
        console.print(f"{value:.5f} {' '.join(map(str, layers))}", highlight=False)

    made = make_policy(policy, {})
    loaded = load_subject(
        subject, dict(pair(text, "--option", "scored=128") for text in option or [])
    )
    with threads_of_torch(threads):
        found = lab.calibrate(
            loaded, made, budget, out, named=(subject, policy), moves=moves, seed=seed, tell=tell
        )
    console.print(
        f"{found.items} items: {found.uniform:.5f} with {found.budget} tokens for every layer, "
        f"{found.found:.5f} with {' '.join(map(str, found.layers))}",
        highlight=False,
    )
    console.print(f"wrote {out}", markup=False, highlight=False)
