"""Parts, what can be put together from them, and that the shipped policies are that."""

from __future__ import annotations

import copy
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pytest
import torch
from pydantic import Field

import kvpolicy
from kvpolicy import ParameterError, UnknownNameError, available_parts, compose, create
from kvpolicy.parts.named import PARTS, read_part
from kvpolicy.policies import Compose
from kvpolicy.registry import CHOICES, POLICIES
from kvpolicy.testing import Stream, applicable, drive, find_violation

ROOT = Path(__file__).parents[2]

#: Every shipped policy that ranks tokens, put together from stock parts; so small that they evict.
SPELLED = {
    "linear": (
        {"anchors": 3, "recent_lines": 2},
        "compose/protect=anchors:3+lines:2/observe=line_mass/score=mass/decide=line",
    ),
    "linear2d": (
        {"anchors": 2, "recent": 4, "lines": 3, "parts": 2},
        "compose/protect=anchors:2+window:4/observe=rolling_mass/score=least_change:3"
        "/decide=parts:2",
    ),
    "streaming_llm": ({"sinks": 2}, "compose/protect=anchors:2"),
    "h2o": ({"recent": 0.3}, "compose/protect=share:0.3/observe=cumulative_mass/score=mass"),
    "tova": ({}, "compose/observe=last_query/score=head_mean"),
    "knorm": ({}, "compose/score=short_keys"),
    "random": ({"seed": 3}, "compose/score=lots:3"),
    "ahead": (
        {"anchors": 2, "horizon": 5, "fall": 3.0},
        "compose/protect=anchors:2/score=change_ahead:5:3.0",
    ),
    "near": ({"anchors": 2, "horizon": 5}, "compose/protect=anchors:2/score=nearness:5"),
    "snapkv": (
        {"window": 2, "interval": 3, "kernel": 3},
        "compose/protect=window:2/observe=window_mass:2/score=pooled:3:2/decide=every:3",
    ),
    "pyramid": (
        {"window": 2, "interval": 3, "kernel": 3, "beta": 3},
        "compose/protect=window:2/observe=window_mass:2/score=pooled:3:2/decide=every:3"
        "/schedule=arithmetic:3",
    ),
    "rkv": (
        {"window": 2, "interval": 3, "kernel": 3, "importance": 0.4, "similar": 0.2},
        "compose/protect=window:2/observe=window_mass:2/score=not_redundant:3:2:0.4:0.2"
        "/decide=every:3",
    ),
    "ssd": (
        {"recent": 0.4, "window": 3, "local": 0.6},
        "compose/protect=share:0.4/observe=cumulative_mass/score=by_head:3:0.6",
    ),
}


def a_stream(policy: kvpolicy.EvictionPolicy, chance: random.Random) -> Stream:
    if chance.random() < 0.7:
        layout = kvpolicy.RasterLayout(
            rows=chance.randint(5, 9), cols=chance.randint(2, 5), prefix=chance.randint(0, 3)
        )
    else:
        layout = kvpolicy.TextLayout(sinks=chance.randint(0, 2), line_length=3, length=40)
    return Stream(
        layout=layout,
        tokens=layout.length,
        budget=min(policy.min_budget(layout) + chance.randint(0, 4), layout.evictable),
        reclaim=chance.choice(["lazy", "eager"]),
        layers=chance.randint(1, 3),
        batch=2,
        heads=2,
        group=chance.randint(1, 2),
        calls=chance.choice([(1,), (5,), (layout.length,)]),
        attention=chance.choice(["random", "peaked", "tied"]),
        seed=chance.randrange(2**16),
    )


def test_every_shipped_policy_that_ranks_is_listed_here():
    shipped = [getattr(kvpolicy.policies, name) for name in kvpolicy.policies.__all__]
    ranks = {kind.key for kind in shipped if issubclass(kind, kvpolicy.ScoredPolicy)}
    assert set(SPELLED) == ranks - {"compose"}


