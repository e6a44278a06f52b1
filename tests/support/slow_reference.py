"""A slow reference of eviction: the model keeps everything, and masks hide what a policy let go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvpolicy_adapters.transformers.cache_argument import as_argument

#: Of each step, of each layer: the positions that were attended to, int64 [B, H, S], -1 = none.
Held = list[list[Tensor]]


def texts(length: int, batch: int = 2) -> Tensor:
    """Ids [B, T], none of which comes twice in a text."""
    order = torch.rand(batch, 59, generator=torch.Generator().manual_seed(5)).argsort(-1)
    return 1 + order[:, :length]


def under_policy(model: nn.Module, cache, parts: Sequence[Tensor]) -> tuple[list[Tensor], Held]:
    """Logits of each call, and what each layer held in it."""
    logits, held = [], []
    with torch.inference_mode():
        for part in parts:
            logits.append(model(part, **as_argument(cache)).logits)
            layers = range(len(cache.layers))
            held.append(
                [
                    cache.positions(layer)
                    for layer in layers
                    if cache.policy_cache.layers[layer].store is not None
                ]
            )
    return logits, held


def check(model, modules: Sequence[nn.Module], parts, given: list[Tensor], held: Held) -> None:
    """Compare with the model's own cache, each attention module's mask hiding what is not held.

    The first call is compared, too, but not masked: nothing is gone from it.
    """
    from transformers import DynamicCache

    own, seen, step = DynamicCache(config=model.config), 0, 0

    def hide(module, args, kwargs):
        if step == 0:
            return args, kwargs
        places = held[step][modules.index(module)]
        kept = torch.zeros(*places.shape[:2], seen + 1, dtype=torch.bool)
        kept.scatter_(2, places.where(places >= 0, seen), True)
        return args, kwargs | {"attention_mask": _hidden(module, kwargs["attention_mask"], kept)}

    hooks = [module.register_forward_pre_hook(hide, with_kwargs=True) for module in modules]
    try:
        for part in parts:
            seen += part.shape[1]
            with torch.inference_mode():
                expected = model(part, use_cache=True, **as_argument(own)).logits
            torch.testing.assert_close(given[step], expected, atol=1e-4, rtol=1e-4)
            step += 1
    finally:
        for hook in hooks:
            hook.remove()
    with torch.inference_mode():
        whole = model(torch.cat(list(parts), dim=1)).logits
    assert (whole[:, -1] - expected[:, -1]).abs().max() > 0.02, "what is gone must matter"


def _hidden(module: nn.Module, mask: Tensor | None, kept: Tensor) -> Tensor:
    """A module's mask that hides besides what is not kept, [B, H, seen + 1]."""
    gone = ~kept[:, :, None, :-1]
    config = getattr(module, "config", None)
    heads = getattr(module, "num_heads", getattr(config, "num_attention_heads", gone.shape[1]))
    if gone.shape[1] not in (1, heads):
        gone = gone.repeat_interleave(heads // gone.shape[1], dim=1)
    if "Mpt" in type(module).__name__:  # whose mask says what is hidden
        return mask | gone
    if mask is None or mask.dtype == torch.bool:
        return ~gone if mask is None else mask & ~gone
    return mask.expand(-1, gone.shape[1], -1, -1).masked_fill(gone, torch.finfo(mask.dtype).min)
