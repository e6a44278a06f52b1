"""What ``make bench`` runs: a small fixed bench, whose figures are kept with commit and machine.

The workload does not change, so figures of different commits on one machine may be set side by
side. Only ratios are drawn, each to a baseline of the same run: what else a machine does changes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.ticker import PercentFormatter

ROOT = Path(__file__).parents[1]
HISTORY, PLOT = ROOT / "docs" / "bench.json", ROOT / "docs" / "bench.png"
POLICIES = ("linear", "linear2d", "streaming_llm", "h2o")
#: Four of LlamaGen-B's twelve layers, four images at once, a sixth of the cache, one thread.
WORKLOAD = (
    *("--shape", "llamagen-b", "--layers", "4", "--batch", "4", "--budget", "1/6"),
    *("--policies", ",".join(POLICIES), "--baselines", "dynamic,floor"),
    *("--rounds", "3", "--every", "5", "--threads", "1", "--no-memory", "--seed", "0"),
)
MARKERS = "osD^"


def git(*arguments: str) -> str:
    """What git says of this checkout."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def measure(options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run the bench, and keep of it what is compared between commits."""
    # The CPU kernel of this checkout, which must not become the user's.
    kernels = os.environ.get("KVPOLICY_KERNELS", str(Path(sys.prefix, "kernels")))
    env = os.environ | {"KVPOLICY_KERNELS": kernels, "OMP_NUM_THREADS": "1"}
    kvpolicy = [sys.executable, "-m", "kvpolicy"]
    subprocess.run([*kvpolicy, "build-kernel"], cwd=ROOT, env=env, check=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = [*kvpolicy, "bench", *WORKLOAD, *options, "--out", folder]
        subprocess.run(bench, cwd=ROOT, env=env, check=True)
        results = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
    faster = {each["policy"]: each for each in results["faster"] if each["than"] == "dynamic"}
    changed = git("status", "--porcelain", "--", "kvpolicy", "adapters")
    return {
        "commit": git("rev-parse", "--short=12", "HEAD") + ("+" if changed else ""),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": results["machine"],
        "workload": " ".join([*WORKLOAD, *options]),
        "rounds": results["rounds_finished"],
        "policies": {
            each["name"]: {
                "step": each["step"],
                "over_floor": each["overhead"],
                "than_dynamic": {
                    end: faster[each["name"]][end] for end in ("value", "low", "high")
                },
            }
            for each in results["figures"]
            if each["kind"] == "policy"
        },
        "baselines": {
            each["name"]: each["step"] for each in results["figures"] if each["kind"] != "policy"
        },
    }


def draw(history: list[dict[str, Any]]) -> None:
    """A column a machine, in which each commit's ratios stand from left to right."""
    machines: dict[str, list[dict[str, Any]]] = {}
    for entry in history:
        machine = entry["machine"]
        kernel = "CPU kernel" if machine["kernel"] else "no kernel"
        title = f"{machine['processor']}, torch {machine['torch']}, {kernel}"
        machines.setdefault(title, []).append(entry)
    figure, panels = pyplot.subplots(
        2,
        len(machines),
        figsize=(1.5 + 4.5 * len(machines), 6),
        sharex="col",
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for (above, below), (title, entries) in zip(panels.T, machines.items(), strict=True):
        for panel, ratio in ((above, "over_floor"), (below, "than_dynamic")):
            for index, name in enumerate(POLICIES):
                told = [entry["policies"][name][ratio] for entry in entries]
                value, low, high = (
                    [each[end] for each in told] for end in ("value", "low", "high")
                )
                around = [
                    [v - x for v, x in zip(value, low, strict=True)],
                    [x - v for v, x in zip(value, high, strict=True)],
                ]
                # Side by side, so that no interval hides another.
                places = [place + 0.08 * (index - 1.5) for place in range(len(entries))]
                panel.errorbar(places, value, around, label=name, marker=MARKERS[index], capsize=3)
            panel.grid(axis="y", alpha=0.3)
        above.axhline(0, color="black", linewidth=0.8)
        below.axhline(1, color="black", linewidth=0.8)
        above.set_title(title, fontsize=9)
        below.set_xticks(
            range(len(entries)), [entry["commit"][:8] + entry["commit"][12:] for entry in entries]
        )
        below.tick_params(axis="x", rotation=45)
        below.set_xlim(-0.5, len(entries) - 0.5)
    panels[0, 0].set_ylabel("a step above the floor's")
    panels[0, 0].yaxis.set_major_formatter(PercentFormatter(1))
    panels[1, 0].set_ylabel("times as fast as DynamicCache")
    panels[0, -1].legend(fontsize=8)
    figure.savefig(PLOT, dpi=120)


def main() -> None:
    """Measure, add to the history, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="only draw what has been measured")
    parser.add_argument("--dry-run", action="store_true", help="measure, print, and keep nothing")
    given = parser.parse_args()
    history = json.loads(HISTORY.read_text(encoding="utf-8")) if HISTORY.exists() else []
    if not given.draw:
        entry = measure()
        if given.dry_run:
            print(json.dumps(entry, indent=1))
            return
        history.append(entry)
        HISTORY.write_text(json.dumps(history, indent=1) + "\n", encoding="utf-8")
    draw(history)
    print(f"wrote {HISTORY.relative_to(ROOT)} and {PLOT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
