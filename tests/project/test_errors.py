"""Wrong uses: each raises its exception, as early as it can, and says what to do instead."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from support.turns import in_turn

import kvpolicy
from kvpolicy import (
    Arithmetic,
    AttentionError,
    Budget,
    BudgetError,
    CacheStateError,
    KernelError,
    LayoutError,
    ParameterError,
    PerLayer,
    PolicyCache,
    RasterLayout,
    ShapeError,
    SlotShape,
    TextLayout,
    UnknownNameError,
    WindowMass,
    create,
)
from kvpolicy.ops.cpu.build import build

try:
    from kvpolicy.lab.run.plan import Plan, read_plan
    from kvpolicy.lab.run.subject import load_subject
except ImportError:
    read_plan = None
try:
    from kvpolicy_adapters import zoo
    from kvpolicy_adapters.zoo.fashion import read_fashion
except ImportError:  # the extra is missing: what needs no model is tested all the same
    zoo = None

GRID = RasterLayout(rows=4, cols=4, prefix=1)
NAN, INF = float("nan"), float("inf")
#: Every exception also is the built-in one that fits.
BUILT_IN = {
    AttentionError: FloatingPointError,
    BudgetError: ValueError,
    CacheStateError: RuntimeError,
    KernelError: RuntimeError,
    LayoutError: ValueError,
    ParameterError: ValueError,
    ShapeError: ValueError,
    UnknownNameError: LookupError,
}


def cache(policy="random", budget=8, layout=GRID, num_layers=2, **options) -> PolicyCache:
    return PolicyCache(policy, budget, layout=layout, num_layers=num_layers, **options)


def tokens(batch=2, heads=2, count=1, dim=4, **options) -> torch.Tensor:
    return torch.zeros(batch, heads, count, dim, **options)


def attend(query=None, key=None, value=None, *, layer=0, on=None, **options):
    """One call with good tensors, except for those given."""
    query, key, value = (tokens() if tensor is None else tensor for tensor in (query, key, value))
    return (on or cache()).attend(layer, query, key, value, **options)


def begun(**options) -> PolicyCache:
    """A cache that has seen one token of two samples, two heads and four dims."""
    started = cache(**options)
    for layer in range(2):
        attend(layer=layer, on=started)
    return started


def interrupted() -> PolicyCache:
    """A cache whose second token was broken off in layer 0."""
    started = begun(policy="h2o")
    with pytest.raises(AttentionError):
        attend(tokens() * NAN, on=started)
    return started


def far() -> PolicyCache:
    """A cache that has counted as many tokens as there can be."""
    made = begun(layout=TextLayout(), policy="h2o")
    for layer in made.layers:
        layer.seen = 2**30
    return made


def naming(slot: int, method: str = "victims"):
    """Ask a policy that names a slot that there is none of."""

    class Wild(kvpolicy.policies.Random):
        pass

    def wild(self, view, count, *protected):
        chosen = getattr(super(Wild, self), method)(view, count, *protected)
        return torch.full_like(chosen, slot)

    setattr(Wild, method, wild)
    made = cache(policy=Wild(), num_layers=1)
    for _ in range(GRID.length):
        attend(on=made)


def kernels(where: str, compiler: str | None = None):
    """Build the CPU kernels, nearly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVPOLICY_KERNELS", where)
        build(compiler or sys.executable)


def plan_of(text: str, name: str = "plan.yaml"):
    """Read a plan's file."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_text(text)
        return read_plan(Path(folder) / name)


def damaged(case: str):
    """Read a copy of the model in the box with one thing wrong."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "fashion_ar"
        shutil.copytree(str(files("kvpolicy_adapters.zoo").joinpath("fashion_ar")), folder)
        card = json.loads((folder / "card.json").read_text())
        weights = folder / "model.safetensors"
        match case:
            case "a file cut short":
                weights.write_bytes(weights.read_bytes()[:-1])
            case "a file with something behind it":
                weights.write_bytes(weights.read_bytes() + b"\0")
            case "an empty file":
                weights.write_bytes(b"")
            case "a pickle instead":
                torch.save({"weights": torch.zeros(3)}, weights)
            case "two files that have changed places":
                weights.rename(folder / "other")
                (folder / "classifier.safetensors").rename(weights)
                (folder / "other").rename(folder / "classifier.safetensors")
            case "a folder instead of a file":
                weights.unlink()
                weights.mkdir()
            case "no such file":
                weights.unlink()
            case "a card that is no JSON":
                (folder / "card.json").write_text("[red]{")
            case "a card that is not UTF-8":
                (folder / "card.json").write_bytes(b"\xff\xfe{}")
            case "a card without seals":
                (folder / "card.json").write_text(json.dumps(card | {"files": {}}))
            case "a card with a seal that is no text":
                (folder / "card.json").write_text(json.dumps(card | {"files": {"a": 1}}))
            case "a card that knows more":
                (folder / "card.json").write_text(json.dumps(card | {"run": "import os"}))
        return read_fashion(folder)


