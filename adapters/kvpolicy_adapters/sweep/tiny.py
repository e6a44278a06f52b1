"""A tiny random model of every causal-LM architecture that transformers has."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["VOCAB", "WINDOW", "architectures", "build"]

VOCAB, WINDOW = 64, 12
_LAYERS, _HIDDEN, _HEADS, _KV_HEADS, _HEAD_DIM = 2, 32, 4, 2, 8

#: Sizes by the names that configurations use; only fields that a configuration has are set.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _LAYERS),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), _LAYERS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size"), _HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv"), _KV_HEADS),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "shared_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "n_shared_experts"), 1),
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "rotary_dim", "linear_key_head_dim"), _HEAD_DIM
    ),
    **dict.fromkeys(("linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 256),
    **dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "n_words"), VOCAB
    ),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("mlp_dim", "out_hidden_size", "projector_hidden_size"), 48),
    "initializer_range": 0.1,
    "hidden_size_per_layer_input": _HEAD_DIM,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "query_pre_attn_scalar": _HEAD_DIM,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "is_decoder": True,
}

_HYBRID = {"num_hidden_layers": 4}
_BORROWING = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
#: What only one kind of configuration needs.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _HYBRID | {"layer_group_size": 2},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "dots3_note": {"num_key_value_heads": _HEADS},
    "gemma3": {"vision_config": {"image_size": 28, "patch_size": 14}},
    **dict.fromkeys(("gemma3n_text", "gemma4_text"), _BORROWING),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": _HYBRID,
    "mamba2": {"num_heads": 8},
    "moshi": {"audio_vocab_size": VOCAB},
    "qwen3_5": {"text_config": _HYBRID},
    "qwen3_5_moe": {"text_config": _HYBRID},
    "qwen3_next": _HYBRID,
    "qwen4_exp": {"text_config": _HYBRID},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    "xlm": {"emb_dim": _HIDDEN, "n_words": VOCAB},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layer_types": ["linear_attention", "hybrid"]},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def architectures() -> dict[str, tuple[str, ...]]:
    """Every architecture by class name, with the model types that use it."""
    found: dict[str, list[str]] = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        name = names if isinstance(names, str) else names[0]
        found.setdefault(name, []).append(model_type)
    return {name: tuple(found[name]) for name in sorted(found, key=str.lower)}


def build(model_type: str) -> PreTrainedModel:
    """The real class of a model type, tiny, with random weights; the same ones each time."""
    torch.manual_seed(0)
    config = _shrink(CONFIG_MAPPING[model_type], _OVERRIDES.get(model_type, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def _shrink(kind: type, changes: dict[str, Any]) -> Any:
    """A configuration of this class with the sizes above."""
    fields = {field.name for field in dataclasses.fields(kind)}
    sizes = {name: size for name, size in _SIZES.items() if name in fields}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        sizes["num_key_value_heads"] = _HEADS  # a latent is expanded into keys of every head
    parts = [name for name in getattr(kind, "sub_configs", {}) if name in fields]
    if parts:
        whole = kind()
        for name in parts:
            part = getattr(whole, name)
            if part is not None:
                sizes[name] = _shrink(type(part), changes.get(name, {})).to_dict()
    flat = {name: value for name, value in changes.items() if name not in parts}
    return kind(**sizes | flat)
