"""The walkthrough's lines are those of the code."""

from __future__ import annotations

import pytest
from support.walkthrough import COMMAND, PAGE, stops, updated


def test_every_stop_is_where_the_page_says():
    page = PAGE.read_text(encoding="utf-8")
    assert len(stops(page)) >= 12
    assert updated(page) == page, f"the code has moved; run: {COMMAND}"


def test_the_check_bites():
    page = PAGE.read_text(encoding="utf-8")
    file, line, code = stops(page)[0]
    moved = page.replace(f"`{file}:{line}` — `{code}`", f"`{file}:{line + 1}` — `{code}`")
    assert moved != page
    assert updated(moved) == page
    gone = page.replace(f"`{code}`", "`def nothing_of_that_name`", 1)
    with pytest.raises(ValueError, match="stands on lines"):
        updated(gone)
