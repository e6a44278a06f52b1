"""The fuzz: it runs everything, counts what it ran, and finds what is planted."""

from __future__ import annotations

import random

import pytest

import kvpolicy
import kvpolicy.cache.layer
from kvpolicy import ParameterError, SlotStore, TextLayout
from kvpolicy.cache.layer import Layer
from kvpolicy.observers import replace_state, state_of
from kvpolicy.registry import POLICIES
from kvpolicy.testing import INVARIANTS, Case, Stream
from kvpolicy.testing import fuzz as command
from kvpolicy.testing.draw import draw_parameters, draw_policy
from kvpolicy.testing.fuzz import DRIVERS, Violation, fuzz


class Shifted(SlotStore):
    """Writes keys beside the tokens that they belong to, where several come at once."""

    def write(self, slots, key, value, first):
        super().write(slots, key.roll(1, 2), value, first)


@pytest.fixture
def model_driver(monkeypatch):
    pytest.importorskip("transformers", reason="the adapters need transformers")
    from kvpolicy_adapters.evaluation.fuzz import drive_model

    # As the entry point says, also where the package was installed before it had one.
    monkeypatch.setitem(DRIVERS._items, "transformers", drive_model)


@pytest.mark.slow
def test_a_few_runs_on_streams():
    session = fuzz(seed=3, runs=5)
    assert {on for _, on in session.tallies} == {"core"}
    total = list(session.tallies.values())
    assert sum(tally.runs for tally in total) == 5
    assert sum(tally.tokens for tally in total) > 500
    assert sum(tally.decisions for tally in total) > 50
    assert sum(tally.evictions for tally in total) > 50
    assert "evictions" in session.table()


@pytest.mark.slow
def test_every_policy_is_run_on_whole_models(model_driver):
    for policy in kvpolicy.available():
        session = fuzz(seed=1, runs=4, on=["transformers"], policies=[policy])
        ((_, tally),) = session.tallies.items()
        assert tally.runs == 4
        assert (tally.evictions > 0) == (tally.decisions > 0) == (policy != "full"), policy


@pytest.mark.slow
def test_it_finds_a_bug_in_the_core_and_tells_how_to_see_it_again(monkeypatch, capsys):
    monkeypatch.setattr(kvpolicy.cache.layer, "SlotStore", Shifted)
    assert command.main(["--runs", "20", "--seed", "5", "--model", "core"]) == 1
    said = capsys.readouterr().out
    assert "Invariant 'truth'" in said
    assert "On the smallest stream found: " in said
    again = said.partition("To see it again: python -m kvpolicy.testing.fuzz ")[2].splitlines()[0]
    assert command.main(again.split()) == 1
    assert "Invariant 'truth'" in capsys.readouterr().out
    monkeypatch.undo()
    assert command.main(again.split()) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "fault", "words"),
    [
        (
            Layer,
            "whole",
            property(lambda self: True, lambda self, whole: None),
            "Invariant '(mixed|interruption)'",
        ),
        (SlotStore, "__deepcopy__", lambda self, memo: self, "Invariant 'copies'"),
    ],
    ids=["an interrupted layer that goes on", "a copy that shares its slots"],
)
def test_it_finds_faults_of_state(monkeypatch, kind, name, fault, words):
    """What an adversary once found in an afternoon; the first run finds it."""
    monkeypatch.setattr(kind, name, fault, raising=False)
    with pytest.raises(Violation, match=words):
        fuzz(seed=1, runs=1, policies=["h2o", "linear", "snapkv"])


@pytest.mark.parametrize(
    ("planted", "words", "seed"),
    [
        ("capacity", "held too much", 0),
        ("reset", "after reset", 102),
        ("select_batch", "mixed tokens up", 25),
    ],
)
def test_it_finds_a_bug_under_a_model(model_driver, monkeypatch, planted, words, seed):
    """Within a hundred runs; a test begins nearer."""
    if planted == "capacity":
        larger = property(lambda self: self.layout.prefix + self.budget + 1)
        monkeypatch.setattr(Layer, "capacity", larger)
    elif planted == "reset":
        whole = Layer.watch

        def watch(self, shape):
            kept = self.__dict__.get("kept", ())
            whole(self, shape)
            for observer, old in zip(self.observers, kept, strict=False):
                if state_of(old).shape == state_of(observer).shape:
                    replace_state(observer, state_of(old))
            self.kept = self.observers

        monkeypatch.setattr(Layer, "watch", watch)
    else:
        monkeypatch.setattr(Layer, "select_batch", lambda self, index: None)
    with pytest.raises(Violation, match=words) as raised:
        fuzz(seed=seed, runs=100, on=["transformers"])
    seed = raised.value.seed
    with pytest.raises(Violation, match=words):
        fuzz(seed=seed, runs=1, on=["transformers"])


@pytest.mark.parametrize("name", kvpolicy.available())
def test_parameters_are_drawn_from_what_the_fields_allow(name):
    drawn = [draw_policy(random.Random(seed), [name]) for seed in range(12)]
    if type(drawn[0]).model_fields:
        assert len({policy.model_dump_json() for policy in drawn}) > 3, drawn
    again = draw_policy(random.Random(3), [name])
    assert again == drawn[3]


def test_bounds_are_kept():
    kind = POLICIES.get("ssd")
    drawn = [draw_parameters(random.Random(seed), kind) for seed in range(60)]
    shares = [values["recent"] for values in drawn if "recent" in values]
    assert min(shares) >= 0
    assert max(shares) <= 1
    assert len(set(shares)) > 20
    assert any("recent" not in values for values in drawn), "defaults are tried, too"


# -- what it has found -----------------------------------------------------------------------------


def test_a_steep_schedule_does_not_make_the_check_of_lossless_take_all_memory(monkeypatch):
    """Top layers of a text without an end had room only once the lowest had gigabytes."""
    slots = []

    class Watched(SlotStore):
        def __init__(self, shape, key, value, **named):
            slots.append(shape.slots)
            super().__init__(shape, key, value, **named)

    monkeypatch.setattr(kvpolicy.cache.layer, "SlotStore", Watched)
    policy = kvpolicy.create("pyramid", beta=1e6, window=3, interval=3, kernel=1)
    stream = Stream(TextLayout(sinks=4, line_length=3), tokens=29, budget=36, layers=2)
    INVARIANTS["lossless"](Case(policy, stream))
    assert slots
    assert max(slots) < 1_000


def test_wrong_arguments(capsys):
    with pytest.raises(ParameterError, match="give minutes or runs"):
        fuzz()
    assert command.main(["--policy", "lineer", "--runs", "1"]) == 2
    assert "did you mean 'linear'" in capsys.readouterr().err
    assert command.main(["--model", "cores", "--runs", "1"]) == 2
    assert "no fuzz driver is called 'cores'" in capsys.readouterr().err
