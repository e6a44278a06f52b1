"""The registry: names, specs, and entry points that are loaded only when asked for by name."""

from __future__ import annotations

import sys

import pytest

import kvpolicy
from kvpolicy.registry import POLICIES, Registry

SHIPPED = ("full", "h2o", "linear", "pyramid", "random", "streaming_llm")


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """An installed distribution with one good, one broken and one shadowing entry point."""
    (tmp_path / "their_policies.py").write_text(
        "import kvpolicy\n"
        "@kvpolicy.register('theirs', paper='a paper')\n"
        "class Theirs(kvpolicy.policies.Random):\n"
        "    '''Keep what they like.\n\n    At length.'''\n"
    )
    (tmp_path / "broken_policies.py").write_text("raise OSError('no such accelerator')\n")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kvpolicy.policies]\n"
        "theirs = their_policies:Theirs\n"
        "broken = broken_policies:Broken\n"
        "absent = their_policies:Absent\n"
        "linear = broken_policies:Linear\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("theirs", "broken", "absent"):
        POLICIES._items.pop(name, None)
    for module in ("their_policies", "broken_policies"):
        sys.modules.pop(module, None)


def test_the_shipped_policies_are_available():
    assert set(SHIPPED) <= set(kvpolicy.available())
    assert kvpolicy.available() == tuple(sorted(kvpolicy.available()))


#: Strategies that no paper has.
OURS = ("ahead", "compose", "full", "linear2d", "near", "random")


@pytest.mark.parametrize("name", kvpolicy.available())
def test_every_policy_has_a_spec_and_round_trips(name):
    spec = kvpolicy.spec(name)
    policy = kvpolicy.create(name)
    assert spec.name == policy.key == name
    assert spec.summary.endswith(".")
    assert "\n" not in spec.summary
    assert spec.paper.startswith("arXiv:") or name in OURS
    assert set(spec.parameters.get("properties", {})) == set(type(policy).model_fields)
    for about in spec.parameters.get("properties", {}).values():
        assert about["description"], "every parameter says what it is"
    assert type(policy).model_validate_json(policy.model_dump_json()) == policy


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("full", kvpolicy.Need.NONE),
        ("random", kvpolicy.Need.NONE),
        ("streaming_llm", kvpolicy.Need.NONE),
        ("h2o", kvpolicy.Need.MASS),
        ("linear", kvpolicy.Need.MASS),
        ("pyramid", kvpolicy.Need.MASS),
        ("tova", kvpolicy.Need.MASS),
        ("knorm", kvpolicy.Need.NONE),
    ],
)
def test_needs(name, needs):
    assert kvpolicy.spec(name).needs is needs


def test_a_third_partys_policy_is_listed_but_not_loaded(third_party):
    assert {"theirs", "broken"} <= set(kvpolicy.available())
    assert kvpolicy.create("linear", anchors=3).anchors == 3, "a shipped name is not shadowed"
    with pytest.raises(kvpolicy.UnknownNameError, match="did you mean 'theirs'"):
        kvpolicy.create("their")
    assert "their_policies" not in sys.modules
    assert "broken_policies" not in sys.modules


def test_a_third_partys_policy_is_loaded_by_its_name(third_party):
    policy = kvpolicy.create("theirs", seed=3)
    assert (type(policy).__name__, policy.seed, policy.key) == ("Theirs", 3, "theirs")
    spec = kvpolicy.spec("theirs")
    assert (spec.summary, spec.paper) == ("Keep what they like.", "a paper")
    assert "broken_policies" not in sys.modules


@pytest.mark.parametrize(
    ("name", "why"), [("broken", "no such accelerator"), ("absent", "has no attribute 'Absent'")]
)
def test_an_entry_point_that_cannot_be_loaded_says_which_and_why(third_party, name, why):
    with pytest.raises(kvpolicy.ParameterError, match=f"'{name}' of entry point .*{why}"):
        kvpolicy.create(name)


def test_a_name_is_given_once():
    registry: Registry[int] = Registry("number", "kvpolicy.no-such-group")
    registry.add("one", 1)
    registry.add("one", 1)
    with pytest.raises(kvpolicy.ParameterError, match="number name 'one' is taken by 1"):
        registry.add("one", 2)
    assert registry.names() == ("one",)
    assert registry.get("one") == 1
    with pytest.raises(kvpolicy.UnknownNameError, match="no number is called 'two'; known: 'one'"):
        registry.get("two")


@pytest.mark.parametrize(
    "name", ["", "Mine", "my policy", "1st", "../mine", "mïne", "a.b", "mine\n"]
)
def test_malformed_names(name):
    with pytest.raises(kvpolicy.ParameterError, match="must be lower-case words"):
        kvpolicy.register(name)(kvpolicy.policies.Random)


def test_a_subclass_of_a_registered_policy_does_not_go_by_its_name():
    class Mine(kvpolicy.policies.Random):
        """Mine."""

    assert Mine.key == ""
    cache = kvpolicy.PolicyCache(
        Mine(), 2, layout=kvpolicy.RasterLayout(rows=2, cols=2), num_layers=1
    )
    assert cache.stats().policy == "Mine"
    assert kvpolicy.policies.Random.key == "random"
