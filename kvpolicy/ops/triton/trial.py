"""``python -m kvpolicy.ops.triton.trial``: are the Triton kernels right here, against float64?

Prints a line of JSON for each case. On a machine without a GPU give ``--device cpu``, with
``TRITON_INTERPRET=1`` in the environment.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

from kvpolicy.ops.rank import leveled
from kvpolicy.ops.triton import decode_op, step_op
from kvpolicy.ops.triton.asserting import ASSERTING
from kvpolicy.ops.triton.decode_slots import decode_slots, step_slots
from kvpolicy.ops.triton.rank_slots import lowest_slots

__all__: list[str] = []


class Case(NamedTuple):
    """Shapes of one case, and what its queries may see."""

    name: str
    batch: int
    heads: int
    group: int
    slots: int
    dim: int
    dim_v: int
    dtype: torch.dtype
    mask: str


def cases() -> Iterator[Case]:
    """All of them; the first of each kind of kernel come first."""
    kinds = ((torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16"))
    for (dtype, label), group in itertools.product(kinds, (1, 4)):
        yield Case(f"{label} group {group}", 2, 2, group, 97, 64, 64, dtype, "none")
        yield Case(f"{label} group {group} masked", 2, 2, group, 97, 64, 64, dtype, "some")
    for dim in (64, 80, 128, 256):
        yield Case(f"dim {dim}", 1, 2, 2, 130, dim, dim, torch.float32, "some")
        yield Case(f"dim {dim} bfloat16", 1, 2, 2, 130, dim, dim, torch.bfloat16, "some")
    yield Case("values narrower than keys", 1, 2, 3, 70, 64, 32, torch.float32, "none")
    for slots in (1, 63, 64, 65, 1200):
        yield Case(f"{slots} slots", 1, 1, 1, slots, 64, 64, torch.float32, "none")
    yield Case("one mask for all heads", 2, 2, 2, 97, 64, 64, torch.float32, "shared")
    yield Case("a query that sees nothing", 2, 2, 2, 97, 64, 64, torch.float32, "blind")
    yield Case("large scores", 1, 2, 2, 97, 64, 64, torch.float32, "large")


#: Enough to see that a GPU computes what the interpreter does: a kernel takes a second to compile.
BRIEF = (
    *("float32 group 1", "bfloat16 group 1", "bfloat16 group 4 masked", "float16 group 1"),
    "values narrower than keys",
)


def reference(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention and mass in float64, with every probability written out."""
    batch, query_heads, _, dim = query.shape
    heads, slots = keys.shape[1:3]
    group = query_heads // heads
    grouped = query.double().view(batch, heads, group, dim)
    scores = torch.einsum("bhgd,bhsd->bhgs", grouped, keys.double()) * scale
    hidden = torch.zeros(batch, heads, slots, dtype=torch.bool, device=query.device)
    if visible is not None:
        hidden = ~visible.expand(batch, heads, 1, slots)[:, :, 0]
        scores = scores.masked_fill(hidden[:, :, None], torch.finfo(torch.float32).min)
    chances = scores.softmax(-1)
    output = torch.einsum("bhgs,bhsd->bhgd", chances, values.double())
    mass = chances.mean(2).masked_fill(hidden, 0)
    return output.reshape(batch, query_heads, 1, -1), mass[:, :, None]


def error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; NaN counts as infinite."""
    ratio = ((found.double() - wanted).norm() / wanted.norm()).item()
    return ratio if ratio == ratio else float("inf")


def tensors(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, keys, values and mask, none of them contiguous."""
    chance = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=chance).to(device, case.dtype)

    query = draw(case.batch, 1, case.heads * case.group, case.dim).transpose(1, 2)
    keys = draw(case.batch, case.heads, case.slots + 3, case.dim)[:, :, : case.slots]
    values = draw(case.batch, case.heads, case.slots + 3, case.dim_v)[:, :, : case.slots]
    visible = None
    if case.mask in ("some", "blind", "shared"):
        heads = 1 if case.mask == "shared" else case.heads
        visible = torch.rand(case.batch, heads, 1, case.slots, generator=chance) > 0.3
        if case.mask == "blind":
            visible[0, 1] = False
        visible = visible.to(device)
    return query * 60 if case.mask == "large" else query, keys, values, visible


