"""Draw images by speculative Jacobi decoding, and see which pass settled which token.

python examples/speculate.py --window 32 --out passes.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from kvpolicy.lab.show.pictures import pass_sheet
from kvpolicy_adapters import attach, decode, zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", default="0,2,9", help="of Fashion-MNIST, 0 to 9")
    parser.add_argument("--policy", default="linear")
    parser.add_argument("--budget", default="1/6")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--draft", default="above")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=784, help="fewer, to try it out")
    parser.add_argument("--out", type=Path, default=Path("passes.png"))
    options = parser.parse_args()

    torch.set_num_threads(1)
    fashion = zoo.load("fashion-ar")
    model, rows = fashion.model, []
    decoder = f"sjd:window={options.window}:draft={options.draft}"
    for wanted in map(int, options.classes.split(",")):
        prompt = torch.tensor([[16 + wanted]])  # the class token
        with (
            torch.inference_mode(),
            attach(
                model, policy=options.policy, budget=options.budget, layout=fashion.layout
            ) as cache,
        ):
            drawn = decode(
                model,
                prompt,
                cache,
                options.tokens,
                decoder=decoder,
                suppress_tokens=range(16, model.config.vocab_size),
                seed=options.seed,
            )
        print(f"class {wanted}: {options.tokens} tokens in {drawn.passes} passes")
        if options.tokens == 784:
            image = fashion.images(drawn.tokens[:, 1:])[0]
            rows.append((f"class {wanted}", image, drawn.settled[0].view(28, 28).numpy()))
    if rows:
        title = f"{options.policy} at {options.budget}, {decoder}: the pass that settled each token"
        pass_sheet(rows, title).savefig(options.out, dpi=160)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