@pytest.mark.parametrize("name", SPELLED)
def test_a_shipped_policy_decides_as_its_named_parts_do(name):
    parameters, spelled = SPELLED[name]
    policy, composed = create(name, **parameters), create(spelled)
    assert type(composed) is Compose
    assert composed.mixes_heads == policy.mixes_heads
    chance, decided = random.Random(5), 0
    for _ in range(15):
        stream = a_stream(policy, chance)
        assert composed.min_budget(stream.layout) == policy.min_budget(stream.layout)
        mine, theirs = drive(policy, stream), drive(composed, stream)
        assert mine.budgets == theirs.budgets
        assert len(mine.decisions) == len(theirs.decisions)
        for a, b in zip(mine.decisions, theirs.decisions, strict=True):
            assert torch.equal(a.slots, b.slots), (name, stream)
        decided += bool(mine.decisions)
    assert decided > 8


@pytest.mark.parametrize(
    "word",
    [
        *(spelled for _, spelled in SPELLED.values()),
        *(f"{name}/decide=every:9" for name in SPELLED),
        "linear/anchors=14/decide=token",
        "linear/anchors=2lines/recent_lines=2/observe=cumulative_mass",
        "linear/protect=anchors:2lines+lines:1",
        "pyramid/window=2/interval=3/beta=2.5/score=mass",
        "ssd/window=2lines/schedule=arithmetic:3",
    ],
)
def test_a_policy_is_spelled_in_one_word_that_a_shell_and_a_list_leave_alone(word):
    composed = create(word)
    assert shlex.quote(word).strip("'") == word
    assert set(word) <= set("abcdefghijklmnopqrstuvwxyz_0123456789:+=/.-")
    assert create(composed.label) == composed
    assert composed.label.startswith(word.partition("/")[0])
    again = Compose.model_validate_json(composed.model_dump_json())
    assert again == composed
    assert hash(again) == hash(composed)


def test_parameters_can_be_spelled_without_any_part():
    assert create("linear/anchors=14") == create("linear", anchors=14)
    assert create("linear/anchors=2lines").anchors == "2 lines"
    assert create("snapkv/window=4", interval=4) == create("snapkv", window=4, interval=4)


@pytest.mark.parametrize(
    "word",
    [
        "linear/protect=anchors:2+lines:1",
        "linear/protect=anchors:2+lines:1/observe=cumulative_mass",
        "linear/protect=anchors:2+lines:1/decide=token",
        "linear/protect=lines:0/decide=every:3",
        "linear/protect=anchors:1+lines:1/schedule=arithmetic:3",
        "h2o/decide=line",
        "h2o/protect=anchors:2+share:0.5",
        "tova/protect=window:3+anchors:1",
        "snapkv/protect=none/score=mass/observe=window_mass:2/decide=every:4",
        "snapkv/observe=line_mass/decide=line/protect=window:2/score=pooled:3:2:max",
        "compose/observe=fading_mass:4/score=mass/protect=share:0.25",
    ],
)
def test_compositions_keep_every_invariant(word):
    policy = create(word)
    found = find_violation(policy, applicable(policy), examples=10)
    assert found is None, str(found)


def test_a_composition_that_keeps_lines_is_held_to_line_locality():
    held = [invariant.name for invariant in applicable(create("linear/score=recency"))]
    assert {"line locality", "inter-line only"} <= set(held)
    held = [invariant.name for invariant in applicable(create("linear/decide=token"))]
    assert "line locality" not in held


