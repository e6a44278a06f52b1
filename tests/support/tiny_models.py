"""Tiny models of transformers whose random weights attend to something, and policies to match."""

from __future__ import annotations

import torch

import kvpolicy

VOCAB = 61
#: Parameters that let a policy work with a budget of a dozen tokens. Pooling makes neighbours tie
#: but for rounding; without it (a kernel of 1), calls of any size decide alike.
SMALL = {"anchors": 3, "window": 2, "interval": 3, "kernel": 1, "beta": 2.0}


def policy(name: str) -> kvpolicy.EvictionPolicy:
    """A policy with such of these parameters as it has."""
    fields = type(kvpolicy.create(name)).model_fields
    return kvpolicy.create(name, **{field: SMALL[field] for field in SMALL if field in fields})


def llama(kv_heads: int = 2, seed: int = 1, **changes):
    """A Llama of three layers and four query heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return _sharpened(LlamaForCausalLM(LlamaConfig(**_size(kv_heads), **changes)))


def mistral(kv_heads: int = 2, seed: int = 1):
    """A Mistral without a sliding window."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    return _sharpened(MistralForCausalLM(MistralConfig(**_size(kv_heads), sliding_window=None)))


def gpt2(seed: int = 1):
    """A GPT-2: learned positions, one KV head a query head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=256, **_NO_SPECIAL
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight *= 20  # tied to the output: logits that tell tokens apart
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, :64] *= 15  # queries and keys
            block.attn.c_attn.weight[:, 64:] *= 20
    return model


_NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


def _size(kv_heads: int) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        **_NO_SPECIAL,
    }


def _sharpened(model):
    # Random weights of the usual size attend almost uniformly; sharpen them so that a wrong cache
    # changes tokens.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
    return model.eval()
