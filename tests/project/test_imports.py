"""Imports run downwards only (see ``FLOORS``), and the core stays light.

The checker reads source, not behaviour: an import inside a function or under TYPE_CHECKING counts
as much as one at the top.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvpolicy

ROOT = Path(__file__).parents[2]

#: Low to high. A module may import from lower floors, and from its own floor what stands to its
#: left. "" is kvpolicy/__init__.py, which only what lies above it may import.
FLOORS = (
    ("errors",),
    ("layout", "ops", "measured"),
    ("budget",),
    ("slots", "observers"),
    ("policy", "registry", "named", "parts", "policies"),
    ("cache",),
    ("tracing",),
    ("decoding",),
    ("",),
    ("testing", "lab"),
    ("commands", "cli"),
    ("__main__",),
)
HEIGHT = {part: (i, j) for i, floor in enumerate(FLOORS) for j, part in enumerate(floor)}

#: What the parts may import from elsewhere, besides the standard library.
CORE_LIBRARIES = {"numpy", "pydantic", "torch", "triton"}
LIBRARIES = {
    "testing": CORE_LIBRARIES | {"hypothesis", "pytest"},
    "tracing": CORE_LIBRARIES | {"safetensors"},  # to write and read files only
    "lab": None,  # whatever its extras bring
    "commands": None,
    "cli": None,
    "__main__": set(),
}


def part_of(module: str) -> str:
    """The part of the house that a module of kvpolicy belongs to: its first name below kvpolicy."""
    return module.partition(".")[2].partition(".")[0]


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a source imports, `from a import b` as `a.b`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def complaints(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module of kvpolicy, in words."""
    here = part_of(module)
    if here not in HEIGHT:
        return [f"{module}: {here!r} has no floor yet; give it one in FLOORS"]
    found = []
    for line, name in imported(source, module, is_package):
        where = f"{module}:{line} imports {name}"
        top = name.partition(".")[0]
        if top == "kvpolicy":
            there = part_of(name)
            # `from kvpolicy import PolicyCache` is an import of the package itself.
            there = there if there in HEIGHT else ""
            if there != here and HEIGHT[there] >= HEIGHT[here]:
                found.append(f"{where}: that is upwards")
        elif top in sys.stdlib_module_names or top == "__future__":
            continue
        elif top == "kvpolicy_adapters":
            found.append(f"{where}: adapters are found through registries only")
        else:
            allowed = LIBRARIES.get(here, CORE_LIBRARIES)
            if allowed is not None and top not in allowed:
                found.append(f"{where}: {here or 'kvpolicy'} must do without {top}")
    return found


def modules(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*.py")):
        names = path.relative_to(folder.parent).with_suffix("").parts
        yield ".".join(names[:-1] if names[-1] == "__init__" else names), path


SOURCES = dict(modules(ROOT / "kvpolicy"))


@pytest.mark.parametrize("module", SOURCES)
def test_imports_run_downwards(module):
    path = SOURCES[module]
    is_package = path.name == "__init__.py"
    assert not complaints(path.read_text(encoding="utf-8"), module, is_package=is_package)


def test_there_is_something_to_check():
    assert {"kvpolicy", "kvpolicy.cache.layer", "kvpolicy.policies"} <= set(SOURCES)


def test_adapters_stand_on_the_library_not_on_its_tools():
    for module, path in modules(ROOT / "adapters" / "kvpolicy_adapters"):
        names = imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
        tools = {"kvpolicy.cli", "kvpolicy.commands", "kvpolicy.testing", "kvpolicy.lab"}
        speak = ("subjects", "checkpoints", "clipart", "drawn_figures", "real_images")
        evaluation = {f"kvpolicy_adapters.evaluation.{name}" for name in speak}
        if module in {*evaluation, "kvpolicy_adapters.bench.shapes"}:
            tools.remove("kvpolicy.lab")  # a subject, or a shape, speaks the lab's protocol
        if module.startswith("kvpolicy_adapters.bench.gpu"):
            tools.remove("kvpolicy.lab")  # the lab's bench on one GPU
        if module.startswith("kvpolicy_adapters.evaluation.drawing"):
            tools.remove("kvpolicy.lab")  # and so does an image model
        if module == "kvpolicy_adapters.evaluation.fuzz":
            tools.remove("kvpolicy.testing")  # and this one the fuzz's
        for line, name in names:
            assert ".".join(name.split(".")[:2]) not in tools, f"{module}:{line} imports {name}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvpolicy.layout", "from kvpolicy.cache.cache import PolicyCache"),
        ("kvpolicy.errors", "import kvpolicy.layout"),
        ("kvpolicy.layout", "from kvpolicy.ops import attend"),  # same floor, leftwards only
        ("kvpolicy.slots", "def f():\n    from kvpolicy.policy.view import CacheView"),
        ("kvpolicy.slots", "if TYPE_CHECKING:\n    from kvpolicy.policy.view import CacheView"),
        ("kvpolicy.slots", "from .policy import view"),
        ("kvpolicy.slots", "from . import policy"),
        ("kvpolicy.registry", "from kvpolicy.policies.h2o import H2O"),
        ("kvpolicy.policies.h2o", "from ..cache.cache import PolicyCache"),
        ("kvpolicy.policies.h2o", "from kvpolicy import cache"),
        ("kvpolicy.policies.h2o", "from kvpolicy import PolicyCache"),
        ("kvpolicy.policies.h2o", "import kvpolicy"),
        ("kvpolicy.cache.cache", "from kvpolicy.testing import check_policy"),
        ("kvpolicy.cache.cache", "import os, transformers.cache_utils"),
        ("kvpolicy.cache.cache", "from kvpolicy_adapters import attach"),
        ("kvpolicy.lab.show.report", "from kvpolicy_adapters import zoo"),
        ("kvpolicy.lab.show.report", "from kvpolicy import cli"),
        ("kvpolicy.testing", "import typer"),
        ("kvpolicy.registry", "import rich.table"),
        ("kvpolicy.observers", "from matplotlib import pyplot"),
        ("kvpolicy.brand_new", "import torch"),
    ],
)
def test_checker_catches(module, source):
    assert complaints(source, module)


