"""The page of problems names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
PAGE = (FOLDER.parents[1] / "docs" / "reports.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_named_test_exists(file, name):
    text = (FOLDER / file).read_text(encoding="utf-8")
    assert f"def {name or 'test_'}" in text


def test_every_row_names_one():
    rows = re.findall(r"^\| (?!---|situation)(.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 30
    for row in rows:
        assert "test_" in row or row.endswith("the same"), row
