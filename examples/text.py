"""Continue a text with any causal language model of transformers, with a part of its cache.

Checkpoint: Qwen/Qwen3-0.6B by default, or any other of the architectures in docs/models.md, from
the Hugging Face hub; transformers downloads it::

    pip install "kvpolicy[transformers]"
    python examples/text.py --file long.txt --policy snapkv --budget 512

``--tiny`` runs the same code on random weights of a tiny size, in seconds and without a download;
that is also all that this project's tests have run. Several processes share a model where the
script runs under torchrun: ``torchrun --nproc-per-node 2 examples/text.py``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

from kvpolicy import TextLayout
from kvpolicy_adapters import attach


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a text under a policy.")
    parser.add_argument("--file", type=Path, help="the text to continue; a few words by default")
    parser.add_argument("--checkpoint", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--policy", default="h2o")
    parser.add_argument("--budget", type=int, default=32, help="tokens a head may hold")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens that are pinned")
    parser.add_argument("--new", type=int, default=100, help="tokens to generate")
    parser.add_argument("--tiny", action="store_true", help="random weights, tiny size")
    args = parser.parse_args()

    if args.tiny:
        model, prompt = tiny()
    else:
        model = load(args.checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
        text = args.file.read_text(encoding="utf-8") if args.file else "Once upon a time, a fox"
        prompt = tokenizer(text, return_tensors="pt").input_ids.to(model.device)

    layout = TextLayout(sinks=args.sinks)
    with attach(model, policy=args.policy, budget=args.budget, layout=layout) as cache:
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **cache.as_argument,
            max_new_tokens=args.new,
        )
        stats = cache.stats()
    if not args.tiny:
        print(tokenizer.decode(tokens[0]))
    print(f"held at most {max(stats.peak_tokens)} of {stats.seen} tokens; {stats.bytes:,} bytes")
    if stats.left_alone:
        print(f"layers that need no policy: {', '.join(map(str, stats.left_alone))}")


def load(checkpoint: str) -> Any:
    """The model: on a GPU where there is one, shared by all processes of torchrun."""
    if "WORLD_SIZE" in os.environ:
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(tp_plan="auto")
        return AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(checkpoint).to(device)


def tiny() -> tuple[Any, torch.Tensor]:
    """A Gemma 2 of 4 layers, two of them with a sliding window, and a prompt of 60 tokens."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).eval(), torch.randint(2, 99, (1, 60))


if __name__ == "__main__":
    main()