def test_the_page_says_what_shipped_policies_are_made_of():
    """Each row of the table is a composition of the same decisions; see above for the parts."""
    page = (ROOT / "docs" / "compose.md").read_text(encoding="utf-8")
    for name in SPELLED:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` | `"))
        cells = re.findall(r"`([^`]+)`", row)[1:]
        composed = compose(**dict(zip(CHOICES, cells, strict=True)))
        assert all(getattr(composed.choices, kind) for kind in CHOICES)
        chance = random.Random(3)
        layout = kvpolicy.RasterLayout(rows=12, cols=4, prefix=1)
        policy = create(name)
        assert composed.min_budget(layout) == policy.min_budget(layout)
        for _ in range(4):
            stream = a_stream(policy, chance)
            stream = replace(stream, layout=layout, tokens=layout.length, budget=24)
            mine, theirs = drive(policy, stream), drive(composed, stream)
            assert mine.decisions
            for a, b in zip(mine.decisions, theirs.decisions, strict=True):
                assert torch.equal(a.slots, b.slots), (name, stream)
    for kind in CHOICES:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{kind}` |"))
        named = {part.partition(":")[0] for part in re.findall(r"`([^`]+)`", row)[1:]}
        shipped = {
            part
            for part in available_parts(kind)
            if PARTS[kind].get(part).make.__module__.startswith("kvpolicy.")
        }
        assert named == shipped


def test_a_plan_takes_a_composition_by_its_spelling_or_by_its_parts():
    pytest.importorskip("yaml", reason="plans need the lab's extra")
    from kvpolicy.lab.run.plan import Plan
    from kvpolicy.named import make_policy

    chosen = {"protect": "anchors:2+share:0.5", "observe": "cumulative_mass", "score": "mass"}
    word = "h2o/protect=anchors:2+share:0.5"
    plan = Plan(subject="fashion-ar", policies=[word, {"name": "compose", "parameters": chosen}])
    made = [make_policy(cell.policy, cell.parameters) for cell in plan.cells()]
    assert made == [create("full"), create(word), create("compose", **chosen)]
    assert len({cell.id for cell in plan.cells()}) == 3
    assert all("/" not in cell.id for cell in plan.cells())


def test_json_and_back():
    policy = compose("linear", observe="cumulative_mass", schedule="per_layer:1:2.5")
    again = Compose.model_validate_json(policy.model_dump_json())
    assert again == policy
    assert create("compose", **policy.model_dump()) == policy
    assert create("compose", base="linear", **dict(policy.choices)) == policy
    assert hash(again) == hash(policy)


def test_json_of_older_versions_is_read():
    """Where all five choices were parts, and there was no base."""
    choices = {"protect": "anchors:3+lines:2", "observe": "line_mass", "score": "mass"}
    older = create("compose", choices={**choices, "decide": "line", "schedule": "uniform"})
    assert older.label == SPELLED["linear"][1] + "/schedule=uniform"


def test_schedules_may_be_given_as_objects_and_parts_one_by_one():
    by_object = compose("linear", schedule=kvpolicy.Arithmetic(beta=3))
    assert by_object == create("linear/schedule=arithmetic:3")
    assert by_object.schedule() == kvpolicy.Arithmetic(beta=3)
    assert compose(protect=["anchors:3", "lines:2"]).choices.protect == "anchors:3+lines:2"
    none = compose("linear", protect="none")
    assert none.choices.protect == "none"
    assert none.min_budget(kvpolicy.RasterLayout(rows=8, cols=5)) == 5


def test_what_is_composed_can_be_composed_again():
    policy = compose(create("linear/decide=token"), observe="cumulative_mass")
    assert policy == create("linear/observe=cumulative_mass/decide=token")
    assert compose("linear") == create("linear")


@pytest.mark.parametrize("kind", CHOICES)
def test_every_part_is_spelled_and_read_back(kind):
    assert available_parts(kind) == tuple(sorted(PARTS[kind].names()))
    for name in available_parts(kind):
        if name == "calibrated":
            continue  # needs a file: test_calibrate
        part = read_part(kind, "per_layer:1:2" if name == "per_layer" else name)
        assert read_part(kind, str(part)) == part
        assert part.part.make.__doc__
        for field in part.part.parameters.model_fields.values():
            assert field.description or kind == "schedule"


WRONG = [
    ("linear/observ=x", ParameterError, "no choice is called 'observ'", "did you mean 'observe'"),
    ("linear/observe=line_mas", ParameterError, "observe", "'line_mas'", "'line_mass'"),
    ("h2o/observe=none", ParameterError, "reads mass", "watch none"),
    ("full/observe=line_mass", ParameterError, "Full()", "ranks no tokens"),
    ("snapkv/decide=every:4", ParameterError, "window=8", "interval=4"),
    ("linear/decide=token/observe=window_mass:8", ParameterError, "window=8", "interval=1"),
    ("knorm/score=mass", ParameterError, "reads mass", "watch none"),
    ("compose/protect=anchors:1:2", ParameterError, "2 values", "'anchors:count'"),
    ("compose/protect=anchors:x", ParameterError, "'anchors'", "count='x'", "lines"),
    ("compose/protect=anchors:-1", ParameterError, "'anchors'", "count=-1"),
    ("compose/score=pooled:4/observe=line_mass", ParameterError, "kernel=4", "odd"),
    ("compose/score=none", ParameterError, "names 0 parts", "one is needed"),
    ("compose/observe=line_mass+last_query", ParameterError, "names 2 parts"),
    ("linear/score=mass/score=mass", ParameterError, "says score= twice"),
    ("linear/score", UnknownNameError, "'linear/score'"),
    ("linear/score=mass/decide", ParameterError, "no score part is called 'mass/decide'"),
    ("=", UnknownNameError, "no policy is called '='"),
    ("compose/protect=", ParameterError, "no protect part is called ''"),
    ("liner/score=mass", UnknownNameError, "'liner'", "did you mean 'linear'"),
]


@pytest.mark.parametrize(
    ("word", "error", "fragments"), [pytest.param(w, e, f, id=w) for w, e, *f in WRONG]
)
def test_what_is_wrong_is_said(word, error, fragments):
    with pytest.raises(error) as raised:
        create(word)
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_what_else_is_wrong():
    with pytest.raises(ParameterError, match="did you mean 'score'"):
        available_parts("scores")
    with pytest.raises(ParameterError, match="no kind of part is called 'scores'"):
        kvpolicy.register_part("scores", "mine")
    with pytest.raises(ParameterError, match=r"observe=Uniform\(\) is no observe part"):
        compose(observe=kvpolicy.Uniform())

    class Mine(kvpolicy.policies.Linear):
        """Has no name."""

    with pytest.raises(ParameterError, match=r"has no name: decorate its class with @kvpolicy"):
        compose(Mine(), decide="token")
    with pytest.raises(TypeError, match=r"abstract method '?score"):

        class Nothing(kvpolicy.ScoredPolicy):
            """Says nothing."""

        Nothing()


@pytest.fixture
def written_as_the_readme_says():
    """Policies of somebody else's, with methods of their own."""

    @kvpolicy.register("odd_ones")
    class OddOnes(kvpolicy.ScoredPolicy):
        """Keep the last lines, and odd columns before even ones."""

        lines: int = Field(1, ge=0)

        def observers(self, shape):
            return (kvpolicy.CumulativeMass(shape),)

        def protect(self, view):
            return view.lines >= view.line - self.lines

        def score(self, view):
            return (view.layout.column(view.positions) % 2) + view.mass / view.age

        def headroom(self, view):
            return view.layout.line_length if view.layout.is_line_start(view.seen) else 1

    @kvpolicy.register("own_victims")
    class OwnVictims(kvpolicy.ScoredPolicy):
        """Names its victims itself."""

        def score(self, view):
            return view.positions

        def victims(self, view, count):
            return super().victims(view, count)

    yield OddOnes
    for name in ("odd_ones", "own_victims"):
        POLICIES._items.pop(name)


@pytest.mark.parametrize("change", ["decide=token", "observe=line_mass", "protect=lines:0"])
def test_any_policy_that_ranks_can_be_a_base(written_as_the_readme_says, change):
    policy = create(f"odd_ones/lines=0/{change}")
    assert policy.base == written_as_the_readme_says(lines=0)
    by_hand = {
        "decide": {"headroom": lambda self, view: 1},
        "observe": {"observers": lambda self, shape: (kvpolicy.LineMass(shape),)},
        "protect": {"protect": lambda self, view: view.lines >= view.line},
    }[change.partition("=")[0]]
    same = type("ByHand", (written_as_the_readme_says,), by_hand)(lines=0)
    chance, decided = random.Random(1), 0
    for _ in range(6):
        stream = a_stream(same, chance)
        assert policy.min_budget(stream.layout) == same.min_budget(stream.layout)
        mine, theirs = drive(policy, stream), drive(same, stream)
        for a, b in zip(mine.decisions, theirs.decisions, strict=True):
            assert torch.equal(a.slots, b.slots), stream
        decided += len(mine.decisions)
    assert decided > 10
    found = find_violation(policy, applicable(policy), examples=15)
    assert found is None, str(found)


def test_a_base_that_chooses_a_set_goes_on_to():
    composed = create("linear2d/anchors=1/lines=2/protect=anchors:3+window:5")
    same = create("linear2d", anchors=3, lines=2, recent=5)
    chance, differ = random.Random(1), 0
    for _ in range(6):
        stream = a_stream(same, chance)
        mine, theirs, ranked = (
            drive(policy, stream).decisions
            for policy in (composed, same, create("linear2d/anchors=3/recent=5/score=mass"))
        )
        for a, b, c in zip(mine, theirs, ranked, strict=True):
            assert torch.equal(a.slots, b.slots), stream
            differ += not torch.equal(a.slots, c.slots)
    assert differ > 5


def test_a_base_that_names_its_victims_itself_keeps_them(written_as_the_readme_says):
    assert create("own_victims/decide=every:2").min_budget(kvpolicy.TextLayout()) == 2
    for change in ("score=mass/observe=line_mass", "protect=lines:1"):
        with pytest.raises(ParameterError, match="names its victims itself"):
            create(f"own_victims/{change}")


def test_what_protects_everything_has_no_budget():
    policy = create("compose/protect=share:1+anchors:3")
    with pytest.raises(kvpolicy.BudgetError, match="no budget is enough"):
        policy.min_budget(kvpolicy.RasterLayout(rows=2, cols=2))


def test_anyone_may_add_a_part():
    @kvpolicy.register_part("score", "odd_columns")
    def odd_columns(view, start: Annotated[int, Field(ge=0)] = 0):
        """Odd columns, if they are at least so far to the right."""
        column = view.layout.column(view.positions)
        return ((column % 2 == 1) & (column >= start)).float()

    try:
        policy = create("linear/score=odd_columns:1")
        assert policy.parts["score"][0].part.make is odd_columns
        assert "odd_columns" in available_parts("score")
        assert find_violation(policy, applicable(policy), examples=10) is None
        with pytest.raises(ParameterError, match="is taken"):
            kvpolicy.register_part("score", "odd_columns")(lambda view: view.mass)
        with pytest.raises(ParameterError, match="start=-1"):
            create("linear/score=odd_columns:-1")
    finally:
        PARTS["score"]._items.pop("odd_columns")


def test_a_changed_copy_is_asked_anew():
    layout = kvpolicy.RasterLayout(rows=9, cols=4)
    policy = create("linear", anchors=3)
    assert policy.min_budget(layout) == 11
    assert policy.model_copy(update={"anchors": 5}).min_budget(layout) == 13
    assert copy.deepcopy(policy) == policy == create("linear", anchors=3)
    assert hash(policy) == hash(create("linear", anchors=3))