#: What is wrong with a file of the zoo, and what must be said.
DAMAGE = {
    "a file cut short": ("model.safetensors is damaged", "reinstall"),
    "a file with something behind it": ("model.safetensors is damaged", "reinstall"),
    "an empty file": ("model.safetensors is damaged", "e3b0c44298fc"),
    "a pickle instead": ("model.safetensors is damaged", "SHA-256"),
    "two files that have changed places": ("model.safetensors is damaged", "SHA-256"),
    "a folder instead of a file": ("model.safetensors can't be read", "reinstall"),
    "no such file": ("model.safetensors can't be read", "reinstall"),
    "a card that is no JSON": ("card.json can't be read", "reinstall"),
    "a card that is not UTF-8": ("card.json can't be read", "reinstall"),
    "a card without seals": ("no SHA-256 for config.json",),
    "a card with a seal that is no text": ("card.json can't be read", "files.a"),
    "a card that knows more": ("card.json can't be read", "run"),
}


def alike(tensor: torch.Tensor, **options):
    return attend(tensor, tensor, tensor, **options)


WRONG = [
    # names
    (lambda: create("lineer"), UnknownNameError, "'lineer'", "did you mean 'linear'"),
    (lambda: create("LINEAR"), UnknownNameError, "did you mean 'linear'"),
    (lambda: create("h20"), UnknownNameError, "did you mean 'h2o'?"),
    (lambda: create(""), UnknownNameError, "''", "known: ", "'full'"),
    (lambda: create("../../etc/passwd"), UnknownNameError, "'../../etc/passwd'", "known: "),
    (lambda: create("linear\0"), UnknownNameError, r"'linear\x00'"),
    (lambda: create("[red]linear[/red]"), UnknownNameError, "'[red]linear[/red]'"),
    (lambda: create("linear\n"), UnknownNameError, r"'linear\n'", "did you mean 'linear'"),
    (lambda: create("lin\u202eear"), UnknownNameError, r"'lin\u202eear'"),
    (lambda: create("линейная"), UnknownNameError, "'линейная'", "known: "),
    (lambda: create("linear/protect=..%2fx"), ParameterError, "'..%2fx'", "known: "),
    (lambda: create("linear/[red]=lots"), ParameterError, "[red]"),
    (lambda: create("x" * 10_000), UnknownNameError, "known: "),
    (lambda: create(5), UnknownNameError, "5", "must be a string"),
    (lambda: create([]), UnknownNameError, "[]", "must be a string"),
    (lambda: kvpolicy.spec("streaming-llm"), UnknownNameError, "did you mean 'streaming_llm'?"),
    (lambda: cache(policy="pyramids"), UnknownNameError, "did you mean 'pyramid'?"),
    # parameters of policies
    (lambda: create("linear", anchors=-1), ParameterError, "'linear'", "anchors=-1", "equal to 0"),
    (
        lambda: create("linear", anchors="many"),
        ParameterError,
        "anchors='many'",
        "integer",
        "'2 lines'",
    ),
    (lambda: create("linear", anchors=2.5), ParameterError, "anchors=2.5", "integer"),
    (lambda: create("linear", anchors="3"), ParameterError, "anchors='3'", "integer"),
    (lambda: create("linear", anchors=3.0), ParameterError, "anchors=3.0", "integer"),
    (lambda: create("linear", anchors=True), ParameterError, "anchors=True", "integer"),
    (lambda: create("linear", anchors=[3]), ParameterError, "anchors=[3]", "integer"),
    (lambda: create("h2o", recent="0.5"), ParameterError, "recent='0.5'", "valid number"),
    (lambda: create("h2o", recent=True), ParameterError, "recent=True", "valid number"),
    (lambda: Arithmetic(beta="2"), ParameterError, "beta='2'", "valid number"),
    (lambda: PerLayer(shares=("1", 2)), ParameterError, "shares.0='1'", "valid number"),
    (lambda: create("linear/protect=anchors:x"), ParameterError, "anchors:x", "integer"),
    (lambda: create("linear/protect=anchors:1.5"), ParameterError, "count=1.5", "integer"),
    (lambda: create("linear", anchors="-1 lines"), ParameterError, "'-1 lines'", "'2 lines'"),
    (lambda: create("ssd", window="0 lines"), ParameterError, "window='0 lines'", "equal to 1"),
    (lambda: create("linear/anchor=3"), ParameterError, "'anchor'", "did you mean 'anchors'"),
    (lambda: create("linear/anchors=3", anchors=4), ParameterError, "anchors= twice"),
    (lambda: create("linear", anchors=None), ParameterError, "anchors=None", "never evicted"),
    (lambda: create("linear", anchor=3), ParameterError, "'anchor'", "did you mean 'anchors'?"),
    (lambda: create("linear", recent_lines=-1), ParameterError, "recent_lines=-1"),
    (lambda: create("h2o", recent=1.5), ParameterError, "recent=1.5", "share of the budget"),
    (lambda: create("h2o", recent=NAN), ParameterError, "recent=nan"),
    (lambda: create("h2o", recent="half"), ParameterError, "recent='half'"),
    (lambda: create("pyramid", beta=0.5), ParameterError, "beta=0.5", "equal to 1"),
    (lambda: create("pyramid", beta=INF), ParameterError, "beta=inf"),
    (lambda: create("pyramid", kernel=4), ParameterError, "'pyramid'", "kernel=4", "odd"),
    (lambda: create("pyramid", window=9, interval=3), ParameterError, "window=9", "interval=3"),
    (lambda: create("random", seed=2**31), ParameterError, "seed=2147483648", "less than"),
    (lambda: create("streaming_llm", sinks=-1), ParameterError, "sinks=-1"),
    (lambda: create("full", sinks=1), ParameterError, "'full' has no parameter 'sinks'"),
    # layouts
    (lambda: RasterLayout(rows=0, cols=2), ParameterError, "RasterLayout", "rows=0", "equal to 1"),
    (lambda: RasterLayout(cols=2), ParameterError, "RasterLayout", "rows is missing"),
    (lambda: RasterLayout(rows=2.0, cols=2), ParameterError, "rows=2.0", "integer"),
    (lambda: RasterLayout(rows="2", cols=2), ParameterError, "rows='2'", "integer"),
    (lambda: RasterLayout(rows=True, cols=2), ParameterError, "rows=True", "integer"),
    (lambda: RasterLayout(rows=2, cols=-2), ParameterError, "cols=-2"),
    (lambda: RasterLayout(rows=2, cols=2, line_break=2), ParameterError, "line_break=2"),
    (lambda: RasterLayout(rows=2, cols=2, prefix=-1), ParameterError, "prefix=-1"),
    (lambda: RasterLayout(rows=2, cols=2, suffix=-1), ParameterError, "suffix=-1"),
    (lambda: RasterLayout(rows=2, cols=2, colls=3), ParameterError, "did you mean 'cols'?"),
    (lambda: TextLayout(sinks=-4), ParameterError, "TextLayout", "sinks=-4"),
    (lambda: TextLayout(length=0), ParameterError, "length=0"),
    (lambda: TextLayout(line_length=0), ParameterError, "line_length=0"),
    (lambda: TextLayout(sinks=4, length=4), LayoutError, "length=4", "sinks=4", "works is 5"),
    # schedules
    (lambda: Arithmetic(beta=0.5), ParameterError, "Arithmetic", "beta=0.5"),
    (lambda: Arithmetic(slope=2), ParameterError, "no parameter 'slope'", "'beta'"),
    (lambda: kvpolicy.Uniform(beta=2), ParameterError, "Uniform has no parameter 'beta'"),
    (lambda: PerLayer(), ParameterError, "PerLayer", "shares is missing"),
    (lambda: PerLayer(shares=()), ParameterError, "shares=()"),
    (lambda: PerLayer(shares=(1, -2)), ParameterError, "shares.1=-2"),
    (lambda: PerLayer(shares=(NAN, 1)), ParameterError, "shares.0=nan"),
    (lambda: PerLayer(shares=(1, INF)), ParameterError, "shares.1=inf"),
    (lambda: cache(schedule=PerLayer(shares=(0, 0))), BudgetError, "shares=(0.0, 0.0)", "all be 0"),
    (lambda: cache(schedule=PerLayer(shares=(1, 2, 3))), BudgetError, "3 shares for 2 layers"),
    (lambda: cache(schedule="uniform"), ParameterError, "schedule='uniform'", "Uniform()"),
    # budgets
    *[
        (lambda value=value: cache(budget=value), BudgetError, f"budget={value!r}", "(96)", "'1/6'")
        for value in (
            *(0, -3, 0.0, -0.5, 1e-12, True, [], b"8", NAN, INF, np.int64(8)),
            *("", "abc", "1/0", "0/3", "-1/6", "0 lines", "-2 lines", "2.5 lines", "4 rows"),
            *("0%", "-5%", "%", "1/", "1/3/4", "0x10", "nan", "inf", "1e999999999", "9" * 50),
        )
    ],
    (lambda: cache(budget=1.5), BudgetError, "budget=1.5", "above 1", "integer for a number"),
    (lambda: cache(budget="7/6"), BudgetError, "budget='7/6'", "at most 1.0"),
    (lambda: cache(budget="150%"), BudgetError, "budget='150%'", "at most 1.0"),
    (lambda: cache(budget="1/17"), BudgetError, "1/17", "less than one token of 16", "'1/16'"),
    (
        lambda: cache(budget="1/2", layout=TextLayout()),
        BudgetError,
        "1/2",
        "no length",
        "number of",
    ),
    (lambda: cache(budget=None, layout=TextLayout()), BudgetError, "no length", "or a budget"),
    # making a cache
    (lambda: cache(policy=None), ParameterError, "policy=None", "name"),
    (lambda: cache(policy=kvpolicy.policies.H2O), ParameterError, "H2O", "EvictionPolicy"),
    (lambda: cache(layout=None), ParameterError, "layout=None", "RasterLayout(...)"),
    (lambda: cache(layout=(4, 4)), ParameterError, "layout=(4, 4)"),
    (lambda: cache(num_layers=0), ParameterError, "num_layers=0", "at least 1"),
    (lambda: cache(num_layers="2"), ParameterError, "num_layers='2'", "integer"),
    (lambda: cache(num_layers=True), ParameterError, "num_layers=True"),
    (lambda: cache(reclaim="later"), ParameterError, "reclaim='later'", "'lazy' or 'eager'"),
    (lambda: cache(reclaim=None), ParameterError, "reclaim=None"),
    # tensors
    (lambda: attend(None, None, tokens(count=2)), ShapeError, "value is [2, 2, 2, 4]", "key is"),
    (lambda: alike(torch.zeros(2, 1, 4)), ShapeError, "is [2, 1, 4]", "[B, H, T, D]"),
    (lambda: alike(tokens(count=0)), ShapeError, "no tokens", "[2, 2, 0, 4]"),
    (lambda: alike(tokens(heads=0)), ShapeError, "[2, 0, 1, 4]", "at least 1"),
    (lambda: alike(tokens(dim=0)), ShapeError, "[2, 2, 1, 0]", "at least 1"),
    (lambda: attend(tokens(heads=3)), ShapeError, "3 heads", "multiple of the 2 KV heads"),
    (lambda: attend(tokens(heads=0)), ShapeError, "query is [2, 0, 1, 4]"),
    (lambda: attend(tokens(dim=8)), ShapeError, "query is [2, 2, 1, 8]", "head dim must agree"),
    (lambda: attend(tokens(batch=1)), ShapeError, "query is [1, 2, 1, 4]", "batch"),
    (lambda: attend(tokens(count=2)), ShapeError, "query is [2, 2, 2, 4]", "tokens"),
    (lambda: alike(tokens().long()), ShapeError, "torch.int64", "floating point"),
    (lambda: alike(tokens().bool()), ShapeError, "torch.bool", "floating point"),
    (lambda: alike(tokens().to(torch.complex64)), ShapeError, "complex64", "floating point"),
    (lambda: alike(tokens().numpy()), ShapeError, "ndarray", "torch.Tensor"),
    (lambda: attend([[1.0]]), ShapeError, "query is list", "torch.Tensor"),
    (lambda: cache().attend(0, tokens(), None, tokens()), ShapeError, "key is NoneType"),
    (lambda: attend(tokens().double()), ShapeError, "query is torch.float64", "torch.float32"),
    (lambda: attend(None, None, tokens().half()), ShapeError, "value is torch.float16"),
    (lambda: attend(tokens(device="meta")), ShapeError, "query", "on meta", "on cpu"),
    (lambda: attend(None, tokens(device="meta")), ShapeError, "on cpu", "on meta"),
    (lambda: alike(tokens(device="meta"), on=begun()), ShapeError, "on meta", "holds", "on cpu"),
    (lambda: alike(tokens().half(), on=begun()), ShapeError, "float16", "holds torch.float32"),
    (lambda: alike(tokens(heads=1), on=begun()), ShapeError, "[2, 1, 1, 4]", "H=2"),
    (lambda: alike(tokens(dim=8), on=begun()), ShapeError, "[2, 2, 1, 8]", "D=4"),
    (lambda: attend(visible=torch.ones(1, 1, 1, 1)), ShapeError, "visible", "float32", "bool"),
    (lambda: attend(visible=[True]), ShapeError, "visible is [True]", "[2, 1, 1, 1]"),
    *[
        (
            lambda size=size: attend(visible=torch.ones(size, dtype=torch.bool)),
            ShapeError,
            f"visible is torch.bool {list(size)}",
            "expected bool [2, 1, 1, 1]",
        )
        for size in ((1, 1, 1, 3), (3, 1, 1, 1), (2, 3, 1, 1), (1, 1, 2, 1), (1, 1))
    ],
    # the order of calls
    (lambda: alike(tokens(count=18)), LayoutError, "position 17", "17 tokens", "reset()"),
    (lambda: alike(tokens(count=17), on=begun()), LayoutError, "position 17", "real size"),
    (lambda: alike(tokens(batch=1), on=begun()), CacheStateError, "from 2 to 1", "select_batch()"),
    (lambda: cache().positions(0), CacheStateError, "layer 0 has not seen a token"),
    (lambda: cache().positions(1), CacheStateError, "layer 1 has not seen a token"),
    (lambda: [attend(on=c) for c in [cache()] * 2], CacheStateError, "out of turn", "{0: 1, 1: 0}"),
    (lambda: attend(layer=1), CacheStateError, "layer 1 is given tokens out of turn", "reset()"),
    (lambda: begun().positions(2), ParameterError, "layer=2", "2 layers"),
    (lambda: begun().positions(-1), ParameterError, "layer=-1"),
    (lambda: attend(layer=2), ParameterError, "layer=2 is not one of the 2 layers"),
    (lambda: attend(layer=-1), ParameterError, "layer=-1"),
    (lambda: attend(layer="0"), ParameterError, "layer='0'"),
    (lambda: attend(layer=0.0), ParameterError, "layer=0.0"),
    (lambda: attend(layer=True), ParameterError, "layer=True"),
    (lambda: begun().select_batch([0]), ShapeError, "index=[0]", "vector of integers"),
    (lambda: begun().select_batch(torch.tensor([0.0])), ShapeError, "vector of integers"),
    (lambda: begun().select_batch(torch.tensor([[0]])), ShapeError, "vector of integers"),
    (lambda: begun().select_batch(torch.tensor([True])), ShapeError, "vector of integers"),
    # attention that is no number
    (lambda: attend(tokens() * NAN, on=cache("h2o")), AttentionError, "layer 0", "position 0"),
    (lambda: attend(None, tokens() + NAN, on=cache("linear", 16)), AttentionError, "NaN"),
    (lambda: attend(scale=NAN, on=cache("h2o")), AttentionError, "NaN", "not finite"),
    (lambda: alike(tokens() + INF, on=cache("h2o")), AttentionError, "NaN"),
    # pieces
    (
        lambda: WindowMass(SlotShape(1, 1, 4, torch.device("cpu"), GRID), 0),
        ParameterError,
        "window=0",
    ),
    (lambda: kvpolicy.register("linear")(kvpolicy.policies.H2O), ParameterError, "is taken by"),
    (lambda: kvpolicy.register("My Policy"), ParameterError, "'My Policy'", "lower-case"),
    # after an exception, and beyond what can be counted
    (
        lambda: attend(on=interrupted()),
        CacheStateError,
        "was interrupted",
        "reset()",
    ),
    (lambda: interrupted().state_dict(), CacheStateError, "was interrupted", "reset()"),
    (lambda: attend(on=far()), LayoutError, "position 1073741824", "positions can count"),
    *[
        (
            lambda layout=layout: cache("h2o", 8, layout),
            LayoutError,
            f"{layout.length} tokens",
            "positions count 1073741824",
        )
        for layout in (TextLayout(length=2**30 + 1), RasterLayout(rows=2**16, cols=2**16))
    ],
    # what native code would trust
    *[
        (lambda slot=slot: naming(slot), ShapeError, f"Wild.victims named slot {slot};", "0 to 8")
        for slot in (-5, -1, 9, 10**9)
    ],
    (lambda: naming(9, "choose"), ShapeError, "Wild.victims named slot 9;", "0 to 8"),
    (lambda: kernels("/tmp", "no-such-compiler"), KernelError, "(no-such-compiler)", "PATH"),
    (lambda: kernels("/dev/null/x"), KernelError, "/dev/null/x", "$KVPOLICY_KERNELS"),
]

