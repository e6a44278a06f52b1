"""``python -m kvpolicy_adapters.evaluation.sweep``: examine architectures, write the page."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

import torch

from kvpolicy.errors import near_matches
from kvpolicy_adapters.evaluation.sweep.examine import examine
from kvpolicy_adapters.evaluation.sweep.page import page, row, versions
from kvpolicy_adapters.evaluation.sweep.tiny import architectures


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m kvpolicy_adapters.evaluation.sweep", description=__doc__
    )
    parser.add_argument("--out", type=Path, help="the page to write, or to check")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where the page is another"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="examine these classes, and print their rows"
    )
    chosen = parser.parse_args(arguments)
    known = architectures()
    for name in chosen.only or ():
        if name not in known:
            parser.error(f"--only {name}: no such architecture; {near_matches(name, known)}")
    if chosen.check and chosen.out is None:
        parser.error("--check needs the page: --out docs/models.md")
    if chosen.check and versions() not in " ".join(chosen.out.read_text(encoding="utf-8").split()):
        # Other versions find other things, which is no mistake of the page's.
        parser.error(f"{chosen.out} was not made with {versions()}; check it with what it names")
    torch.set_num_threads(1)  # the models are tiny: a second thread would only wait at barriers
    findings = []
    names = chosen.only or list(known)
    for number, name in enumerate(names, 1):
        finding = examine(name, known[name])
        findings.append(finding)
        outcome = "passes" if finding.passes else finding.reason
        print(f"{number}/{len(names)} {name}: {outcome}", file=sys.stderr, flush=True)
    if chosen.only:
        print(*map(row, findings), sep="\n")
        return 0
    text = page(findings, *([] if chosen.out is None else [f"docs/{chosen.out.name}"]))
    if chosen.out is None:
        print(text)
    elif not chosen.check:
        chosen.out.write_text(text, encoding="utf-8")
    else:
        before = chosen.out.read_text(encoding="utf-8").splitlines()
        difference = list(difflib.unified_diff(before, text.splitlines(), str(chosen.out), "now"))
        print(*difference, sep="\n")
        return 1 if difference else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
