"""A call inside of a stage: tokens that attend as if each came alone, and may be taken back.

Each is written and attends in its turn, exactly as :meth:`Layer.token` has it, and all that it
takes to take a run of them back is kept aside at once. Where the stage asks for it, those with no
decision between them attend together: as wherever several tokens attend at once, sums are those of
one token after the other but for rounding. What observers are to hear waits until it is known how
many of the tokens stay, and is then what those alone would have given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvpolicy.cache.beside import attend_beside, mass_by_slot
from kvpolicy.cache.blocks import block_ends
from kvpolicy.cache.checks import check_tokens
from kvpolicy.cache.staging import StagedLayer, Staging
from kvpolicy.cache.terms import Terms
from kvpolicy.errors import CacheStateError
from kvpolicy.observers import AttentionReport
from kvpolicy.ops.attend import attend, write_and_attend
from kvpolicy.slots import SlotStore

__all__ = ["RunLayer", "RunNews", "attend_staged", "attend_sure"]


class RunLayer(StagedLayer, Protocol):
    """What a call inside of a stage asks of a layer; see :class:`kvpolicy.cache.layer.Layer`."""

    need_mass: bool

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, terms: Terms, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Cache T tokens and attend from them."""

    def decide(self, block: int) -> None:
        """Let the policy make room for ``block`` tokens that are written together."""

    def may_pad(self, terms: Terms) -> bool:
        """Whether there is padding to look for."""

    def token(
        self,
        store: SlotStore,
        slots: Tensor,
        reclaimed: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
    ) -> Tensor:
        """Write a token into the slots it was given, attend from it, and report."""

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        terms: Terms,
        ends: list[int],
        weights: bool,
        length: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from tokens that come with no decision between them, then write them."""

    def report(
        self, mass: Tensor, first: int, room: int, finite: bool | None = None
    ) -> AttentionReport:
        """Mass for the observers, after refusing NaN."""


@dataclass(frozen=True)
class RunNews:
    """What observers are to hear of T tokens that attended together.

    Attributes:
        slots: where they lie, int64 ``[B, H, T]``.
        fresh: how many of them, the first ones, lie in slots that no token had held.
        held: slots that had held a token before.
        report: mass to those slots, and to the new tokens beside them, ``[B, H, T, held + T]``;
            None where nobody asks.
    """

    slots: Tensor
    fresh: int
    held: int
    report: AttentionReport | None

    def of_first(self, count: int) -> tuple[Tensor | None, AttentionReport | None]:
        """Which slots were reclaimed, and what attention did, if only ``count`` had come."""
        slots, report = self.slots[:, :, :count], self.report
        reclaimed = slots[:, :, self.fresh :] if count > self.fresh else None
        if report is None:
            return reclaimed, None
        mass = report.mass[:, :, :count, : self.held + count]
        mass = mass_by_slot(mass, slots, self.held, self.held + min(count, self.fresh))
        room = report.room + self.slots.shape[2] - count
        return reclaimed, AttentionReport(mass, report.first, room, report.layout)


def attend_staged(
    layer: RunLayer,
    staging: Staging,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    weights: bool,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Cache T tokens that may be taken back, and attend from them: runs with no decision within.

    Args:
        layer: the layer, whose slots are there.
        staging: its stage, which has admitted them.
        query: ``[B, G * H, T, D]``.
        key: ``[B, H, T, D]``.
        value: ``[B, H, T, Dv]``.
        terms: of these T queries.
        weights: whether to return what each query head gave to each position.
        wants_gradient: whether a gradient goes back through them.

    Returns:
        Output ``[B, G * H, T, Dv]``, and the weights, or None.
    """
    store, first, count = layer.require_store(), layer.seen, key.shape[2]
    # Observers are told at once of what may be padding, and then told otherwise.
    apart = terms.visible is not None and layer.may_pad(terms)
    if count == 1 and not (apart or weights or wants_gradient):
        if first >= layer.decider.settled:
            layer.decide(1)
        layer.whole = False
        (output,) = _in_turn(layer, staging, query, key, value, terms)
        layer.whole = True
        return output, None
    ends = block_ends(terms.visible, first, count)
    joined = not apart and layer.lending is None
    outputs: list[Tensor] = []
    given: list[Tensor] = []
    done = 0
    while done < count:
        if layer.seen >= layer.decider.settled or ends[done] - done > 1:
            layer.decide(ends[done] - done)
        run = ends[done]
        # Only tokens of a block are written together.
        alone = run - done == 1 and not (weights or wants_gradient)
        if alone and joined:
            calm = done + layer.decider.settled - layer.seen
            while run < count and ends[run] == run + 1 <= calm:
                run += 1
        layer.whole = False
        new = query, key, value, terms
        if run - done < count:
            part = slice(done, run)
            new = query[:, :, part], key[:, :, part], value[:, :, part], terms.rows(part)
        if apart:
            staging.isolate()
        if not alone:
            until = [end - done for end in ends[done:run]]
            output, weight = layer.run(*new, until, weights, first + count)
            outputs.append(output)
            given += [] if weight is None else [weight]
        elif apart:
            slots, reclaimed = store.take(1)
            staging.keep(store, slots, reclaimed is not None)
            outputs.append(layer.token(store, slots, reclaimed, *new))
        elif staging.together and run - done > 1:
            outputs.append(_together(layer, staging, *new))
        else:
            outputs += _in_turn(layer, staging, *new)
        if apart:
            staging.rejoin()
        if layer.lending is not None and alone and run < count:
            layer.lending.copy_slots()
        done = run
    layer.whole = True
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return output, torch.cat(given, dim=2) if weights else None


