"""A tiny configuration of any architecture, from the names of its fields.

Names mean the same in almost every configuration of transformers, so one table of sizes makes most
of them tiny; what an architecture wants besides stands in :data:`OVERRIDES`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

__all__ = ["HIDDEN", "LAYERS", "VOCAB", "WINDOW", "architectures", "build", "shrink"]

VOCAB, LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 32, 4, 2, 8
#: Larger than a quarter of a generation, and smaller than all of it: it hides tokens.
WINDOW = 12

#: Field name -> value. The first that matches the whole name is taken; a value that is smaller
#: already stays.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?vocab_size(_per_layer_input)?|encoder_hash_byte_group_vocab", VOCAB),
    (
        r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|word_embed_proj_dim|embedding_size",
        HIDDEN,
    ),
    (r"(input|output)_embedding_size|backbone_hidden_size|lru_width", HIDDEN),
    (r"hidden_size_per_layer_input|laurel_rank|router_hidden_size|num_centroids|ple_embed_dim", 8),
    (r"\w*intermediate_size(_mlp)?|\w*ffn_dim|\w*ffn_hidden_size|n_inner|dff|dim_ff", 48),
    (r"(num_)?(decoder_|encoder_|hidden_)?layers|n_layers?|num_blocks", LAYERS),
    (r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups|kv_n_heads", KV_HEADS),
    (r"(swa_)?num_attention_heads|n_heads?|num_heads|\w*attention_heads|index_n_heads", HEADS),
    (r"qk_head_dim", 16),
    (r"(\w+_)?head_dim|kv_channels|dim_head|d_head|attention_head_size|qk_rope_head_dim", HEAD_DIM),
    (r"(q|o|kv)_lora_rank|query_pre_attn_scalar|index_topk", 16),
    (r"n_routed_experts|(num|moe_num)_(local_)?experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|num_selected_experts|top_k_experts", 2),
    (r"n_group|num_expert_group|topk_group|n_shared_experts|num_shared_experts", 1),
    (r"moe_num_shared_experts|first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", 1),
    (r"moe_layer_start_index", 1),
    (r"linear_num_(key_|value_)?heads|mamba_n(um)?_heads", KV_HEADS),
    (r"rotary_dim|ssm_state_size|state_size|mamba_d_state|chunk_size|mamba_chunk_size", HEAD_DIM),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 256),
    (r"max_(source|target)_positions|seq_length|prompt_mid_dim|position_bias_max_distance", 256),
    (r"rel_extent|keep_window_size", 64),
    (r"mamba_n_?groups|n_groups|o_groups", 1),
)
_WINDOWS = re.compile(
    r"sliding_window(_size)?|attention_(chunk|window)_size|window_size|local_attention"
)
_PATTERNS = tuple((re.compile(name), size) for name, size in _SIZES)
#: Switches: a model that can be a decoder is one, and weights that many heads share stay so.
_SWITCHES: dict[str, Any] = {"is_decoder": True, "use_cache": True, "attention_dropout": 0.0}
#: Fields that are tiny where the configuration leaves them open, too.
_UNSET = {"head_dim": HEAD_DIM, "sliding_window": WINDOW}
#: What each architecture wants besides, by the class of its configuration.
_GEMMA4 = {
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "use_bidirectional_attention": "vision",
}
_GEMMA4_TOKENS = {"image_token_id": VOCAB - 3, "video_token_id": VOCAB - 2, "audio_token_id": 59}
_SHARED = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaConfig": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "BlenderbotConfig": {"encoder_layers": LAYERS},
    "CohereCompassTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": None,
        },
    },
    "DbrxAttentionConfig": {"kv_n_heads": KV_HEADS, "rope_theta": 10_000.0, "clip_qkv": 8.0},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "DoryConfig": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "Dots1Config": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "FalconH1Config": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "Gemma3Config": {"mm_tokens_per_image": 4},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 6,
        "intermediate_size": [48] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
        "altup_num_inputs": 2,
    },
    "Gemma4Config": _GEMMA4_TOKENS
    | {
        "vision_config": {
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
        }
    },
    "Gemma4TextConfig": _GEMMA4,
    "Gemma4UnifiedConfig": _GEMMA4_TOKENS
    | {"vision_config": {"patch_size": 2, "mm_embed_dim": HIDDEN, "output_proj_dims": HIDDEN}},
    "Gemma4UnifiedTextConfig": _GEMMA4,
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "GotOcr2VisionConfig": {"image_size": 128},
    "GraniteMoeHybridConfig": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "HrmTextConfig": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2Config": {"num_heads": 4, "head_dim": 16},
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    "NemotronConfig": {"num_key_value_heads": KV_HEADS},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "ReformerConfig": {"axial_pos_embds": False},
    "SiglipVisionConfig": {"image_size": 28, "patch_size": 14},
    "RwkvConfig": {"attention_hidden_size": 32},
    "XmodConfig": {"languages": ["en_XX"], "default_language": "en_XX"},
    "ZambaConfig": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "xLSTMConfig": {"chunk_size": 64, "hidden_size": 128, "embedding_dim": 128},
}


def shrink(kind: type[PreTrainedConfig], window: int = WINDOW) -> PreTrainedConfig:
    """A tiny configuration of a class: four layers, width 32, two KV heads for four query heads.

    Args:
        kind: the class of the configuration.
        window: tokens that a sliding window or a chunk of attention spans, where there is one.

    Raises:
        ValueError: the configuration can't have these sizes.
    """
    return _tiny(kind(), window)


def _tiny(config: PreTrainedConfig, window: int) -> PreTrainedConfig:
    return type(config)(**_changes(config, window))


def _changes(config: PreTrainedConfig, window: int) -> dict[str, Any]:
    """The arguments that make a configuration like this one tiny."""
    kind = type(config)
    if getattr(config, "is_heterogeneous", False):
        config.allow_global_per_layer_attribute_access = True
    own = OVERRIDES.get(kind.__name__, {})
    layers = _layers(config)
    changes: dict[str, Any] = {}
    for name in _fields(kind):
        if name in own:
            continue
        value = getattr(config, name, None)
        if isinstance(value, PreTrainedConfig):
            changes[name] = _tiny(value, window)
        elif name in _SWITCHES:
            changes[name] = _SWITCHES[name]
        elif re.fullmatch(r"\w*_token_(id|index)|\w*_index", name):
            changes[name] = _token(name)
        elif name == "num_key_value_heads" and hasattr(config, "kv_lora_rank"):
            changes[name] = HEADS  # latents are unfolded to as many
        elif isinstance(value, int) and not isinstance(value, bool):
            changes[name] = _size(name, value, window)
        elif value is None and name in _UNSET:
            changes[name] = window if name == "sliding_window" else _UNSET[name]
        elif isinstance(value, list | tuple) and layers and len(value) == layers:
            changes[name] = _per_layer(value)
    return changes | own


def _fields(kind: type[PreTrainedConfig]) -> list[str]:
    """The arguments of a configuration's constructor."""
    passed_over = {"transformers_version", "architectures", "dtype"}
    names = (field.name for field in dataclasses.fields(kind) if field.init)
    return [name for name in names if name not in passed_over]


