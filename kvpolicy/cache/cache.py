"""PolicyCache: the keys and values of one generation, under one policy and one budget."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from kvpolicy.budget.budget import Budget, Schedule
from kvpolicy.cache.checks import check_tokens, under_autocast
from kvpolicy.cache.compiled_step import CompiledStep, Hide, SlotStep
from kvpolicy.cache.layer import Layer
from kvpolicy.cache.plan import LayerPlan
from kvpolicy.cache.saving import check_alike, load_layer, save_layer
from kvpolicy.cache.sharing import Sharing
from kvpolicy.cache.stage import Stage
from kvpolicy.cache.stats import CacheStats
from kvpolicy.cache.terms import Terms
from kvpolicy.errors import CacheStateError, KVPolicyError, ParameterError, ShapeError
from kvpolicy.layout import LateLayout, TokenLayout
from kvpolicy.observers import state_of
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.registry import create

__all__ = ["Halves", "PolicyCache", "Reclaim"]

Reclaim = Literal["lazy", "eager"]
Halves = Literal["own", "first"]

#: Devices on which tensors may be under autocast; others refuse the question.
_AUTOCASTS = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")
_INTEGERS = (torch.int64, torch.int32)


class PolicyCache:
    """The cache of one generation: layout + budget + stores + policy.

    Example:
        >>> import torch, kvpolicy
        >>> layout = kvpolicy.RasterLayout(rows=4, cols=4, prefix=1)
        >>> cache = kvpolicy.PolicyCache("streaming_llm", budget=8, layout=layout, num_layers=1)
        >>> for _ in range(layout.length):
        ...     q = k = v = torch.randn(2, 3, 1, 8)
        ...     out = cache.attend(0, q, k, v)
        >>> out.shape, cache.stats().peak_tokens
        (torch.Size([2, 3, 1, 8]), (9,))

    Args:
        policy: a policy, or its name in the registry.
        budget: evictable tokens a head of a layer may hold (see :class:`Budget`); None for as
            many as the layout has.
        layout: where tokens sit; or a :class:`LateLayout`, which says so once the first tokens are
            out. Fractions of a budget are worked out then, and a budget that is too small is
            refused then.
        num_layers: number of layers.
        reclaim: ``lazy``, a victim stays visible until its slot is overwritten, or ``eager``, it
            is hidden as soon as it is chosen.
        schedule: how layers share the budget; the policy's own by default.
        windows: of each layer, how many tokens its queries can see (a sliding window, which the
            ``visible`` of each call imposes): None for all, 0 where it keeps no keys and values.
            A layer that can see no more than the budget is left alone: it gets no slots, and the
            others share the budget as if it were not there.
        lent: layers whose tokens other layers attend to as well.
        first_head: index of head 0 here among all KV heads of a layer: not 0 where processes share
            a layer's heads (tensor parallelism).
        halves: ``own``, every sequence decides for itself; or ``first``, the second half of a batch
            gives up what the first half does. Under guidance, with the conditional sequences
            first, both halves then know the same of the image.

    Raises:
        BudgetError: the budget is too small for this policy on this layout.
        LayoutError: the layout has more tokens than positions can count.
        ParameterError: another argument is wrong.
        UnknownNameError: no policy has this name.
    """

    def __init__(
        self,
        policy: EvictionPolicy | str,
        budget: Budget | int | float | str | None = None,
        *,
        layout: TokenLayout | LateLayout,
        num_layers: int,
        reclaim: Reclaim = "lazy",
        schedule: Schedule | None = None,
        windows: Sequence[int | None] | None = None,
        lent: Collection[int] = (),
        first_head: int = 0,
        halves: Halves = "own",
    ) -> None:
        self.policy = create(policy) if isinstance(policy, str) else policy
        if not isinstance(self.policy, EvictionPolicy):
            raise ParameterError(f"policy={policy!r} is neither an EvictionPolicy nor a name")
        # A class has the attributes of its objects, and would pass for one of them.
        if isinstance(layout, type) or not isinstance(layout, TokenLayout | LateLayout):
            raise ParameterError(
                f"layout={layout!r} is not a TokenLayout: give RasterLayout(...) or TextLayout(...)"
            )
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise ParameterError(f"num_layers={num_layers!r} must be an integer, at least 1")
        self.policy.check(num_layers)
        if reclaim not in ("lazy", "eager"):
            raise ParameterError(f"reclaim={reclaim!r} must be 'lazy' or 'eager'")
        self.reclaim = reclaim
        if halves not in ("own", "first"):
            raise ParameterError(f"halves={halves!r} must be 'own' or 'first'")
        self.halves = halves
        schedule = self.policy.schedule() if schedule is None else schedule
        if not isinstance(schedule, Schedule):
            raise ParameterError(f"schedule={schedule!r} is not a Schedule, e.g. Uniform()")
        self.schedule = schedule
        budget = None if budget is None else Budget.parse(budget)
        self._sharing = sharing = Sharing(
            self.policy, budget, schedule, layout, num_layers, windows
        )
        known = sharing.known
        budgets = {} if known is None else sharing.budgets(known)
        self.layers = tuple(
            Layer(
                LayerPlan(
                    policy=self.policy,
                    layer=layer,
                    num_layers=num_layers,
                    eager=reclaim == "eager",
                    alike=halves == "first",
                    window=sharing.windows[layer] or None,
                    lends=layer in lent,
                    first_head=first_head,
                    bind=None if sharing.late is None else sharing.bind,
                ),
                known,
                budgets.get(layer, 0),
            )
            for layer in range(num_layers)
        )
        self._attending = {layer: self.layers[layer] for layer in sharing.managed}
        self._managed = tuple(self._attending.values())
        self._first = self._managed[0] if self._managed else self.layers[0]
        self._last = self._managed[-1] if self._managed else self.layers[0]
        self._step = CompiledStep(self._managed)
        self._stepping = False
        self._stage = Stage(self._managed)

    def __getstate__(self) -> dict[str, Any]:
        """What ``copy.deepcopy`` copies: a copy is not inside of a stage.

        Raises:
            CacheStateError: tokens are staged.
        """
        self._refuse_staged("copied")
        return vars(self).copy()

    @property
    def layout(self) -> TokenLayout | None:
        """Where tokens sit, as the first layer knows it; None while that is unknown."""
        return self._first.layout

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        visible: Tensor | None = None,
        bias: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Cache T new tokens of one layer and attend from them to what the layer holds.

        T tokens at once give what T calls with one token each give, up to float error. There are
        two exceptions. A text prompt longer than the capacity attends to the whole prompt, and what
        the policy keeps of it is cached. And tokens that see each other's future (a *block*) are
        cached together before the first of them attends.

        Args:
            layer: index of the layer. Every layer gets the same tokens, one call after the other.
            query: ``[B, G * H, T, D]``, rotation applied.
            key: ``[B, H, T, D]``, rotation applied.
            value: ``[B, H, T, Dv]``.
            scale: factor of the scores; ``1 / sqrt(D)`` by default.
            visible: the model's whole mask by position, bool ``[B|1, 1|H, T, seen + T]``: False
                hides the token at a position from a query. Nothing is added to it; None is causal.
                In text, tokens that don't see themselves are padding: they hold no slot, and
                pinned sinks and anchors are counted from the first token behind leading ones.
            bias: added to the scores, by position, ``[B|1, 1|H|G * H, T, seen + T]`` (ALiBi).
            softcap: scores become ``softcap * tanh(scores / softcap)``.
            sinks: learned logits ``[G * H]`` that take a share of the softmax and give nothing.

        Returns:
            Output ``[B, G * H, T, Dv]``.

        Raises:
            ShapeError: a tensor has the wrong shape, dtype or device.
            LayoutError: more tokens than the layout has.
            BudgetError: a block that the layer can't free slots for.
            CacheStateError: the batch size has changed since the last call; layers disagree on how
                many tokens there were; a call was interrupted by an exception; or a gradient would
                have to go back through an earlier call.
            AttentionError: the attention is NaN, or a score that a decision is made from. One whose
                policy neither observes attention nor scores keys pays nothing for it, and NaN goes
                on into the output. (On a GPU it is asserted there, so that nobody waits for it.)
        """
        found = self._attending.get(layer) if type(layer) is int else None
        if found is None:
            raise self._no_layer(layer)
        if not isinstance(query, Tensor) or not isinstance(key, Tensor) or key.ndim != 4:
            check_tokens(query, key, value)
        if visible is not None and self._stage.lookahead is not None:
            seen, count = found.seen, key.shape[2]
            visible = self._stage.unless_causal(visible, seen, count, anew=found is self._first)
        terms = Terms(scale, visible, bias, softcap, sinks)
        if query.device.type in _AUTOCASTS and torch.is_autocast_enabled(query.device.type):
            return self._under_autocast(found, query, key, value, terms, False)[0]
        # Layers take turns: each gets the same tokens, the first layer first. Some layers, though
        # never the last, may get none at all (cross-attention where there is no image).
        if found is not self._first:
            if found.seen + key.shape[2] != self._first.seen:
                raise self._disagree(found)
        else:
            for other in self._managed:
                if other.seen != found.seen and (other.seen or other is self._last):
                    raise self._disagree(found)
                if not other.whole:
                    raise other.interrupted()
        return found.attend(query, key, value, terms)[0]

    def attend_with_weights(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        visible: Tensor | None = None,
        bias: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same, with what each query head gave to each position.

        Returns:
            Output ``[B, G * H, T, Dv]``, and the weights ``[B, G * H, T, seen + T]``, in which
            evicted tokens have zero.
        """
        found = self._layer(layer)
        check_tokens(query, key, value)
        terms = Terms(scale, visible, bias, softcap, sinks)
        output, weights = self._under_autocast(found, query, key, value, terms, True)
        assert weights is not None
        return output, weights

    def attend_shared(
        self,
        layer: int,
        query: Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from a layer that keeps nothing to what this layer's newest call attended to.

        Args:
            layer: the layer whose keys and values are borrowed; ``lent`` must have named it.
            query: ``[B, G * H, T', D]``, of the last T' tokens of that call.
            scale: factor of the scores; ``1 / sqrt(D)`` by default.
            softcap: as in :meth:`attend`.
            sinks: as in :meth:`attend`.
            weights: whether to return the weights.

        Returns:
            Output ``[B, G * H, T', Dv]``; weights by position ``[B, G * H, T', seen]``, or None.

        Raises:
            CacheStateError: the layer does not lend, or its newest call had fewer tokens.
        """
        found = self._layer(layer)
        if found.lending is None:
            raise CacheStateError(
                f"layer {layer} does not lend its tokens; say lent=[{layer}] when the cache is made"
            )
        if query.device.type in _AUTOCASTS:
            (query,) = under_autocast(query)
        terms = Terms(scale=scale, softcap=softcap, sinks=sinks)
        return found.lending.attend(query, terms, found.seen, weights=weights)

    def _under_autocast(
        self, found: Layer, query: Tensor, key: Tensor, value: Tensor, terms: Terms, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attend in the dtype that autocast gives attention, and in float32 where we say so."""
        device = query.device.type
        if device not in _AUTOCASTS:
            self._check_turn(found, key.shape[2])
            return found.attend(query, key, value, terms, weights)
        query, key, value = under_autocast(query, key, value)
        self._check_turn(found, key.shape[2])
        with torch.autocast(device, enabled=False):
            return found.attend(query, key, value, terms, weights)

    def _check_turn(self, found: Layer, count: int) -> None:
        """What :meth:`attend` looks at, too."""
        if found is not self._first:
            wrong = found.seen + count != self._first.seen
        else:
            for layer in self._managed:
                if not layer.whole:
                    raise layer.interrupted()
            wrong = self._last.seen != found.seen or any(
                layer.seen not in (0, found.seen) for layer in self._managed
            )
        if wrong:
            raise self._disagree(found)

    def _disagree(self, found: Layer) -> CacheStateError:
        """Why a layer can't take tokens now."""
        seen = {layer.plan.layer: layer.seen for layer in self._managed}
        return CacheStateError(
            f"layer {found.plan.layer} is given tokens out of turn: layers have seen {seen} "
            f"tokens, but each must see the same ones, the first layer first; after an exception "
            f"in the middle of a forward pass, reset() the cache"
        )

    # -- staging -----------------------------------------------------------------------------------

    @contextmanager
    def stage(self, lookahead: int, *, sure: int = 0, together: bool = False) -> Iterator[None]:
        """Take tokens that may be taken back, up to ``lookahead`` of them at once.

        Inside the block tokens come as ever, in any number of calls. They are *staged*: attention
        and policy treat each exactly as if it came alone, evictions included, but what it
        overwrites is kept aside. :meth:`commit` says how many of them are kept. What has not been
        committed when the block ends is forgotten, also after an exception: a layer that was
        interrupted inside is as it was before.

        Tokens that see each other (a *block*) stay or go together.

        Example:
            >>> import torch, kvpolicy
            >>> layout = kvpolicy.TextLayout(sinks=1)
            >>> cache = kvpolicy.PolicyCache("h2o", 8, layout=layout, num_layers=1)
            >>> _ = cache.attend(0, *torch.randn(3, 1, 1, 9, 8))
            >>> with cache.stage(lookahead=4):
            ...     guesses = cache.attend(0, *torch.randn(3, 1, 1, 4, 8))
            ...     cache.commit(2)  # the first two were right
            >>> cache.seen
            11

        Args:
            lookahead: tokens that may be staged at once, W, at least 1. A layer keeps aside W slots
                a head, allocated when the first token is staged, and used again by later stages.
            sure: tokens before this position come for sure, also inside of the block: a prompt, in
                the same call as what is staged behind it.
            together: let the tokens of a call attend together where no decision comes between them:
                much faster, and the same but for rounding, as in :meth:`attend`.

        Raises:
            ParameterError: ``lookahead`` is no integer, or less than 1; or ``sure`` less than 0.
            CacheStateError: a stage or a compiled step has begun that has not ended; a layer was
                interrupted; or an observer knows what can't be copied. In the block: more tokens
                are staged than ``lookahead``; or a prompt comes that has to be compressed, or that
                says where tokens sit.
        """
        if isinstance(lookahead, bool) or not isinstance(lookahead, int) or lookahead < 1:
            raise ParameterError(f"lookahead={lookahead!r} must be an integer, at least 1")
        if isinstance(sure, bool) or not isinstance(sure, int) or sure < 0:
            raise ParameterError(f"sure={sure!r} must be a position, an integer of at least 0")
        if self.staging:
            raise CacheStateError(
                f"a stage of {self._stage.lookahead} tokens has begun that has not ended; commit() "
                f"in it, or leave it first"
            )
        if self._stepping:
            raise CacheStateError("a step has begun that has not ended; stage tokens after it")
        for layer in self._managed:
            if not layer.whole:
                raise layer.interrupted()
            if layer.seen not in (0, self._first.seen):
                raise self._disagree(layer)
        try:
            self._stage.begin(lookahead, sure, together)
            yield
        finally:
            self._stage.end()

    @property
    def staging(self) -> bool:
        """Whether a stage has begun and not ended."""
        return self._stage.lookahead is not None

    @property
    def staged(self) -> int:
        """Tokens that are staged now, and not yet committed."""
        return self._stage.staged

    def commit(self, count: int) -> None:
        """Keep the first ``count`` staged tokens, and forget the others; inside of :meth:`stage`.

        The cache is then, bit for bit, what it would be if only those had come, one by one. More
        tokens may be staged behind them.

        Args:
            count: how many, 0 to :attr:`staged`. With 0 the cache is as it was, also where a layer
                was interrupted.

        Raises:
            CacheStateError: there is no stage; layers have not all seen the same tokens; or a block
                would be cut.
            ParameterError: ``count`` is no integer, or more tokens than are staged.
        """
        if not self.staging:
            raise CacheStateError("nothing can be staged outside of `with cache.stage(...)`")
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= self.staged:
            raise ParameterError(
                f"commit({count!r}): give an integer from 0 to {self.staged}, the tokens staged"
            )
        if count:
            for layer in self._managed:
                if not layer.whole:
                    raise layer.interrupted()
                if layer.seen not in (0, self._first.seen):
                    raise self._disagree(layer)
        self._stage.commit(count)

    def _refuse_staged(self, done: str) -> None:
        """Refuse what would need all tokens to be sure.

        Raises:
            CacheStateError: tokens are staged.
        """
        if self.staged:
            raise CacheStateError(
                f"{self.staged} tokens are staged, so the cache can't be {done}: commit() first"
            )

    # -- a compiled step -------------------------------------------------------------------------

    @contextmanager
    def step(self, hide: Hide | None = None) -> Iterator[None]:
        """Around compiled code that decodes one token, and calls :meth:`attend_step` in each layer.

        Policies decide before the block and observe after it; nothing inside depends on a number
        that changes (see :mod:`kvpolicy.cache.compiled_step`). If the block raises before a layer
        has written its token, the cache goes on as if it had not been entered.

        Args:
            hide: given a layer's store, the slots of padding to hide from every step, bool
                ``[B, 1, S]``, or None; asked once.

        Raises:
            CacheStateError: no token has come yet, a step has begun already, or a layer was
                interrupted.
            ParameterError: other layers attend to a layer's tokens.
        """
        if self._stepping:
            raise CacheStateError("a step has begun that has not ended")
        if self.staging:
            raise CacheStateError(
                "a compiled step can't be taken back; inside of stage(), decode without "
                "compile_decode"
            )
        for layer in self._managed:
            if layer.seen != self._first.seen:
                raise self._disagree(layer)
        self._step.begin(hide)
        self._stepping = done = False
        try:
            self._stepping = True
            yield
            done = True
        finally:
            self._stepping = False
            self._step.end(done)

    @property
    def stepping(self) -> bool:
        """Whether a compiled step has begun and not ended."""
        return self._stepping

    def attend_step(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        bias: Tensor | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Cache one token and attend from it, inside of :meth:`step`.

        Args and returns are those of :meth:`attend`, with one token; masks are made by slot.

        Raises:
            ParameterError: the model adds a bias by position.
        """
        terms = Terms(scale=scale, bias=bias, softcap=softcap, sinks=sinks)
        return self._step.by_layer[layer].attend(query, key, value, terms)

    def layer_step(self, layer: int) -> SlotStep:
        """The tensors of a layer's step, inside of :meth:`step`."""
        return self._step.by_layer[layer]

    def _layer(self, layer: int) -> Layer:
        found = self._attending.get(layer) if type(layer) is int else None
        if found is None:
            raise self._no_layer(layer)
        return found

    def _no_layer(self, layer: int) -> KVPolicyError:
        """Why there is no such layer under the policy."""
        if type(layer) is not int or not 0 <= layer < len(self.layers):
            return ParameterError(f"layer={layer!r} is not one of the {len(self.layers)} layers")
        return CacheStateError(
            f"layer {layer} is left alone: it sees no more tokens than its budget, or keeps "
            f"none; the layers under the policy are {list(self._sharing.managed)}"
        )

    @property
    def seen(self) -> int:
        """Tokens of the sequence so far (in the first layer, which is the first to see them)."""
        return self._first.seen

    @property
    def num_layers(self) -> int:
        """Layers of the model, those that are left alone included."""
        return len(self.layers)

    @property
    def batch(self) -> int | None:
        """Sequences of the batch; None before the first token."""
        return None if self._first.store is None else self._first.store.shape.batch

    def seen_by(self, layer: int) -> int:
        """Tokens of the sequence so far in one layer: in a forward pass, those above are behind."""
        return self._layer(layer).seen

    def lends(self, layer: int) -> bool:
        """Whether other layers may attend to this layer's tokens (:meth:`attend_shared`)."""
        return self._layer(layer).lending is not None

    def positions(self, layer: int) -> Tensor:
        """Positions that a layer holds, int64 ``[B, H, S]``, -1 = empty (a copy).

        Raises:
            ParameterError: there is no such layer.
            CacheStateError: the layer has not seen a token yet.
        """
        return self._layer(layer).require_store().positions.to(torch.int64)

    def stats(self) -> CacheStats:
        """What the generation has cost so far."""
        stores = [layer.store for layer in self.layers if layer.store is not None]
        passes, staged, accepted = self._stage.counted
        readings = [state_of(o).nbytes for layer in self.layers for o in layer.observers]
        return CacheStats(
            policy=self.policy.label,
            budgets=tuple(layer.budget for layer in self.layers),
            peak_tokens=tuple(0 if n.store is None else n.store.peak for n in self.layers),
            bytes=sum(store.nbytes for store in stores),
            overhead_bytes=sum(store.overhead_nbytes for store in stores) + sum(readings),
            evictions=tuple(0 if n.store is None else n.seen - n.store.held for n in self.layers),
            reports=tuple(layer.reports for layer in self.layers),
            seen=self.seen,
            left_alone=tuple(sorted(self._sharing.left_alone)),
            staging_bytes=self._stage.nbytes,
            passes=passes,
            staged=staged,
            accepted=accepted,
        )

    def reset(self) -> None:
        """Forget everything: the next token is the first of a new sequence."""
        for layer in self.layers:
            layer.reset()
        self._stepping = False
        self._stage.counted = (0, 0, 0)

    def state_dict(self) -> dict[str, Any]:
        """The cache in tensors, numbers and text, for ``torch.save``; tensors are its own.

        Example:
            >>> import io, torch, kvpolicy
            >>> def make():
            ...     return kvpolicy.PolicyCache(
            ...         "h2o", 4, layout=kvpolicy.TextLayout(sinks=1), num_layers=1
            ...     )
            >>> cache, again, file = make(), make(), io.BytesIO()
            >>> _ = cache.attend(0, *torch.randn(3, 1, 1, 9, 8))
            >>> torch.save(cache.state_dict(), file)
            >>> again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
            >>> token = torch.randn(3, 1, 1, 1, 8)
            >>> bool((again.attend(0, *token) == cache.attend(0, *token)).all())
            True

        Raises:
            CacheStateError: a call was interrupted by an exception, a compiled step has begun, or
                tokens are staged.
            ParameterError: a layout or an observer of third parties can't be written down.
        """
        if self._stepping:
            raise CacheStateError("a step has begun that has not ended; save the cache after it")
        self._refuse_staged("saved")
        layers = [save_layer(layer) for layer in self.layers]
        return {**self._made_with(), "layers": layers, "counted": list(self._stage.counted)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that :meth:`state_dict` gave; tensors are copied.

        Raises:
            CacheStateError: the state is that of another kind of cache, or tokens are staged.
        """
        self._refuse_staged("loaded into")
        check_alike(state, self._made_with())
        for layer, saved in zip(self.layers, state["layers"], strict=True):
            load_layer(layer, saved)
            if layer.staging is not None:
                layer.staging.restart()
        passes, staged, accepted = state.get("counted", (0, 0, 0))
        self._stage.counted = (passes, staged, accepted)

    def _made_with(self) -> dict[str, Any]:
        """What a cache must have in common with one whose state it takes."""
        policy = {"name": self.policy.label, **self.policy.model_dump(mode="json")}
        return {
            "policy": policy,
            "reclaim": self.reclaim,
            "halves": self.halves,
            "num_layers": len(self.layers),
        }

    def select_batch(self, index: Tensor) -> None:
        """Keep the sequences ``index``, int64 ``[B']``; a sequence may repeat (beam search).

        Raises:
            ShapeError: the index is not a vector of integers.
            CacheStateError: tokens are staged: commit those that stay first.
        """
        self._refuse_staged("reordered")
        if not isinstance(index, Tensor) or index.dtype not in _INTEGERS or index.ndim != 1:
            raise ShapeError(f"index={index!r} is not a vector of integers [B'], int64 or int32")
        for layer in self.layers:
            layer.select_batch(index)
