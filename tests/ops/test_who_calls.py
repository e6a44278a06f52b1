"""Policies and parts call operations; which backend serves is known to ``kvpolicy.ops`` alone."""

import ast
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "kvpolicy"
ABOVE = [path for part in ("parts", "policies", "policy") for path in (CORE / part).rglob("*.py")]


def backends(source: str) -> list[str]:
    """Everything that a source imports of a backend, by its full name."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.startswith(("kvpolicy.ops.cpu", "kvpolicy.ops.triton"))]


@pytest.mark.parametrize("path", ABOVE, ids=lambda path: path.relative_to(CORE).as_posix())
def test_policies_and_parts_know_no_backend(path):
    source = path.read_text(encoding="utf-8")
    assert not backends(source)
    assert "torch.ops" not in source


def test_the_checker_finds_what_it_should():
    assert len(ABOVE) > 20
    for source in (
        "from kvpolicy.ops.cpu import native",
        "from kvpolicy.ops import cpu",
        "import kvpolicy.ops.cpu.native",
        "def f():\n    from kvpolicy.ops.triton import decode",
    ):
        assert backends(source)
    assert not backends("from kvpolicy.ops.rank import lowest")
