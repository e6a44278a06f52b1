"""The support table, as a page."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import transformers

from kvpolicy_adapters.evaluation.sweep.examine import POLICIES, Finding

__all__ = ["COMMAND", "page", "row", "versions"]

COMMAND = "python -m kvpolicy_adapters.evaluation.sweep --out docs/models.md"

_INTRODUCTION = """\
# Text models

`attach` serves every causal language model of transformers that computes its attention through
transformers' attention interface and keeps keys and values per head. This page is made by

```bash
{command}
```

which builds the real class of every architecture that `AutoModelForCausalLM` knows, tiny, with
every kind of layer that it has and with random weights ({versions},
float32), and attaches policies to it. Its input is ids of text, for all architectures; what other
input does to masks (an image whose tokens see each other, prefixes, trees) has
[tests of its own](reports.md).

**{passing} of {total} architectures pass**; {nothing} have nothing to evict. For each that
passes, with a batch of two prompts:

- *lossless*: with a budget as long as the text, under `h2o`, greedy `generate` gives the same
  tokens as with the model's own cache, and the same logits within 1e-4 (of the largest logit,
  where that is above 1);
- *a quarter*: with a budget of a quarter of the text, shorter than the prompt, no head of any layer
  under the policy ever holds more, and every such layer evicts;
- {policies} run at that budget, with finite logits;
- where all layers are windows, so that such a budget leaves them alone, *lossless* holds with
  windows longer than the text as well, which come under the policy;
- *padded*: a left-padded batch is lossless, too, under `streaming_llm` (– where the model itself
  can't take one).

*Heads* are query heads / KV heads of a layer, in the tiny model. *Layers* says what its layers
keep: `every token` comes under the policy; `a window` does, too, unless its budget holds the whole
window (then the layer is left as it is, and `cache.stats().left_alone` says so); a recurrent state,
or keys and values borrowed from another layer, are left as they are.
"""


def versions() -> str:
    """What the findings are of, in words."""
    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def page(findings: Sequence[Finding]) -> str:
    """The whole page; one row for each finding, in the order of their names."""
    ordered = sorted(findings, key=lambda finding: finding.name.lower())
    passing = [finding for finding in ordered if finding.passes]
    nothing = [finding for finding in ordered if not finding.passes and finding.by_design]
    failing = [finding for finding in ordered if not finding.passes and not finding.by_design]
    names = [f"`{name}`" for name in POLICIES]
    introduction = _INTRODUCTION.format(
        command=COMMAND,
        versions=versions(),
        passing=len(passing),
        total=len(ordered),
        nothing=len(nothing),
        policies=", ".join(names[:-1]) + f" and {names[-1]}",
    )
    header = ["architecture", "model types", "heads", "layers", "lossless", "a quarter", *POLICIES]
    return "\n".join(
        [
            introduction,
            "## What passes\n",
            *_header([*header, "padded"]),
            *map(row, passing),
            "\n## What has nothing to evict\n",
            "States and compressed latents: no keys and values of a head to choose from.\n",
            *_header(["architecture", "model types", "reason"]),
            *map(row, nothing),
            "\n## What is not served yet, and why\n",
            *_header(["architecture", "model types", "reason"]),
            *map(row, failing),
            "",
        ]
    )


def row(finding: Finding) -> str:
    """One architecture's line in its table."""
    start = [_code(finding.name), ", ".join(map(_code, finding.model_types))]
    if not finding.passes:
        return _line([*start, _safe(finding.reason)])
    padded = {True: "yes", False: "**no**", None: "–"}[finding.padded]
    yes = ["yes"] * (2 + len(POLICIES))
    return _line([*start, _safe(finding.heads), _safe(finding.layers), *yes, padded])


def _header(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(name: str) -> str:
    """A name as code, which can't break out of it."""
    return f"`{re.sub(r'[^A-Za-z0-9_.-]', '?', name)}`"


def _safe(text: str) -> str:
    """Text that can't break a table, nor be taken for markup."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("|", "\\|").replace("`", "'").replace("[", "\\[").replace("_", "\\_")
