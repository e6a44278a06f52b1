"""Models of transformers that compute their attention themselves, beside its attention interface.

Such a module takes its keys back from the cache and multiplies on its own, so nobody could watch it
from outside. For the length of an ``attach`` block each of them is given another ``forward``, on
the object alone: what it makes of the hidden states goes through the policy's attention where the
call brings a cache under a policy, and all other calls run what they always ran. What a family's
attention is made of stands in one function below; everything else is the module's own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from kvpolicy_adapters.transformers.attention import policy_attention
from kvpolicy_adapters.transformers.cache import TransformersCache
from kvpolicy_adapters.transformers.cache_argument import given_cache
from kvpolicy_adapters.transformers.generation import refuse_dropped_cache

__all__ = ["override", "own_attention", "restore"]

#: What a call of such a module returns: the output ``[B, T, width]``, its weights or None, and what
#: its family returns besides.
_Result = tuple[Tensor | None, ...]
#: Open blocks that have overridden a module, by its id; and the ``forward`` of the object itself.
_OVERRIDDEN: dict[int, tuple[int, Any]] = {}


def own_attention(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of a model whose attention is served although it is their own."""
    return [module for module in model.modules() if _family(module) is not None]


def override(model: PreTrainedModel) -> None:
    """Put a model's own attention under the caches that calls bring, once more.

    Callers see to it that no other thread does.
    """
    for module in own_attention(model):
        blocks, before = _OVERRIDDEN.get(id(module), (0, vars(module).get("forward")))
        if not blocks:
            forward: Any = module.forward
            module.forward = update_wrapper(partial(_forward, module, forward), forward)
        _OVERRIDDEN[id(module)] = blocks + 1, before


def restore(model: PreTrainedModel) -> None:
    """Undo one :func:`override`."""
    for module in own_attention(model):
        blocks, before = _OVERRIDDEN.pop(id(module))
        if blocks > 1:
            _OVERRIDDEN[id(module)] = blocks - 1, before
        else:
            del module.forward
            if before is not None:
                module.forward = before


def _family(module: nn.Module) -> Callable[..., _Result] | None:
    """The function that serves a module: for transformers' own class, and none derived from it."""
    kind = type(module)
    return _FAMILIES.get(kind.__name__) if kind.__module__.startswith("transformers.") else None


