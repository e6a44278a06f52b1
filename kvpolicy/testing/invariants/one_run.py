"""What one run shows: budgets, pins, lines, truth, decisions, counts."""

from __future__ import annotations

import torch

from kvpolicy.budget.span import tokens_of
from kvpolicy.layout import TokenLayout
from kvpolicy.policies import Near
from kvpolicy.testing.claims import anchors_of, is_line_by_line, lines_kept
from kvpolicy.testing.invariants.invariant import Case, bits, fail, first, register


@register(
    "runs", "with any budget from min_budget up, every stream runs to its end; no score is NaN."
)
def _runs(case: Case) -> None:
    assert case.trace.stats is not None


@register("decision", "a decision names as many distinct slots of the layer as were asked for.")
def _decision(case: Case) -> None:
    for decision in case.trace.decisions:
        at = {"layer": decision.layer, "step": decision.step}
        if not decision.well_formed():
            fail(
                case.trace,
                f"victims() gave {decision.slots.dtype} {decision.slots.tolist()} before position "
                f"{decision.seen}; expected int64 [B, H, {decision.count}] out of the "
                f"{decision.handed_out} slots that have been handed out",
                **at,
            )
        ordered = decision.slots.sort(dim=-1).values
        twice = first(ordered[..., 1:] == ordered[..., :-1])
        if twice is not None:
            batch, head, place = twice
            fail(
                case.trace,
                f"slot {int(ordered[batch, head, place])} is named twice before position "
                f"{decision.seen}",
                batch=batch,
                head=head,
                **at,
            )


@register("budget", "at no instant does a head hold more than the prefix and the layer's budget.")
def _budget(case: Case) -> None:
    trace = case.trace
    prefix = case.stream.layout.prefix
    for shot in sorted([*trace.instants, *trace.snapshots], key=lambda shot: shot.step):
        held = (shot.positions >= 0).sum(-1)
        most = prefix + trace.budgets[shot.layer]
        over = first(held > most)
        if over is not None:
            batch, head = over
            fail(
                trace,
                f"holds {int(held[batch, head])} tokens {shot.moment}, with {shot.seen} seen; "
                f"prefix {prefix} + budget {trace.budgets[shot.layer]} allow {most}",
                layer=shot.layer,
                batch=batch,
                head=head,
                step=shot.step,
            )


@register(
    "pins",
    "the prefix, anchors and sinks are never evicted, nor is what protect() names at a decision.",
)
def _pins(case: Case) -> None:
    trace = case.trace
    pinned = case.stream.layout.prefix + anchors_of(case.policy, case.stream.layout)
    for shot in trace.snapshots:
        must = torch.arange(case.stream.tokens) < min(pinned, shot.seen)
        lost = first((shot.present(case.stream.tokens) == 0) & must)
        if lost is not None:
            batch, head, position = lost
            fail(
                trace,
                f"pinned position {position} is no longer cached after {shot.seen} tokens",
                layer=shot.layer,
                batch=batch,
                head=head,
                step=shot.step,
            )
    for decision in trace.decisions:
        if not decision.well_formed():
            continue
        lost = first(decision.protected.gather(2, decision.slots))
        if lost is not None:
            batch, head, place = lost
            position = int(decision.positions[batch, head, decision.slots[batch, head, place]])
            fail(
                trace,
                f"protected position {position} is a victim before position {decision.seen}",
                layer=decision.layer,
                batch=batch,
                head=head,
                step=decision.step,
            )


@register(
    "line locality",
    "every token of the current line and of the last recent_lines lines is cached.",
    is_line_by_line,
)
def _line_locality(case: Case) -> None:
    layout: TokenLayout = case.stream.layout
    recent_lines = lines_kept(case.policy, layout)
    positions = torch.arange(case.stream.tokens)
    for shot in case.trace.snapshots:
        # A compressed prompt has made room for the line of the token to come.
        compressed = shot.step == 0 and case.trace.compressed(shot.layer)
        current = layout.line(shot.seen if compressed else shot.seen - 1)
        must = (layout.line(positions) >= current - recent_lines) & (positions < shot.seen)
        lost = first((shot.present(case.stream.tokens) == 0) & must)
        if lost is not None:
            batch, head, position = lost
            fail(
                case.trace,
                f"position {position} of line {layout.line(position)} is not cached after "
                f"{shot.seen} tokens, in line {current}",
                layer=shot.layer,
                batch=batch,
                head=head,
                step=shot.step,
            )


@register(
    "once gone, gone", "an evicted position never comes back, and no head holds a position twice."
)
def _once_gone(case: Case) -> None:
    trace = case.trace
    for layer, held in enumerate(trace.held):
        shots = trace.of_layer(layer)
        for before, step in zip([None, *range(len(shots))], range(len(shots)), strict=False):
            at = {"layer": layer, "step": shots[step].step}
            twice = first(held[step] > 1)
            if twice is not None:
                batch, head, position = twice
                fail(trace, f"position {position} is held twice", batch=batch, head=head, **at)
            strange = first(held[step][..., shots[step].seen :] > 0)
            if strange is not None:
                batch, head, ahead = strange
                fail(
                    trace,
                    f"position {shots[step].seen + ahead} is held before it has come",
                    batch=batch,
                    head=head,
                    **at,
                )
            if before is None:
                continue
            old = torch.arange(case.stream.tokens) < shots[before].seen
            back = first((held[step] > 0) & (held[before] == 0) & old)
            if back is not None:
                batch, head, position = back
                fail(
                    trace,
                    f"position {position} had been evicted and is cached again",
                    batch=batch,
                    head=head,
                    **at,
                )


