"""One layer, one way: how much of it a token goes through is counted."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from support.kernel_library import needs_compiler

import kvpolicy
from kvpolicy.cache.layer import Layer

HOUSE = Path(kvpolicy.__file__).parent
LAYOUT = kvpolicy.RasterLayout(rows=8, cols=8, prefix=1)
TOKENS = 1 + 8 * 3 + 2  # two into a line, and full: no decision is due


def counted(cache) -> tuple[int, set[str]]:
    """Python calls in kvpolicy, and its files that are entered, for one token of one layer."""
    query, key, value = torch.randn(2, 2, 1, 8), *torch.randn(2, 2, 2, 1, 8)
    calls, files = 0, set()

    def profile(frame, event, argument):
        nonlocal calls
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(HOUSE)):
            calls += 1
            files.add(file.removeprefix(str(HOUSE)))

    sys.setprofile(profile)
    try:
        cache.attend(0, query, key, value)
    finally:
        sys.setprofile(None)
    return calls, files


def begun(policy: str) -> kvpolicy.PolicyCache:
    cache = kvpolicy.PolicyCache(policy, 24, layout=LAYOUT, num_layers=1)
    for _ in range(TOKENS):
        query, key, value = torch.randn(2, 2, 1, 8), *torch.randn(2, 2, 2, 1, 8)
        cache.attend(0, query, key, value)
    return cache


def test_a_token_goes_through_few_calls_and_files():
    calls, files = counted(begun("linear/protect=anchors:2+lines:1"))
    assert calls <= 18, calls
    assert len(files) <= 6, files


@needs_compiler
def test_a_token_goes_through_fewer_calls_with_the_kernel(kernel):
    cache = begun("linear/protect=anchors:2+lines:1")
    assert cache.layers[0].store.kernel is not None
    calls, files = counted(cache)
    assert calls <= 14, calls
    assert len(files) <= 6, files


def test_the_count_bites(monkeypatch):
    """Two more calls in the store would be seen."""
    whole = kvpolicy.SlotStore.take
    before, _ = counted(begun("linear/protect=anchors:2+lines:1"))
    cache = begun("linear/protect=anchors:2+lines:1")

    def take(self, count):
        self.accepts(None, None, None)
        self.accepts(None, None, None)
        return whole(self, count)

    monkeypatch.setattr(kvpolicy.SlotStore, "take", take)
    after, _ = counted(cache)
    assert after == before + 2


def test_a_layer_has_few_attributes():
    cache = begun("linear/protect=anchors:2+lines:1")
    assert len(vars(cache.layers[0])) <= 12, sorted(vars(cache.layers[0]))


def functions_that_write() -> set[str]:
    """Functions of the cache that put keys and values into a store."""
    found = set()
    for path in sorted((HOUSE / "cache").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for call in ast.walk(node):
                name = getattr(getattr(call, "func", None), "attr", "") or getattr(
                    getattr(call, "func", None), "id", ""
                )
                handed = isinstance(call, ast.Attribute) and call.attr == "write"
                if name in ("write", "write_and_attend", "one_pass") or handed:
                    found.add(f"{path.stem}.{node.name}")
    return found


def test_there_are_few_ways_to_write_and_attend():
    """One token, several, and a compiled step; binding a late layout only moves what is there.

    Several staged tokens, with no decision between them, have two ways of their own, one of which
    is chosen for each such run: one after the other, or, in a stage that asks for it, together. A
    token that is not staged goes through neither.
    """
    assert functions_that_write() == {
        "layer.token",
        "layer.run",
        "compiled_step.attend",
        "layer._follow",
        "staged_run._in_turn",
        "staged_run._together",
    }


@pytest.mark.parametrize("name", ["attend", "attend_with_weights", "attend_shared", "attend_step"])
def test_the_cache_is_the_front_door(name):
    assert callable(getattr(kvpolicy.PolicyCache, name))


def test_adapters_do_not_reach_into_layers():
    """The adapters ask the cache; tests, the floor and sweeps look inside on purpose."""
    for path in (HOUSE.parent / "adapters" / "kvpolicy_adapters" / "transformers").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        for private in ("policy_cache.layers", "kvpolicy.cache.", "layer.layer."):
            assert private not in source, f"{path.name} reaches for {private}"
    assert Layer.__module__ == "kvpolicy.cache.layer"
