"""docs/invariants.md out of the invariants and the mutants.

    python tests/support/invariants_page.py

The table says only what ``test_mutants.py`` has seen: each mutant is caught by the invariant beside
it, or that test fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "invariants.md"
COMMAND = "python tests/support/invariants_page.py"

OPENING = """\
# Invariants

Every policy, shipped or somebody's own, is held to these by property-based tests: `check_policy`
drives it through `PolicyCache` on generated streams (layouts, budgets from its smallest up, layers,
samples and heads, tokens one by one and in chunks, prompts longer than the budget, float32 and
bfloat16, attention with ties, zeros and extremes), and shows the smallest stream that breaks one.

```python
import kvpolicy
from kvpolicy.testing import check_policy

check_policy(kvpolicy.create("h2o"), examples=5)  # says nothing: all of them hold
```

`kvpolicy check my_package.my_module:MyPolicy` prints a line for each, and
`pytest --kvpolicy my_package.my_module:MyPolicy` runs a test for each.

| invariant | what must hold | of whom |
| --- | --- | --- |
"""
MUTANTS_OPENING = """
## What the checks catch

The checks are checked by policies, caches and observers that are broken on purpose. Each of these
{count} mutants is caught by the invariant beside it; one that survived would fail the tests.

| broken so that it … | caught by |
| --- | --- |
"""


def page() -> str:
    """The whole page."""
    from test_mutants import MUTANTS

    from kvpolicy import create
    from kvpolicy.testing import INVARIANTS

    lines = [OPENING]
    for invariant in INVARIANTS.values():
        whom = "all" if invariant.applies(create("h2o")) else "those that decide line by line"
        lines.append(f"| **{invariant.name}** | {invariant.words} | {whom} |\n")
    lines.append(MUTANTS_OPENING.format(count=len(MUTANTS)))
    for name, (invariant_name, _) in MUTANTS.items():
        lines.append(f"| {name.replace('_', ' ')} | {invariant_name} |\n")
    return "".join(lines)


if __name__ == "__main__":
    tests = Path(__file__).parents[1]
    sys.path[:0] = [str(tests), str(tests / "testing")]
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")
