"""kvpress's DecodingPress on a Llama of the same dimensions, in its own environment.

Its transformers is another one than kvpolicy's, and may spend more or less around attention. What
kvpress's cache costs is therefore told by the same model there without attention.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from kvpress import DecodingPress, KnormPress, LagKVPress, StreamingLLMPress
from protocol import serve, settle, tokens_of
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

_SINKS = 4
_SKIP = "no-attention"


class NoCache(DynamicCache):
    """A cache that keeps no token."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand back the new keys and values alone."""
        return key_states, value_states


def no_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The query itself, in the output's shape."""
    return query.transpose(1, 2).contiguous(), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Nobody would read it."""


class Worker:
    """One press, or with ``skip`` in its place the model without attention.

    A press compresses once a line, from the capacity down to the capacity less a line: its peak,
    counted after each step, is the capacity.
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
        self.press: DecodingPress | None = None
        if job["press"] != "skip":
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
        AttentionInterface.register(_SKIP, no_attention)
        AttentionMaskInterface.register(_SKIP, no_mask)
        config._attn_implementation = _SKIP if self.press is None else "sdpa"
        torch.manual_seed(self.workload["seed"])
        with torch.device(self.device):
            self.model = LlamaForCausalLM(config).to(self.dtype).eval()
        self.tokens = tokens_of(job).to(self.device)
        self.block = ExitStack()
        self.cache: Any = None
        self.seen = 0

    def restart(self) -> None:
        self.block.close()
        kind = NoCache if self.press is None else DynamicCache
        self.cache = kind(config=self.model.config)
        self.seen = 0
        self._forward(self.job["prefix"])
        self.block = ExitStack()
        if self.press is not None:
            self.block.enter_context(self.press(self.model))

    def run(self, count: int) -> tuple[list[float], list[float]]:
        seconds, read = [], []
        for _ in range(count):
            read.append(0.0 if self.press is None else float(self._held() + 1))
            begun = settle(self.device)
            self._forward(1)
            seconds.append(settle(self.device) - begun)
        return seconds, read

    def skip(self, count: int) -> None:
        """Lines are skipped whole, so the state is that after a compression."""
        self.seen += count
        if self.press is None:
            return
        held = min(self.seen, self.target)
        size = (self.workload["batch"], self.sizes["kv_heads"], held, self.sizes["head_dim"])
        for layer in self.cache.layers:
            if layer.keys.shape[2] == held:
                continue
            layer.keys = torch.randn(size, dtype=self.dtype, device=self.device)
            layer.values = torch.randn(size, dtype=self.dtype, device=self.device)
        self.press.reset()

    def wake(self) -> None:
        for tensor in (*self.model.parameters(), *self._kept()):
            tensor.sum()

    def release(self) -> None:
        self.cache = None
        if self.press is not None:
            self.press.reset()

    def cache_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept())

    def _held(self) -> int:
        count: int = self.cache.layers[0].keys.shape[2]
        return count

    def _kept(self) -> list[Tensor]:
        if self.press is None:
            return []
        return [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]

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
