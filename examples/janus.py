"""Draw an image with Janus-Pro, with a part of its cache.

Checkpoint: deepseek-community/Janus-Pro-1B (4 GB) or -7B, from the Hugging Face hub; transformers
downloads it. The processor needs pillow and torchvision::

    pip install "kvpolicy[transformers]" pillow torchvision
    python examples/janus.py "A red fox in the snow" --budget 1/6

``--tiny`` runs the same code on random weights of a tiny size, in a second and without a download;
that is also all that this project's tests have run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, JanusConfig, JanusForConditionalGeneration

from kvpolicy_adapters import attach


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw an image with Janus-Pro under a policy.")
    parser.add_argument("prompt", nargs="?", default="A red fox in the snow")
    parser.add_argument("--checkpoint", default="deepseek-community/Janus-Pro-1B")
    parser.add_argument("--policy", default="linear")
    parser.add_argument("--budget", default="1/6", help="tokens (96), a share (1/6), '4 lines'")
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("janus.png"))
    parser.add_argument("--tiny", action="store_true", help="random weights, tiny size")
    args = parser.parse_args()

    processor = None
    if args.tiny:
        model, inputs = tiny()
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        processor = AutoProcessor.from_pretrained(args.checkpoint)
        model = JanusForConditionalGeneration.from_pretrained(
            args.checkpoint, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        ).to(device)
        messages = [{"role": "user", "content": [{"type": "text", "text": args.prompt}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=prompt, generation_mode="image", return_tensors="pt").to(device)

    torch.manual_seed(args.seed)
    with attach(model, policy=args.policy, budget=args.budget) as cache:
        tokens = model.generate(
            **inputs,
            generation_mode="image",
            guidance_scale=args.guidance,
            do_sample=True,
            **cache.as_argument,
        )
        print(f"layout: {cache.policy_cache.layout!r}")
    stats = cache.stats()
    print(f"held at most {max(stats.peak_tokens)} of {stats.seen} tokens; {stats.bytes:,} bytes")

    pixels = model.decode_image_tokens(tokens)
    print(f"pixels: {tuple(pixels.shape)}")
    if processor is not None:
        images = processor.postprocess(list(pixels.float()), return_tensors="PIL.Image.Image")
        images["pixel_values"][0].save(args.out)
        print(f"saved {args.out}")


def tiny() -> tuple[Any, dict[str, torch.Tensor]]:
    """A Janus of 24 x 24 image tokens and 2 layers, with random weights, and a prompt."""
    torch.manual_seed(0)
    config = JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 96,
            "patch_size": 4,
            "mlp_ratio": 1.0,
            "projection_dim": 32,
            "depth": 1,
        },
        vq_config={
            "num_embeddings": 64,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
            "num_hidden_layers": 1,
        },
    )
    model = JanusForConditionalGeneration(config).eval()
    model.generation_config.generation_kwargs = {"boi_token_id": 3}
    model.generation_config.bos_token_id = 1
    model.generation_config.pad_token_id = 0
    prompt = torch.tensor([[1, 10, 11, 12, 3]])
    return model, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}


if __name__ == "__main__":
    main()
