"""Shapes for ``kvpolicy bench``: image models' real dimensions, random weights.

All are transformers' Llama, so that every baseline runs the same code around its cache. What that
leaves out (Chameleon's norms of queries and keys, Janus's two-layer head) is the same for all
contenders.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from kvpolicy import Budget, ParameterError, RasterLayout, create
from kvpolicy.lab.bench.contender import Contender, Decoder, Dimensions, Workload
from kvpolicy_adapters.attach import attach
from kvpolicy_adapters.bench.floor import FloorCache, floor_attention, skip_attention
from kvpolicy_adapters.transformers.cache_argument import as_argument
from kvpolicy_adapters.transformers.compiled import compile_decode
from kvpolicy_adapters.transformers.skinny import skinny_gemm

__all__ = ["SHAPES", "LlamaBench"]

_JANUS = {"rows": 24, "cols": 24, "prefix": 32}
#: Dimensions and grid of each shape. LlamaGen: arXiv:2406.06525, table 1. Janus-Pro: the language
#: models' configurations (arXiv:2501.17811), with the image tokens' vocabulary, behind a prompt of
#: 32 tokens. Lumina-mGPT 7B (arXiv:2408.02657): 48 x 48 and 64 x 64 tokens, each row with its
#: line-break token, behind a prompt of 32 tokens.
SHAPES: dict[str, tuple[Dimensions, RasterLayout]] = {
    "llamagen-b": (
        Dimensions(768, 12, 12, 12, 64, 2048, 16384),
        RasterLayout(rows=24, cols=24, prefix=1),
    ),
    "llamagen-xl": (
        Dimensions(1280, 36, 20, 20, 64, 3584, 16384),
        RasterLayout(rows=24, cols=24, prefix=1),
    ),
    "llamagen-xxl": (
        Dimensions(1536, 48, 24, 24, 64, 4096, 16384),
        RasterLayout(rows=24, cols=24, prefix=1),
    ),
    "janus-pro-1b": (Dimensions(2048, 24, 16, 16, 128, 5632, 16384), RasterLayout(**_JANUS)),
    "janus-pro-7b": (Dimensions(4096, 30, 32, 32, 128, 11008, 16384), RasterLayout(**_JANUS)),
    "lumina-768": (
        Dimensions(4096, 32, 32, 32, 128, 11008, 65536),
        RasterLayout(rows=48, cols=48, line_break=1, prefix=32),
    ),
    "lumina-1024": (
        Dimensions(4096, 32, 32, 32, 128, 11008, 65536),
        RasterLayout(rows=64, cols=64, line_break=1, prefix=32),
    ),
    # No model's: for whoever tries a bench where its figures mean nothing.
    "tiny": (Dimensions(32, 2, 4, 4, 8, 48, 64), RasterLayout(rows=8, cols=6, prefix=1)),
}
_FLOOR, _SKIP = "kvpolicy-bench-floor", "kvpolicy-bench-skip"


class LlamaBench:
    """A model of one shape, and decoders that share its weights.

    Args:
        name: the shape.
        layers: fewer than the real one's, to save time; None for all.
        dtype: of the weights.
        device: where they lie.
        seed: makes them.

    Raises:
        ParameterError: the shape has fewer layers.
    """

    peers = Path(__file__).parent / "peers"

    def __init__(
        self, name: str, layers: int | None, dtype: torch.dtype, device: str, seed: int
    ) -> None:
        real, self.layout = SHAPES[name]
        if layers is not None and not 1 <= layers <= real.layers:
            raise ParameterError(f"layers={layers}: {name} has {real.layers}; give 1 to that many")
        self.dimensions = Dimensions(**{**vars(real), "layers": layers or real.layers})
        self.real_layers = real.layers
        sizes = self.dimensions
        config = LlamaConfig(
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            vocab_size=sizes.vocab,
            max_position_embeddings=self.layout.length,
            tie_word_embeddings=False,
        )
        config._attn_implementation = "sdpa"
        torch.manual_seed(seed)
        with torch.device(device):
            model: Any = LlamaForCausalLM(config).eval()
        self.model: LlamaForCausalLM = model.to(dtype)

    def twin(self) -> LlamaForCausalLM:
        """A model of its own with the same weights, so that contenders don't share settings."""
        shared = {
            id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())
        }
        return copy.deepcopy(self.model, shared)

    def decoder(self, contender: Contender, workload: Workload) -> Decoder:
        """A decoder of one contender.

        Raises:
            ParameterError: there is no such baseline.
            BudgetError: the budget is too small for this policy.
        """
        if contender.kind == "policy":
            return PolicyDecoder(self, contender, workload)
        return BaselineDecoder(self, contender, workload)


class LlamaDecoder:
    """What decoders share: a model, a cache, and filling it without the model."""

    cache: Any = None

    def __init__(self, bench: LlamaBench, contender: Contender, workload: Workload) -> None:
        self.bench = bench
        self.workload = workload
        self.model = bench.twin()
        self.block = ExitStack()
        if contender.skinny:
            self.block.enter_context(skinny_gemm(self.model))
        self.forward: Any = self.model
        self.seen = 0

    def step(self, token: Tensor) -> Tensor:
        """Decode one token a sequence."""
        return self._decode(token)

    def _decode(self, token: Tensor, **options: Any) -> Tensor:
        """A forward pass."""
        output: Tensor = self.forward(
            token, use_cache=True, logits_to_keep=1, **as_argument(self.cache), **options
        ).logits
        self.seen += token.shape[1]
        return output

    def wake(self) -> None:
        """Read all weights and the cache once."""
        for tensor in (*self.model.parameters(), *self.cached()):
            tensor.sum()

    def cached(self) -> Iterable[Tensor]:
        """Keys and values of all layers, as far as they are allocated."""
        kept = (getattr(layer, name) for layer in self.cache.layers for name in ("keys", "values"))
        return [tensor for tensor in kept if tensor is not None]

    def release(self) -> None:
        """Give the cache back."""
        self.cache = None

    def close(self) -> None:
        """Give the cache back, and leave the model as it was."""
        self.release()
        self.block.close()

    def _tokens(self, heads: int, count: int) -> Tensor:
        """Random queries, keys or values ``[B, heads, count, D]``."""
        size = (self.workload.batch, heads, count, self.bench.dimensions.head_dim)
        return torch.randn(size, dtype=self.workload.torch_dtype, device=self.workload.device)