if zoo is not None:
    WRONG += [
        *[
            (lambda name=name: zoo.load(name), UnknownNameError, repr(name), "known: 'clipart-ar'")
            for name in (
                "../fashion_ar",
                "fashion-ar\n",
                "[red]",
                "/etc/passwd",
                "x" * 5_000,
                "ﬁ",
                "",
            )
        ],
        (lambda: zoo.load(None), UnknownNameError, "None", "known: 'clipart-ar'"),
        *[
            (lambda case=case: damaged(case), zoo.CorruptFileError, *words)
            for case, words in DAMAGE.items()
        ],
    ]
    BUILT_IN[zoo.CorruptFileError] = OSError


if read_plan is not None:
    plan = {"subject": "a:B", "policies": ["h2o"]}
    WRONG += [
        # what data names is not run
        (lambda: load_subject("subprocess:call"), ParameterError, "'subprocess:call'", "measure()"),
        (lambda: load_subject("os:system"), ParameterError, "'os:system'", "not a class"),
        (lambda: load_subject("json:dumps"), ParameterError, "not a class with a method measure()"),
        (
            lambda: plan_of("subject: subprocess:call\npolicies: [h2o]"),
            ParameterError,
            "names 'subprocess:call'",
            "--own subprocess:call",
        ),
        (
            lambda: plan_of("subject: fashion-ar\npolicies: [os:system]"),
            ParameterError,
            "names 'os:system'",
            "--own os:system",
        ),
        (
            lambda: plan_of("subject: !!python/object/apply:os.system [ls]\npolicies: [h2o]"),
            ParameterError,
            "is not YAML",
            "python/object/apply",
        ),
        (lambda: plan_of("- fashion-ar"), ParameterError, "plan.yaml", "must be a mapping"),
        (lambda: plan_of("2026-01-02: a"), ParameterError, "plan.yaml", "must be a mapping"),
        (lambda: plan_of("{", "plan.json"), ParameterError, "plan.json is not JSON"),
        (lambda: plan_of("", "plan.txt"), ParameterError, "must end in .yaml"),
        # what JSON can't hold would be another plan the next time
        *[
            (
                lambda value=value: Plan(**plan, options={"mark": value}),
                ParameterError,
                "options",
                words,
            )
            for value, words in (
                (NAN, "mark=nan"),
                (INF, "mark=inf"),
                ("\ud800", r"mark='\ud800'"),
                ([1, {"a": NAN}], "nan"),
                (datetime.date(2026, 1, 2), "mark"),
            )
        ],
        (
            lambda: Plan(subject="a:B", policies=[{"name": "h2o", "parameters": {"recent": NAN}}]),
            ParameterError,
            "recent=nan",
        ),
    ]


