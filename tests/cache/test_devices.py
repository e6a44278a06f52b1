"""Layers on several devices: each layer's slots, masses and masks lie where the layer lies."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models
from support.fake_devices import fake_devices
from support.turns import in_turn

import kvpolicy
from kvpolicy.cache.sharing import Sharing

LAYOUTS = {
    "image": kvpolicy.RasterLayout(rows=6, cols=5, prefix=6),
    "text": kvpolicy.TextLayout(sinks=1, line_length=5),
    "late": kvpolicy.AfterPrompt(kvpolicy.RasterLayout(rows=6, cols=5)),
}
EVERY = kvpolicy.available()


def test_the_pretence_finds_what_real_devices_would_refuse():
    with fake_devices():
        here, there = torch.zeros(2, 3, device="cuda:0"), torch.zeros(2, 3, device="cuda:1")
        assert (here[:, 1:] * 2).device == torch.device("cuda:0")
        for mixed in (lambda: here + there, lambda: here + torch.arange(3)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(Exception, match="local_scalar"):
            here.sum().item()


@pytest.mark.parametrize(
    ("name", "layout", "reclaim"), in_turn(EVERY, LAYOUTS, turn=["lazy", "eager"])
)
def test_a_layers_tensors_lie_where_the_layer_lies(name, layout, reclaim, monkeypatch):
    """On a device no number is read back, either: nothing in a step waits for it."""
    if layout == "late":
        # The smallest budget is worked out when the layout comes, from tensors on the CPU, which
        # have no numbers in here: work it out before.
        known = LAYOUTS["late"].at(0, 6, None)
        floor = tiny_models.policy(name).min_budget(known)
        monkeypatch.setattr(Sharing, "_floor", lambda sharing, layout: floor)
    cache = kvpolicy.PolicyCache(
        tiny_models.policy(name),
        40 if name == "full" else 13,
        layout=LAYOUTS[layout],
        num_layers=2,
        reclaim=reclaim,
    )
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    with fake_devices():
        batch = 2

        def call(count: int, **terms) -> None:
            for layer, device in enumerate(gpus):
                query = torch.randn(batch, 4, count, 8, device=device)
                key = torch.randn(batch, 2, count, 8, device=device)
                there = {name: term.to(device) for name, term in terms.items()}
                output = cache.attend(layer, query, key, key, **there)
                assert output.device == device

        call(6)
        for count in (1, 7, *[1] * 6):
            call(count)
        cache.select_batch(torch.tensor([1, 0, 0]))
        batch = 3
        seen = cache.seen
        visible = torch.ones(3, 1, 1, seen + 1, dtype=torch.bool)
        call(1, visible=visible, bias=torch.zeros(1, 4, 1, seen + 1), sinks=torch.zeros(4))
        call(4)
        for layer, device in zip(cache.layers, gpus, strict=True):
            tensors = [layer.store.keys, layer.store.values, layer.store.positions]
            tensors += [observer.mass for observer in layer.observers]
            books = (layer.store.victims, layer.store.start)
            tensors += [tensor for tensor in books if tensor is not None]
            assert {tensor.device for tensor in tensors} == {device}
            assert cache.positions(layer.plan.layer).device == device
    assert cache.stats().seen == 25


@pytest.mark.parametrize(
    ("name", "layout", "reclaim"), [("linear", "image", "lazy"), ("h2o", "text", "eager")]
)
def test_a_stage_reads_no_number_back(name, layout, reclaim):
    """Staged tokens, those that stay and those that go: nothing waits for the device.

    But for several tokens under a mask, which says which of them see each other.
    """
    policy = tiny_models.policy(name)
    there = LAYOUTS[layout]
    cache = kvpolicy.PolicyCache(policy, 13, layout=there, num_layers=2, reclaim=reclaim)
    with fake_devices():

        def call(count: int, masked: bool = False) -> None:
            seen = cache.seen
            shape = (1, 1, count, seen + count)
            visible = torch.ones(shape, dtype=torch.bool, device="cuda:0") if masked else None
            for layer in range(2):
                query, key = (torch.randn(2, n, count, 8, device="cuda:0") for n in (4, 2))
                output = cache.attend(layer, query, key, key, visible=visible)
                assert output.device == torch.device("cuda", 0)

        call(6)
        for together in (False, True):
            with cache.stage(4, together=together):
                for count, kept in ((4, 4), (4, 1), (1, 1), (3, 0)):
                    call(count)
                    cache.commit(kept)
                call(1, masked=True)
                cache.commit(1)
                with pytest.raises(Exception, match=r"local_scalar|data-dependent|is_nonzero"):
                    call(2, masked=True)
                cache.commit(0)
    assert cache.seen == 6 + 2 * 7
