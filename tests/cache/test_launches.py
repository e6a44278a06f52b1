"""What a decode step asks of a GPU, counted without one: launches, waits, and other devices.

Operations are counted on tensors that have no data (see ``support.fake_devices``), on which any
wait for the device and any operation over two devices raises.
"""

from __future__ import annotations

import pytest
import torch
from support import gpu_kernels
from support.fake_devices import fake_devices

import kvpolicy
from kvpolicy.parts.offsets import HeadOffsets, OffsetAttention

pytest.importorskip("transformers", reason="the counter lies beside the bench of a GPU")
from kvpolicy_adapters.bench.gpu.launches import Launches

LAYOUT = kvpolicy.RasterLayout(rows=10, cols=6, prefix=1)
BUDGET = 30
#: Launches of one layer's step once the budget is full: most between two decisions, and most with
#: one. A policy that decides at every token has no step without.
MOST = {
    "ahead": (None, 53),
    "compose": (None, 2),
    "full": (1, None),
    "h2o": (None, 4),
    "knorm": (None, 8),
    "linear": (3, 4),
    "linear2d": (3, 115),
    "near": (None, 19),
    "pyramid": (3, 12),
    "random": (None, 19),
    "rkv": (3, 55),
    "snapkv": (3, 12),
    "ssd": (None, 14),
    "streaming_llm": (None, 2),
    "tova": (None, 7),
}
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    gpu_kernels.serve(monkeypatch)


def new(count: int = 1):
    return [torch.randn(2, heads, count, 16, device=GPU) for heads in (8, 4, 4)]


def made(name: str, **options) -> kvpolicy.PolicyCache:
    budget = None if name == "full" else BUDGET
    # Else it would decide at every token of so short a line.
    policy = kvpolicy.create(name, **({"parts": 2} if name == "linear2d" else {}))
    return kvpolicy.PolicyCache(policy, budget, layout=LAYOUT, num_layers=1, **options)


def steps(cache: kvpolicy.PolicyCache, count: int) -> list[tuple[bool, int]]:
    """Whether each step decided, and its launches."""
    found = []
    for _ in range(count):
        decides = cache.seen >= cache.layers[0].decider.settled
        with Launches() as seen:
            cache.attend(0, *new())
        found.append((decides, seen.count - 3))  # the three tensors that were drawn
        assert not seen.waits
    return found


def test_the_table_has_every_policy():
    assert set(MOST) == set(kvpolicy.available())


@pytest.mark.parametrize("name", MOST)
def test_launches_of_a_step(name):
    cache = made(name)
    with fake_devices(), torch.inference_mode():
        steps(cache, 1 + BUDGET + LAYOUT.cols)
        found = steps(cache, 2 * LAYOUT.cols)
        for decides, most in zip((False, True), MOST[name], strict=True):
            counted = [count for decided, count in found if decided is decides]
            assert max(counted, default=None) == most


def test_a_decision_of_linear_is_one_launch_more_from_the_first_token_on():
    cache = made("linear")
    with fake_devices(), torch.inference_mode():
        steps(cache, 1)
        found = steps(cache, LAYOUT.length - 1)
    deciding = [count for decides, count in found if decides]
    others = [count for decides, count in found if not decides]
    assert (len(deciding), len(others)) == (5, 55)
    # A line may begin where none is decided: while there is room, or behind a decision.
    assert max(deciding) <= max(others) + 1 <= 4


def test_ahead_by_offset_waits_for_nobody(tmp_path):
    flat = HeadOffsets(near=[[0.1]], far=0.01)
    found = OffsetAttention(subject="toy", layout="", queries=1, radius=0, layers=[[flat] * 4])
    file = tmp_path / "offsets.json"
    file.write_text(found.text())
    policy = kvpolicy.create("ahead", offsets=str(file))
    cache = kvpolicy.PolicyCache(policy, BUDGET, layout=LAYOUT, num_layers=1)
    with fake_devices(), torch.inference_mode():
        steps(cache, LAYOUT.length)
        assert cache.positions(0).device == GPU


def test_a_step_without_the_kernel_takes_more(monkeypatch):
    """So that the numbers above are those of the kernel."""
    monkeypatch.setattr("kvpolicy.ops.triton._on_gpu", lambda tensor: False)
    cache = made("linear")
    with fake_devices(), torch.inference_mode():
        steps(cache, 1 + BUDGET + LAYOUT.cols)
        counted = [count for decides, count in steps(cache, LAYOUT.cols) if not decides]
    assert min(counted) > 12


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("name", MOST)
def test_staged_tokens_wait_for_nobody(name, together):
    """Decisions, staging and commit, part of it taken back: on the layer's device, with no wait."""
    cache = made(name)
    with fake_devices(), torch.inference_mode():
        steps(cache, 1 + BUDGET + 3)
        with cache.stage(8, together=together):
            for count, kept in ((5, 2), (1, 1), (8, 0), (4, 4)):
                cache.attend(0, *new(count))
                cache.commit(kept)
        steps(cache, 3)
        store = cache.layers[0].store
        assert {store.keys.device, store.positions.device, cache.positions(0).device} == {GPU}
    assert cache.seen == 1 + BUDGET + 3 + 7 + 3


@pytest.mark.parametrize("name", MOST)
def test_a_compiled_steps_outside_is_a_few_launches(name):
    """What is left outside of the graph: where the token goes, and what observers are told."""
    cache = made(name)
    with fake_devices(), torch.inference_mode():
        steps(cache, 1 + BUDGET + LAYOUT.cols)
        found = []
        with cache.step():  # which allocates the step's own tensors
            cache.attend_step(0, *new())
        for _ in range(2 * LAYOUT.cols):
            decides = cache.seen >= cache.layers[0].decider.settled
            with Launches() as seen:
                with cache.step():
                    before = seen.count
                    cache.attend_step(0, *new())
                    inside = seen.count - before
                outside = seen.count - inside
            found.append((decides, inside, outside))
            assert not seen.waits
    # Three tensors are drawn, and the kernel is one. Outside: where the token goes, two; behind it
    # forget and observe; and what a decision takes, where there is one.
    assert {inside for _, inside, _ in found} == {3 + 1}
    between, deciding = MOST[name]
    for decides, _, outside in found:
        if decides:
            assert outside <= deciding - 1 + 2
        else:
            assert outside == between - 1 + 2


def test_the_counter_sees_waits_and_parts():
    with fake_devices():
        numbers = torch.ones(4, device=GPU)
        with Launches() as seen:
            numbers.view(2, 2)[0].detach()
        assert seen.count == 0
        with Launches() as seen:
            numbers.isfinite()
        assert seen.count > 1
    with Launches() as seen:
        torch.ones(4).nonzero()
        bool(torch.ones(1))
    assert seen.waits == 2
