"""What the pages for contributors say is so: commands, versions, and paths that are named."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="the extra 'lab' brings a reader of YAML")

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: Folders whose files are named, by their path from the root, in prose, docstrings and comments.
FOLDERS = ("kvpolicy", "adapters", "tests", "docs", "examples", "kvpolicy_adapters")
#: What a run makes, or a page tells its reader to write.
MADE = {"docs/bench.json", "table.md", "tables.md", "my_lines.py"}


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile, without the folder of their program."""
    (rule,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    return [line.strip().removeprefix("$(BIN)/") for line in rule.splitlines()]


def test_hooks_run_what_lint_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]
    # A hook may mend what it finds, and is given the files that are committed.
    said = [re.sub(r"^\.venv/bin/| --force-exclude| --fix", "", hook) for hook in hooks]
    assert said == [re.sub(r" --check| \.$", "", line) for line in recipe("lint")]


def test_ci_runs_what_a_contributor_runs():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w[\w-]*)", script, re.MULTILINE)
    assert {"lint", "docs", "test"} <= set(targets)
    for target in targets:
        assert recipe(target)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", ".pre-commit-config.yaml"])
def test_every_make_that_a_page_names_is_a_target(page):
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    named = set(re.findall(r"(?:^#?|`)\s*make ([\w-]+)", (ROOT / page).read_text("utf-8"), re.M))
    assert named, page
    assert named <= targets


def test_help_lists_every_target():
    listed = re.findall(r"^# make ([\w-]+)", MAKEFILE, re.MULTILINE)
    (phony,) = re.findall(r"^\.PHONY: help (.*)", MAKEFILE, re.MULTILINE)
    assert sorted(listed) == sorted(phony.split())


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changes, re.MULTILINE)[1]
    assert PROJECT["version"] == citation["version"] == newest
    assert PROJECT["license"] == citation["license"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda p: p.name)
def test_issue_templates_are_forms(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "config.yml":
        assert form["blank_issues_enabled"] is False
        return
    assert form["name"]
    assert form["description"]
    for field in form["body"]:
        assert field["type"] in ("input", "textarea", "dropdown", "checkboxes", "markdown")
        assert field["attributes"]["label"]
        assert isinstance(field["validations"]["required"], bool)


# -- paths ----------------------------------------------------------------------------------------

TEXTS = [
    path
    for pattern in ("*.md", "*.py", "*.toml", "*.yml", "*.cpp", "*.h", "Makefile")
    for path in sorted(ROOT.rglob(pattern))
    if not {part for part in path.relative_to(ROOT).parts[:-1] if part[0] == "."}
    and path.relative_to(ROOT).parts[0] not in ("build", "dist", "out", "runs", "site")
]
NAMED = re.compile(rf"(?<![\w/.{{~-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w\.(?:py|md|json|cpp|h))\b")
#: ``layer.py``, in prose or a comment.
ALONE = re.compile(r"``?(\w+\.(?:py|cpp|h|md))``?")


def stale(text: str, folder: Path) -> set[str]:
    """Paths that a text names and that nothing lies at."""
    places = (ROOT, ROOT / "adapters", ROOT / "tests", folder)
    gone = {
        name for name in NAMED.findall(text) if not any((place / name).exists() for place in places)
    }
    there = {path.name for path in TEXTS}
    return (gone | (set(ALONE.findall(text)) - there)) - MADE


def test_paths_that_are_named_exist():
    found = {}
    for path in TEXTS:
        gone = stale(path.read_text(encoding="utf-8"), path.parent)
        if gone and path != Path(__file__):
            found[str(path.relative_to(ROOT))] = gone
    assert not found


def test_tests_that_the_page_on_trust_names_are_there():
    named = set(re.findall(r"\b(test_\w+)\b(?!\.py)", (ROOT / "docs/trust.md").read_text()))
    assert len(named) > 30
    texts = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    assert not {name for name in named if f"def {name}(" not in texts}


def test_a_path_that_has_gone_is_seen():
    text = "see `kvpolicy/nowhere.py`, tests/golden/fidelity.json and ``making_room.py``; run make"
    gone = {"kvpolicy/nowhere.py", "tests/golden/fidelity.json", "making_room.py"}
    assert stale(text, ROOT) == gone
    assert stale("`docs/design.md`, `kvpolicy_adapters/attach.py`, ``slots.py``", ROOT) == set()


def test_git_would_carry_no_path_of_this_machine():
    """What is committed is for everybody: no home folder, no folder of a worktree."""
    here = {str(ROOT), str(Path.home())} - {"/root", "/"}
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        assert not [place for place in here if place in text], path
