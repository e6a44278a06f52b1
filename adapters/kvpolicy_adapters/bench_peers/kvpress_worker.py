"""kvpress's DecodingPress on a Llama of the same dimensions, in its own environment."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from kvpress import DecodingPress, KnormPress, LagKVPress, StreamingLLMPress
from protocol import serve, settle, tokens_of
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

_SINKS = 4


class Worker:
    """One press.

    It compresses once a line, from the capacity down to the capacity less a line: its peak, counted
    after each step, is the capacity.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.workload, sizes = job["workload"], job["dimensions"]
        self.sizes = sizes
        self.device = self.workload["device"]
        self.dtype = getattr(torch, self.workload["dtype"])
        capacity, interval = self.workload["capacity"], job["line"]
        self.target = capacity - interval
        # Two partitions of lag must fit behind the sinks, or LagKV keeps the newest tokens only.
        lag = max(1, (capacity - _SINKS) // 3)
        base = {
            "streaming_llm": StreamingLLMPress(n_sink=_SINKS),
            "lagkv": LagKVPress(n_sink=_SINKS, lag_size=lag),
            "knorm": KnormPress(),
        }[job["press"]]
        self.press = DecodingPress(
            base,
            compression_interval=interval,
            target_size=self.target,
            hidden_states_buffer_size=0,  # none of these presses looks at hidden states
        )
        config = LlamaConfig(
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["intermediate"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["kv_heads"],
            head_dim=sizes["head_dim"],
            vocab_size=sizes["vocab"],
            max_position_embeddings=job["length"],
            tie_word_embeddings=False,
        )
        config._attn_implementation = "sdpa"
        torch.manual_seed(self.workload["seed"])
        with torch.device(self.device):
            self.model = LlamaForCausalLM(config).to(self.dtype).eval()
        self.tokens = tokens_of(job).to(self.device)
        self.block = ExitStack()
        self.cache: Any = None
        self.seen = 0

    def restart(self) -> None:
        self.block.close()
        self.cache = DynamicCache(config=self.model.config)
        self.seen = 0
        self._forward(self.job["prefix"])
        self.block = ExitStack()
        self.block.enter_context(self.press(self.model))

    def run(self, count: int) -> tuple[list[float], list[float]]:
        seconds, read = [], []
        for _ in range(count):
            read.append(float(self.cache.layers[0].keys.shape[2] + 1))
            begun = settle(self.device)
            self._forward(1)
            seconds.append(settle(self.device) - begun)
        return seconds, read

    def skip(self, count: int) -> None:
        """Lines are skipped whole, so the state is that after a compression."""
        self.seen += count
        held = min(self.seen, self.target)
        size = (self.workload["batch"], self.sizes["kv_heads"], held, self.sizes["head_dim"])
        for layer in self.cache.layers:
            if layer.keys.shape[2] == held:
                continue
            layer.keys = torch.randn(size, dtype=self.dtype, device=self.device)
            layer.values = torch.randn(size, dtype=self.dtype, device=self.device)
        self.press.reset()

    def wake(self) -> None:
        kept = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        for tensor in (*self.model.parameters(), *kept):
            tensor.sum()

    def release(self) -> None:
        self.cache = None
        self.press.reset()

    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def _forward(self, count: int) -> None:
        positions = torch.arange(self.seen, self.seen + count, device=self.device)
        # The cache forgets how long the sequence is; the press wants to know.
        self.model(
            self.tokens[:, self.seen : self.seen + count],
            past_key_values=self.cache,
            position_ids=positions[None],
            cache_position=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        self.seen += count


if __name__ == "__main__":
    serve(Worker)
