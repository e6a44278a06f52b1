"""``kvpolicy check``: does this policy hold?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvpolicy.commands.arguments import find_own
from kvpolicy.commands.console import UNREAD, console, drop_output, say_error
from kvpolicy.errors import KVPolicyError

__all__ = ["check"]


def check(
    policy: Annotated[
        str, typer.Argument(help="my_package.my_module:MyPolicy, or a name in the registry.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A parameter of the policy, e.g. recent_lines=1; repeatable."),
    ] = None,
    examples: Annotated[int, typer.Option(min=1, help="Streams to try.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of the streams.")] = 0,
    invariants: Annotated[
        str | None, typer.Option(help="Only these, separated by commas; all if none.")
    ] = None,
) -> None:
    """Hold a policy to every invariant, on generated streams.

    Prints a line for each; what breaks one is shown on the smallest stream found. Exits with 1 if
    any is broken. The policy runs in a process of its own: where that crashes, or runs out of
    memory, it is said on which stream.
    """
    from kvpolicy.testing.apart import run_apart

    def work(tell: Callable[[str], None]) -> int:
        try:
            return _check(policy, set_ or (), examples, seed, invariants, tell)
        except KVPolicyError as error:
            say_error(str(error))
            return 2
        except BrokenPipeError:
            drop_output()
            return UNREAD

    ending = run_apart(work)
    if ending.status is None:
        console.show_cursor()  # a progress bar that could not end has hidden it
        where = f", {ending.told}" if ending.told else ""
        console.print(
            f"[bold red]failed[/]     the process that ran {escape(policy)} did not come to its "
            f"end{escape(where)}: {ending.words}",
            highlight=False,
            soft_wrap=True,
        )
        raise SystemExit(1)
    raise SystemExit(ending.status)


def _check(
    policy: str,
    settings: Sequence[str],
    examples: int,
    seed: int,
    invariants: str | None,
    tell: Callable[[str], None],
) -> int:
    """Check, print, and give the exit status; ``tell`` learns what is being tried."""
    from kvpolicy.testing import INVARIANTS, check_each, policy_named

    tell("while it was made")
    find_own(policy)
    made = policy_named(policy, settings)
    names = [name.strip() for name in invariants.split(",")] if invariants else None
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("trying streams", total=examples)
        outcomes = check_each(
            made,
            examples=examples,
            seed=seed,
            invariants=names,
            on_try=lambda invariant, stream: tell(f"held to {invariant.name!r} on {stream!r}"),
            on_stream=lambda: progress.advance(task),
        )
    console.print(f"{made!r}", markup=False, soft_wrap=True)
    told = {outcome.invariant.name: outcome for outcome in outcomes}
    for name in INVARIANTS:
        if name not in told:
            if names is None:
                console.print(f"[dim]not asked  {name}: not of such a policy[/]", highlight=False)
            continue
        word = "[green]passed[/]   " if told[name].violation is None else "[bold red]failed[/]   "
        tried = told[name].streams
        if tried == 0:
            word = "[yellow]not tried[/]"
        streams = f"{tried} stream{'' if tried == 1 else 's'}"
        console.print(f"{word}  {name} ({streams})", highlight=False)
    failed = [outcome for outcome in outcomes if outcome.violation is not None]
    for outcome in failed:
        console.print(f"\n[bold]{escape(outcome.invariant.name)}[/]", highlight=False)
        console.print(str(outcome.violation), markup=False, highlight=False, soft_wrap=True)
    if failed:
        console.print(f"\n{len(failed)} of {len(outcomes)} invariants are broken", highlight=False)
        return 1
    console.print(f"all {len(outcomes)} invariants hold", highlight=False)
    return 0