@pytest.mark.parametrize(
    ("wrong", "exception", "fragments"),
    [pytest.param(wrong, kind, parts, id=parts[0][:40]) for wrong, kind, *parts in WRONG],
)
def test_wrong_use(wrong, exception, fragments):
    with pytest.raises(exception) as raised:
        result = wrong()
        if callable(result):  # a decorator complains when it is applied
            result(kvpolicy.policies.H2O)
    message = str(raised.value)
    for fragment in fragments:
        assert fragment in message
    assert isinstance(raised.value, kvpolicy.KVPolicyError)
    assert isinstance(raised.value, BUILT_IN[exception])
    assert "\n" not in message, "one line"
    assert len(message) < 11_000


def test_there_are_many():
    assert len(WRONG) >= 100


def test_a_wrong_tensor_changes_nothing():
    """The check comes before the first write, so the right tensor may follow."""
    started = begun()
    before = started.positions(0), started.stats()
    for bad in (tokens().double(), tokens(dim=8), tokens(heads=3), tokens(count=0)):
        with pytest.raises(ShapeError):
            attend(bad, on=started)
    assert torch.equal(started.positions(0), before[0])
    assert started.stats() == before[1]
    attend(on=started)


@pytest.mark.parametrize(
    ("name", "layout", "layers"),
    in_turn(
        [name for name in kvpolicy.available() if name != "full"],
        [GRID, RasterLayout(rows=9, cols=3, line_break=1), TextLayout()],
        turn=[1, 3],
    ),
)
def test_the_smallest_budget_that_the_message_names_works_and_no_smaller(name, layout, layers):
    small = {
        "linear": {"anchors": 2},
        "linear2d": {"anchors": 2},
        "pyramid": {"window": 2, "interval": 3},
    }
    policy = create(name, **small.get(name, {}))
    floor = policy.min_budget(layout)
    if layout.evictable is not None:
        floor = min(floor, layout.evictable)
    if floor > 1:
        with pytest.raises(
            BudgetError, match=f"{name} on .*smallest budget that works is"
        ) as raised:
            PolicyCache(policy, floor - 1, layout=layout, num_layers=layers)
        assert int(re.search(r"that works is (\d+)$", str(raised.value))[1]) == floor
        with pytest.raises(BudgetError, match="smallest budget that works is"):
            PolicyCache(policy, 1, layout=layout, num_layers=layers)
    made = PolicyCache(policy, floor, layout=layout, num_layers=layers)
    for _ in range(layout.length or 40):
        for layer in range(layers):
            attend(layer=layer, on=made)
    assert max(made.stats().peak_tokens) <= layout.prefix + floor


