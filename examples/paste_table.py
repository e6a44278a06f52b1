"""Put the table of a run into a page, between its two marks.

python examples/paste_table.py runs/first/table.md docs/ablate.md
"""

from __future__ import annotations

import sys
from pathlib import Path

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def main() -> None:
    table, page = map(Path, sys.argv[1:])
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{page} has no {BEGIN} ... {END}")
    text = table.read_text(encoding="utf-8").strip()
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
