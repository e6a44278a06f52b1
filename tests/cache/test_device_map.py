"""device_map: a model whose layers accelerate moves about generates under every policy."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models

import kvpolicy
import kvpolicy_adapters

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")
accelerate = pytest.importorskip("accelerate", reason="device_map needs accelerate")

EVICTING = sorted(set(kvpolicy.available()) - {"full"})
LAYOUT = kvpolicy.RasterLayout(rows=5, cols=5, prefix=3)


def generate(model, cache):
    tokens = torch.tensor([[5, 9, 2], [7, 1, 30]])
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        **cache.as_argument,
        max_new_tokens=22,
        do_sample=False,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, and the same one with a layer on disk and others behind accelerate's hooks."""
    folder = tmp_path_factory.mktemp("model")
    whole = tiny_models.llama()
    whole.save_pretrained(folder)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    spread = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=folder / "offload"
    )
    assert spread.model.layers[1].self_attn.k_proj.weight.device.type == "meta"
    assert hasattr(spread.model.layers[1].self_attn.k_proj, "_hf_hook")
    return whole, spread


@pytest.mark.parametrize("name", EVICTING)
def test_hooked_layers_keep_their_slots_where_they_compute(models, name):
    found = []
    for model in models:
        with kvpolicy_adapters.attach(
            model, policy=tiny_models.policy(name), budget=13, layout=LAYOUT
        ) as cache:
            tokens = generate(model, cache)
        assert min(cache.stats().evictions) > 0
        found.append((tokens, [cache.positions(layer) for layer in range(3)]))
    assert torch.equal(found[0][0], found[1][0])
    for whole, spread in zip(found[0][1], found[1][1], strict=True):
        assert spread.device.type == "cpu", "where it computes, not where its weights lie"
        assert torch.equal(whole, spread)
