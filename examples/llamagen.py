"""Draw images of ImageNet classes with LlamaGen, with a part of its cache.

Checkpoint: one of FoundationVision/LlamaGen on the Hugging Face hub, e.g. c2i_L_384.pt (343 million
parameters): https://huggingface.co/FoundationVision/LlamaGen/resolve/main/c2i_L_384.pt . 24 tokens
a side go with 384 pixels, 16 with 256::

    pip install "kvpolicy[transformers]"
    python examples/llamagen.py c2i_L_384.pt --side 24 --classes 207 360 387 974 --budget 1/6

It writes image tokens, ``[images, side, side]``. Pixels are made of them by the tokenizer
(vq_ds16_c2i.pt, same place), which is not part of this package: give ``tokens.flatten(1)`` to
``decode_code`` of the authors' VQ model. With their repository at hand you can also keep its own
sampling script as it is, and put ``with kvpolicy_adapters.attach(gpt_model, ...):`` around its
``generate``.

``--tiny`` runs the same code on random weights of a tiny size, in seconds and without a download;
that is also all that this project's tests have run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvpolicy_adapters import attach
from kvpolicy_adapters.images.llamagen import LlamaGen, LlamaGenConfig, read_official


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw images with LlamaGen under a policy.")
    parser.add_argument("checkpoint", nargs="?", default="c2i_L_384.pt")
    parser.add_argument("--side", type=int, default=24, help="image tokens a side")
    parser.add_argument("--classes", type=int, nargs="+", default=[207, 360, 387, 974])
    parser.add_argument("--policy", default="linear")
    parser.add_argument("--budget", default="1/6", help="tokens (96), a share (1/6), '4 lines'")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--top-k", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("llamagen.safetensors"))
    parser.add_argument("--tiny", action="store_true", help="random weights, tiny size")
    args = parser.parse_args()

    device = "cpu"
    if args.tiny:
        model = tiny()
    else:
        model = read_official(args.checkpoint, grid_size=args.side)
        if torch.cuda.is_available():
            device = "cuda"
            model = model.to(device, torch.bfloat16)

    with attach(model, policy=args.policy, budget=args.budget) as cache:
        tokens = model.generate(
            torch.tensor(args.classes, device=device),
            **cache.as_argument,
            cfg_scale=args.guidance,
            top_k=args.top_k,
            seed=args.seed,
        )
        print(f"layout: {cache.policy_cache.layout!r}")
    stats = cache.stats()
    print(f"held at most {max(stats.peak_tokens)} of {stats.seen} tokens; {stats.bytes:,} bytes")
    print(f"tokens: {tuple(tokens.shape)}")
    if not args.tiny:
        save_file({"tokens": tokens.cpu()}, args.out)
        print(f"saved {args.out}")


def tiny() -> LlamaGen:
    """A LlamaGen of 24 x 24 image tokens and 2 layers, with random weights."""
    torch.manual_seed(0)
    config = LlamaGenConfig(
        grid_size=24, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaGen(config).eval()


if __name__ == "__main__":
    main()
