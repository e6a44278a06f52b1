"""``python -m kvpolicy_adapters.bench.gpu``: is kvpolicy right on this GPU, and how fast?

One command for anybody's GPU, in six minutes at most: every policy's decisions against the CPU's,
the Triton kernels against float64, a decode step in a CUDA graph, LlamaGen's shapes against other
caches, kernels and waits of a step, and the largest batch. Prints tables to paste into an issue.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kvpolicy.errors import KVPolicyError
from kvpolicy.lab.bench.peers import find_environment
from kvpolicy_adapters.bench.gpu.batch import find_largest_batch
from kvpolicy_adapters.bench.gpu.decisions import compare_decisions
from kvpolicy_adapters.bench.gpu.graphs import compare_graphs
from kvpolicy_adapters.bench.gpu.guard import run_part
from kvpolicy_adapters.bench.gpu.kernels import compare_kernels
from kvpolicy_adapters.bench.gpu.machine import look_at_machine, look_for_gpu
from kvpolicy_adapters.bench.gpu.part import Outcome, Part, Setting
from kvpolicy_adapters.bench.gpu.profile import profile_steps
from kvpolicy_adapters.bench.gpu.report import markdown, write_json
from kvpolicy_adapters.bench.gpu.speed import measure

#: What is looked at, what matters most first; together no more than six minutes.
PARTS = (
    Part("the machine", 15, look_at_machine),
    Part("kernels against float64", 55, compare_kernels),
    Part("decisions against the CPU's", 40, compare_decisions),
    Part("kernels and waits of a layer's step", 25, profile_steps),
    Part("a step in a CUDA graph", 50, compare_graphs),
    Part("llamagen-b, batch 8", 25, measure("llamagen-b", 8, False)),
    Part("llamagen-b, batch 128", 25, measure("llamagen-b", 128, False)),
    Part("llamagen-xl, batch 8", 30, measure("llamagen-xl", 8, False)),
    Part("llamagen-xl, batch 128", 30, measure("llamagen-xl", 128, False)),
    Part("largest batch of llamagen-b", 25, find_largest_batch),
    Part("llamagen-b compiled, batch 8", 40, measure("llamagen-b", 8, True), gpu_only=True),
)
_MINUTES = 6.0
_LOOKING = 60.0
_DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 if every part came to its end and found nothing wrong; 1 if not; 2 if there is no such
        device, or an option is wrong.
    """
    given = _options(arguments)
    command = shlex.join(
        ["python", "-m", "kvpolicy_adapters.bench.gpu", *(arguments or sys.argv[1:])]
    )
    setting = Setting(
        device=given.device,
        tiny=given.tiny,
        dtype="float32" if given.tiny else given.dtype,
        kvpress=find_environment(given.peers_environment.expanduser()),
        llamagen=None if given.llamagen is None else given.llamagen.resolve(),
    )
    begun = time.monotonic()
    looked = run_part(Part("the device", _LOOKING, look_for_gpu), setting, _LOOKING)
    if looked.state != "done":
        print(looked.error, file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    parts = [part for part in PARTS if setting.cuda or not part.gpu_only]
    try:
        for part in parts:
            left = 60 * given.minutes - (time.monotonic() - begun)
            share = part.seconds * given.minutes / _MINUTES
            outcomes.append(run_part(replace(part, seconds=share), setting, left))
            last = outcomes[-1]
            print(f"{last.part}: {last.state}, {last.seconds:.0f} s", file=sys.stderr, flush=True)
            # What there is, is kept: the machine itself may not live to the end.
            write_json(given.out, outcomes, setting, command, time.monotonic() - begun)
    except KeyboardInterrupt:
        print("interrupted: what was finished follows", file=sys.stderr)
    print(markdown(outcomes, command, tiny=setting.tiny))
    print(f"wrote {given.out}", file=sys.stderr)
    if len(outcomes) < len(parts):
        return 130
    return 0 if all(outcome.good for outcome in outcomes) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kvpolicy_adapters.bench.gpu", description=__doc__
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu with --tiny")
    parser.add_argument(
        "--tiny", action="store_true", help="small enough for a CPU; measures nothing"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=_MINUTES,
        help="in all, at most: a slower machine needs more",
    )
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument(
        "--llamagen", type=Path, help="a checkout of LlamaGen: its official generate too"
    )
    parser.add_argument(
        "--peers-environment",
        type=Path,
        default=Path("~/.cache/kvpolicy/peers"),
        help="where `kvpolicy bench --peers` has made one: kvpress too, if it is there",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="all figures")
    given = parser.parse_args(arguments)
    kind = given.device.partition(":")[0]
    if kind not in ("cuda", "cpu"):
        parser.error(f"--device {given.device}: give cuda, cuda:N, or cpu with --tiny")
    if kind == "cpu" and not given.tiny:
        parser.error("--device cpu needs --tiny: the real shapes would take hours")
    if not given.minutes > 0:
        parser.error(f"--minutes {given.minutes} must be above 0")
    if given.llamagen is not None:
        model = given.llamagen / "autoregressive" / "models" / "gpt.py"
        if not model.exists():
            parser.error(f"--llamagen {given.llamagen}: there is no {model}")
    if not given.out.parent.is_dir():
        parser.error(f"--out {given.out}: there is no folder {given.out.parent}")
    return given


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KVPolicyError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(74 if isinstance(error, OSError) else 2)
