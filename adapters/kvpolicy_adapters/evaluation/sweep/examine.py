"""What holds of one architecture when policies are attached to it."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

import kvpolicy
from kvpolicy import KVPolicyError
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.evaluation.sweep.inputs import made_for
from kvpolicy_adapters.evaluation.sweep.tiny import VOCAB, build
from kvpolicy_adapters.transformers.cache import TransformersCache
from kvpolicy_adapters.transformers.cache_argument import as_argument

__all__ = ["POLICIES", "Finding", "examine"]

#: The policies that every architecture runs, with parameters for a budget of eight.
POLICIES: dict[str, dict[str, Any]] = {"linear": {"anchors": 2}, "h2o": {}, "streaming_llm": {}}
_PROMPT, _NEW, _PADDING, _LINE = 14, 18, 3, 3
_LENGTH, _BUDGET = _PROMPT + _NEW, (_PROMPT + _NEW) // 4
#: Fields of configurations whose models cache latents, or several tokens as one.
_COMPRESSED = ("kv_lora_rank", "compress_rates")
_EVERY = "every token"
#: Largest difference of a logit, float32, to the model's own cache.
_TOLERANCE = 1e-4

_DRAFT = "a draft model: all its layers attend to the keys and values of another model's cache"
#: Classes of which no tiny model stands alone, and why.
_NOT_ALONE = {
    "Gemma3nForConditionalGeneration": (
        "not tried: its vision tower comes from another package (timm); its text model, "
        "Gemma3nForCausalLM, passes"
    ),
    "Gemma4AssistantForCausalLM": _DRAFT,
    "Gemma4UnifiedAssistantForCausalLM": _DRAFT,
}


#: Classes whose generate reads the newest token of a prompt alone, which padding would be.
_READS_ONE_TOKEN = ("MusicgenForCausalLM",)


@dataclass(frozen=True)
class Finding:
    """One architecture, examined.

    Attributes:
        name: class of the model.
        model_types: names under which transformers knows it.
        inputs: what it was given, in words.
        heads: query heads and KV heads of a layer under a policy, such as ``4 / 2``.
        layers: what the layers keep, in words.
        padded: whether a left-padded batch gives what it gives with the model's own cache; None
            where the model itself can't take one.
        prefix: whether a mask of the user's own, by which the first tokens see each other, gives
            what it gives with the model's own cache; None where the model itself takes none.
        reason: why it does not pass; empty where it does.
        by_design: where it does not pass, whether it keeps nothing that a policy could evict.
    """

    name: str
    model_types: tuple[str, ...]
    inputs: str = ""
    heads: str = ""
    layers: str = ""
    padded: bool | None = None
    prefix: bool | None = None
    reason: str = ""
    by_design: bool = False

    @property
    def passes(self) -> bool:
        """Whether it is served: lossless when it fits, and within its budget when not."""
        return not self.reason


class _NotHeld(Exception):
    """Something does not hold; the message says what."""


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
    if name in _NOT_ALONE:
        return Finding(name, model_types, reason=_NOT_ALONE[name])
    try:
        model = build(name)
        text, mask = _prompt()
        whole = torch.ones_like(mask)
        _generate(model, text, whole, {}, None)
        inputs, tokens, extra = _given(model, text, whole)
    except Exception as error:
        return Finding(name, model_types, reason=f"can't be built tiny here ({_brief(error)})")
    try:
        layers = _lossless(model, tokens, extra)
        if not _any_under_policy(layers):
            # The budget holds each whole window, so the policy had nothing to do. It has where
            # windows are longer than the text.
            wide = _lossless(build(name, window=2 * _LENGTH), tokens, extra)
            if not _any_under_policy(wide):
                raise _NotHeld("no layer comes under a policy, not even where windows are long")
        for policy in POLICIES:
            with _attached(model, policy, _BUDGET) as cache:
                reason = _at_a_quarter(model, tokens, extra, cache)
                if reason:
                    raise _NotHeld(f"{policy}: {reason}")
                heads = _heads(model, cache)
        padded = _padded(model, tokens, mask, extra)
        if padded is False:
            raise _NotHeld("a left-padded batch gives other logits than with its own cache")
        prefix = _prefix(model, text)
        if prefix is False:
            raise _NotHeld("a prefix that sees itself gives other logits than with its own cache")
    except _NotHeld as error:
        return Finding(name, model_types, reason=str(error))
    except KVPolicyError as error:
        design = _nothing_to_evict(model)
        return Finding(name, model_types, reason=_said(name, error), by_design=design)
    except Exception as error:
        return Finding(name, model_types, reason=f"fails under a policy ({_brief(error)})")
    return Finding(name, model_types, inputs, heads, ", ".join(layers), padded, prefix)


def _given(
    model: PreTrainedModel, text: Tensor, mask: Tensor
) -> tuple[str, Tensor, dict[str, Any]]:
    """The input that a model is made for; ids alone where it can't take token types after all."""
    inputs, tokens, extra = made_for(model, text)
    try:
        _generate(model, tokens, mask, extra, None)
    except Exception:
        if set(extra) == {"token_type_ids"}:
            return "ids", text, {}
        raise
    return inputs, tokens, extra


