"""Drives random policies through tiny models of transformers, for ``kvpolicy.testing.fuzz``."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from kvpolicy import CacheView, EvictionPolicy, RasterLayout, Reclaim, TextLayout
from kvpolicy.testing.fuzz import Tally
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.transformers.cache import TransformersCache

__all__ = ["drive_model"]

VOCAB = 61
LAYERS = 3
_MOST_TOKENS = 48
_SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def _gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        n_positions=256,
        bos_token_id=None,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)


_MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZE, num_key_value_heads=2)),
    "llama, every query head its own": lambda: LlamaForCausalLM(
        LlamaConfig(**_SIZE, num_key_value_heads=4)
    ),
    "gemma2, soft caps": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_SIZE,
            num_key_value_heads=1,
            attn_logit_softcapping=3.0,
            layer_types=["full_attention"] * LAYERS,
        )
    ),
    "gpt2": _gpt2,
}


@cache
def _model(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _MODELS[name]().eval().requires_grad_(False)
    # Random weights of the usual size attend almost uniformly: sharpen them, so that a wrong cache
    # changes what comes out.
    for parameter_name, weight in model.named_parameters():
        if any(part in parameter_name for part in ("q_proj", "k_proj", "c_attn.weight")):
            weight *= 10
    return model


@torch.inference_mode()
def drive_model(policy: EvictionPolicy, seed: int) -> Tally:
    """Attach a random tiny model and bring it tokens in a random pattern of calls.

    What must hold: the budget, at the end of every call; prefix cached, and nothing twice; the same
    again after ``reset``; a reordered batch goes on as if it had been in that order; all of the
    model's own output where everything fits; and the model as it was, afterwards.

    Raises:
        AssertionError: one of these does not hold.
    """
    rng = random.Random(seed)
    name = rng.choice(list(_MODELS))
    model = _model(name)
    prefix = rng.randint(0, 4)
    floor = _floor(policy, prefix)
    count = min(prefix + floor + rng.randint(1, 16), _MOST_TOKENS)
    layout = _layout(rng, prefix, count)
    floor = min(policy.min_budget(layout), layout.evictable or count)
    budget = rng.choice((floor, rng.randint(floor, max(floor, count)), max(floor, count)))
    most = layout.evictable or count
    budget = most if policy.key == "full" else min(budget, most)
    generator = torch.Generator().manual_seed(seed)
    batch = rng.randint(1, 3)
    tokens = torch.randint(1, VOCAB, (batch, count), generator=generator)
    calls = _calls(rng, count)
    reclaim: Reclaim = rng.choice(("lazy", "eager"))
    what = f"{name}, {policy!r}, {layout!r}, budget {budget}, {reclaim}, batch {batch}, {calls}"
    before = model.config._attn_implementation
    with attach(model, policy=policy, budget=budget, layout=layout, reclaim=reclaim) as cache:
        counting = _Counting(policy)
        for layer in cache.policy_cache.layers:
            layer.replace_policy(cast(EvictionPolicy, counting))
        first = _feed(model, cache, tokens, calls, prefix, what)
        held = _held(cache)
        stats, decisions = cache.stats(), counting.decisions
        cache.reset()
        again = _feed(model, cache, tokens, calls, prefix, what)
        assert torch.equal(first, again), f"another output after reset(): {what}"
        assert _same(held, _held(cache)), f"other tokens are kept after reset(): {what}"
        if batch > 1 and len(calls) > 1:
            _reordered(model, cache, tokens, calls, prefix, rng, what)
    assert model.config._attn_implementation == before, f"the model has changed: {what}"
    if max(stats.evictions) == 0 and not stats.left_alone:
        plain = model(tokens).logits
        off = float((plain - first).abs().max() / plain.abs().max())
        assert off < 1e-3, f"everything fits, but the output is off by {off:.2g}: {what}"
    heads = sum(positions.shape[1] for positions in held) // len(held)
    return Tally(
        streams=1,
        tokens=batch * count,
        decisions=decisions,
        evictions=sum(stats.evictions) * batch * heads,
    )


class _Counting:
    """Passes everything on to a policy, and counts what it is asked."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.decisions = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def victims(self, view: CacheView, count: int) -> Tensor:
        """The policy's own."""
        self.decisions += 1
        return self.policy.victims(view, count)


def _floor(policy: EvictionPolicy, prefix: int) -> int:
    return policy.min_budget(TextLayout(sinks=prefix)) if policy.key != "full" else 1


def _layout(rng: random.Random, prefix: int, count: int) -> TextLayout | RasterLayout:
    if rng.random() < 0.5:
        cols = rng.randint(1, 5)
        rows = max(1, -(-(count - prefix) // cols))
        return RasterLayout(rows=rows, cols=cols, prefix=prefix)
    return TextLayout(sinks=prefix, length=rng.choice((None, max(count, prefix + 1))))


def _calls(rng: random.Random, count: int) -> list[int]:
    """Sizes of calls that add up to the tokens: one by one, a prefill first, or chunks."""
    calls: list[int] = []
    pattern = rng.choice(("steps", "prefill", "chunks"))
    while (left := count - sum(calls)) > 0:
        one = pattern == "steps" or (pattern == "prefill" and calls)
        calls.append(1 if one else rng.randint(1, left))
    return calls


def _feed(
    model: Any, cache: TransformersCache, tokens: Tensor, calls: list[int], prefix: int, what: str
) -> Tensor:
    """Bring tokens call by call; the logits of all of them."""
    logits, first = [], cache.get_seq_length()
    for size in calls:
        part = tokens[:, first : first + size]
        logits.append(model(part, use_cache=True, **cache.as_argument).logits)
        first += size
        _look(cache, first, prefix, what)
    return torch.cat(logits, dim=1)


def _look(cache: TransformersCache, seen: int, prefix: int, what: str) -> None:
    """What must hold after every call."""
    stats = cache.stats()
    for layer, positions in enumerate(_held(cache)):
        most = prefix + stats.budgets[layer]
        assert stats.peak_tokens[layer] <= most, f"layer {layer} held too much: {what}"
        there = positions.masked_fill(positions < 0, seen).sort(-1).values
        twice = (there[..., 1:] == there[..., :-1]) & (there[..., 1:] < seen)
        assert not twice.any(), f"layer {layer} holds a position twice: {what}"
        pinned = min(prefix, seen)
        assert (there[..., :pinned] == torch.arange(pinned)).all(), f"prefix is lost: {what}"


def _held(cache: TransformersCache) -> list[Tensor]:
    return [cache.positions(layer) for layer in range(LAYERS)]


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _reordered(
    model: Any,
    cache: TransformersCache,
    tokens: Tensor,
    calls: list[int],
    prefix: int,
    rng: random.Random,
    what: str,
) -> None:
    """Reorder the batch in the middle; the budget and the prefix hold all the same."""
    middle = rng.randint(1, len(calls) - 1)
    index = torch.LongTensor([rng.randrange(len(tokens)) for _ in tokens])
    cache.reset()
    _feed(model, cache, tokens, calls[:middle], prefix, what)
    before = _held(cache)
    cache.reorder_cache(index)
    moved = [positions.index_select(0, index) for positions in before]
    assert _same(moved, _held(cache)), f"reorder_cache({index.tolist()}) mixed tokens up: {what}"
    _feed(model, cache, tokens[index], calls[middle:], prefix, what)
