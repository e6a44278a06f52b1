"""The command line: one application, a file of ``kvpolicy.commands`` for each of its commands."""

from __future__ import annotations

import typer
from rich.console import Console

from kvpolicy.commands.ablate import ablate
from kvpolicy.commands.bench import bench
from kvpolicy.commands.demo import demo
from kvpolicy.commands.list_policies import list_policies
from kvpolicy.errors import KVPolicyError

__all__ = ["app", "main"]

app = typer.Typer(
    name="kvpolicy",
    help="KV-cache eviction policies: try them, compare them, look at what they keep.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(list_policies)
app.command("demo")(demo)
app.command("bench")(bench)
app.command("ablate")(ablate)


def main() -> None:
    """Run the command line; errors of the user's are one line, not a traceback."""
    try:
        app()
    except KVPolicyError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, markup=True)
        raise SystemExit(2) from None