@pytest.mark.parametrize("source", ["from . import lab", "from kvpolicy.cli import app"])
def test_checker_catches_the_package_itself(source):
    assert complaints(source, "kvpolicy", is_package=True)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvpolicy.layout", "import re, torch\nfrom .errors import LayoutError"),
        ("kvpolicy.budget.budget", "from kvpolicy.layout import TokenLayout"),
        ("kvpolicy.policies.pyramid", "from kvpolicy.policies.snapkv import SnapKV"),
        (
            "kvpolicy.cache.cache",
            "from kvpolicy import errors, slots\nfrom .layer import Layer",
        ),
        ("kvpolicy.lab.run.plan", "import kvpolicy, matplotlib.pyplot, rich, transformers"),
        ("kvpolicy.cli", "import typer\nfrom kvpolicy.lab.run import demo"),
        ("kvpolicy.__main__", "from kvpolicy.cli import app"),
    ],
)
def test_checker_lets_pass(module, source):
    assert not complaints(source, module)


# -- the house -----------------------------------------------------------------------------------

ADAPTERS = dict(modules(ROOT / "adapters" / "kvpolicy_adapters"))

#: Adapters may import what ``kvpolicy`` and ``kvpolicy.ops`` name in ``__all__``, and these: the
#: protocols of the lab and of the fuzz, which a subject, a shape or a driver speaks, and errors.
OPEN = ("kvpolicy.errors", "kvpolicy.lab", "kvpolicy.testing")
#: What still goes past that. A line that is no longer true must go; none may be added.
SIDE_DOORS: set[tuple[str, str]] = set()


def side_doors(source: str, module: str, *, is_package: bool = False) -> set[tuple[str, str]]:
    """The module with each thing of kvpolicy's inside that it imports."""
    public = {f"kvpolicy.{name}" for name in kvpolicy.__all__}
    public |= {f"kvpolicy.ops.{name}" for name in getattr(kvpolicy.ops, "__all__", ())}
    return {
        (module, name)
        for _, name in imported(source, module, is_package)
        if name.startswith("kvpolicy.") and name not in public and not name.startswith(OPEN)
    }


def test_adapters_use_public_names():
    found = set()
    for module, path in ADAPTERS.items():
        source = path.read_text(encoding="utf-8")
        found |= side_doors(source, module, is_package=path.name == "__init__.py")
    new, gone = sorted(found - SIDE_DOORS), sorted(SIDE_DOORS - found)
    assert not new, f"private imports of the core; use what kvpolicy.__all__ names: {new}"
    assert not gone, f"no longer true; take them out of SIDE_DOORS: {gone}"


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("from kvpolicy.cache.layer import Layer", True),
        ("from kvpolicy.slots import SlotStore", True),  # public, but by another name
        ("import kvpolicy.ops.cpu.native", True),
        ("def f():\n    from kvpolicy.registry import _entry_points", True),
        ("from kvpolicy import SlotStore", False),
        ("from kvpolicy.errors import near_matches\nimport kvpolicy", False),
        ("from kvpolicy.lab.run.subject import Metric", False),
    ],
)
def test_a_side_door_is_seen(source, caught):
    assert bool(side_doors(source, "kvpolicy_adapters.x")) is caught


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or by way of others, each circle once."""
    found, done = [], set()
    for start in graph:
        path, ways = [start], [iter(sorted(graph[start]))]
        while ways:
            following = next(ways[-1], None)
            if following is None:
                ways.pop()
                done.add(path.pop())
            elif following in path:
                found.append([*path[path.index(following) :], following])
            elif following in graph and following not in done:
                path.append(following)
                ways.append(iter(sorted(graph[following])))
    return found


def graph_of(sources: dict[str, Path]) -> dict[str, set[str]]:
    """Which of these modules each of them imports."""
    graph = {}
    for module, path in sources.items():
        source = path.read_text(encoding="utf-8")
        names = [name for _, name in imported(source, module, path.name == "__init__.py")]
        # A name is that of a module, or of something in the module before the last dot.
        there = {name if name in sources else name.rpartition(".")[0] for name in names}
        graph[module] = (there & set(sources)) - {module}
    return graph


def test_nothing_imports_itself_by_way_of_others():
    graph = graph_of(SOURCES | ADAPTERS)
    assert sum(map(len, graph.values())) > 300  # it did read imports
    assert circles(graph) == []


def test_a_circle_is_seen():
    assert circles({"a": {"b"}, "b": {"c", "d"}, "c": {"d"}, "d": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]


def test_few_modules_stand_at_the_top():
    top = [path.stem for path in (ROOT / "kvpolicy").glob("*.py")]
    assert len(top) <= 9, f"a folder is missing for one of {sorted(top)}"
