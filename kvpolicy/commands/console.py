"""Where every command prints."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

__all__ = ["console", "say_error"]

console = Console()


def say_error(error: str) -> None:
    """One line on stderr; what the user gave is in it as text, and no markup."""
    said = Text.assemble(("error:", "bold red"), f" {error}")
    Console(stderr=True).print(said, highlight=False, soft_wrap=True)