@register(
    "truth",
    "a slot's key and value are bit for bit those of the position it claims, and no observer's "
    "reading outlives its token.",
)
def _truth(case: Case) -> None:
    trace = case.trace
    for shot in trace.snapshots:
        where = shot.positions.clamp(min=0).to(torch.int64).unsqueeze(-1)
        for name, held, given in (
            ("key", shot.keys, trace.tokens.key[shot.layer]),
            ("value", shot.values, trace.tokens.value[shot.layer]),
        ):
            assert held is not None
            true = given.gather(2, where.expand(*where.shape[:3], given.shape[-1]))
            wrong = first(((bits(held) != bits(true)).any(-1)) & (shot.positions >= 0))
            if wrong is not None:
                batch, head, slot = wrong
                fail(
                    trace,
                    f"slot {slot} claims position {int(shot.positions[batch, head, slot])}, but "
                    f"holds another {name}",
                    layer=shot.layer,
                    batch=batch,
                    head=head,
                    step=shot.step,
                )
    for stale in trace.stale:
        wrong = first(stale.reading != stale.fresh)
        if wrong is not None:
            batch, head, place = wrong
            fail(
                trace,
                f"{stale.observer}.forget left {float(stale.reading[batch, head, place]):g} in "
                f"slot {int(stale.slots[batch, head, place])}, which now holds another token",
                layer=stale.layer,
                batch=batch,
                head=head,
                step=stale.step,
            )


@register("full use", "a slot is left empty only while nothing has been evicted (lazy reclaim).")
def _full_use(case: Case) -> None:
    if case.stream.reclaim != "lazy":
        return
    for shot in case.trace.snapshots:
        held = (shot.positions >= 0).sum(-1)
        capacity = case.stream.layout.prefix + case.trace.budgets[shot.layer]
        idle = first(held < min(shot.seen, capacity))
        if idle is not None:
            batch, head = idle
            fail(
                case.trace,
                f"holds {int(held[batch, head])} tokens after {shot.seen}, but has "
                f"{capacity} slots",
                layer=shot.layer,
                batch=batch,
                head=head,
                step=shot.step,
            )


@register("stats", "stats() tells what happened: budgets, peaks, evictions, tokens.")
def _stats(case: Case) -> None:
    trace, stream = case.trace, case.stream
    stats = trace.stats
    assert stats is not None
    for layer in range(stream.layers):
        counts = [int((shot.positions >= 0).sum(-1).max()) for shot in trace.of_layer(layer)]
        lost = stream.tokens - counts[-1]
        most = stream.layout.prefix + stats.budgets[layer]
        # Within a call of many tokens a layer may have held more than at its end.
        if not max(counts) <= stats.peak_tokens[layer] <= min(most, stream.tokens):
            fail(
                trace,
                f"peak_tokens says {stats.peak_tokens[layer]}; up to {max(counts)} were seen, and "
                f"{most} are allowed",
                layer=layer,
            )
        if stats.evictions[layer] != lost:
            fail(trace, f"evictions says {stats.evictions[layer]}; {lost} are gone", layer=layer)
    if stats.seen != stream.tokens:
        fail(trace, f"seen says {stats.seen} after {stream.tokens} tokens", layer=0)
    on_average = case.stream.budget
    if stream.layout.evictable is not None:
        on_average = min(on_average, stream.layout.evictable)
    if sum(stats.budgets) != on_average * stream.layers:
        fail(trace, f"budgets {stats.budgets} are not {on_average} on average", layer=0)


@register(
    "nearest stays",
    "what goes is, of the tokens that may go, what lies farthest on the grid from the next ones.",
    lambda policy: isinstance(policy, Near),
)
def _nearest_stays(case: Case) -> None:
    """Distances are worked out anew, token by token, from rows and columns."""
    policy, layout, trace = case.policy, case.stream.layout, case.trace
    assert isinstance(policy, Near)
    for decision in trace.decisions:
        end = decision.seen + tokens_of(policy.horizon, layout)
        end = end if layout.length is None else min(end, layout.length)
        coming = [(layout.line(t), layout.column(t)) for t in range(decision.seen, end)]
        near = torch.tensor(
            [
                sum(
                    1 / ((layout.line(j) - row) ** 2 + (layout.column(j) - column) ** 2)
                    for row, column in coming
                )
                for j in range(decision.seen)
            ],
            dtype=torch.float32,  # behind the last token nothing comes, and each sum is a 0
        )
        held = near[decision.positions.clamp(min=0).long()]
        goes = torch.zeros_like(held, dtype=torch.bool).scatter_(2, decision.slots, True)
        may_go = (decision.positions >= 0) & ~decision.protected
        farthest = held.masked_fill(goes | ~may_go, torch.inf).amin(2, keepdim=True)
        wrong = first(goes & may_go & (held > farthest * (1 + 1e-5)))
        if wrong is not None:
            batch, head, slot = wrong
            fail(
                trace,
                f"position {int(decision.positions[batch, head, slot])} goes before position "
                f"{decision.seen} comes, and is nearer to what comes than one that stays",
                layer=decision.layer,
                batch=batch,
                head=head,
                step=decision.step,
            )
