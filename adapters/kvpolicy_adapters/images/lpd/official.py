"""Attaching the ``LPD`` object of its authors' repository, its ``sample_tokens`` untouched.

That code is not imported: the object is recognised by its parts. While it is attached, these of its
methods are overridden, on this object alone: ``enable_kv_cache`` makes no cache any more but begins
a new sequence, ``disable_kv_cache`` has nothing to undo, each layer's ``forward_inference`` of the
attention keeps its keys and values under the policy, and what ``sample_tokens`` is given is looked
at before it runs: the order in which tokens come must be the one that the policy is told.

In a pass the object writes the tokens of one group and, behind them, the queries for the next; the
next pass overwrites the queries. Here the whole pass is staged, and its tokens are committed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpolicy import (
    Budget,
    CacheStateError,
    EvictionPolicy,
    Halves,
    LateLayout,
    LayoutError,
    OrderedLayout,
    ParameterError,
    PolicyCache,
    Reclaim,
    Schedule,
    TokenLayout,
)
from kvpolicy_adapters.transformers.cache import TransformersCache

__all__ = ["attach_official", "no_layout", "recognises"]

_PARTS = (
    "blocks",
    "class_emb",
    "disable_kv_cache",
    "enable_kv_cache",
    "fake_latent",
    "mask_token",
    "pos_embed",
    "sample_tokens",
    "seq_len",
    "token_emb",
    "z_proj_ln",
)
_ATTENTION_PARTS = (
    "forward_inference",
    "head_dim",
    "k_norm",
    "num_heads",
    "proj",
    "proj_drop",
    "q_norm",
    "qkv",
)


def recognises(model: object) -> bool:
    """Whether this is an ``LPD`` of its authors' repository."""
    if not isinstance(model, nn.Module) or isinstance(model, PreTrainedModel):
        return False
    if not all(hasattr(model, part) for part in _PARTS):
        return False
    blocks = list(model.blocks) if isinstance(model.blocks, nn.ModuleList) else []
    attention = getattr(blocks[0], "attn", None) if blocks else None
    return all(hasattr(attention, part) for part in _ATTENTION_PARTS)


def no_layout(name: str) -> str:
    """Why a model of this class can't be attached without a layout, and how to make one."""
    return (
        f"{name} draws in an order that whoever draws chooses, so attach() can't know it: "
        f"attach(..., layout=Parallel(passes=20).ordered(grid)), with grid=RasterLayout(rows=16, "
        f"cols=16, prefix=1) for 256 pixels; or OrderedLayout(grid=grid, order=orders[0], "
        f"groups=group_sizes) for an order of your own"
    )


@contextmanager
def attach_official(
    model: Any,
    *,
    policy: EvictionPolicy | str = "near",
    budget: Budget | int | float | str | None = None,
    layout: TokenLayout | LateLayout | None = None,
    reclaim: Reclaim = "lazy",
    schedule: Schedule | None = None,
    halves: Halves = "own",
) -> Iterator[TransformersCache]:
    """Put the official object under a policy; ``attach`` comes here by itself.

    Every ``sample_tokens`` inside the block begins anew and runs under the policy; the cache that
    the block gives is there to be asked (``stats``, ``positions``), not to be passed on. The object
    can be attached once at a time. Its ``forward`` (training) does what it always did.

    Example::

        layout = Parallel(passes=20, repulsion=1).ordered(RasterLayout(rows=16, cols=16, prefix=1))
        mask = create_block_causal_mask([1, *layout.groups], device="cuda")
        orders = torch.tensor(layout.order, device="cuda").expand(len(labels), -1)
        with attach(model, policy="near", budget="1/4", layout=layout) as cache:
            tokens = model.sample_tokens(
                len(labels), labels=labels, attn_mask=mask, group_sizes=list(layout.groups),
                orders=orders,
            )
        cache.stats()

    Args:
        model: the object, not compiled.
        policy: a policy that works in any order, or its name in the registry.
        budget: evictable tokens a head of a layer may hold; None for as many as the layout has.
            Queries count while they attend.
        layout: what comes when; every image of a batch comes in this order.
        reclaim: ``lazy`` or ``eager``.
        schedule: how layers share the budget; the policy's own by default.
        halves: ``own``, or ``first``: see :class:`kvpolicy.PolicyCache`.

    Raises:
        ParameterError: this is no such object, or it is compiled.
        CacheStateError: it is attached already. In the block: the object calls its layers otherwise
            than ``sample_tokens`` does.
        LayoutError: there is no layout, it has no order, or is of another grid; or the policy needs
            raster order. In the block: ``sample_tokens`` is given another order or other groups.
        BudgetError: the budget is too small for this policy on this layout.
    """
    if hasattr(model, "_orig_mod"):
        raise ParameterError(
            "this model is compiled, so its layers can't be put under a policy; attach "
            "model._orig_mod, and draw with that"
        )
    if not recognises(model):
        raise ParameterError(f"{type(model).__name__} is not the LPD of its authors' repository")
    if isinstance(getattr(model.enable_kv_cache, "__self__", None), _Attachment):
        raise CacheStateError(
            "this model is attached already, and draws one batch at a time; end the other block "
            "first, or use kvpolicy_adapters.images.lpd.LPD, which serves several at once"
        )
    if not isinstance(layout, OrderedLayout):
        found = "" if layout is None else f"{layout!r} has no order. "
        raise LayoutError(found + no_layout(type(model).__name__))
    if layout.prefix != 1 or layout.length != model.seq_len + 1:
        raise LayoutError(
            f"this model draws {model.seq_len} tokens behind a class, and {layout!r} has "
            f"{layout.length - layout.prefix} behind a prefix of {layout.prefix}"
        )
    policy_cache = PolicyCache(
        policy,
        budget,
        layout=layout,
        num_layers=len(model.blocks),
        reclaim=reclaim,
        schedule=schedule,
        halves=halves,
    )
    cache = TransformersCache(policy_cache, model)
    with _Attachment(model, policy_cache, layout).overriding():
        try:
            yield cache
        finally:
            cache.closed = True