class BaselineDecoder(LlamaDecoder):
    """transformers' own caches, the floor, and a model without attention."""

    def __init__(self, bench: LlamaBench, contender: Contender, workload: Workload) -> None:
        super().__init__(bench, contender, workload)
        self.kind = contender.kind
        if self.kind in ("floor", "skip"):
            name = _FLOOR if self.kind == "floor" else _SKIP
            AttentionInterface.register(
                name, floor_attention if self.kind == "floor" else skip_attention
            )
            AttentionMaskInterface.register(name, _no_mask)
            self.model.set_attn_implementation(name)
        elif self.kind not in ("dynamic", "static"):
            raise ParameterError(f"no baseline is called {self.kind!r}")
        if contender.compiled:
            options = _compile_options(workload.device)
            self.forward = torch.compile(self.model, fullgraph=True, dynamic=False, **options)
        self.unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=workload.device)

    def step(self, token: Tensor) -> Tensor:
        """Decode one token a sequence; the floor says outside of compiled code where it goes."""
        if self.forward is self.model or not isinstance(self.cache, FloorCache):
            return self._decode(token)
        with self.cache.compiled_step():
            # A mask of its own shape is taken as it is: none is made from the length.
            return self._decode(token, attention_mask=self.unread)

    def restart(self, prefix: Tensor) -> None:
        """Begin a new image batch, whose prefix is decoded here."""
        self.seen = 0
        config = self.model.config
        if self.kind == "dynamic":
            self.cache = DynamicCache(config=config)
        elif self.kind == "static":
            self.cache = StaticCache(config=config, max_cache_len=self.bench.layout.length)
        else:
            slots = self.workload.capacity if self.kind == "floor" else 0
            self.cache = FloorCache(self.bench.dimensions.layers, slots)
        forward, self.forward = self.forward, self.model
        self.step(prefix)
        self.forward = forward

    def skip(self, count: int) -> None:
        """Fill the cache."""
        heads = self.bench.dimensions.kv_heads
        if self.kind in ("dynamic", "static"):
            for layer in range(self.bench.dimensions.layers):
                key, value = self._tokens(heads, count), self._tokens(heads, count)
                self.cache.update(key, value, layer)
        else:
            self.cache.skip(count)
        self.seen += count

    def tokens_read(self) -> float:
        """A static cache is read whole, its empty end included."""
        return {
            "dynamic": self.seen + 1,
            "static": self.bench.layout.length,
            "floor": self.workload.capacity,
            "skip": 0,
        }[self.kind]

    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.nbytes for tensor in self.cached())


class PolicyDecoder(LlamaDecoder):
    """A policy, attached."""

    def __init__(self, bench: LlamaBench, contender: Contender, workload: Workload) -> None:
        super().__init__(bench, contender, workload)
        policy = create(contender.policy)
        budget = None if contender.policy == "full" else Budget.parse(workload.budget)
        self.cache = self.block.enter_context(
            attach(self.model, policy=policy, budget=budget, layout=bench.layout)
        )
        if contender.compiled:
            options = _compile_options(workload.device)
            self.block.enter_context(compile_decode(self.model, self.cache, **options))

    def restart(self, prefix: Tensor) -> None:
        """Begin a new image batch, whose prefix is decoded here."""
        self.cache.reset()
        self.seen = 0
        self.step(prefix)

    def skip(self, count: int) -> None:
        """Fill the slots; the policy decides on what random queries attend to."""
        sizes = self.bench.dimensions
        for layer in range(sizes.layers):
            query, key = self._tokens(sizes.heads, count), self._tokens(sizes.kv_heads, count)
            self.cache.policy_cache.attend(layer, query, key, self._tokens(sizes.kv_heads, count))
        self.seen += count

    def tokens_read(self) -> float:
        """What the layers hold."""
        layers = self.cache.policy_cache.layers
        return sum(min(self.seen + 1, layer.capacity) for layer in layers) / len(layers)

    def cache_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.cache.stats().bytes

    def cached(self) -> Iterable[Tensor]:
        """Keys and values in slots."""
        stores = [layer.store for layer in self.cache.policy_cache.layers]
        return [kept for store in stores if store for kept in (store.keys, store.values)]

    def release(self) -> None:
        """Give the slots back."""
        self.cache.reset()


def _compile_options(device: str) -> dict[str, Any]:
    """Of ``torch.compile``."""
    options: dict[str, Any] = {}
    if device.startswith("cuda"):
        # CUDA graphs: launching the kernels one by one would be most of a step.
        options["mode"] = "reduce-overhead"
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        # Contenders run the same code with other caches, of which torch by default allows eight.
        options["isolate_recompiles"] = True
    return options


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The newest token may see every slot."""


def __getattr__(name: str) -> Any:
    """Entry points name shapes as attributes, ``-`` written as ``_``."""
    shape = name.replace("_", "-")
    if shape not in SHAPES:
        raise AttributeError(name)
    return partial(LlamaBench, shape)
