"""Draw an image with Anole, with a part of its cache.

Checkpoint: leloy/Anole-7b-v0.1-hf (GAIR/Anole-7b-v0.1 in transformers' format), from the Hugging
Face hub; transformers downloads it (28 GB in float32; give it a GPU)::

    pip install "kvpolicy[transformers]"
    python examples/anole.py "A red fox in the snow" --budget 1/6

The tokens are saved as a ``.pt`` file: Chameleon's image decoder is no part of transformers; the
authors' repository (github.com/GAIR-NLP/anole) has it.

``--tiny`` runs the same code on random weights of a tiny size, in seconds and without a download;
that is also all that this project's tests have run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, ChameleonConfig, ChameleonForConditionalGeneration

from kvpolicy_adapters import attach
from kvpolicy_adapters.images.chameleon import ImageChameleon, ImageGrammar


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw an image with Anole under a policy.")
    parser.add_argument("prompt", nargs="?", default="A red fox in the snow")
    parser.add_argument("--checkpoint", default="leloy/Anole-7b-v0.1-hf")
    parser.add_argument("--policy", default="linear")
    parser.add_argument("--budget", default="1/6", help="tokens (96), a share (1/6), '4 lines'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("anole.pt"))
    parser.add_argument("--tiny", action="store_true", help="random weights, tiny size")
    args = parser.parse_args()

    if args.tiny:
        stock, ids = tiny()
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        stock = ChameleonForConditionalGeneration.from_pretrained(
            args.checkpoint, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        ).to(device)
        ids = AutoTokenizer.from_pretrained(args.checkpoint)(args.prompt).input_ids
    model = ImageChameleon.sharing(stock)
    names = model.config.vocabulary_map
    # Without image start, the model would say something first and draw when it likes.
    prompt = torch.tensor([[*ids, names["<racm3:break>"]]], device=model.device)

    torch.manual_seed(args.seed)
    with attach(model, policy=args.policy, budget=args.budget) as cache:
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **cache.as_argument,
            logits_processor=[ImageGrammar(model, sizes=False)],
            max_new_tokens=4096,
            do_sample=True,
            # One image: its end is the end.
            eos_token_id=names["<eoss>"],
        )
        print(f"layout: {cache.policy_cache.layout!r}")
    stats = cache.stats()
    print(f"held at most {max(stats.peak_tokens)} of {stats.seen} tokens; {stats.bytes:,} bytes")
    if not args.tiny:
        torch.save(tokens[0, prompt.shape[1] : -1].cpu(), args.out)
        print(f"saved {args.out}")


def tiny() -> tuple[Any, list[int]]:
    """A Chameleon of 2 layers and 24 x 24 image tokens, with random weights, and a prompt."""
    torch.manual_seed(0)
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<image>": 3, "<eoss>": 20, "<racm3:break>": 21}
    names |= {"IMGIMG" + chr(ord("A") + n) + "Z": 4 + n for n in range(10)}
    config = ChameleonConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=1,
        vocabulary_map=names,
        vq_config={
            "resolution": 48,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
    )
    return ChameleonForConditionalGeneration(config).eval(), [0, 36, 37, 38]


if __name__ == "__main__":
    main()
