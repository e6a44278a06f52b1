"""Attention of a layer under its policy, as transformers' attention interface calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from kvpolicy import ModelError
from kvpolicy_adapters.transformers.cache import marked_layer
from kvpolicy_adapters.transformers.masks import seen_and_added

__all__ = ["policy_attention"]

#: Tensors that come to an attention function and are served, or change nothing that the mask, the
#: queries and the keys don't say already.
_KNOWN = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "mm_token_type_ids",
        "position_bias",
        "position_ids",
        "s_aux",
        "token_type_ids",
    }
)


def policy_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Cache the new tokens of one layer, and attend from them.

    Args:
        module: the attention module.
        query: ``[B, Hq, T, D]``.
        key: the new keys ``[B, H, T, D]``, marked by ``update``.
        value: the new values ``[B, H, T, Dv]``.
        attention_mask: by position: what each new token sees, bool (True = visible) or additive
            ``[B|1, 1|H|Hq, T, seen + T]``; or padding ``[B, seen + T]``; or None.
        scaling: factor of the scores.
        kwargs: what else the model passes: ``is_causal``, ``softcap``, ``s_aux`` (learned sinks),
            ``position_bias`` and ``output_attentions`` are served; a tensor of another name is
            refused, since it may say what is attended to.

    Returns:
        The output ``[B, T, Hq, Dv]``, and the weights by position ``[B, Hq, T, seen + T]`` where
        they are asked for: evicted tokens get zero.

    Raises:
        ModelError: the mask, an argument of the model's own, or how often it attends to a layer's
            keys can't be served.
        CacheStateError: the module is another model's.
    """
    layer = marked_layer(key)
    assert layer is not None
    cache, index = layer.policy_cache, layer.index
    for name, given in kwargs.items():
        if isinstance(given, Tensor) and name not in _KNOWN:
            raise ModelError(
                f"{type(module).__name__} gives its attention {name}, which kvpolicy does not know "
                f"and can't leave out: it may say what is attended to; kvpolicy can't serve this "
                f"model"
            )
    scoring: dict[str, Any] = {
        "scale": scaling,
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
    }
    bias = kwargs.get("position_bias")
    if cache.stepping:
        # The mask that compile_decode gave, of one element, as the model passes it on.
        if attention_mask is not None and attention_mask.shape != (1, 1, 1, 1):
            raise ModelError(
                f"{type(module).__name__} masks its attention in a way of its own, which a "
                f"compiled step does not make; decode without compile_decode"
            )
        output = cache.attend_step(index, query, key, value, bias=bias, **scoring)
        return output.transpose(1, 2).contiguous(), None
    out = value.dtype
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(
        query.device.type
    ):
        # As of models that normalise keys in float32: slots have one dtype, the wider one.
        wide = torch.promote_types(key.dtype, value.dtype)
        query, key, value = (tensor.to(wide) for tensor in (query, key, value))
    layer.cache.check_owner(module)
    layer.cache.served.add(id(module))
    asked = bool(kwargs.get("output_attentions")) or _collected()
    weights = None
    if layer.cache.expected is layer:
        layer.cache.expected = None
        causal = kwargs.get("is_causal")
        visible, bias = seen_and_added(
            type(module).__name__,
            attention_mask,
            bias,
            causal=getattr(module, "is_causal", True) if causal is None else causal,
            queries=query.shape[2],
            heads=key.shape[1],
            length=cache.seen_by(index) + key.shape[2],
            device=query.device,
        )
        terms = scoring | {"visible": visible, "bias": bias}
        if asked:
            output, weights = cache.attend_with_weights(index, query, key, value, **terms)
        else:
            output = cache.attend(index, query, key, value, **terms)
    elif cache.lends(index):
        output, weights = cache.attend_shared(index, query, weights=asked, **scoring)
    else:
        raise ModelError(
            f"{type(module).__name__} attends more than once to the keys of layer {index}, and its "
            f"configuration does not say that layers share them (kv_sharing_modes); kvpolicy can't "
            f"serve this model"
        )
    output = output if key.dtype == out else output.to(out)
    return output.transpose(1, 2).contiguous(), weights


def _collected() -> bool:
    """Whether transformers is about to collect this call's weights.

    A model need not pass on that it was asked for them (GPT-2 doesn't), and its configuration may
    ask: transformers collects what attention returns, and keeps for what in a context variable.
    """
    collector = getattr(output_capturing, "_active_collector", None)
    collected = None if collector is None else collector.get()
    return collected is not None and "attentions" in collected