def _in_turn(
    layer: RunLayer, staging: Staging, query: Tensor, key: Tensor, value: Tensor, terms: Terms
) -> list[Tensor]:
    """Tokens for which there is room, each as :meth:`Layer.token` has it; an output for each."""
    store, first, count = layer.require_store(), layer.seen, key.shape[2]
    fresh, handed_out = store.fresh, store.handed_out
    slots, reclaimed = store.take(count)
    staging.keep(store, slots, reclaimed is not None)
    room = store.room + count - 1
    outputs = []
    new = query, key, value, slots
    each = [new]
    if count > 1:
        each = list(zip(*(tensor.chunk(count, dim=2) for tensor in new), strict=True))
    by_row = count > 1 and (terms.visible is not None or terms.bias is not None)
    for token, (one_query, one_key, one_value, slot) in enumerate(each):
        rows = terms.rows(slice(token, token + 1)) if by_row else terms
        output, mass, finite = write_and_attend(
            store.kernel,
            store.write,
            one_query,
            store.keys,
            store.values,
            store.positions,
            slot,
            one_key,
            one_value,
            first + token,
            handed_out + min(token + 1, fresh),
            scale=rows.scale,
            visible=rows.visible,
            bias=rows.bias,
            softcap=rows.softcap,
            sinks=rows.sinks,
            need_mass=layer.need_mass,
            may_be_empty=store.may_be_empty,
        )
        layer.seen += 1
        outputs.append(output)
        if layer.lending is not None:
            layer.lending.keep(store, rows)
        report = None if mass is None else layer.report(mass, first + token, room - token, finite)
        if token >= fresh or report is not None:
            staging.hear(first + token, slot if token >= fresh else None, report)
    return outputs


def _together(
    layer: RunLayer, staging: Staging, query: Tensor, key: Tensor, value: Tensor, terms: Terms
) -> Tensor:
    """Write T tokens for which there is room, and attend from all of them at once."""
    store, first, count = layer.require_store(), layer.seen, key.shape[2]
    old, fresh = store.cached(), min(store.fresh, count)
    slots, reclaimed = store.take(count)
    staging.keep(store, slots, reclaimed is not None)
    if terms.visible is None and terms.bias is None and not store.may_be_empty:
        output, mass = _attend_plainly(query, key, value, terms, old, reclaimed, layer.need_mass)
    else:
        # One part: decisions are foreseen no further ahead than as many queries attend at once.
        (part,) = attend_beside(
            query,
            key,
            value,
            terms,
            list(range(1, count + 1)),
            seen=first,
            old=old,
            slots=slots,
            need_mass=layer.need_mass,
            weights=False,
        )
        output, mass = part.output, part.mass
    if layer.observers:
        told = None if mass is None else layer.report(mass, first, store.room)
        staging.hear_run(first, RunNews(slots, fresh, old[2].shape[2], told))
    store.write(slots, key.detach(), value.detach(), first)
    layer.seen = first + count
    return output


def _attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    old: tuple[Tensor, Tensor, Tensor],
    reclaimed: Tensor | None,
    need_mass: bool,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention to old slots that all hold a token, each until it is reclaimed."""
    count, held = query.shape[2], old[0].shape[2]
    batch, heads = key.shape[:2]
    rows = 1 if reclaimed is None else heads
    visible = query.new_ones(batch, rows, count, held + count, dtype=torch.bool)
    causal = visible.new_ones(count, count).tril()
    visible[..., held:] = causal
    if reclaimed is not None:
        # The last tokens are those that reclaim: an old slot is seen before its turn.
        turns = ~causal[:, count - reclaimed.shape[2] :]
        into = reclaimed.unsqueeze(2).expand(batch, heads, *turns.shape)
        visible.scatter_(3, into, turns.expand_as(into))
    return attend(
        query,
        torch.cat([old[0], key], dim=2),
        torch.cat([old[1], value], dim=2),
        scale=terms.scale,
        visible=visible,
        softcap=terms.softcap,
        sinks=terms.sinks,
        need_mass=need_mass,
    )


def attend_sure(
    layer: RunLayer,
    staging: Staging,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Terms,
    weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Cache tokens that come for sure, before the first that is staged, and those behind it.

    Args, returns and errors are those of :meth:`Layer.attend`.

    Raises:
        CacheStateError: the mask lets sure tokens see staged ones.
    """
    opens, first = staging.opens, layer.seen
    assert opens is not None
    if first == opens:  # it was refused when it was to open
        staging.start()
        return layer.attend(query, key, value, terms, weights)
    check_tokens(query, key, value)
    terms.check(key, query.shape[1], first)
    count = key.shape[2]
    sure = min(opens - first, count)
    end, length = first + sure, first + count
    if terms.visible is not None and bool(terms.visible[:, :, :sure, end:].any()):
        raise CacheStateError(
            f"tokens before position {opens} are not staged, but the mask lets them see tokens "
            f"that are; stage all of them, or bring them apart"
        )

    def part(rows: slice, end: int) -> tuple[Tensor, Tensor | None]:
        new = query[:, :, rows], key[:, :, rows], value[:, :, rows]
        return layer.attend(*new, terms.rows(rows).columns(end), weights)

    layer.staging = None
    try:
        output, given = part(slice(0, sure), end)
    finally:
        layer.staging = staging
    if end == opens:
        staging.start()
    if sure == count:
        return output, given
    passes = [] if layer.lending is None else [each.copied() for each in layer.lending.passes]
    rest, more = part(slice(sure, count), length)
    if layer.lending is not None:
        layer.lending.passes = passes + layer.lending.passes
    output = torch.cat([output, rest], dim=2)
    if given is None or more is None:
        return output, None
    wider = torch.nn.functional.pad(given, (0, length - end))
    return output, torch.cat([wider, more], dim=2)
