"""clipart-ar's folder as ``examples/training/pack_clipart_ar.py`` writes it, of random weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy_adapters.images.vqgan import VQGAN, VQGANConfig
from kvpolicy_adapters.images.vqgan_checkpoint import save_vqgan
from kvpolicy_adapters.zoo.clipart import CLIPART_FILES, ClipartCard
from kvpolicy_adapters.zoo.clipart_tokens import ClipartTokens

WORDS = ("signs", "flags", "fruit", "people", "apple", "france", "tree", "red", "2", "smilies")
CODES = 24


def write_clipart(path: Path) -> None:
    """Two layers, one KV head, 24 codes; five drawings to test on, three to calibrate on."""
    torch.manual_seed(0)
    tokens = ClipartTokens(WORDS, CODES)
    config = LlamaConfig(
        vocab_size=tokens.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    shape = VQGANConfig(32, (1, 1, 1), 1, 32, CODES, 2, (), groups=8)
    save_vqgan(VQGAN(shape), path / "vqgan.safetensors")
    splits = {"test": 5, "calibration": 3}
    said = [["flags", "france"], [], ["fruit"], ["people", "2"], ["tree", "red"]]
    about = {"vocabulary": WORDS, **{name: said[:count] for name, count in splits.items()}}
    (path / "drawings.json").write_text(json.dumps(about))
    drawn = {
        name: torch.randint(0, CODES, (count, 24, 24), dtype=torch.int16)
        for name, count in splits.items()
    }
    (path / "drawings.safetensors").write_bytes(save(drawn))
    facts = dict.fromkeys(ClipartCard.model_fields, 1) | {"bits_of_counting": {}}
    facts |= {n: "" for n, f in ClipartCard.model_fields.items() if f.annotation is str}
    facts["files"] = {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in CLIPART_FILES
    }
    (path / "card.json").write_text(ClipartCard(**facts).model_dump_json())
