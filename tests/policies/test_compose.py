"""Parts, what can be put together from them, and that the shipped policies are that."""

from __future__ import annotations

import copy
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
from pydantic import Field

import kvpolicy
from kvpolicy import ParameterError, UnknownNameError, available_parts, compose, create
from kvpolicy.parts import Anchors, EachLine, Mass, RecentLines, WatchLine
from kvpolicy.parts.named import KINDS, PARTS, read_part, spell_part
from kvpolicy.policies import Compose
from kvpolicy.testing import Stream, applicable, drive, find_violation

ROOT = Path(__file__).parents[2]

#: Every shipped policy that is a composition, in a few words; parameters small enough to evict.
SPELLED = {
    "linear": (
        {"anchors": 3, "recent_lines": 2},
        "compose/protect=anchors:3+lines:2/observe=line_mass/score=mass/decide=line",
    ),
    "linear2d": (
        {"anchors": 2, "recent_lines": 1, "lines": 3},
        "compose/protect=anchors:2+lines:1/observe=line_mass/score=least_change:3/decide=line",
    ),
    "streaming_llm": ({"sinks": 2}, "compose/protect=anchors:2"),
    "h2o": ({"recent": 0.3}, "compose/protect=share:0.3/observe=cumulative_mass/score=mass"),
    "tova": ({}, "compose/observe=last_query/score=head_mean"),
    "knorm": ({}, "compose/score=short_keys"),
    "random": ({"seed": 3}, "compose/score=lots:3"),
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


def is_composition(name: str) -> bool:
    try:
        return bool(compose(name))
    except ParameterError:
        return False


def test_every_shipped_composition_is_listed_here():
    shipped = {getattr(kvpolicy.policies, name).key for name in kvpolicy.policies.__all__}
    assert set(SPELLED) == set(filter(is_composition, shipped)) - {"compose"}


@pytest.mark.parametrize("name", SPELLED)
def test_a_shipped_policy_decides_as_its_named_parts_do(name):
    parameters, spelled = SPELLED[name]
    policy, composed = create(name, **parameters), create(spelled)
    assert type(composed) is Compose
    assert compose(policy) == composed
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


@pytest.mark.parametrize("name", SPELLED)
def test_a_policy_is_spelled_in_one_word_that_a_shell_and_a_list_leave_alone(name):
    composed = compose(name)
    word = composed.spelled()
    assert shlex.quote(word).strip("'") == word
    assert set(word) <= set("abcdefghijklmnopqrstuvwxyz_0123456789:+=/.-")
    assert word == composed.label
    assert create(word) == composed
    assert create(name + "/decide=" + composed.choices.decide) == composed


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
    found = find_violation(policy, applicable(policy), examples=25)
    assert found is None, str(found)


def test_a_composition_that_keeps_lines_is_held_to_line_locality():
    held = [invariant.name for invariant in applicable(create("linear/score=recency"))]
    assert {"line locality", "inter-line only"} <= set(held)
    held = [invariant.name for invariant in applicable(create("linear/decide=token"))]
    assert "line locality" not in held


def test_the_page_says_what_shipped_policies_are_made_of():
    page = (ROOT / "docs" / "compose.md").read_text(encoding="utf-8")
    for name in SPELLED:
        chosen = " | ".join(f"`{part}`" for _, part in compose(name).choices)
        assert f"| `{name}` | {chosen} |" in page
    for kind in KINDS:
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{kind}` |"))
        named = {part.partition(":")[0] for part in re.findall(r"`([^`]+)`", row)[1:]}
        shipped = {
            part
            for part in available_parts(kind)
            if PARTS[kind].get(part).__module__.startswith("kvpolicy.")
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
    assert made == [create("full"), create(word), create(word)]
    assert len({cell.id for cell in plan.cells()}) == 3
    assert all("/" not in cell.id for cell in plan.cells())


def test_json_and_back():
    policy = compose("linear", observe="cumulative_mass", schedule="per_layer:1:2.5")
    again = Compose.model_validate_json(policy.model_dump_json())
    assert again == policy
    assert again.parts == policy.parts
    assert create("compose", **policy.model_dump()) == policy
    assert create("compose", **dict(policy.choices)) == policy
    assert hash(again) == hash(policy)


def test_parts_may_be_given_as_objects():
    parts = (Anchors(count=3), RecentLines(count=2))
    policy = compose(protect=parts, observe=WatchLine(), score=Mass(), decide=EachLine())
    assert policy == create(SPELLED["linear"][1])
    assert compose(protect=[Anchors(count=3), "lines:2"]).choices.protect == "anchors:3+lines:2"
    assert compose(protect=Anchors(count=3)).choices.protect == "anchors:3"
    assert compose("linear", protect="none").parts.protect == ()


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_is_spelled_and_read_back(kind):
    assert available_parts(kind) == tuple(sorted(PARTS[kind].names()))
    for name in available_parts(kind):
        if name == "calibrated":
            continue  # needs a file: test_calibrate
        part = read_part(kind, "per_layer:1:2" if name == "per_layer" else name)
        assert read_part(kind, spell_part(kind, part)) == part
        assert type(part).__doc__
        for field in type(part).model_fields.values():
            assert field.description or kind == "schedule"


WRONG = [
    ("linear/observ=x", ParameterError, "no choice is called 'observ'", "did you mean 'observe'"),
    ("linear/observe=line_mas", ParameterError, "observe", "'line_mas'", "'line_mass'"),
    ("h2o/observe=none", ParameterError, "reads mass", "watch none"),
    ("full/observe=line_mass", ParameterError, "Full()", "not made of parts"),
    ("snapkv/decide=every:4", ParameterError, "window=8", "interval=4"),
    ("snapkv/decide=line", ParameterError, "window=8", "EachLine()", "varies"),
    ("compose/protect=anchors:1:2", ParameterError, "2 values", "'anchors:count'"),
    ("compose/protect=anchors:x", ParameterError, "'anchors'", "count='x'"),
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
    with pytest.raises(ParameterError, match="is no part: derive it from one of Protect"):
        kvpolicy.register_part("mine")(int)
    with pytest.raises(ParameterError, match="observe=Mass\\(\\) is no observe part"):
        compose(observe=Mass())

    class Mine(kvpolicy.policies.Linear):
        def score(self, view):
            return -super().score(view)

    with pytest.raises(ParameterError, match="has its own score"):
        compose(Mine())
    with pytest.raises(ParameterError, match="override score"):

        class Nothing(kvpolicy.ScoredPolicy):
            """Says nothing."""

        Nothing()


def test_what_protects_everything_has_no_budget():
    policy = create("compose/protect=share:1+anchors:3")
    with pytest.raises(kvpolicy.BudgetError, match="no budget is enough"):
        policy.min_budget(kvpolicy.RasterLayout(rows=2, cols=2))


def test_anyone_may_add_a_part():
    @kvpolicy.register_part("odd_columns")
    class OddColumns(kvpolicy.Score):
        """Odd columns, if they are at least so far to the right."""

        start: int = Field(0, ge=0, description="first column that counts")

        def worth(self, view):
            column = view.layout.column(view.positions)
            return ((column % 2 == 1) & (column >= self.start)).float()

    try:
        policy = create("linear/score=odd_columns:1")
        assert policy.parts.score == OddColumns(start=1)
        assert "odd_columns" in available_parts("score")
        assert find_violation(policy, applicable(policy), examples=10) is None
        with pytest.raises(ParameterError, match="is taken"):
            kvpolicy.register_part("odd_columns")(type("Other", (OddColumns,), {}))
    finally:
        PARTS["score"]._items.pop("odd_columns")


def test_an_unnamed_part_works_in_a_class_but_has_no_spelling():
    class Twice(kvpolicy.Score):
        def worth(self, view):
            return 2.0 * -view.age

    with pytest.raises(ParameterError, match="is no score part that has a name"):
        compose(score=Twice())


def test_a_changed_copy_makes_its_own_parts():
    policy = create("linear", anchors=3)
    assert policy.parts.protect[0] == Anchors(count=3)
    assert policy.model_copy(update={"anchors": 5}).parts.protect[0] == Anchors(count=5)
    assert copy.deepcopy(policy) == policy == create("linear", anchors=3)
    assert hash(policy) == hash(create("linear", anchors=3))