def test_a_full_cache_that_must_evict_says_what_would_do():
    layout = TextLayout(sinks=1)
    made = PolicyCache("full", 4, layout=layout, num_layers=1)
    for _ in range(5):
        attend(on=made)
    with pytest.raises(BudgetError, match=r"'full' can't evict.*position 5.*budget=4.*works is 5"):
        attend(on=made)
    with pytest.raises(BudgetError, match=r"10 tokens per layer.*full.*works is 16"):
        cache(policy="full", budget=10)


def test_nan_names_the_position_where_it_entered():
    started = cache("h2o", num_layers=1)
    for _ in range(3):
        attend(on=started)
    with pytest.raises(AttentionError, match="position 3"):
        attend(tokens() * NAN, on=started)


def test_victims_of_the_wrong_shape_are_refused():
    class Short(kvpolicy.policies.Random):
        def victims(self, view, count):
            return super().victims(view, count)[..., :-1]

    for layout, count in ((GRID, 1), (TextLayout(), 20)):
        made = PolicyCache(Short(), 4, layout=layout, num_layers=1)
        with pytest.raises(
            ShapeError, match=r"Short\.victims gave .* expected int64 \[2, 2, \d+\]"
        ):
            for _ in range(12):
                alike(tokens(count=count), on=made)


def test_a_policy_that_asks_for_an_observer_it_did_not_make_is_told():
    class Confused(kvpolicy.ScoredPolicy):
        def observers(self, shape):
            return (kvpolicy.LastQuery(shape),)

        def score(self, view):
            return view.observed(kvpolicy.CumulativeMass)

    made = PolicyCache(Confused(), 4, layout=GRID, num_layers=1)
    with pytest.raises(ParameterError, match=r"asks for CumulativeMass.*made \['LastQuery'\]"):
        for _ in range(12):
            attend(on=made)


def test_a_budget_can_be_given_parsed():
    assert cache(budget=Budget.parse("1/2")).stats().budgets == (8, 8)
