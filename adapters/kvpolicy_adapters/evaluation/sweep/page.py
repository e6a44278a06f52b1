"""The support table, as a page."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import transformers

from kvpolicy_adapters.evaluation.sweep.examine import POLICIES, Finding

__all__ = ["page", "row", "versions"]

_INTRODUCTION = """\
# Text models, on transformers {transformers}

`attach` serves every causal language model of transformers that keeps keys and values per head and
computes its attention through transformers' attention interface, and some that compute it
themselves. This page is made by

```bash
python -m kvpolicy_adapters.evaluation.sweep --out {out}
```

which builds the real class of every architecture that `AutoModelForCausalLM` knows, tiny, with
every kind of layer that it has and with random weights ({versions},
float32), and attaches policies to it. There is such a page of [the newest transformers that was
tested](models.md) and of [the oldest that we serve](models-5.17.md).

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
  can't take one);
- *prefix*: so are the logits of a prompt whose first half sees itself, by a mask of the user's own
  (– where the model itself takes no such mask).

*Input* is what `generate` was given: what the family is made for (audio and video have not been
tried). *Heads* are query heads / KV heads of a layer, in the tiny model. *Layers* says what its
layers keep: `every token` comes under the policy; `a window` does, too, unless its budget holds the
whole window (then the layer is left as it is, and `cache.stats().left_alone` says so); a recurrent
state, and keys and values borrowed from another layer, are left as they are.
"""


def versions() -> str:
    """What the findings are of, in words."""
    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def page(findings: Sequence[Finding], out: str = "docs/models.md") -> str:
    """The whole page; one row for each finding, in the order of their names.

    Args:
        findings: of all architectures.
        out: the file that it is written to, for the command that the page names.
    """
    ordered = sorted(findings, key=lambda finding: finding.name.lower())
    passing = [finding for finding in ordered if finding.passes]
    nothing = [finding for finding in ordered if not finding.passes and finding.by_design]
    failing = [finding for finding in ordered if not finding.passes and not finding.by_design]
    names = [f"`{name}`" for name in POLICIES]
    introduction = _INTRODUCTION.format(
        out=out,
        transformers=transformers.__version__,
        versions=versions(),
        passing=len(passing),
        total=len(ordered),
        nothing=len(nothing),
        policies=", ".join(names[:-1]) + f" and {names[-1]}",
    )
    header = ["architecture", "model types", "input", "heads", "layers", "lossless", "a quarter"]
    header += [*POLICIES, "padded", "prefix"]
    return "\n".join(
        [
            introduction,
            "## What passes\n",
            *_header(header),
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
    said = {True: "yes", None: "–"}  # what does not hold has a reason instead of a row here
    yes = ["yes"] * (2 + len(POLICIES))
    words = map(_safe, (finding.inputs, finding.heads, finding.layers))
    return _line([*start, *words, *yes, said[finding.padded], said[finding.prefix]])


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
