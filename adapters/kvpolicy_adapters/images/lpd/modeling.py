"""LPD as a model of transformers, with the parameter names of the released checkpoints.

For drawing, not for training: there is no dropout, and no class is dropped at random.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy import (
    CacheStateError,
    GroupStep,
    LayoutError,
    OrderedLayout,
    Parallel,
    ParameterError,
    Sampling,
    ShapeError,
)
from kvpolicy_adapters.images.guidance import CFGSchedule, guided_groups
from kvpolicy_adapters.images.lpd.configuration import LPDConfig
from kvpolicy_adapters.transformers.cache_argument import as_argument, either

__all__ = ["LPD"]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention, as transformers' attention interface calls it where asked for ``eager``."""
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).type_as(query)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class LPDAttention(nn.Module):
    """Self-attention through transformers' attention interface; keys are not rotated."""

    is_causal = False

    def __init__(self, config: LPDConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention(
            self, query, key, value, mask, dropout=0.0, scaling=self.head_dim**-0.5
        )
        return self.proj(output.flatten(2))


class LPDMlp(nn.Module):
    """``fc2(gelu(fc1 x))``."""

    def __init__(self, config: LPDConfig) -> None:
        super().__init__()
        hidden = config.intermediate_size
        assert hidden is not None
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class LPDBlock(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to it."""

    def __init__(self, config: LPDConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = LPDAttention(config, layer_idx)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = LPDMlp(config)

    def forward(self, x: Tensor, mask: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask, cache)
        return x + self.mlp(self.norm2(x))


class LPD(PreTrainedModel):
    """LPD (arXiv:2507.01957), of a class.

    Example::

        model, decoder = read_official("lpd_l_256.pth"), Parallel(passes=20)
        layout = decoder.ordered(model.config.grid)
        with attach(model, policy="near", budget="1/4", layout=layout) as cache:
            grids = model.generate(torch.tensor([207, 360]), cache=cache, cfg_scale=4.0)

    A sequence is the class (position 0) and ``n * n`` image tokens in the order of the cache's
    layout. A token is its embedding plus that of its place, and so is the query that asks for it,
    with one learned vector in the place of a token's.
    """

    config_class = LPDConfig
    config: LPDConfig
    base_model_prefix = ""
    main_input_name = "inputs_embeds"
    _no_split_modules = ["LPDBlock"]  # noqa: RUF012 (its type in transformers)
    _supports_sdpa = True
    # Its mask says that groups see themselves, and what can't take it would ignore it.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = True

    def __init__(self, config: LPDConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.token_emb = nn.Embedding(config.vocab_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid.length, width))
        # Not of the configuration: the authors' code has it fixed.
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList(
            LPDBlock(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LPD):
            for vector in (module.fake_latent, module.mask_token, module.pos_embed):
                nn.init.normal_(vector, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of image tokens."""
        return self.token_emb

    def get_output_embeddings(self) -> nn.Module:
        """The linear layer that makes logits."""
        return self.head

    @property
    def no_class(self) -> int:
        """The number that stands for no class, for guidance: behind the last one."""
        return self.config.num_classes

    def embed_class(self, classes: Tensor) -> Tensor:
        """Embeddings ``[B, 1, width]`` of classes ``[B, 1]``; ``no_class`` is one of them."""
        table = torch.cat([self.class_emb.weight, self.fake_latent])
        return self.z_proj_ln(table[classes] + self.pos_embed[:, 0])

    def embed_tokens(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Embeddings ``[B, T, width]`` of tokens ``[B, T]`` at raster indices ``[T]``."""
        return self.z_proj_ln(self.token_emb(tokens) + self.pos_embed[:, 1 + places])

    def embed_queries(self, places: Tensor) -> Tensor:
        """Embeddings ``[1, T, width]`` of the queries for the tokens at raster indices ``[T]``."""
        return self.z_proj_ln(self.mask_token + self.pos_embed[:, 1 + places])

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        cache: Cache | None = None,
        logits_to_keep: int = 0,
        past_key_values: Cache | None = None,
    ) -> CausalLMOutputWithPast:
        """The logits of what is asked for.

        Args:
            inputs_embeds: of tokens and queries behind what is cached, ``[B, T, width]``.
            attention_mask: what each of them sees, bool ``[B|1, 1, T, tokens so far and T]``.
            cache: a cache, e.g. that of ``attach``.
            logits_to_keep: number of newest inputs whose logits are wanted; 0 for all.
            past_key_values: the former name of ``cache``.

        Returns:
            ``logits``, float32 ``[B, T, vocab_size]``, and the cache.
        """
        cache = either(cache, past_key_values)
        x = inputs_embeds
        for block in self.blocks:
            x = block(x, attention_mask, cache)
        x = self.norm(x[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=self.head(x).float(), **as_argument(cache))

    def step(self, cache: Any) -> GroupStep:
        """The model as a decoder sees it, over an ``attach`` block's cache.

        The prompt is a class, ``[B, 1]``, or :attr:`no_class`.

        Raises:
            LayoutError: the cache's layout has no order, or is not of this model's grid.
        """
        layout = cache.layout
        if not isinstance(layout, OrderedLayout) or layout.grid != self.config.grid:
            raise LayoutError(
                f"LPD needs a cache with an OrderedLayout of {self.config.grid!r}, not {layout!r}; "
                f"attach(..., layout=Parallel(passes=...).ordered(model.config.grid))"
            )

        def step(tokens: Tensor, ask: int) -> Tensor:
            seen, new = cache.get_seq_length(), tokens.shape[1]
            arrivals = torch.arange(seen, seen + new + ask, device=tokens.device)
            known, asked = layout.place(arrivals).sub(1).split([new, ask])
            first = layout.prefix if seen == 0 else 0
            parts = [
                self.embed_class(tokens[:, :first]),
                self.embed_tokens(tokens[:, first:], known[first:]),
                self.embed_queries(asked).expand(len(tokens), -1, -1),
            ]
            visible = torch.ones(
                1, 1, new + ask, seen + new + ask, dtype=torch.bool, device=tokens.device
            )
            visible[..., :new, seen + new :] = False
            logits: Tensor = self(
                torch.cat(parts, dim=1),
                visible,
                cache=cache,
                logits_to_keep=ask,
            ).logits
            return logits

        return step

    @torch.no_grad()
    def generate(
        self,
        classes: Tensor,
        *,
        cache: Any,
        decoder: Parallel | None = None,
        cfg_scale: float = 1.0,
        cfg_schedule: CFGSchedule = "linear",
        sampling: Sampling | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Draw one image for each class.

        Args:
            classes: int64 ``[B]``.
            cache: of an ``attach`` block, empty; its layout says what comes when.
            decoder: whose layout that is; by default one of as many passes as it has groups.
            cfg_scale: guidance, which doubles the batch; 1 is none.
            cfg_schedule: see :func:`kvpolicy_adapters.images.guidance.guided_groups`.
            sampling: temperature, top-k and top-p; plain sampling by default.
            seed: makes the draw repeatable; None to go on from torch's own generator.

        Returns:
            Image tokens, int64 ``[B, n, n]``, row by row; the tokenizer's decoder makes pixels of
            them.

        Raises:
            ParameterError: an option is out of range, or a class is unknown.
            ShapeError: the classes are no integers ``[B]``.
            LayoutError: the cache's layout has no order, or is not of this model's grid.
            CacheStateError: the cache holds tokens already.
        """
        if classes.ndim != 1 or classes.dtype != torch.int64:
            raise ShapeError(f"classes are {classes.dtype} {list(classes.shape)}, not int64 [B]")
        wrong = classes[(classes < 0) | (classes > self.no_class)].tolist()
        if wrong:
            raise ParameterError(f"class {wrong[0]} is not one of 0 to {self.no_class - 1}")
        if held := cache.get_seq_length():
            raise CacheStateError(
                f"this cache holds {held} tokens already; reset() it, or take another"
            )
        step, layout, size = self.step(cache), cache.layout, self.config.grid_size
        if cfg_scale != 1:
            step = guided_groups(step, cache, self.no_class, cfg_scale, cfg_schedule)
        decoder = decoder or Parallel(passes=len(layout.groups))
        chance = None if seed is None else torch.Generator(classes.device).manual_seed(seed)
        drawn = decoder.decode(
            step, cache, classes[:, None], size * size, sampling=sampling, generator=chance
        )
        return layout.to_raster(drawn.tokens)[:, 1:].unflatten(1, (size, size))
