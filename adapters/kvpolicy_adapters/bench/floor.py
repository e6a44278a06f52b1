"""The floor of a decode step: the least work that still is a model with so many cached tokens.

Each layer writes the newest key and value into the next of a fixed number of slots and attends over
all of them, with whichever attention is the fastest here. Nothing is chosen and nothing observed.
With no slots, attention is left out. Compiled, it is the step of a policy that does neither.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kvpolicy import SlotShape, SlotStep, SlotStore, TextLayout

__all__ = ["FloorCache", "fastest", "floor_attention", "skip_attention"]

_TRIALS = 15
#: Bytes that other layers read between two turns of one, more than most caches of a core hold.
_BETWEEN = 1 << 26
_MARK = "_kvpolicy_floor"
#: Writes a layer's next token and attends: layer, query, key, value.
Way = Callable[["FloorLayer", Tensor, Tensor, Tensor], Tensor]
#: The fastest way of each case, measured when it first comes.
_FASTEST: dict[tuple[Any, ...], Way] = {}


class FloorLayer(CacheLayerMixin):
    """Slots that are written in turn."""

    is_compileable = False
    is_sliding = False
    store: SlotStore

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.seen = 0
        # In the middle of compiled code, where the number of tokens is a tensor.
        self.compiled = False
        self.compiled_step: SlotStep | None = None
        self.position: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, with no slot empty."""
        shape = SlotShape(
            batch=key_states.shape[0],
            heads=key_states.shape[1],
            slots=self.slots,
            device=key_states.device,
            layout=TextLayout(),
        )
        self.store = SlotStore(shape, key_states, value_states)
        self.store.positions.zero_()
        self.keys, self.values = self.store.keys, self.store.values
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the newest tokens over the oldest, and give all slots."""
        if self.compiled:
            return self._mark(key_states), value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.slots and key_states.shape[2] == 1:
            return self._mark(key_states), value_states  # attention writes it, as it likes
        for token in range(key_states.shape[2]):
            if self.slots:
                self.write(key_states[:, :, token], value_states[:, :, token])
            self.seen += 1
        return self.store.keys, self.store.values

    @property
    def slot(self) -> int:
        """Where the next token goes: over the oldest."""
        return self.seen % self.slots

    def write(self, key: Tensor, value: Tensor) -> None:
        """Write the next token, ``[B, H, D]``."""
        self.store.keys[:, :, self.slot] = key
        self.store.values[:, :, self.slot] = value

    def _mark(self, key: Tensor) -> Tensor:
        """The same keys, which tell attention whose they are."""
        marked = key.view_as(key)
        setattr(marked, _MARK, self)
        return marked

    def begin(self) -> None:
        """Say where the next token of compiled code goes."""
        if self.position is None:
            self.position = torch.zeros(1, dtype=torch.int32, device=self.store.keys.device)
            if self.slots:
                self.compiled_step = SlotStep(self.store)
        if self.compiled_step is not None:
            where = torch.full_like(self.compiled_step.slots, self.slot)
            self.compiled_step.aim(where, self.seen)
        self.position.fill_(self.seen)
        self.compiled = True

    def end(self) -> None:
        """The compiled code has run."""
        self.compiled = False
        self.seen += 1

    def get_seq_length(self) -> int:
        """Tokens so far; a tensor in the middle of compiled code."""
        return self.position if self.compiled else self.seen  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is made."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows with no end."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1: it grows with no end."""
        return -1


class FloorCache(Cache):
    """A fixed number of slots in each layer.

    Args:
        num_layers: layers.
        slots: slots of each; 0 to keep nothing.
    """

    def __init__(self, num_layers: int, slots: int) -> None:
        self.slots_of = [FloorLayer(slots) for _ in range(num_layers)]
        super().__init__(layers=[*self.slots_of])

    def skip(self, count: int) -> None:
        """Go on by so many tokens."""
        for layer in self.slots_of:
            layer.seen += count

    @contextmanager
    def compiled_step(self) -> Iterator[None]:
        """Around compiled code that decodes one token."""
        for layer in self.slots_of:
            layer.begin()
        try:
            yield
        finally:
            for layer in self.slots_of:
                layer.end()


def floor_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of the newest tokens over all slots; returns ``[B, T, Hq, D]``."""
    layer: FloorLayer | None = getattr(key, _MARK, None)
    output: Tensor
    if layer is None:  # a prefix
        output = _fused(query, key, value)
    elif layer.compiled and layer.compiled_step is not None:
        output = layer.compiled_step.attend(query, key, value)
    else:
        case = (*query.shape, *key.shape, layer.slots, query.dtype, query.device)
        if case not in _FASTEST:
            _FASTEST[case] = fastest(layer, query, key, value)
        output = _FASTEST[case](layer, query, key, value)
        layer.seen += 1
    return output.transpose(1, 2).contiguous(), None


def skip_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """No attention: the query itself, in the output's shape."""
    if torch.compiler.is_compiling():
        # A compiler leaves out products that nobody uses; those of keys and values must be made.
        query = query + 0.0 * (key.sum() + value.sum())
    return query.transpose(1, 2).contiguous(), None


def fastest(layer: FloorLayer, query: Tensor, key: Tensor, value: Tensor) -> Way:
    """The way to write a token and attend that has the smallest median time, of all there are.

    They take turns, and each turn begins as a layer of a model does: other layers have been read
    since, so that what it reads is far from the processor.
    """
    seconds: dict[Way, list[float]] = {_write_and_fuse: [], _write_and_multiply: []}
    if layer.store.kernel is not None:
        seconds[_in_one_pass] = []
    others = torch.zeros(_BETWEEN, dtype=torch.uint8, device=query.device)
    for _ in range(_TRIALS):
        for way, times in seconds.items():
            others.add_(1)
            _settle(query)
            begun = time.perf_counter()
            way(layer, query, key, value)
            _settle(query)
            times.append(time.perf_counter() - begun)
    return min(seconds, key=lambda way: statistics.median(seconds[way]))


def _settle(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _in_one_pass(layer: FloorLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The CPU kernel of kvpolicy."""
    decode = layer.store.kernel
    assert decode is not None
    store = layer.store
    where = torch.tensor([layer.slot]).expand(*store.positions.shape[:2], 1)
    kept = (store.keys, store.values, store.positions)
    output, *_ = decode(
        query, *kept, where, key, value, layer.seen, layer.slots, query.shape[3] ** -0.5, False
    )
    return output


def _write_and_fuse(layer: FloorLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The fused kernel behind scaled_dot_product_attention."""
    layer.write(key[:, :, 0], value[:, :, 0])
    return _fused(query, layer.store.keys, layer.store.values)


def _write_and_multiply(layer: FloorLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two batched products and a softmax."""
    layer.write(key[:, :, 0], value[:, :, 0])
    return _products(query, layer.store.keys, layer.store.values)


def _fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    shared = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(query, key, value, enable_gqa=shared)


def _products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, query_heads, count, dim = query.shape
    heads, slots = key.shape[1:3]
    rows = query_heads // heads * count
    scores = torch.baddbmm(
        query.new_empty(batch * heads, rows, slots),
        query.reshape(batch * heads, rows, dim),
        key.view(batch * heads, slots, dim).transpose(1, 2),
        beta=0,
        alpha=dim**-0.5,
    )
    chances = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    output = torch.bmm(chances, value.view(batch * heads, slots, -1))
    return output.view(batch, query_heads, count, -1)
