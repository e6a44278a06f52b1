"""Draw an image with Emu3, with a part of its cache, guidance included.

Checkpoint: BAAI/Emu3-Gen-hf (8B, 32 GB in float32; give it a GPU), from the Hugging Face hub;
transformers downloads it. The processor needs pillow and torchvision::

    pip install "kvpolicy[transformers]" pillow torchvision
    python examples/emu3.py "A portrait of a young girl" --budget 1/6

``--tiny`` runs the same code on random weights of a tiny size, in seconds and without a download;
that is also all that this project's tests have run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, Emu3Config, Emu3ForConditionalGeneration

from kvpolicy_adapters import attach
from kvpolicy_adapters.images.emu3 import GridRule
from kvpolicy_adapters.images.guidance import Guidance

NEGATIVE = "lowres, bad anatomy, bad hands, cropped, worst quality, low quality, blurry"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw an image with Emu3 under a policy.")
    parser.add_argument("prompt", nargs="?", default="A portrait of a young girl")
    parser.add_argument("--checkpoint", default="BAAI/Emu3-Gen-hf")
    parser.add_argument("--policy", default="linear")
    parser.add_argument("--budget", default="1/6", help="tokens (96), a share (1/6), '4 lines'")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("emu3.png"))
    parser.add_argument("--tiny", action="store_true", help="random weights, tiny size")
    args = parser.parse_args()

    processor = None
    if args.tiny:
        model, prompt, negative = tiny()
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        processor = AutoProcessor.from_pretrained(args.checkpoint)
        model = Emu3ForConditionalGeneration.from_pretrained(
            args.checkpoint, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        ).to(device)
        options = {"return_for_image_generation": True, "return_tensors": "pt"}
        prompt = processor(text=[args.prompt], **options).input_ids.to(device)
        negative = processor(text=[NEGATIVE], **options).input_ids.to(device)

    # Two caches on one model: transformers' own guidance would keep the second one whole.
    settings = {"policy": args.policy, "budget": args.budget}
    torch.manual_seed(args.seed)
    with attach(model, **settings) as cache, attach(model, **settings) as second:
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **cache.as_argument,
            logits_processor=[Guidance(args.guidance, model, second, negative)],
            prefix_allowed_tokens_fn=GridRule(model),
            guidance_scale=None,
            max_new_tokens=50_000,
            do_sample=True,
            top_k=2048,
        )
        layout = cache.policy_cache.layout
        print(f"layout: {layout!r}")
    for half, name in ((cache, "conditional"), (second, "unconditional")):
        stats = half.stats()
        held = f"held at most {max(stats.peak_tokens)} of {stats.seen} tokens"
        print(f"{name}: {held}; {stats.bytes:,} bytes")

    pixels = model.decode_image_tokens(
        image_tokens=out[:, prompt.shape[1] :], height=layout.rows, width=layout.cols
    )
    print(f"pixels: {tuple(pixels.shape)}")
    if processor is not None:
        images = processor.postprocess(list(pixels.float()), return_tensors="PIL.Image.Image")
        images["pixel_values"][0].save(args.out)
        print(f"saved {args.out}")


def tiny() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """An Emu3 of 2 layers with random weights, and prompts for an image of 20 x 24 tokens."""
    torch.manual_seed(0)
    names = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<image>": 3, "*": 14, "fox": 15}
    names |= {str(digit): 4 + digit for digit in range(10)}
    names |= {"<|image start|>": 16, "<|image token|>": 17, "<|image end|>": 18}
    names |= {"<|extra_200|>": 19, "<|extra_201|>": 20}
    names |= {f"<|visual token {n:06d}|>": 24 + n for n in range(24)}
    config = Emu3Config(
        text_config={
            "vocab_size": 48,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
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
    model = Emu3ForConditionalGeneration(config).eval()
    size = [16, 4 + 2, 4 + 0, 14, 4 + 2, 4 + 4, 17]
    return model, torch.tensor([[1, 15, *size]]), torch.tensor([[1, *size]])


if __name__ == "__main__":
    main()
