"""What comparing two runs shows: that nothing matters but what may.

Both runs are fed tensors of the same shapes, so that what must be equal is equal bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvpolicy.testing.claims import is_line_by_line
from kvpolicy.testing.drive import Trace, drive
from kvpolicy.testing.invariants.invariant import Case, bits, fail, first, global_seed, register
from kvpolicy.testing.streams import Tokens

#: Seeds of the tensors that replace others; beyond those that the streams draw.
_OTHER = 2**20
#: How many times what a layer needs its neighbours may be given so that it has enough.
_MOST_ROOM = 64


@register(
    "lossless", "with a budget of at least the length, the output equals plain causal attention."
)
def _lossless(case: Case) -> None:
    stream = case.stream
    if stream.dtype != "float32":
        return
    trace = _roomy(case)
    tokens = trace.tokens
    close = 2e-3  # peaked attention magnifies the rounding of its scores
    for layer, output in enumerate(trace.outputs):
        plain = _plain_attention(tokens.query[layer], tokens.key[layer], tokens.value[layer])
        wrong = first(((output.double() - plain).abs() > close * (1 + plain.abs())).any(-1))
        if wrong is not None:
            batch, head, position = wrong
            fail(
                trace,
                f"the output of query {position} is off by "
                f"{float((output.double() - plain)[batch, head, position].abs().max()):.3g} though "
                f"everything fits into {trace.budgets[layer]} tokens",
                layer=layer,
                batch=batch,
                head=head // stream.group,
                step=_step_of(trace, position),
            )


@register(
    "independence",
    "a sample's decisions do not depend on its batch neighbours, a head's not on other heads "
    "(unless the policy says so), a layer's not on other layers.",
)
def _independence(case: Case) -> None:
    stream, own = case.stream, case.trace.tokens
    other = stream.draw(_OTHER + stream.seed)
    if stream.batch > 1:
        for kept in {0, stream.batch - 1}:
            mixed = Tokens(
                *(_spliced(a, b, 1, kept, 1) for a, b in zip(_all(own), _all(other), strict=True))
            )
            _same(case, mixed, "its batch neighbours", batch=kept)
        turned = Tokens(*(tensor.flip(1) for tensor in _all(own)))
        _same(case, turned, "its place in the batch", turned=True)
    if stream.heads > 1 and not case.policy.mixes_heads:
        for kept in {0, stream.heads - 1}:
            mixed = Tokens(
                _spliced(own.query, other.query, 2, kept, stream.group),
                _spliced(own.key, other.key, 2, kept, 1),
                _spliced(own.value, other.value, 2, kept, 1),
            )
            _same(case, mixed, "other heads", head=kept)
    if stream.layers > 1:
        for kept in {0, stream.layers - 1}:
            mixed = Tokens(
                *(_spliced(a, b, 0, kept, 1) for a, b in zip(_all(own), _all(other), strict=True))
            )
            _same(case, mixed, "other layers", layer=kept)


def _same(
    case: Case,
    tokens: Tokens,
    on_what: str,
    *,
    layer: int | None = None,
    batch: int | None = None,
    head: int | None = None,
    turned: bool = False,
) -> None:
    """Demand that the decisions of the given layer, sample and head are the same as they were."""
    again = drive(case.policy, case.stream, tokens=tokens)
    batches, heads = slice(batch, _end(batch)), slice(head, _end(head))
    for at in range(case.stream.layers) if layer is None else [layer]:
        held = again.held[at].flip(1) if turned else again.held[at]
        differs = first((case.trace.held[at] != held)[:, batches, heads])
        if differs is None or (turned and not _decisive(case)):
            continue
        step, of_batch, of_head, position = differs
        fail(
            again,
            f"whether position {position} is cached depends on {on_what}",
            layer=at,
            batch=of_batch + (batch or 0),
            head=of_head + (head or 0),
            step=step,
        )


@register("determinism", "the same stream gives the same decisions, ties included.")
def _determinism(case: Case) -> None:
    before = case.trace
    with global_seed(1):
        again = drive(case.policy, case.stream)
    for layer in range(case.stream.layers):
        differs = first(before.held[layer] != again.held[layer])
        if differs is not None:
            step, batch, head, position = differs
            fail(
                again,
                f"position {position} was treated differently when the same stream ran again",
                layer=layer,
                batch=batch,
                head=head,
                step=step,
            )


@register(
    "inter-line only",
    "the choice for the next line depends on the last finished line's mass, and on no other "
    "query's.",
    is_line_by_line,
)
def _inter_line(case: Case) -> None:
    """Replace all queries but those of the line before, and see whether the choice changes.

    Other queries lead to other choices for earlier lines, so only heads which held the same tokens
    in the same slots all through the line before are compared: they saw the same mass, bit for bit.
    """
    layout, stream, base = case.stream.layout, case.stream, case.stepwise
    last = layout.line(stream.tokens - 1)
    other = stream.draw(_OTHER + stream.seed).query
    decided = sorted({layout.line(d.seen) for d in base.decisions if layout.is_line_start(d.seen)})
    for line in [*decided[:2], *decided[-1:]]:
        start = layout.prefix + line * layout.line_length
        before = max(start - layout.line_length, 0)
        if line > last:
            continue
        query = other.clone()
        query[..., before:start, :] = base.tokens.query[..., before:start, :]
        again = drive(case.policy, stream, tokens=replace(base.tokens, query=query), calls=(1,))
        for layer in range(stream.layers):
            ours, theirs = base.of_layer(layer), again.of_layer(layer)
            same = torch.ones(stream.batch, stream.heads, dtype=torch.bool)
            for step in range(max(before - 1, 0), start):
                same &= (ours[step].positions == theirs[step].positions).all(-1)
            end = min(start + layout.line_length, stream.tokens)
            for step in range(start, end):
                changed = (base.held[layer][step] != again.held[layer][step]) & same.unsqueeze(-1)
                differs = first(changed)
                if differs is not None:
                    batch, head, position = differs
                    fail(
                        again,
                        f"whether position {position} stays for line {line} changed with queries "
                        f"outside line {line - 1}",
                        layer=layer,
                        batch=batch,
                        head=head,
                        step=step,
                    )


@register("chunks", "tokens that come in one call are treated as if they had come one by one.")
def _chunks(case: Case) -> None:
    stream, chunked = case.stream, case.trace
    if stream.dtype != "float32" or any(map(chunked.compressed, range(stream.layers))):
        return
    single = case.stepwise
    for layer in range(stream.layers):
        for shot, held in zip(chunked.of_layer(layer), chunked.held[layer], strict=True):
            differs = first(held != single.held[layer][shot.seen - 1])
            if differs is not None and _decisive(case):
                batch, head, position = differs
                fail(
                    chunked,
                    f"after {shot.seen} tokens, position {position} is "
                    f"{'' if held[batch, head, position] else 'not '}cached in calls of "
                    f"{stream.sizes()}, and the other way round one by one",
                    layer=layer,
                    batch=batch,
                    head=head,
                    step=shot.step,
                )
        off = (chunked.outputs[layer] - single.outputs[layer]).abs()
        wrong = first((off > 2e-3 * (1 + single.outputs[layer].abs())).any(-1))
        if wrong is not None and _decisive(case):
            batch, head, position = wrong
            fail(
                chunked,
                f"the output of query {position} is off from what it is one by one, by "
                f"{float(off[batch, head, position].max()):.3g}",
                layer=layer,
                batch=batch,
                head=head // stream.group,
                step=_step_of(chunked, position),
            )


@register("reset", "after reset() a cache is as good as new.")
def _reset(case: Case) -> None:
    other = case.stream.draw(_OTHER + case.stream.seed)
    with global_seed(0):
        again = drive(case.policy, case.stream, used=other)
    for layer in range(case.stream.layers):
        differs = first(case.trace.held[layer] != again.held[layer])
        if differs is not None:
            step, batch, head, position = differs
            fail(
                again,
                f"position {position} is treated otherwise in a cache that was used before",
                layer=layer,
                batch=batch,
                head=head,
                step=step,
            )
        if not torch.equal(bits(case.trace.outputs[layer]), bits(again.outputs[layer])):
            fail(again, "the output is another in a cache that was used before", layer=layer)


@register(
    "reorder",
    "a sequence that select_batch() moves, or repeats, goes on as if it had been there before.",
)
def _reorder(case: Case) -> None:
    stream, steps = case.stream, len(case.stream.sizes())
    if stream.batch == 1 or steps == 1:
        return
    # The last sequence moves to the front, the first one comes twice, one in the middle is lost.
    index = torch.tensor([stream.batch - 1, *[0] * (stream.batch - 1)])
    moved = drive(case.policy, stream, reorder=(steps // 2, index))
    there = drive(case.policy, stream, tokens=case.trace.tokens.selected(index))
    for layer in range(stream.layers):
        differs = first(moved.held[layer][steps // 2 :] != there.held[layer][steps // 2 :])
        if differs is not None and _decisive(case):
            step, batch, head, position = differs
            fail(
                moved,
                f"position {position} is treated otherwise after select_batch({index.tolist()}) "
                f"before step {steps // 2}",
                layer=layer,
                batch=batch,
                head=head,
                step=step + steps // 2,
            )


@register("round trip", "a policy is its parameters: frozen, and the same after JSON and back.")
def _round_trip(case: Case) -> None:
    policy = case.policy
    try:
        again = type(policy).model_validate_json(policy.model_dump_json())
    except Exception as error:
        fail(None, f"JSON and back raised {type(error).__name__}: {error}", layer=0)
    if again != policy:
        fail(None, f"JSON and back gave {again!r}", layer=0)
    if not policy.model_config.get("frozen"):
        fail(None, "its model_config is not frozen", layer=0)


# -- helpers ---------------------------------------------------------------------------------------


def _decisive(case: Case) -> bool:
    """Whether the stream's decisions stand when its tensors are nudged by more than rounding.

    Sums in another order differ in their last bit, which decides between scores that are as good
    as equal. Where two runs may differ in that bit, a difference counts only in a stream that no
    such bit decides.
    """
    base, tokens = case.stepwise, case.stepwise.tokens
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        nudged = [
            tensor * (1 + 1e-5 * torch.randn(tensor.shape, generator=generator))
            + 1e-5 * torch.randn(tensor.shape, generator=generator)
            for tensor in (tokens.query, tokens.key)
        ]
        near = Tokens(
            nudged[0].to(tokens.query.dtype), nudged[1].to(tokens.key.dtype), tokens.value
        )
        again = drive(case.policy, case.stream, tokens=near, calls=(1,))
        if any(not torch.equal(a, b) for a, b in zip(base.held, again.held, strict=True)):
            return False
    return True


def _roomy(case: Case) -> Trace:
    """The run with a budget that gives every layer room for the whole stream."""
    layout, stream = case.stream.layout, case.stream
    if layout.evictable is None:
        floor = case.policy.min_budget(layout)
        # Without a length, a policy may make room for more tokens than there will be.
        enough = budget = stream.tokens + floor
        schedule = case.policy.schedule()
        while budget <= _MOST_ROOM * enough:
            if min(schedule.layers(budget, stream.layers, floor=floor)) >= enough:
                return drive(case.policy, stream, budget=budget)
            budget *= 2
        # A schedule so steep would cost more memory than there is; with a length no layer gets
        # more than that.
        length = max(stream.tokens, layout.prefix + 1)
        stream = replace(stream, layout=layout.model_copy(update={"length": length}))
        layout = stream.layout
    assert layout.evictable is not None
    return drive(case.policy, stream, budget=layout.evictable)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention from scratch in float64; ``[B, G * H, T, D]``."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = query.double() @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    output: Tensor = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
    return output


def _all(tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    return tokens.query, tokens.key, tokens.value


def _spliced(own: Tensor, other: Tensor, dim: int, kept: int, width: int) -> Tensor:
    """``other``, except for the ``kept``-th group of ``width`` along ``dim``, which is ``own``."""
    part = (slice(None),) * dim + (slice(kept * width, (kept + 1) * width),)
    mixed = other.clone()
    mixed[part] = own[part]
    return mixed


def _end(start: int | None) -> int | None:
    return None if start is None else start + 1


def _step_of(trace: Trace, position: int) -> int:
    return next((shot.step for shot in trace.snapshots if shot.seen > position), 0)
