"""LlamaGen as a model of transformers, with the parameter names of the released checkpoints.

For drawing, not for training: there is no dropout, and no condition is dropped at random.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy import LayoutError, ParameterError, ShapeError
from kvpolicy_adapters.images.llamagen.configuration import LlamaGenConfig
from kvpolicy_adapters.images.llamagen.generation import generate
from kvpolicy_adapters.images.llamagen.rotary import rotate, rotation_table
from kvpolicy_adapters.transformers.cache_argument import as_argument, either

__all__ = ["LlamaGen"]


class LlamaGenRMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``, in float32."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).type_as(x) * self.weight


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention, as transformers' attention interface calls it where asked for ``eager``."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).type_as(query)
    output = weights @ value.repeat_interleave(group, 1)
    return output.transpose(1, 2).contiguous(), weights


class LlamaGenAttention(nn.Module):
    """Self-attention through transformers' attention interface."""

    is_causal = True

    def __init__(self, config: LlamaGenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        kv_heads = config.num_key_value_heads
        assert kv_heads is not None
        self.num_key_value_groups = config.num_attention_heads // kv_heads
        self.widths = [config.hidden_size, kv_heads * self.head_dim, kv_heads * self.head_dim]
        self.wqkv = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)) for part in self.wqkv(x).split(self.widths, -1)
        )
        query, key = rotate(query, rotation).transpose(1, 2), rotate(key, rotation).transpose(1, 2)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention(
            self, query, key, value, mask, dropout=0.0, scaling=self.head_dim**-0.5
        )
        return self.wo(output.flatten(2))