def attended(case: Case, device: str) -> dict[str, Any]:
    """One query's attention."""
    query, keys, values, visible = tensors(case, device)
    scale = case.dim**-0.5
    output, mass = decode_slots(query, keys, values, scale, visible, True)
    wanted, wanted_mass = reference(query, keys, values, scale, visible)
    alone, none = decode_slots(query, keys, values, scale, visible, False)
    assert none is None
    assert mass is not None
    hidden = 0.0
    if visible is not None:
        hidden = mass.masked_select(~visible.expand_as(mass)).abs().sum().item()
    return {
        "output": error(output, wanted),
        "mass": error(mass, wanted_mass),
        "without mass": error(alone, wanted),
        "mass of hidden slots": hidden,
        "sum of mass": (mass.sum(-1) - wanted_mass.float().sum(-1)).abs().max().item(),
    }


def stepped(case: Case, device: str) -> dict[str, Any]:
    """A token that is written and attended to: as if torch had written it before."""
    query, keys, values, visible = tensors(case, device)
    shape = (case.batch, case.heads, case.slots)
    positions = torch.arange(case.slots, dtype=torch.int32, device=device).repeat(*shape[:2], 1)
    if visible is not None:
        positions.masked_fill_(~visible[:, :, 0], -1)
    chance = torch.Generator().manual_seed(1)
    slots = torch.randint(case.slots, (*shape[:2], 1), generator=chance).to(device)
    key, value = (
        torch.randn(case.batch, 1, case.heads, width, generator=chance)
        .to(device, case.dtype)
        .transpose(1, 2)
        for width in (case.dim, case.dim_v)
    )
    scale, position = case.dim**-0.5, case.slots + 7
    stores = [store.clone() for store in (keys, values, positions)]
    for store, new in ((stores[0], key), (stores[1], value)):
        store.scatter_(2, slots.unsqueeze(-1).expand_as(new), new)
    stores[2].scatter_(2, slots, position)
    wanted, wanted_mass = reference(
        query, stores[0], stores[1], scale, (stores[2] >= 0).unsqueeze(2)
    )
    figures: dict[str, Any] = {}
    into = torch.empty(*shape[:2], 1, case.slots, device=device)
    where = torch.full((1,), position, dtype=torch.int32, device=device)
    for name, at, into_ in (("", position, None), (" in place", where, into)):
        written = keys.clone(), values.clone(), positions.clone()
        output, mass = step_slots(
            *(query, *written, slots, key, value, at, case.slots, scale, True, into_)
        )
        assert mass is not None
        figures["output" + name] = error(output, wanted)
        figures["mass" + name] = error(mass, wanted_mass)
        figures["written otherwise" + name] = sum(
            int((a != b).sum()) for a, b in zip(written, stores, strict=True)
        )
    alone, _ = step_slots(
        query, keys, values, positions, slots, key, value, position, case.slots, scale, False
    )
    figures["without mass"] = error(alone, wanted)
    return figures


def ranked(device: str) -> Iterator[dict[str, Any]]:
    """The slots that go, against a sort of the same levels: ties, NaN, empty, protected slots."""
    chance = torch.Generator().manual_seed(0)
    for slots, ranks, count in ((97, False, 24), (97, True, 1), (130, False, 130), (1, False, 1)):
        size = (2, 3, slots)
        positions = torch.rand(size, generator=chance).argsort(-1).to(torch.int32)
        # Few values, so that many tie, some beyond the roof; -0.0 ties with 0.0.
        score = torch.randint(-2, 3, size, generator=chance) * 1e38
        score[..., ::3] = -0.0
        if ranks:
            score = torch.rand(size, generator=chance).argsort(-1).to(torch.int32)
        protected = torch.rand(size, generator=chance) > 0.6
        pinned = positions < 2
        positions[..., 1::7] = -1
        outside = (positions < 20) | (positions >= 70)
        shields = ((None, None), (protected, pinned), (protected[:, :1], None), (outside, None))
        for shield, pin in shields:
            what = "all" if shield is None else "shared" if pin is None else "each"
            span = (20, 70) if shield is outside else None
            what = what if span is None else "by position"
            prefix = 0 if pin is not None else min(2, slots - 1)
            # What is NaN and does not count.
            worth = score if ranks else score.masked_fill(positions < 0, torch.nan)
            level = leveled(worth, positions, protected=shield, pinned=pin, prefix=prefix)
            rows = zip(level.flatten(0, 1).tolist(), positions.flatten(0, 1).tolist(), strict=True)
            order = [
                [slot for *_, slot in sorted(zip(*row, range(slots), strict=True))] for row in rows
            ]
            expected = torch.tensor(order).view(size)[..., :count]
            moved = (
                None if shield is None else span or shield.to(device),
                None if pin is None else pin.to(device),
            )
            found = lowest_slots(worth.to(device), positions.to(device), count, *moved, prefix)
            wrong = int((found.cpu() != expected).sum())
            yield {"case": f"rank {slots} slots, {count} go, {what}", "chosen otherwise": wrong}


