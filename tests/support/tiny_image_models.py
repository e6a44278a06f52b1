"""Image models of transformers with the real class, two layers and random weights."""

from __future__ import annotations

import torch

WORDS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def chameleon(*, sizes: bool):
    """Lumina-mGPT (with size tokens), or Anole of 12 x 12 codes; 64 codes."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    torch.manual_seed(0)
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<image>": 3, "<eoss>": 14, "<racm3:break>": 15}
    names |= {"<reserved08706>": 16, "<reserved08799>": 17}
    names |= {f"<reserved{8800 + n:05d}>": 17 + n for n in range(1, 13)} if sizes else {}
    letters = [f"{n // 10}{n % 10}".translate(_LETTERS) for n in range(64)]
    names |= {f"IMGIMG{code}Z": 32 + n for n, code in enumerate(letters)}
    config = ChameleonConfig(
        vocab_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=1,
        eos_token_id=2,
        vocabulary_map=names,
        vq_config={
            "resolution": 24,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
        **WORDS,
    )
    return _loud(ChameleonForConditionalGeneration(config), "lm_head.weight")


def janus():
    """A Janus of 8 x 8 image tokens."""
    from transformers import JanusConfig, JanusForConditionalGeneration

    torch.manual_seed(0)
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 64,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            **WORDS,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "num_image_tokens": 64,
            "patch_size": 4,
            "mlp_ratio": 1.0,
            "projection_dim": 32,
            "depth": 1,
        },
        vq_config={
            "num_embeddings": 64,
            "num_patches": 8,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
            "num_hidden_layers": 1,
        },
    )
    model = JanusForConditionalGeneration(config)
    model.generation_config.generation_kwargs = {"boi_token_id": 3}
    model.generation_config.bos_token_id = 1
    model.generation_config.pad_token_id = 0
    return _loud(model, "model.generation_head.vision_head.weight")


#: Where an image of 8 x 10 tokens begins in a prompt of :func:`emu3`.
EMU3_HEADER = [16, 12, 14, 5, 4, 17]


def emu3():
    """An Emu3 of 24 codes."""
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    torch.manual_seed(0)
    names = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<image>": 3, "*": 14, "fox": 15}
    names |= {str(digit): 4 + digit for digit in range(10)}
    names |= {"<|image start|>": 16, "<|image token|>": 17, "<|image end|>": 18}
    names |= {"<|extra_200|>": 19, "<|extra_201|>": 20}
    names |= {f"<|visual token {n:06d}|>": 24 + n for n in range(24)}
    config = Emu3Config(
        text_config={
            "vocab_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **WORDS,
        },
        vq_config={
            "codebook_size": 24,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "hidden_size": 32,
            "temporal_downsample_factor": 1,
        },
        vocabulary_map=names,
    )
    return _loud(Emu3ForConditionalGeneration(config), "lm_head.weight")


_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")


def _loud(model, head):
    """Logits that tell tokens apart, so that different prompts and caches draw different tokens."""
    torch.nn.init.normal_(model.get_parameter(head))
    return model.eval()