class LlamaGenFeedForward(nn.Module):
    """``w2(silu(w1 x) * w3 x)``."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        hidden = config.intermediate_size
        assert hidden is not None
        self.w1 = nn.Linear(config.hidden_size, hidden, bias=False)
        self.w3 = nn.Linear(config.hidden_size, hidden, bias=False)
        self.w2 = nn.Linear(hidden, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class LlamaGenBlock(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to it."""

    def __init__(self, config: LlamaGenConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention = LlamaGenAttention(config, layer_idx)
        self.feed_forward = LlamaGenFeedForward(config)
        self.attention_norm = LlamaGenRMSNorm(config)
        self.ffn_norm = LlamaGenRMSNorm(config)

    def forward(
        self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: Cache | None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, mask, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class LlamaGenClassEmbedding(nn.Module):
    """Classes ``[B]`` as one token ``[B, 1, width]``; the last row of the table is "no class"."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def forward(self, classes: Tensor) -> Tensor:
        if classes.ndim != 1 or classes.is_floating_point():
            raise ShapeError(
                f"condition is {classes.dtype} {list(classes.shape)}; a c2i model takes classes, "
                f"integers [B]"
            )
        return self.embedding_table(classes).unsqueeze(1)

    def nothing(self, classes: Tensor) -> Tensor:
        return torch.full_like(classes, self.embedding_table.num_embeddings - 1)


class LlamaGenCaptionEmbedding(nn.Module):
    """Captions ``[B, length, caption_size]`` as tokens ``[B, length, width]``."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.size = (config.caption_length, config.caption_size)
        self.cap_proj = nn.ModuleDict(
            {
                "fc1": nn.Linear(config.caption_size, config.hidden_size, bias=False),
                "fc2": nn.Linear(config.hidden_size, config.hidden_size, bias=False),
            }
        )
        self.uncond_embedding = nn.Parameter(torch.empty(self.size))

    def forward(self, captions: Tensor) -> Tensor:
        if captions.ndim != 3 or captions.shape[1:] != self.size:
            raise ShapeError(
                f"condition is {list(captions.shape)}; this t2i model takes embeddings of captions "
                f"[B, {self.size[0]}, {self.size[1]}], padded on the left"
            )
        captions = captions.to(self.uncond_embedding.dtype)
        hidden = functional.gelu(self.cap_proj["fc1"](captions), approximate="tanh")
        return self.cap_proj["fc2"](hidden)

    def nothing(self, captions: Tensor) -> Tensor:
        return self.uncond_embedding.detach().expand_as(captions)


class LlamaGen(PreTrainedModel):
    """LlamaGen (arXiv:2406.06525), of a class or of a caption.

    Example::

        model = read_official("c2i_L_384.pt", grid_size=24)
        with attach(model, policy="linear", budget="1/6") as cache:
            grids = model.generate(torch.tensor([207, 360]), cfg_scale=4.0, cache=cache)

    A sequence is the condition (positions 0 to ``config.prefix - 1``) and ``n * n`` image tokens,
    row by row.
    """

    config_class = LlamaGenConfig
    config: LlamaGenConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _no_split_modules = ["LlamaGenBlock"]  # noqa: RUF012 (its type in transformers)
    _supports_sdpa = True
    # Its mask says which tokens of a caption are padding, and what can't take it would ignore it.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = True

    generate = generate

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        caption = config.condition == "t2i"
        embedding = LlamaGenCaptionEmbedding if caption else LlamaGenClassEmbedding
        self.cls_embedding = embedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LlamaGenBlock(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = LlamaGenRMSNorm(config)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Not buffers: they stay float32 whatever the weights are.
        self._rotations: dict[torch.device, Tensor] = {}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlamaGenCaptionEmbedding):
            nn.init.normal_(module.uncond_embedding, std=self.config.caption_size**-0.5)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of image tokens."""
        return self.tok_embeddings

    def get_output_embeddings(self) -> nn.Module:
        """The linear layer that makes logits."""
        return self.output

    def unconditional(self, condition: Tensor) -> Tensor:
        """The condition that says nothing, for guidance, in the shape of ``condition``."""
        return self.cls_embedding.nothing(condition)

    def forward(
        self,
        input_ids: Tensor | None = None,
        condition: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        past_key_values: Cache | None = None,
    ) -> CausalLMOutputWithPast:
        """The logits behind each new token.

        Args:
            input_ids: image tokens ``[B, T]`` behind what is cached, and behind ``condition``.
            condition: what the sequence begins with: classes ``[B]``, or embeddings of captions
                ``[B, config.caption_length, config.caption_size]``.
            attention_mask: by position, ``[B, tokens so far, new ones included]``: 0 hides a token
                of a caption from all others (it still attends to itself). None hides nothing.
            cache: a cache, e.g. that of ``attach``.
            use_cache: make a ``DynamicCache`` where no cache is given.
            logits_to_keep: number of newest tokens whose logits are wanted; 0 for all.
            past_key_values: the former name of ``cache``.

        Returns:
            ``logits``, float32 ``[B, T (condition included), vocab_size]``, and the cache.

        Raises:
            ParameterError: neither tokens nor a condition are given.
            LayoutError: a sequence begins without a condition, or is longer than the image.
            ShapeError: the condition or the mask has the wrong shape.
        """
        cache = either(cache, past_key_values)
        if cache is None and use_cache:
            cache = DynamicCache()
        seen: Any = 0 if cache is None else cache.get_seq_length()
        parts = [] if condition is None else [self.cls_embedding(condition)]
        if input_ids is not None:
            parts.append(self.tok_embeddings(input_ids))
        if not parts:
            raise ParameterError("give input_ids (image tokens), condition, or both")
        x = torch.cat(parts, dim=1)
        if isinstance(cache, StaticCache):
            seen = int(seen)  # its length is a tensor, and its empty slots need a mask
        if isinstance(seen, Tensor):
            # In the middle of a compiled step: what is checked below was checked before it.
            return self._logits(x, self._rotation(x.device)[seen], attention_mask, cache)
        if (condition is None) == (seen == 0):
            raise LayoutError(
                "a sequence begins with its condition (a class or a caption), and has no other: "
                f"condition={'None' if condition is None else 'given'} at position {seen}"
            )
        after = seen + x.shape[1]
        if after > self.config.length:
            raise LayoutError(
                f"position {after - 1} is outside the image: {self.config.prefix} tokens of the "
                f"condition and {self.config.grid_size} x {self.config.grid_size} image tokens "
                f"make {self.config.length}"
            )
        mask = self._mask(x, attention_mask, cache, after)
        rotation = self._rotation(x.device)[seen:after]
        return self._logits(x, rotation, mask, cache, logits_to_keep)

    def _logits(
        self,
        x: Tensor,
        rotation: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """The layers and the head; the arguments are those of :meth:`forward`."""
        for layer in self.layers:
            x = layer(x, rotation, mask, cache)
        x = self.norm(x[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=self.output(x).float(), **as_argument(cache))

    def _mask(self, x: Tensor, by_position: Tensor | None, cache: Cache | None, after: int) -> Any:
        """What each new token may see, ``[B|1, 1, T, positions]``; None for all before it."""
        if by_position is None:
            return create_causal_mask(self.config, x, None, cache)
        if by_position.shape != (len(x), after):
            raise ShapeError(
                f"attention_mask is {list(by_position.shape)}; expected [{len(x)}, {after}]: all "
                f"tokens so far, those of the condition included"
            )
        shown = by_position.to(device=x.device, dtype=torch.bool)[:, None, None]
        key = torch.arange(after, device=x.device)
        query = key[-x.shape[1] :, None]
        return (shown & (key < query)) | (key == query)

    def _rotation(self, device: torch.device) -> Tensor:
        """The rotation of every position, float32 ``[length, head_dim // 2, 2]``."""
        if device not in self._rotations:
            config = self.config
            self._rotations[device] = rotation_table(
                config.grid_size,
                config.hidden_size // config.num_attention_heads,
                prefix=config.prefix,
                base=config.rope_base,
                device=device,
            )
        return self._rotations[device]