def break_assertion(kind: str, device: str) -> None:
    """Launch a kernel with one NaN. It must not come to its end; a GPU's process is lost then."""
    broken = torch.randn(2, 2, 1, 97, device=device)
    broken[1, 1, 0, 40] = torch.nan
    positions = torch.arange(97, dtype=torch.int32, device=device).repeat(2, 2, 1)
    if kind == "rank":
        lowest_slots(broken[:, :, 0], positions, 24, None, None, 1)
    else:
        keys = torch.randn(2, 2, 97, 97, device=device)
        slots, new = torch.full((2, 2, 1), 5, device=device), torch.randn_like(broken)
        step_slots(broken, keys, keys.clone(), positions, slots, new, new, 97, 97, 0.1, True)
    if device != "cpu":
        torch.cuda.synchronize(device)


def asserted(device: str) -> Iterator[dict[str, Any]]:
    """Whether NaN ends a process with the kernel's own words: each kind in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, "--device", device, "--nan"]
    said = {"step": "attention is NaN", "rank": "a score is NaN"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ends = {kind: subprocess.Popen([*command, kind], **pipes) for kind in said}
    for kind, process in ends.items():
        words = process.communicate()[0]
        seen = process.returncode != 0 and said[kind] in words
        yield {"case": f"{kind} with NaN", "NaN not seen": 1 - int(seen)}


def compiled(device: str) -> Iterator[dict[str, Any]]:
    """The operators in one graph."""
    case = Case("compiled", 2, 2, 2, 97, 64, 64, torch.float32, "some")
    query, keys, values, visible = tensors(case, device)
    wanted, wanted_mass = reference(query, keys, values, 0.125, visible)
    for need_mass in (True, False):
        operator = torch.compile(decode_op, fullgraph=True, backend="aot_eager")
        output, mass = operator(query, keys, values, 0.125, visible, need_mass)
        figures = {"output": error(output, wanted)}
        if need_mass:
            figures["mass"] = error(mass, wanted_mass)
        yield {"case": "compiled" if need_mass else "compiled without mass", **figures}
    full = torch.arange(97, dtype=torch.int32, device=device).repeat(2, 2, 1)
    mass, slots = torch.empty(2, 2, 1, 97, device=device), torch.full((2, 2, 1), 5, device=device)
    step = torch.compile(step_op, fullgraph=True, backend="aot_eager")
    output = step(
        *(query, keys, values, full, mass, slots),
        *(keys[:, :, 5:6].clone(), values[:, :, 5:6].clone(), full[0, 0, 5:6].clone(), 0.125),
    )
    wanted, wanted_mass = reference(query, keys, values, 0.125, None)
    yield {
        "case": "compiled step",
        "output": error(output, wanted),
        "mass": error(mass, wanted_mass),
    }


def main() -> None:
    """Print each case."""
    parser = argparse.ArgumentParser(prog="python -m kvpolicy.ops.triton.trial")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--brief", action="store_true", help="a few cases of each kind")
    parser.add_argument("--nan", choices=("step", "rank"), help="break this kernel's assertion")
    given = parser.parse_args()
    if given.device == "cpu":  # the interpreter asserts nothing unless told to
        interpreter_builder.options = InterpreterOptions(**ASSERTING)
    if given.nan is not None:
        break_assertion(given.nan, given.device)
        return
    for case in cases():
        if given.brief and case.name not in BRIEF:
            continue
        about = {"case": case.name, "dtype": str(case.dtype)}
        print(json.dumps({**about, **attended(case, given.device)}), flush=True)
        if case.dim == 64:  # other widths differ in nothing but that
            about["case"] = f"step, {case.name}"
            print(json.dumps({**about, **stepped(case, given.device)}), flush=True)
    for found in (*ranked(given.device), *asserted(given.device)):
        print(json.dumps({"dtype": str(torch.float32), **found}), flush=True)
    if not given.brief:
        for found in compiled(given.device):
            print(json.dumps({"dtype": "torch.float32", **found}), flush=True)


if __name__ == "__main__":
    main()
