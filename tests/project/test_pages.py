"""Every Python block of the README and of the documentation runs, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.processes import run_code

pytest.importorskip("transformers", reason="pages show whole models, which need transformers")

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    return FENCE.findall(page.read_text())


#: Each once, if it stands on several pages.
BLOCKS = {
    block: f"{page.relative_to(ROOT)}-{number}"
    for page in reversed(PAGES)
    for number, block in enumerate(blocks(page))
}


@pytest.mark.parametrize(
    "block", [pytest.param(*each, id=where) for *each, where in BLOCKS.items()]
)
def test_block_runs_and_says_what_its_comments_say(block, tmp_path):
    done = run_code(block, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, "a line that users are told to write draws a warning"
    # `print(...)  # (131, 131): why` promises what is printed.
    promised = re.findall(r"^print\(.*\)  # (\(.*?\)|\S+)", block, re.MULTILINE)
    assert done.stdout.split("\n")[: len(promised)] == promised


def test_the_readme_has_blocks_and_names_every_policy():
    import kvpolicy

    text = (ROOT / "README.md").read_text()
    assert len(blocks(ROOT / "README.md")) >= 3
    for name in kvpolicy.policies.__all__:
        key = getattr(kvpolicy.policies, name).key
        assert f"| `{key}` |" in text, key


def test_a_block_that_fails_is_found(tmp_path):
    assert run_code("raise SystemExit(3)", tmp_path).returncode == 3
    raised = run_code("import kvpolicy\nprint('so far')\nkvpolicy.create('lineer')", tmp_path)
    assert raised.returncode == 1
    assert raised.stdout == "so far\n"
    assert "did you mean 'linear'" in raised.stderr
    # What a block forgot to import is not there, though the process has it.
    assert "NameError" in run_code("kvpolicy.available()", tmp_path).stderr
