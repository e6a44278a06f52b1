"""The page that walks one token through the code: its lines are looked up, not remembered."""

from __future__ import annotations

import re
import sys

from support.paths import ROOT

__all__ = ["COMMAND", "PAGE", "stops", "updated"]

PAGE = ROOT / "docs" / "walkthrough.md"
COMMAND = "PYTHONPATH=tests python -m support.walkthrough"
#: A stop: a file, a line, and what stands there.
_STOP = re.compile(r"`(?P<file>[\w/]+\.py):(?P<line>\d+)` — `(?P<code>[^`]+)`")


def stops(page: str) -> list[tuple[str, int, str]]:
    """File, line and code of each stop."""
    return [(m["file"], int(m["line"]), m["code"]) for m in _STOP.finditer(page)]


def updated(page: str) -> str:
    """The page with the lines on which its code stands today.

    Raises:
        ValueError: some code stands nowhere, or in two places.
    """

    def look_up(match: re.Match[str]) -> str:
        lines = (ROOT / match["file"]).read_text(encoding="utf-8").splitlines()
        found = [number for number, line in enumerate(lines, 1) if match["code"] in line]
        if len(found) != 1:
            raise ValueError(f"{match['code']!r} stands on lines {found} of {match['file']}")
        return f"`{match['file']}:{found[0]}` — `{match['code']}`"

    return _STOP.sub(look_up, page)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE.name}")
    sys.exit(0)