class _Attachment:
    """One block on one object."""

    def __init__(self, model: Any, cache: PolicyCache, layout: OrderedLayout) -> None:
        self.model = model
        self.cache = cache
        self.layout = layout
        self.original_sample = model.sample_tokens
        self.takes = inspect.signature(model.sample_tokens)
        self.passing = ExitStack()
        self.known = 0

    @contextmanager
    def overriding(self) -> Iterator[None]:
        """Override the methods, and leave the object as it was."""
        attentions = [block.attn for block in self.model.blocks]
        overrides: list[tuple[Any, str, Any]] = [
            (attention, "forward_inference", partial(self.attend, index, attention))
            for index, attention in enumerate(attentions)
        ]
        names = ("enable_kv_cache", "disable_kv_cache", "sample_tokens")
        overrides += [(self.model, name, getattr(self, name)) for name in names]
        before = [owner.__dict__.get(name) for owner, name, _ in overrides]
        try:
            for owner, name, override in overrides:
                owner.__dict__[name] = override
            yield
        finally:
            self.passing.close()
            for (owner, name, _), own in zip(overrides, before, strict=True):
                owner.__dict__.pop(name, None)
                if own is not None:
                    owner.__dict__[name] = own

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """The object's own, if it is going to draw in the order that the policy was told.

        Raises:
            LayoutError: it is not.
            ParameterError: there is no mask, which the object needs, too.
        """
        given = self.takes.bind(*args, **kwargs).arguments
        sizes, orders = given.get("group_sizes"), given.get("orders")
        if isinstance(sizes, str):  # as the repository's files have them
            sizes = [int(size) for size in sizes.strip("[]() ").split(",")]
        if not isinstance(sizes, Sequence) or tuple(sizes) != self.layout.groups:
            raise LayoutError(
                f"sample_tokens(group_sizes={sizes!r}), but the policy was told the groups "
                f"{list(self.layout.groups)!r}; give group_sizes=list(layout.groups)"
            )
        order = torch.tensor(self.layout.order)
        if not isinstance(orders, Tensor) or not bool((orders.cpu() == order).all()):
            raise LayoutError(
                "sample_tokens(orders=...) has another order than the layout that the policy was "
                "told, in which every image of the batch must come; give "
                "orders=torch.tensor(layout.order).expand(batch, -1)"
            )
        if not isinstance(given.get("attn_mask"), Tensor):
            raise ParameterError(
                f"sample_tokens(attn_mask={given.get('attn_mask')!r}): the object needs the mask "
                f"of its repository's create_block_causal_mask([1, *group_sizes])"
            )
        return self.original_sample(*args, **kwargs)

    def enable_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Begin a new sequence; the object's own would allocate a cache of full size."""
        self.passing.close()
        self.cache.reset()

    def disable_kv_cache(self) -> None:
        """Nothing to undo: the object has made no cache."""

    def attend(
        self, index: int, attention: Any, x: Tensor, input_pos: Tensor, attn_mask: Tensor
    ) -> Tensor:
        """A layer's attention.

        Args:
            index: the layer.
            attention: its module.
            x: tokens of a group, and the queries for the next, ``[B, T, width]``.
            input_pos: their positions by arrival, ``[T]``.
            attn_mask: over all positions, bool, or 0 where a key is seen, ``[L, L]``.

        Returns:
            ``[B, T, width]``.
        """
        if index == 0:
            self.begin_pass(input_pos)
        query, key, value = (
            part.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
            for part in attention.qkv(x).chunk(3, dim=-1)
        )
        seen = self.cache.seen_by(index)
        rows = attn_mask[input_pos.to(attn_mask.device), : seen + x.shape[1]]
        output = self.cache.attend(
            index,
            attention.q_norm(query),
            attention.k_norm(key),
            value,
            visible=(rows if rows.dtype == torch.bool else rows == 0)[None, None],
        )
        if index == len(self.model.blocks) - 1:
            self.cache.commit(self.known)
            self.passing.close()
        return attention.proj_drop(attention.proj(output.transpose(1, 2).flatten(2)))

    def begin_pass(self, input_pos: Tensor) -> None:
        """Stage the tokens of a group, which stay, and the queries for the next, which don't.

        Raises:
            CacheStateError: positions don't follow what is cached, group by group.
        """
        seen = self.cache.seen
        known = self.layout.group(seen)
        asked = self.layout.group(known.stop)
        expected = range(seen, asked.stop)
        if input_pos.tolist() != list(expected):
            raise CacheStateError(
                f"tokens came for the positions {input_pos.tolist()}, but a pass has those of a "
                f"group and of the next one, {expected.start} to {expected.stop - 1}; "
                f"enable_kv_cache() begins a new sequence"
            )
        self.known = len(known)
        self.passing.enter_context(self.cache.stage(len(expected)))