def _lossless(model: PreTrainedModel, tokens: Tensor, extra: dict[str, Any]) -> list[str]:
    """With room for everything, tokens and logits are those of the model's own cache.

    Returns:
        What its layers keep, in words.

    Raises:
        _NotHeld: they are not.
    """
    mask = torch.ones_like(tokens)
    own_tokens, own_logits = _generate(model, tokens, mask, extra, None)
    with _attached(model, "h2o", _LENGTH) as cache:
        got_tokens, got_logits = _generate(model, tokens, mask, extra, cache)
        layers = list(dict.fromkeys(map(_kept, cache.layers)))
    if not _close(got_logits, own_logits):
        raise _NotHeld("other logits than with its own cache")
    if not torch.equal(got_tokens, own_tokens):
        raise _NotHeld("other tokens than with its own cache")
    return layers


def _close(given: Tensor, own: Tensor) -> bool:
    """Whether logits are those of the model's own cache, but for rounding."""
    difference = (given - own).abs().max().item()
    return difference <= _TOLERANCE * max(1.0, own.abs().max().item())


def _at_a_quarter(
    model: PreTrainedModel, tokens: Tensor, extra: dict[str, Any], cache: TransformersCache
) -> str:
    """What is wrong at a quarter of the cache, or nothing."""
    _, logits = _generate(model, tokens, torch.ones_like(tokens), extra, cache)
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
    """The layers under the policy, but for those that no text comes to (attention to an image)."""
    left_alone = cache.stats().left_alone
    layers = enumerate(cache.policy_cache.layers)
    return [n for n, layer in layers if n not in left_alone and layer.store is not None]


def _padded(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, extra: dict[str, Any]
) -> bool | None:
    """Whether a left-padded batch is lossless, too."""
    if type(model).__name__ in _READS_ONE_TOKEN:
        return None
    try:
        own_tokens, own_logits = _generate(model, tokens, mask, extra, None)
    except Exception:
        return None
    with _attached(model, "streaming_llm", _LENGTH) as cache:
        got_tokens, got_logits = _generate(model, tokens, mask, extra, cache)
    return _close(got_logits, own_logits) and torch.equal(got_tokens, own_tokens)


def _prefix(model: PreTrainedModel, text: Tensor) -> bool | None:
    """Whether a prefix that sees itself, by a mask of the user's own, gives the model's logits.

    None where the model takes no such mask: it fails, or gives what it gives without.
    """
    batch, length = text.shape
    seen = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    seen[..., : length // 2, : length // 2] = True
    # Additive, as eager attention takes it, too.
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)

    def run(**options: Any) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(text, use_cache=True, **options).logits
        return logits.float()

    try:
        own = run(attention_mask=mask, **as_argument(DynamicCache(config=model.config)))
        if _close(run(**as_argument(DynamicCache(config=model.config))), own):
            return None
    except Exception:
        return None
    with _attached(model, "h2o", _LENGTH) as cache:
        return _close(run(attention_mask=mask, **as_argument(cache)), own)


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
    model: PreTrainedModel,
    tokens: Tensor,
    mask: Tensor,
    extra: dict[str, Any],
    cache: TransformersCache | None,
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
        **extra,
        **({} if cache is None else cache.as_argument),
    )
    return out.sequences, torch.stack(out.logits, dim=1).float()


def _heads(model: PreTrainedModel, cache: TransformersCache) -> str:
    """Query heads and KV heads of a layer under the policy."""
    store = cache.policy_cache.layers[_managed(cache)[0]].require_store()
    config = model.config.get_text_config(decoder=True)
    return f"{getattr(config, 'num_attention_heads', '?')} / {store.shape.heads}"


def _any_under_policy(layers: list[str]) -> bool:
    return any(kept.startswith(_EVERY) for kept in layers)


def _kept(layer: Any) -> str:
    """What a layer keeps where everything fits, in words."""
    kind = type(layer).__name__
    return {
        "PolicyLayer": _EVERY,
        "StatePolicyLayer": f"{_EVERY} beside a state",
        "DynamicSlidingWindowLayer": "a window",
        "LinearAttentionAndSlidingWindowAttentionLayer": "a window beside a state",
        "LinearAttentionLayer": "a state",
        "DummyLayer": "nothing of its own",
    }.get(kind, kind)


def _nothing_to_evict(model: PreTrainedModel) -> bool:
    """Whether a refused model keeps nothing that a policy could evict head by head."""
    config = model.config.get_text_config(decoder=True).to_dict()
    if model.config.is_encoder_decoder or any(config.get(name) for name in _COMPRESSED):
        return True
    layers = DynamicCache(config=model.config).layers
    if model._is_stateful and all(type(layer) is DynamicLayer for layer in layers):
        return True  # a state of which transformers' own cache does not know
    # A layer may keep a state or an index beside keys and values: those could be evicted.
    return not any(isinstance(layer, DynamicLayer) for layer in layers)


def _said(name: str, error: KVPolicyError) -> str:
    """What attach says of a model, without its name, which the row has already."""
    return " ".join(str(error).split()).removeprefix(name).lstrip(": ")


def _brief(error: Exception) -> str:
    """An error in one line, without the paths of this machine."""
    text = re.sub(r"(/[\w.\-]+){2,}", "...", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:120]}"
