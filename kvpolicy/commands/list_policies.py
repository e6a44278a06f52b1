"""``kvpolicy list``: the registry."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

import kvpolicy
from kvpolicy.commands.console import console
from kvpolicy.parts.compose import Compose
from kvpolicy.registry import POLICIES

__all__ = ["list_policies"]


def list_policies() -> None:
    """Print the registry: every policy that can be named.

    Those of other packages are named, but not loaded.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("policy", "what it does", "watches", "source"):
        table.add_column(heading, no_wrap=heading != "what it does")
    waiting = POLICIES.waiting()
    for name in kvpolicy.available():
        if name in waiting:  # a stranger's code runs only when it is asked for by name
            about = Text.assemble("of the package ", waiting[name], (" (not loaded)", "dim"))
            table.add_row(Text(name), about, "?", "?")
            continue
        spec = kvpolicy.spec(name)
        parameters = ", ".join(
            f"{field}={about.get('default', '(required)')}"
            for field, about in spec.parameters.get("properties", {}).items()
        )
        about = Text(spec.summary)
        if parameters:
            about.append(f"\n{parameters}", style="dim")
        # What is put together of parts watches what they do, which its defaults don't tell.
        watches = "as its parts" if name == Compose.key else spec.needs.name.lower()
        table.add_row(name, about, watches.replace("_", " "), Text(spec.paper or "-"))
    console.print(table)
