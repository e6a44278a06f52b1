"""The oracles see what lines to come look at, and nothing else changes."""

import numpy as np
import pytest
import torch

import kvpolicy
from kvpolicy import ParameterError, PolicyCache, RasterLayout
from kvpolicy.lab.run.subject import Setting, load_subject
from kvpolicy.lab.search.oracle import Oracle, Recorder, oracle_bits
from kvpolicy.policies import Linear

LAYOUT = RasterLayout(rows=6, cols=3, prefix=2)
LIKE = Linear(anchors=2, recent_lines=0)


def drive(policy, tensors, budget=None):
    cache = PolicyCache(policy, budget, layout=LAYOUT, num_layers=2)
    for layer, (query, key, value) in enumerate(tensors):
        cache.attend(layer, query, key, value)
    return cache


@pytest.fixture
def tensors():
    draw = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randn(2, heads, LAYOUT.length, 8, generator=draw) for heads in (4, 2, 2))
        for _ in range(2)
    ]


def test_what_is_recorded_is_the_softmax_by_line(tensors):
    recorder = Recorder()
    drive(recorder, tensors)
    for layer, (query, key, _) in enumerate(tensors):
        scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
        causal = torch.ones(LAYOUT.length, LAYOUT.length, dtype=torch.bool).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        weights = weights.view(2, 2, 2, LAYOUT.length, LAYOUT.length).mean(2)
        by_line = weights[:, :, LAYOUT.prefix :].unflatten(2, (6, 3)).sum(3)
        torch.testing.assert_close(recorder.worth("next")[layer], by_line)
        for line in range(6):
            torch.testing.assert_close(
                recorder.worth("all")[layer][:, :, line], by_line[:, :, line:].sum(2)
            )


def test_an_oracle_keeps_what_the_next_line_looks_at_most(tensors):
    recorder = Recorder()
    drive(recorder, tensors)
    oracle = Oracle.of(recorder, "next", LIKE)
    # Up to the end of line 2: of line 0 (its anchors aside) and 1, four tokens may stay.
    upto = LAYOUT.prefix + 3 * 3 + 1
    short = [tuple(x[:, :, :upto] for x in layer) for layer in tensors]
    cache = drive(oracle, short, budget=8)
    worth = recorder.worth("next")[0][:, :, 3]
    held = cache.positions(0)
    assert ((held >= LAYOUT.prefix) & (held < LAYOUT.prefix + 2)).sum(-1).eq(2).all()
    free = torch.arange(LAYOUT.prefix + 2, upto - 1)
    # Three slots were freed for line 3, of which one is written: the lowest is gone.
    lowest = free[worth[..., free].argmin(-1)]
    assert not (held == lowest.unsqueeze(-1)).any()


def test_another_batch_than_the_recorded_one_is_refused(tensors):
    recorder = Recorder()
    drive(recorder, tensors)
    one = [tuple(x[:1] for x in layer) for layer in tensors]
    with pytest.raises(ParameterError, match="recorded 2 images and is asked about 1"):
        drive(Oracle.of(recorder, "all", LIKE), one, budget=8)


def test_with_room_for_all_an_oracle_scores_as_the_full_cache():
    subject = load_subject("fashion-ar")
    full = subject.score(Setting(kvpolicy.create("full"), None), 2, lambda count: None, first=3)
    bits = oracle_bits(subject, "784", 2, "all", first=3)
    np.testing.assert_allclose(bits, full.bits, atol=1e-6)
