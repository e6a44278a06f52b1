"""Where every command prints."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.text import Text

__all__ = ["UNREAD", "Terminal", "console", "drop_output", "say_error"]

#: Exit status of a command whose output nobody reads any more: a shell's for SIGPIPE.
UNREAD = 141


class Terminal(Console):
    """Leaves it to :func:`kvpolicy.cli.main` what becomes of a command that nobody reads."""

    def on_broken_pipe(self) -> None:
        """Raise it again: rich would end the process, with the status of a check that failed."""
        raise  # rich calls this where it has caught it


console = Terminal()


def say_error(error: str) -> None:
    """One line on stderr; what the user gave is in it as text, and no markup."""
    said = Text.assemble(("error:", "bold red"), f" {error}")
    Console(stderr=True).print(said, highlight=False, soft_wrap=True)


def drop_output() -> None:
    """Let what is still printed go nowhere: Python flushes at its end, and would say so again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