def _layers(config: PreTrainedConfig) -> int | None:
    count = getattr(config, "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def _token(name: str) -> int:
    """A special token, none of which a prompt has: padding is 0, the beginning and the end 1."""
    if name in ("pad_token_id", "pad_index"):
        return 0
    return 1 if name in ("bos_token_id", "eos_token_id") else VOCAB - 1


def _size(name: str, value: int, window: int) -> int:
    if _WINDOWS.fullmatch(name):
        return window
    for pattern, size in _PATTERNS:
        if pattern.fullmatch(name):
            return min(value, size) if value > 0 else value
    return value


def _per_layer(values: Sequence[Any]) -> list[Any]:
    """One value for each of the few layers, with every kind that occurs among them."""
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    count = max(LAYERS, len(kinds))
    return (kinds * count)[:count]


def architectures() -> dict[str, tuple[str, ...]]:
    """Every architecture by class name, with the model types that use it."""
    found: dict[str, list[str]] = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        name = names if isinstance(names, str) else names[0]
        found.setdefault(name, []).append(model_type)
    return {name: tuple(found[name]) for name in sorted(found, key=str.lower)}


def build(name: str, window: int = WINDOW, seed: int = 0) -> PreTrainedModel:
    """The real class of this name, tiny, in float32; the same weights each time.

    Weights as transformers draws them attend almost uniformly, so that a wrong cache would hardly
    show: these tell tokens apart.

    Args:
        name: the class.
        window: tokens that a sliding window or a chunk of attention spans, where there is one.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    config: Any = shrink(kind.config_class, window)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        config._attn_implementation = "eager"  # on sdpa, older transformers drop the cap
    model: PreTrainedModel = kind(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
                fan = module.weight.shape[0 if isinstance(module, Conv1D) else -1]
                spread = 1.0 if isinstance(module, nn.Embedding) else fan**-0.5
                if _is_query_or_key(name):
                    spread *= 2
                module.weight.normal_(0, spread, generator=generator)
    model.generation_config = GenerationConfig(
        pad_token_id=0, decoder_start_token_id=1, num_return_sequences=1
    )
    return model


def _is_query_or_key(name: str) -> bool:
    last = name.rpartition(".")[2]
    return bool(
        re.fullmatch(r"[qk]_proj|query|key|query_key_value|c_attn|Wqkv|wqkv|qkv_proj", last)
    )
