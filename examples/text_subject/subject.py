"""A subject of one's own: a tiny language model on a book, measured in bits per byte.

Run an ablation on it from this folder's parent (or anywhere with that on the PYTHONPATH)::

    kvpolicy ablate --subject text_subject.subject:Alice \\
        --policies linear,h2o,streaming_llm,snapkv --budgets 1/2,1/4,1/8 --out runs/alice

Everything that an ablation asks of a subject is in the class below. The model has read the first
three quarters of the book (`train.py` made it); it is judged on pieces of the last quarter.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import kvpolicy
import kvpolicy_adapters
from kvpolicy.lab.run.subject import Measurement, Metric, Setting

HERE = Path(__file__).parent
#: Bytes of a piece: what the model has been trained on.
LENGTH = 256
CONFIG = LlamaConfig(
    vocab_size=128,  # the book is in ASCII
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def book() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on, and bytes to judge with: int64 vectors."""
    text = torch.tensor(list((HERE / "alice.txt").read_bytes()))
    cut = len(text) * 3 // 4
    return text[:cut], text[cut:]


class Alice:
    """A byte-level Llama of 0.1 M parameters, and *Alice's Adventures in Wonderland*.

    Args:
        pieces: pieces of the held-out quarter that a seed scores; seeds see different ones, as
            long as there are some.
    """

    name = "alice"

    def __init__(self, pieces: int = 32) -> None:
        self.layout = kvpolicy.TextLayout(sinks=1, length=LENGTH, line_length=16)
        self.num_layers = CONFIG.num_hidden_layers
        self.metrics = (
            Metric(
                name="bits_per_byte",
                label="bits per byte",
                better="lower",
                array="bits",  # in `measure`'s arrays: one number an item; this is their mean
                items="piece",  # and which item each number is of
                about="of held-out text, teacher-forced under the cache",
            ),
        )
        held_out = book()[1]
        count = len(held_out) // LENGTH
        self.pieces = held_out[: count * LENGTH].view(count, LENGTH)
        if not 1 <= pieces <= count:
            raise kvpolicy.ParameterError(f"alice: pieces={pieces} must be from 1 to {count}")
        self.count = pieces
        self.model = LlamaForCausalLM(CONFIG)
        self.model.load_state_dict(load_file(HERE / "weights.safetensors"), strict=False)
        self.model.float().eval().requires_grad_(False)

    def measure(self, setting: Setting, seed: int, wanted: Collection[str]) -> Measurement:
        """Bits per byte of this seed's pieces."""
        blocks = len(self.pieces) // self.count
        first = seed % blocks * self.count
        tokens = self.pieces[first : first + self.count]
        with (
            torch.inference_mode(),
            kvpolicy_adapters.attach(
                self.model, policy=setting.policy, budget=setting.budget, layout=self.layout
            ) as cache,
        ):
            # A prompt of text attends in full before it is compressed. What comes after the
            # first byte is no prompt, and sees what is in the cache.
            logits = [
                self.model(part, **cache.as_argument).logits
                for part in (tokens[:, :1], tokens[:, 1:-1])
            ]
        nats = functional.cross_entropy(
            torch.cat(logits, dim=1).transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        return Measurement(
            arrays={
                "bits": nats.double().mean(1).numpy() / math.log(2),
                "piece": np.arange(first, first + len(tokens)),
            },
            stats=cache.stats(),
            batch=len(tokens),
        )