def _forward(module: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of such a module, for the length of a block."""
    cache = given_cache(args, kwargs)
    if not isinstance(cache, TransformersCache):
        refuse_dropped_cache(module)
        return original(*args, **kwargs)
    bound = inspect.signature(original).bind(*args, **kwargs).arguments
    family = _family(module)
    assert family is not None
    return family(module, bound | bound.get("kwargs", {}), cache)


def _attend(
    module: nn.Module,
    given: Mapping[str, Any],
    cache: TransformersCache,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    bias: Tensor | None = None,
    weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention under the policy, its heads side by side ``[B, T, Hq * Dv]``."""
    key, value = cache.update(key, value, layer)
    output, attention = policy_attention(
        module,
        query,
        key,
        value,
        mask,
        scale,
        position_bias=bias,
        output_attentions=weights or given.get("output_attentions", False),
    )
    return output.flatten(2), attention


def _heads(projected: Tensor, size: int) -> Tensor:
    """``[B, T, H * D]`` as ``[B, H, T, D]``."""
    return projected.unflatten(-1, (-1, size)).transpose(1, 2)


def _bloom(module: Any, given: Mapping[str, Any], cache: TransformersCache) -> _Result:
    """ALiBi, and the residual stream inside the attention."""
    query, key, value = module._reshape(module.query_key_value(given["hidden_states"]))
    output, weights = _attend(
        module,
        given,
        cache,
        module.layer_idx,
        query,
        key,
        value,
        given["attention_mask"],
        scale=module.inv_norm_factor,
        bias=module.beta * given["alibi"].view(len(query), module.num_heads, 1, -1),
    )
    output = functional.dropout(module.dense(output), module.hidden_dropout, module.training)
    return given["residual"] + output, weights


def _falcon(module: Any, given: Mapping[str, Any], cache: TransformersCache) -> _Result:
    """Rotation or ALiBi; query heads may share keys and values, which are cached once.

    The model puts ALiBi into the mask, and the module adds it again where it runs without sdpa.
    """
    fused = module.query_key_value(given["hidden_states"])
    query, key, value = (part.transpose(1, 2) for part in module._split_heads(fused))
    if module.new_decoder_architecture:
        # The module repeats each of them for the query heads that share it.
        shared = module.num_heads // module.num_kv_heads
        key, value = key[:, ::shared], value[:, ::shared]
    alibi, bias = given.get("alibi"), None
    if alibi is None:
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        query, key = rotate(query, key, *given["position_embeddings"])
    elif module.config._attn_implementation != "sdpa":
        bias = module.inv_norm_factor * alibi.view(len(query), module.num_heads, 1, -1)
    output, weights = _attend(
        module,
        given,
        cache,
        module.layer_idx,
        query,
        key,
        value,
        given["attention_mask"],
        scale=module.inv_norm_factor,
        bias=bias,
    )
    return module.dense(output), weights


def _gpt_neo(module: Any, given: Mapping[str, Any], cache: TransformersCache) -> _Result:
    """Scores without a scale; every other layer sees a window, which a buffer says."""
    hidden, mask = given["hidden_states"], given.get("attention_mask")
    query, key, value = (
        _heads(project(hidden), module.head_dim)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    first = cache.get_seq_length(module.layer_id)
    length = first + hidden.shape[1]
    near = module.bias[:, :, first:length, :length]
    if mask is None:
        mask = near
    elif mask.dtype == torch.bool:
        mask = mask & near
    else:
        mask = mask.masked_fill(~near, torch.finfo(mask.dtype).min)
    output, weights = _attend(
        module, given, cache, module.layer_id, query, key, value, mask, scale=1.0
    )
    return module.resid_dropout(module.out_proj(output)), weights


def _gpt_neox_japanese(module: Any, given: Mapping[str, Any], cache: TransformersCache) -> _Result:
    """Rotation of a part of each head; the bias of the output is added by the caller."""
    fused = _heads(module.query_key_value(given["hidden_states"]), 3 * module.head_size)
    query, key, value = fused.chunk(3, dim=-1)
    turned, rotate = module.rotary_ndims, sys.modules[type(module).__module__].apply_rotary_pos_emb
    parts = rotate(query[..., :turned], key[..., :turned], *given["position_embeddings"])
    query, key = (
        torch.cat([part, whole[..., turned:]], dim=-1)
        for part, whole in zip(parts, (query, key), strict=True)
    )
    output, weights = _attend(
        module,
        given,
        cache,
        module.layer_idx,
        query,
        key,
        value,
        given["attention_mask"],
        scale=1 / module.norm_factor,
    )
    return module.dense(output), weights, module.dense_bias


def _mpt(module: Any, given: Mapping[str, Any], cache: TransformersCache) -> _Result:
    """ALiBi, counted from the newest token, and a mask that says what is hidden.

    The module isn't told whether its weights are wanted, and gives them at every call.
    """
    fused = module.Wqkv(given["hidden_states"])
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (_heads(part, module.head_dim) for part in fused.chunk(3, dim=2))
    mask, bias = given["attention_mask"], given["position_bias"]
    output, weights = _attend(
        module,
        given,
        cache,
        module.layer_idx,
        query,
        key,
        value,
        ~mask,
        scale=module.softmax_scale,
        bias=None if bias is None else bias[None, ..., -mask.shape[-1] :],
        weights=True,
    )
    return module.out_proj(output), weights


def _xglm(module: Any, given: Mapping[str, Any], cache: TransformersCache) -> _Result:
    """Three projections, and no more."""
    query, key, value = (
        _heads(project(given["hidden_states"]), module.head_dim)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    mask = given.get("attention_mask")
    output, weights = _attend(
        module, given, cache, module.layer_idx, query, key, value, mask, scale=module.scaling
    )
    return module.out_proj(output), weights


_FAMILIES: dict[str, Callable[..., _Result]] = {
    "BloomAttention": _bloom,
    "FalconAttention": _falcon,
    "GPTNeoSelfAttention": _gpt_neo,
    "GPTNeoXJapaneseAttention": _gpt_neox_japanese,
    "MptAttention": _mpt,
    "XGLMAttention": _xglm,
}
