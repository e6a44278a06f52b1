"""TransformersCache: a PolicyCache that transformers' models and ``generate`` take for their own.

A transformers model hands new keys and values to its cache (``update``), takes back tensors, and
passes those to an attention function. The policy needs the query too, so ``update`` only marks
the new keys with the layer they belong to; everything happens in the attention function, which
finds the mark. The mark travels with the tensor, so threads and models can't mix their caches up.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    LinearAttentionLayer,
)

from kvpolicy import CacheStateError, CacheStats, ModelError, PolicyCache, TokenLayout
from kvpolicy_adapters.transformers.cache_argument import as_argument
from kvpolicy_adapters.transformers.left_alone import LeftAlone
from kvpolicy_adapters.transformers.masks import PolicyLength

__all__ = ["PolicyLayer", "StatePolicyLayer", "TransformersCache", "marked_layer"]

_MARK = "_kvpolicy_layer"


class PolicyLayer(CacheLayerMixin):
    """One layer of a :class:`TransformersCache`."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: TransformersCache, index: int) -> None:
        super().__init__()
        self.cache = weakref.proxy(cache)
        self.policy_cache = cache.policy_cache
        self.index = index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store allocates itself when the first token comes."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Mark the new keys ``[B, H, T, D]`` for :func:`policy_attention`, and hand them back.

        Raises:
            ModelError: the keys of the layer before never came to an attention function.
        """
        if self.policy_cache.stepping:  # traced by a compiler: the step's beginning has looked
            return _mark(key_states, self), value_states
        self.cache.expect(self)
        return _mark(key_states, self), value_states

    def get_seq_length(self) -> int:
        """Tokens of the sequence so far, evicted ones included.

        In the middle of a compiled step it is a tensor, as that of a static cache of transformers
        is: models add it to other tensors, and a number would be compiled in.
        """
        if self.policy_cache.stepping:
            return self.policy_cache.layer_step(self.index).position  # type: ignore[return-value]
        return self.policy_cache.seen_by(self.index)

    def get_max_length(self) -> int:
        """Tokens that the layout has, or -1 where it has no end."""
        layout = self.policy_cache.layout
        return -1 if layout is None or layout.length is None else layout.length

    def get_max_cache_shape(self) -> int:
        """The former name of :meth:`get_max_length`."""
        return self.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made by position: as long as the whole sequence, from 0.

        Raises:
            CacheStateError: ``generate`` was given no more tokens than the cache has seen.
        """
        if query_length == 0:
            raise CacheStateError(
                f"this cache has seen {self.policy_cache.seen_by(self.index)} tokens, and the "
                f"input has no others; reset() the cache for a new sequence, or pass the whole "
                f"sequence so far and more"
            )
        length = self.policy_cache.seen_by(self.index) + query_length
        # A compiler that traces this knows numbers, and no other kinds of them.
        return length if torch.compiler.is_compiling() else PolicyLength(length), 0

    def reset(self) -> None:
        """Nothing to do: :meth:`TransformersCache.reset` forgets all layers at once."""

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # transformers' own is one, too
        """Whether tokens are staged, so that they can be taken back."""
        return self.policy_cache.staging

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to do: :meth:`TransformersCache.crop` crops all layers at once."""


class StatePolicyLayer(PolicyLayer, LinearAttentionLayer):
    """A layer under a policy that keeps a state of fixed size beside its keys and values.

    As hybrids have them whose attention and state space are parts of one layer (FalconH1, Zamba).
    The state is transformers' own, and all of it is kept.
    """

    def __init__(self, cache: TransformersCache, index: int, own: LinearAttentionLayer) -> None:
        PolicyLayer.__init__(self, cache, index)
        # Of the layer that transformers made for this model: versions differ in what it has.
        for name, value in vars(own).items():
            if name not in vars(self):
                setattr(self, name, copy.deepcopy(value))

    #: No token can be taken back from a recurrent state.
    is_croppable = False
    # Of the state: keys and values have their store.
    lazy_initialization = LinearAttentionLayer.lazy_initialization  # type: ignore[assignment]
    reset = LinearAttentionLayer.reset
    reorder_cache = LinearAttentionLayer.reorder_cache


class _Block:
    """The ``attach`` block of a cache and of all its copies: they end together."""

    closed = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Block:
        return self


class TransformersCache(Cache):
    """The cache that ``attach`` gives: pass it as ``cache``, or by ``**cache.as_argument``.

    Args:
        policy_cache: the cache of the layers that the policy manages.
        model: the model.
        own: transformers' own cache layers, of which those that the policy leaves alone are used.
        chunked: layers whose windows are chunks.

    Attributes:
        policy_cache: the :class:`kvpolicy.PolicyCache` behind it.
        name: class of the model.
    """

    def __init__(
        self,
        policy_cache: PolicyCache,
        model: PreTrainedModel,
        own: Sequence[Any] = (),
        chunked: Collection[int] = (),
    ) -> None:
        self.policy_cache = policy_cache
        self.chunked = chunked
        self._block = _Block()
        self._left_alone: LeftAlone | None = None
        self.expected: PolicyLayer | None = None
        #: Attention modules, by id, that have brought it their tokens; and the ids ``[B, T]`` of
        #: those tokens, as far as they are known.
        self.served: set[int] = set()
        self.said: Tensor | None = None
        self.name = type(model).__name__
        # The block holds the model, so its ids are not given to others while the cache is in use.
        self._modules = frozenset(id(module) for module in model.modules())
        left_alone = policy_cache.stats().left_alone
        layers = list(own) or [None] * policy_cache.num_layers
        super().__init__(
            layers=[
                layer if index in left_alone else self._under_policy(index, layer)
                for index, layer in enumerate(layers)
            ]
        )

    def _under_policy(self, index: int, own: Any) -> PolicyLayer:
        """A layer under the policy, in the place of transformers' own."""
        if isinstance(own, LinearAttentionLayer):
            return StatePolicyLayer(self, index, own)
        return PolicyLayer(self, index)

    def __deepcopy__(self, memo: dict[int, Any]) -> TransformersCache:
        """A cache that goes on by itself on the same model, until the same block ends."""
        made = object.__new__(type(self))
        memo[id(self)] = made
        for name, value in vars(self).items():
            if name not in ("layers", "expected", "_modules", "_left_alone"):
                setattr(made, name, copy.deepcopy(value, memo))
        made.expected, made._modules, made._left_alone = None, self._modules, None
        made.layers = [
            made._under_policy(layer.index, layer)
            if isinstance(layer, PolicyLayer)
            else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]
        return made

    @property
    def closed(self) -> bool:
        """Whether its ``attach`` block has ended."""
        return self._block.closed

    @closed.setter
    def closed(self, closed: bool) -> None:
        self._block.closed = closed

    @property
    def as_argument(self) -> dict[str, Any]:
        """This cache under the name that the installed transformers gives the argument.

        For code that runs on several versions: ``model.generate(ids, **cache.as_argument)`` is
        ``cache=cache`` since 5.24, and ``past_key_values=cache`` before.
        """
        return as_argument(self)

    def expect(self, layer: PolicyLayer) -> None:
        """Note that a layer's keys are on their way to its attention.

        Raises:
            ModelError: those of the layer before never arrived.
        """
        if self.expected is not None:
            lost, self.expected = self.expected.index, None
            raise ModelError(
                f"the keys of layer {lost} never came to the policy's attention: use this cache on "
                f"the {self.name} that attach() was given, and on no other object; if that is so, "
                f"{self.name} does not pass keys on to transformers' attention interface as its "
                f"cache gives them, and kvpolicy can't serve it; after an exception in the middle "
                f"of a forward pass, reset() the cache"
            )
        self.expected = layer

    def check_owner(self, module: torch.nn.Module) -> None:
        """Refuse an attention module of another model.

        Raises:
            CacheStateError: this cache was made for a model that has no such module.
        """
        if id(module) not in self._modules:
            self.expected = None
            raise CacheStateError(
                f"this cache was made for another {self.name} object than the model it is used "
                f"on (its {type(module).__name__} is not in it); attach() each model, and use the "
                f"cache that its own block gives"
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the new keys and values of a layer.

        Raises:
            CacheStateError: the model has more layers than this cache, or its block has ended.
        """
        if self.closed:
            raise CacheStateError(
                "this cache's attach() block has ended; attach the model again for a new cache"
            )
        if layer_idx >= len(self.layers):
            raise CacheStateError(
                f"this cache was made for a model of {len(self.layers)} layers, and is used on one "
                f"that has a layer {layer_idx}; attach() that model and use the cache it gives"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @contextmanager
    def stage(self, lookahead: int, *, sure: int = 0, together: bool = False) -> Iterator[None]:
        """Take tokens that may be taken back; see :meth:`kvpolicy.PolicyCache.stage`.

        Layers that the policy leaves alone take them back, too. Inside the block transformers'
        own ``crop`` commits.

        Raises:
            CacheStateError: one of those layers can't, or all are left alone; and what PolicyCache
                raises.
            ParameterError: ``lookahead`` is no integer, or less than 1.
        """
        own = [(n, layer) for n, layer in enumerate(self.layers) if type(layer) is not PolicyLayer]
        if not any(isinstance(layer, PolicyLayer) for layer in self.layers):
            raise CacheStateError(
                "all layers are left alone, so nothing is under a policy, and nothing to stage; "
                "give a budget smaller than the windows of the layers"
            )
        if self.policy_cache.staging:
            raise CacheStateError("a stage has begun that has not ended; leave it first")
        left_alone = LeftAlone(own)
        try:
            with self.policy_cache.stage(lookahead, sure=sure, together=together):
                self._left_alone = left_alone
                yield
        finally:
            self.expected = self._left_alone = None
            left_alone.end(self.policy_cache.seen)

    @property
    def staged(self) -> int:
        """Tokens that are staged now, and not yet committed."""
        return self.policy_cache.staged

    def commit(self, count: int) -> None:
        """Keep the first ``count`` staged tokens; see :meth:`kvpolicy.PolicyCache.commit`.

        Raises:
            CacheStateError: there is no stage, or PolicyCache can't.
            ParameterError: ``count`` is no integer, or more tokens than are staged.
        """
        self.policy_cache.commit(count)
        self.expected = None
        if self._left_alone is not None:
            self._left_alone.crop(self.policy_cache.seen)

    def activate_past_recording(self) -> None:
        """What decoding with candidates asks of a cache before it crops: be inside of a stage.

        Raises:
            CacheStateError: there is none.
        """
        if not self.policy_cache.staging:
            raise CacheStateError(
                "this cache takes tokens back inside of `with cache.stage(lookahead)`, which "
                "generate opens by itself where it is asked for an assistant model, "
                "prompt_lookup_num_tokens or assistant_early_exit"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Keep all staged tokens but the newest: transformers' name of :meth:`commit`.

        Args:
            tokens_to_remove: how many, with a minus sign; where it is positive, how many tokens of
                the sequence are to be left, as versions before 5.18 have it.

        Raises:
            CacheStateError: more are to be removed than are staged.
        """
        tokens_to_remove = int(tokens_to_remove)  # 5.17 counts matches in a tensor
        seen, staged = self.policy_cache.seen, self.staged
        removed = seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if removed > staged:
            raise CacheStateError(
                f"crop({tokens_to_remove}) would take back {removed} of {seen} tokens, but "
                f"{staged} are staged: what the others evicted is gone; bring tokens that may be "
                f"taken back inside of `with cache.stage(lookahead)`"
            )
        if self.policy_cache.staging and removed >= 0:
            self.commit(staged - removed)

    def reset(self) -> None:
        """Forget everything: the next token is the first of a new sequence."""
        self.expected = self.said = None
        self.policy_cache.reset()
        self._of_others("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.said = None
        self.policy_cache.select_batch(beam_idx)
        self._of_others("reorder_cache", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.policy_cache.batch is not None:
            self.reorder_cache(torch.arange(self.policy_cache.batch).repeat_interleave(repeats))

    def _of_others(self, method: str, *arguments: Any) -> None:
        """Do the same to what the policy leaves alone: layers, and states beside keys."""
        for layer in self.layers:
            if type(layer) is not PolicyLayer:
                getattr(layer, method)(*arguments)

    @property
    def layout(self) -> TokenLayout | None:
        """Where tokens sit; None while that is unknown."""
        return self.policy_cache.layout

    def positions(self, layer: int) -> Tensor:
        """Positions that a layer holds, int64 ``[B, H, S]``, -1 = empty."""
        return self.policy_cache.positions(layer)

    def stats(self) -> CacheStats:
        """What the generation has cost so far, the layers that are left alone included."""
        stats = self.policy_cache.stats()
        if not stats.left_alone:
            return stats
        peaks, extra = list(stats.peak_tokens), 0
        for index in stats.left_alone:
            keys, values = (getattr(self.layers[index], name, None) for name in ("keys", "values"))
            if keys is not None and values is not None:
                peaks[index] = keys.shape[2]
                extra += keys.nbytes + values.nbytes
        return replace(stats, peak_tokens=tuple(peaks), bytes=stats.bytes + extra)


def _mark(key: Tensor, layer: PolicyLayer) -> Tensor:
    """The same keys, marked as new ones of this layer."""
    marked = key.view_as(key)
    setattr(marked, _MARK, layer)
    return marked


def marked_layer(key: Tensor) -> PolicyLayer | None:
    """The layer whose new keys these are, or None where they came through no policy cache."""
    return getattr(key, _MARK, None)
