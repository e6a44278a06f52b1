"""What holds of one architecture when policies are attached to it."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

import kvpolicy
from kvpolicy import KVPolicyError
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.sweep.tiny import VOCAB, build
from kvpolicy_adapters.transformers_cache import TransformersCache

__all__ = ["POLICIES", "Finding", "examine"]

#: The policies that every architecture runs, with parameters for a budget of eight.
POLICIES: dict[str, dict[str, Any]] = {"linear": {"anchors": 2}, "h2o": {}, "streaming_llm": {}}
_PROMPT, _NEW, _PADDING, _LINE = 14, 18, 3, 3
_LENGTH, _BUDGET = _PROMPT + _NEW, (_PROMPT + _NEW) // 4
#: Largest difference of a logit, float32, to the model's own cache.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """One architecture, examined.

    Attributes:
        name: class of the model.
        model_types: names under which transformers knows it.
        heads: query heads and KV heads of a layer under a policy, such as ``4 / 2``.
        layers: what the layers keep, in words.
        padded: whether a left-padded batch gives what it gives with the model's own cache; None
            where the model itself can't take one.
        reason: why it does not pass; empty where it does.
    """

    name: str
    model_types: tuple[str, ...]
    heads: str = ""
    layers: str = ""
    padded: bool | None = None
    reason: str = ""

    @property
    def passes(self) -> bool:
        """Whether it is served: lossless when it fits, and within its budget when not."""
        return not self.reason


def examine(name: str, model_types: tuple[str, ...]) -> Finding:
    """Build an architecture tiny, attach policies, and compare with its own cache."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return _examine(name, model_types)
    finally:
        logging.set_verbosity(verbosity)


def _examine(name: str, model_types: tuple[str, ...]) -> Finding:
    try:
        model = build(model_types[0])
        tokens, mask = _prompt()
        own_tokens, own_logits = _generate(model, tokens, torch.ones_like(mask), None)
    except Exception as error:
        return Finding(name, model_types, reason=f"can't be built tiny here ({_brief(error)})")
    try:
        with _attached(model, "h2o", _LENGTH) as cache:
            got_tokens, got_logits = _generate(model, tokens, torch.ones_like(mask), cache)
            layers = ", ".join(dict.fromkeys(map(_kept, cache.layers)))
        if not torch.equal(got_tokens, own_tokens):
            return Finding(name, model_types, reason="other tokens than with its own cache")
        difference = (got_logits - own_logits).abs().max().item()
        if not difference <= _TOLERANCE * max(1.0, own_logits.abs().max().item()):
            return Finding(name, model_types, reason=f"logits differ by {difference:.1e}")
        heads = ""
        for policy in POLICIES:
            with _attached(model, policy, _BUDGET) as cache:
                reason = _at_a_quarter(model, tokens, cache)
                heads = _heads(model, cache)
            if reason:
                return Finding(name, model_types, reason=f"{policy}: {reason}")
    except KVPolicyError as error:
        return Finding(name, model_types, reason=str(error))
    except Exception as error:
        return Finding(name, model_types, reason=f"fails under a policy ({_brief(error)})")
    return Finding(name, model_types, heads, layers, padded=_padded(model, tokens, mask))


def _at_a_quarter(model: PreTrainedModel, tokens: Tensor, cache: TransformersCache) -> str:
    """What is wrong at a quarter of the cache, or nothing."""
    _, logits = _generate(model, tokens, torch.ones_like(tokens), cache)
    stats = cache.stats()
    for layer in _managed(cache):
        held = (cache.positions(layer) >= 0).sum(-1).max().item()
        most = max(int(held), stats.peak_tokens[layer])
        if most > _BUDGET:
            return f"layer {layer} held {most} tokens with a budget of {_BUDGET}"
        if stats.evictions[layer] == 0:
            return f"layer {layer} evicted nothing"
    if not _managed(cache):
        return "no layer came under the policy"
    return "" if logits.isfinite().all() else "logits are not finite"


def _managed(cache: TransformersCache) -> list[int]:
    """The layers under the policy."""
    left_alone = cache.stats().left_alone
    return [layer for layer in range(len(cache.layers)) if layer not in left_alone]


def _padded(model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> bool | None:
    """Whether a left-padded batch is lossless, too."""
    try:
        own_tokens, own_logits = _generate(model, tokens, mask, None)
    except Exception:
        return None
    with _attached(model, "streaming_llm", _LENGTH) as cache:
        got_tokens, got_logits = _generate(model, tokens, mask, cache)
    scale = max(1.0, own_logits.abs().max().item())
    close = (got_logits - own_logits).abs().max().item() <= _TOLERANCE * scale
    return close and torch.equal(got_tokens, own_tokens)


def _attached(model: PreTrainedModel, policy: str, budget: int) -> Any:
    layout = kvpolicy.TextLayout(length=_LENGTH, line_length=_LINE)
    made = kvpolicy.create(policy, **POLICIES[policy])
    return attach(model, policy=made, budget=budget, layout=layout)


def _prompt() -> tuple[Tensor, Tensor]:
    """Two prompts, and a mask that pads the first one on the left."""
    torch.manual_seed(1)
    tokens = torch.randint(2, VOCAB, (2, _PROMPT))
    mask = torch.ones_like(tokens)
    mask[0, :_PADDING] = 0
    return tokens, mask


def _generate(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, cache: TransformersCache | None
) -> tuple[Tensor, Tensor]:
    """Greedy tokens ``[B, T]`` and the logits that chose them ``[B, N, V]``."""
    generate: Any = model.generate
    out = generate(
        tokens.masked_fill(mask == 0, 0),
        attention_mask=mask,
        max_new_tokens=_NEW,
        min_new_tokens=_NEW,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **({} if cache is None else {"past_key_values": cache}),
    )
    return out.sequences, torch.stack(out.logits, dim=1).float()


def _heads(model: PreTrainedModel, cache: TransformersCache) -> str:
    """Query heads and KV heads of a layer under the policy."""
    store = cache.policy_cache.layers[_managed(cache)[0]].require_store()
    config = model.config.get_text_config(decoder=True)
    return f"{getattr(config, 'num_attention_heads', '?')} / {store.shape.heads}"


def _kept(layer: Any) -> str:
    """What a layer keeps where everything fits, in words."""
    kind = type(layer).__name__
    return {
        "PolicyLayer": "every token",
        "DynamicSlidingWindowLayer": "a window",
        "LinearAttentionLayer": "a state",
        "DummyLayer": "nothing of its own",
    }.get(kind, kind)


def _brief(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}"
