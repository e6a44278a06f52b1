"""The Triton kernel against float64; run with TRITON_INTERPRET=1, prints one JSON line a case."""

from __future__ import annotations

import itertools
import json

import torch

from kvpolicy.ops.triton import decode_op
from kvpolicy.ops.triton.decode_slots import decode_slots


def reference(query, keys, values, scale, visible):
    """Attention and mass in float64, with every probability written out."""
    batch, query_heads, _, dim = query.shape
    heads, slots = keys.shape[1:3]
    group = query_heads // heads
    grouped = query.double().view(batch, heads, group, dim)
    scores = torch.einsum("bhgd,bhsd->bhgs", grouped, keys.double()) * scale
    hidden = torch.zeros(batch, heads, slots, dtype=torch.bool)
    if visible is not None:
        hidden = ~visible.expand(batch, heads, 1, slots)[:, :, 0]
        scores = scores.masked_fill(hidden[:, :, None], torch.finfo(torch.float32).min)
    chances = scores.softmax(-1)
    output = torch.einsum("bhgs,bhsd->bhgd", chances, values.double())
    mass = chances.mean(2).masked_fill(hidden, 0)
    return output.reshape(batch, query_heads, 1, -1), mass[:, :, None]


def error(found, wanted) -> float:
    """Norm of the difference over the norm of what is wanted; NaN counts as infinite."""
    ratio = ((found.double() - wanted).norm() / wanted.norm()).item()
    return ratio if ratio == ratio else float("inf")


def cases():
    """(name, batch, heads, group, slots, dim, dim_v, dtype, mask)."""
    kinds = ((torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16"))
    for (dtype, label), group in itertools.product(kinds, (1, 4)):
        yield f"{label} group {group}", 2, 2, group, 97, 64, 64, dtype, "none"
        yield f"{label} group {group} masked", 2, 2, group, 97, 64, 64, dtype, "some"
    for dim in (64, 80, 128, 256):
        yield f"dim {dim}", 1, 2, 2, 130, dim, dim, torch.float32, "some"
        yield f"dim {dim} bfloat16", 1, 2, 2, 130, dim, dim, torch.bfloat16, "some"
    yield "values narrower than keys", 1, 2, 3, 70, 64, 32, torch.float32, "none"
    for slots in (1, 63, 64, 65, 1200):
        yield f"{slots} slots", 1, 1, 1, slots, 64, 64, torch.float32, "none"
    yield "one mask for all heads", 2, 2, 2, 97, 64, 64, torch.float32, "shared"
    yield "a query that sees nothing", 2, 2, 2, 97, 64, 64, torch.float32, "blind"
    yield "large scores", 1, 2, 2, 97, 64, 64, torch.float32, "large"


def main() -> None:
    torch.manual_seed(0)
    for name, batch, heads, group, slots, dim, dim_v, dtype, kind in cases():
        query = torch.randn(batch, 1, heads * group, dim).to(dtype).transpose(1, 2)
        keys = torch.randn(batch, heads, slots + 3, dim).to(dtype)[:, :, :slots]
        values = torch.randn(batch, heads, slots + 3, dim_v).to(dtype)[:, :, :slots]
        visible = None
        if kind == "some":
            visible = torch.rand(batch, heads, 1, slots) > 0.3
        elif kind == "shared":
            visible = torch.rand(batch, 1, 1, slots) > 0.3
        elif kind == "blind":
            visible = torch.rand(batch, heads, 1, slots) > 0.3
            visible[0, 1] = False
        elif kind == "large":
            query = query * 60
        scale = dim**-0.5
        output, mass = decode_slots(query, keys, values, scale, visible, True)
        wanted, wanted_mass = reference(query, keys, values, scale, visible)
        alone, none = decode_slots(query, keys, values, scale, visible, False)
        assert none is None
        hidden = 0.0
        if visible is not None:
            hidden = mass.masked_select(~visible.expand_as(mass)).abs().sum().item()
        found = {
            "case": name,
            "dtype": str(dtype),
            "output": error(output, wanted),
            "mass": error(mass, wanted_mass),
            "without mass": error(alone, wanted),
            "mass of hidden slots": hidden,
            "sum of mass": (mass.sum(-1) - wanted_mass.float().sum(-1)).abs().max().item(),
        }
        print(json.dumps(found), flush=True)


def compiled() -> None:
    """The operator in one graph."""
    query, keys, values = torch.randn(2, 4, 1, 64), *torch.randn(2, 2, 2, 97, 64)
    visible = torch.rand(2, 2, 1, 97) > 0.3
    wanted, wanted_mass = reference(query, keys, values, 0.125, visible)
    for need_mass in (True, False):
        operator = torch.compile(decode_op, fullgraph=True, backend="aot_eager")
        output, mass = operator(query, keys, values, 0.125, visible, need_mass)
        found = {
            "case": "compiled" if need_mass else "compiled without mass",
            "dtype": "torch.float32",
            "output": error(output, wanted),
        }
        if need_mass:
            found["mass"] = error(mass, wanted_mass)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
    compiled()
