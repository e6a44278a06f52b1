"""A decode step in one CUDA graph, decisions outside of it, against the same step without."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.bench.gpu.part import Finding, Setting, Tell
from kvpolicy_adapters.bench.shapes import LlamaBench
from kvpolicy_adapters.transformers.compiled import compile_decode

__all__ = ["compare_graphs"]

#: Lines that are decoded: a budget of four is full before the last ones.
_LINES = 6
#: Logits in float32 may differ by this, as norms, while nothing has been evicted.
_NEAR = 1e-3


def compare_graphs(setting: Setting, tell: Tell) -> None:
    """``linear`` on two layers of LlamaGen-B."""
    bench = LlamaBench(setting.shape("llamagen-b"), 2, torch.float32, setting.device, 0)
    line, prefix = bench.layout.line_length, bench.layout.prefix
    count = prefix + _LINES * line
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(bench.dimensions.vocab, (2, count), generator=chance)
    tokens = tokens.to(setting.device)
    plain, seconds, held = _decode(bench, tokens, setting, compiled=False)
    counters.clear()
    graph, faster, graph_held = _decode(bench, tokens, setting, compiled=True)
    # Capacity, prefix included, less the last line: no token has gone before.
    before = prefix + 3 * line
    error = ((graph[:before] - plain[:before]).norm() / plain[:before].norm()).item()
    skips = counters["inductor"]["cudagraph_skips"]
    wrong = [] if error < _NEAR else [f"logits differ by {error:.3g}"]
    if setting.cuda and skips:
        wrong.append(f"{skips} graphs were not captured")
    tell(
        Finding(
            "linear",
            {
                "logits differ by": error,
                "same slots": f"{(held == graph_held).float().mean().item():.1%}",
                "ms/step": seconds * 1e3,
                "ms/step in a graph": faster * 1e3,
            },
            "; ".join(wrong),
        )
    )


@torch.inference_mode()
def _decode(
    bench: LlamaBench, tokens: Tensor, setting: Setting, *, compiled: bool
) -> tuple[Tensor, float, Tensor]:
    """Logits of each step, seconds of the fastest, and the positions that were held at the end."""
    model = bench.twin()
    logits, times = [], []
    with ExitStack() as block:
        cache = block.enter_context(
            attach(model, policy="linear", budget=setting.budget, layout=bench.layout)
        )
        if compiled:
            options: Any = {"backend": "aot_eager"}
            if setting.cuda:
                options = {"mode": "reduce-overhead"}
            block.enter_context(compile_decode(model, cache, **options))
        for position in range(tokens.shape[1]):
            token = tokens[:, position : position + 1]
            begun = time.perf_counter()
            output = model(token, use_cache=True, **cache.as_argument).logits
            if setting.cuda:
                torch.cuda.synchronize(setting.device)
            times.append(time.perf_counter() - begun)
            logits.append(output.float().clone())
        held = cache.policy_cache.positions(0)
    return torch.stack(logits), min(times), held
