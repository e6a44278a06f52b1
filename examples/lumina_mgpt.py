"""Draw an image with Lumina-mGPT, with a part of its cache, guidance included.

Checkpoint: Alpha-VLLM/Lumina-mGPT-7B-768 (or -1024), from the Hugging Face hub; transformers
downloads it (28 GB in float32; give it a GPU). The tokenizer is the checkpoint's own::

    pip install "kvpolicy[transformers]"
    python examples/lumina_mgpt.py "A red fox in the snow" --pixels 768 --budget 1/6

The tokens are saved as a ``.pt`` file: Chameleon's image decoder is no part of transformers. The
authors' repository (github.com/Alpha-VLLM/Lumina-mGPT) says where to get ``vqgan.ckpt``, and its
``decode_image`` takes these tokens.

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
from kvpolicy_adapters.images.chameleon import ImageChameleon, ImageGrammar, ImageGuidance

IMAGE_START, SIZE_ZERO, END_OF_TURN = 8197, 8804, 8710


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw an image with Lumina-mGPT under a policy.")
    parser.add_argument("prompt", nargs="?", default="A red fox in the snow")
    parser.add_argument("--checkpoint", default="Alpha-VLLM/Lumina-mGPT-7B-768")
    parser.add_argument("--pixels", type=int, default=768, help="side of the image")
    parser.add_argument("--policy", default="linear")
    parser.add_argument("--budget", default="1/6", help="tokens (96), a share (1/6), '4 lines'")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("lumina_mgpt.pt"))
    parser.add_argument("--tiny", action="store_true", help="random weights, tiny size")
    args = parser.parse_args()

    if args.tiny:
        stock, prompt, stop = tiny()
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        stock = ChameleonForConditionalGeneration.from_pretrained(
            args.checkpoint, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        ).to(device)
        tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
        wish = (
            f"Generate an image of {args.pixels}x{args.pixels} according to the following prompt:\n"
            f"{args.prompt}"
        )
        # The size could be left to the model; saying it makes sure of it. A patch is 32 pixels.
        size = SIZE_ZERO + args.pixels // 32
        words = tokenizer(wish, add_special_tokens=False).input_ids
        ids = [tokenizer.bos_token_id, *words, END_OF_TURN, IMAGE_START, size, size]
        prompt, stop = torch.tensor([ids], device=device), END_OF_TURN
    model = ImageChameleon.sharing(stock)

    settings = {"policy": args.policy, "budget": args.budget}
    torch.manual_seed(args.seed)
    with attach(model, **settings) as cache, attach(model, **settings) as second:
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **cache.as_argument,
            logits_processor=[ImageGuidance(args.guidance, model, second), ImageGrammar(model)],
            max_new_tokens=8192,
            do_sample=True,
            top_k=2000,
            # One image: its end is the end.
            eos_token_id=[stop, model.config.vocabulary_map["<eoss>"]],
        )
        print(f"layout: {cache.policy_cache.layout!r}")
    for half, name in ((cache, "conditional"), (second, "unconditional")):
        stats = half.stats()
        held = f"held at most {max(stats.peak_tokens)} of {stats.seen} tokens"
        print(f"{name}: {held}; {stats.bytes:,} bytes")
    if not args.tiny:
        torch.save(tokens[0, prompt.shape[1] :].cpu(), args.out)
        print(f"saved {args.out}")


def tiny() -> tuple[Any, torch.Tensor, int]:
    """A Chameleon of 2 layers with random weights, and a prompt for 20 x 20 tokens."""
    torch.manual_seed(0)
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<image>": 3}
    names |= {"IMGIMG" + chr(ord("A") + n) + "Z": 4 + n for n in range(10)}
    names |= {"<eoss>": 20, "<racm3:break>": 21, "<reserved08706>": 22, "<reserved08799>": 23}
    names |= {f"<reserved{8800 + n:05d}>": 23 + n for n in range(1, 13)}
    config = ChameleonConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=1,
        eos_token_id=22,
        vocabulary_map=names,
        vq_config={"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    )
    model = ChameleonForConditionalGeneration(config).eval()
    return model, torch.tensor([[0, 36, 37, 38, 21, 23 + 10, 23 + 10]]), 22


if __name__ == "__main__":
    main()
