"""Drives random policies through tiny models of transformers, for ``kvpolicy.testing.fuzz``."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
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

from kvpolicy import (
    CacheStateError,
    CacheView,
    EvictionPolicy,
    ModelError,
    RasterLayout,
    Reclaim,
    TextLayout,
)
from kvpolicy.testing.faults import Interrupt, Interrupted
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
def _model(name: str, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _MODELS[name]().eval().requires_grad_(False).to(dtype)
    # Random weights of the usual size attend almost uniformly: sharpen them, so that a wrong cache
    # changes what comes out.
    for parameter_name, weight in model.named_parameters():
        if any(part in parameter_name for part in ("q_proj", "k_proj", "c_attn.weight")):
            weight *= 10
    return model


@dataclass(frozen=True)
class _Run:
    """Tokens for a model, and the calls that bring them.

    Attributes:
        model: of transformers.
        tokens: ``[B, T]``.
        calls: sizes of the calls; they add up to T.
        prefix: pinned tokens.
        mask: what is a token and what is padding, ``[B, T]``; None where all are tokens.
        what: the whole of it, for messages.
    """

    model: Any
    tokens: Tensor
    calls: list[int]
    prefix: int
    mask: Tensor | None
    what: str

    def call(self, cache: TransformersCache, first: int, size: int) -> Tensor:
        """The logits of some tokens."""
        seen = None if self.mask is None else self.mask[:, : first + size]
        part = self.tokens[:, first : first + size]
        output = self.model(part, use_cache=True, attention_mask=seen, **cache.as_argument)
        logits: Tensor = output.logits
        return logits

    def feed(self, cache: TransformersCache, begin: int = 0, end: int | None = None) -> Tensor:
        """Bring the tokens of some calls; the logits of all of them."""
        logits, first = [], sum(self.calls[:begin])
        for size in self.calls[begin:end]:
            logits.append(self.call(cache, first, size))
            first += size
            self.look(cache, first)
        return torch.cat(logits or [self.tokens.new_empty(len(self.tokens), 0)], dim=1)

    def look(self, cache: TransformersCache, seen: int) -> None:
        """What must hold after every call."""
        stats = cache.stats()
        for layer, positions in enumerate(_held(cache)):
            most = self.prefix + stats.budgets[layer]
            assert stats.peak_tokens[layer] <= most, f"layer {layer} held too much: {self.what}"
            there = positions.masked_fill(positions < 0, seen).sort(-1).values
            twice = (there[..., 1:] == there[..., :-1]) & (there[..., 1:] < seen)
            assert not twice.any(), f"layer {layer} holds a position twice: {self.what}"
            if self.mask is None:  # a prefix begins behind padding
                pinned = min(self.prefix, seen)
                there = there[..., :pinned]
                assert (there == torch.arange(pinned)).all(), f"prefix is lost: {self.what}"


@torch.inference_mode()
def drive_model(policy: EvictionPolicy, seed: int) -> Tally:
    """Attach a random tiny model and bring it tokens in a random pattern of calls.

    What must hold: the budget, at the end of every call; prefix cached, and nothing twice; the same
    again after ``reset``, in a copy that goes on alone, and after an exception anywhere in the
    model, unless the cache says that it can't go on; a reordered batch goes on as if it had been in
    that order; all of the model's own output where everything fits; and the model as it was,
    afterwards.

    Raises:
        AssertionError: one of these does not hold.
    """
    rng = random.Random(seed)
    name = rng.choice(list(_MODELS))
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16))
    model = _model(name, dtype)
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
    mask = _padding(rng, batch, count) if isinstance(layout, TextLayout) else None
    what = (
        f"{name}, {dtype}, {policy!r}, {layout!r}, budget {budget}, {reclaim}, batch {batch}, "
        f"{calls}{'' if mask is None else f', padding {(mask == 0).sum(1).tolist()}'}"
    )
    run = _Run(model, tokens, calls, prefix, mask, what)
    tally = Tally(streams=1, tokens=batch * count, masks=int(mask is not None))
    before = model.config._attn_implementation
    with attach(model, policy=policy, budget=budget, layout=layout, reclaim=reclaim) as cache:
        counting = _Counting(policy)
        for layer in cache.policy_cache.layers:
            layer.replace_policy(cast(EvictionPolicy, counting))
        first = run.feed(cache)
        held = _held(cache)
        stats, tally.decisions = cache.stats(), counting.decisions
        cache.reset()
        again = run.feed(cache)
        assert torch.equal(first, again), f"another output after reset(): {what}"
        assert _same(held, _held(cache)), f"other tokens are kept after reset(): {what}"
        if len(calls) > 1:
            middle = rng.randint(1, len(calls) - 1)
            _copied(run, cache, middle, first, held)
            _interrupted(run, cache, middle, held, rng)
            tally.copies, tally.exceptions = 1, 1
            if batch > 1:
                _reordered(run, cache, middle, rng)
    assert model.config._attn_implementation == before, f"the model has changed: {what}"
    fits = max(stats.evictions) == 0 and not stats.left_alone
    if fits and dtype == torch.float32:
        seen = torch.ones_like(tokens) if mask is None else mask
        plain = model(tokens, attention_mask=seen).logits
        off = (plain - first).abs().amax(-1).masked_fill(seen == 0, 0.0) / plain.abs().max()
        assert off.max() < 1e-3, (
            f"everything fits, but the output is off by {off.max():.2g}: {what}"
        )
    heads = sum(positions.shape[1] for positions in held) // len(held)
    tally.evictions = sum(stats.evictions) * batch * heads
    return tally


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


def _padding(rng: random.Random, batch: int, count: int) -> Tensor | None:
    """Rows that begin, or end, later or sooner than others; None where all are whole."""
    if rng.random() < 0.6:
        return None
    mask = torch.ones(batch, count, dtype=torch.int64)
    for row in mask:
        missing = rng.randint(0, count // 2)
        if rng.random() < 0.7:
            row[:missing] = 0
        elif missing:
            row[-missing:] = 0
    return mask


def _held(cache: TransformersCache) -> list[Tensor]:
    return [cache.positions(layer) for layer in range(LAYERS)]


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _copied(
    run: _Run, cache: TransformersCache, middle: int, first: Tensor, held: list[Tensor]
) -> None:
    """A copy made in the middle goes on alone, as the original would have."""
    cache.reset()
    run.feed(cache, end=middle)
    before = _held(cache)
    other = copy.deepcopy(cache)
    rest = run.feed(other, middle)
    assert torch.equal(rest, first[:, -rest.shape[1] :]), f"a copy goes on otherwise: {run.what}"
    assert _same(held, _held(other)), f"a copy keeps other tokens: {run.what}"
    assert _same(before, _held(cache)), f"the original followed its copy: {run.what}"


def _interrupted(
    run: _Run, cache: TransformersCache, middle: int, held: list[Tensor], rng: random.Random
) -> None:
    """An exception somewhere in the model: the cache goes on exactly, or says that it can't."""
    cache.reset()
    run.feed(cache, end=middle)
    first, size = cache.get_seq_length(), run.calls[middle]
    trial = copy.deepcopy(cache)
    with Interrupt() as counter:
        run.call(trial, first, size)
    at, behind = rng.randrange(counter.count), rng.random() < 0.5
    where = f"an exception at operation {at} of {counter.count}, {run.what}"
    try:
        with Interrupt(at, behind=behind):
            run.call(cache, first, size)
    except Interrupted:
        pass
    layers = cache.policy_cache.layers
    taken = all(layer.whole and layer.seen == first + size for layer in layers)
    refused = ""
    try:
        run.feed(cache, middle + taken)
    except (CacheStateError, ModelError) as error:
        refused = str(error)
    if refused:
        assert "reset()" in refused, f"{refused} says not what to do after {where}"
        cache.reset()
        run.feed(cache)
    assert _same(held, _held(cache)), f"other tokens are kept after {where}"


def _reordered(run: _Run, cache: TransformersCache, middle: int, rng: random.Random) -> None:
    """Reorder the batch in the middle; the budget and the prefix hold all the same."""
    batch = len(run.tokens)
    index = torch.LongTensor([rng.randrange(batch) for _ in range(batch)])
    cache.reset()
    run.feed(cache, end=middle)
    before = _held(cache)
    cache.reorder_cache(index)
    moved = [positions.index_select(0, index) for positions in before]
    assert _same(moved, _held(cache)), (
        f"reorder_cache({index.tolist()}) mixed tokens up: {run.what}"
    )
    mask = None if run.mask is None else run.mask[index]
    moved_run = replace(run, tokens=run.tokens[index], mask=mask)
    moved_run.feed(cache, middle)
