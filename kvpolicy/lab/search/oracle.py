"""Oracles: what ``linear`` would keep if it knew what the coming lines will look at.

Real images are scored twice. In the first pass everything is cached, and what each line looks at is
recorded. In the second a policy that is ``linear`` in all else looks its scores up there. No
estimate of a token's mass from the past, at the same budgets, can be expected to do much better, so
the oracles say what is left to gain. They are for the lab alone: they see the future. In an order
other than raster it is groups that look (:class:`GroupOracle`).
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PrivateAttr
from torch import Tensor

from kvpolicy.errors import ParameterError
from kvpolicy.lab.run.subject import ImageSubject, Setting
from kvpolicy.layout import OrderedLayout
from kvpolicy.observers import AttentionObserver, AttentionReport, Need
from kvpolicy.ops import change
from kvpolicy.policies import Full, Linear
from kvpolicy.policy.policy import ScoredPolicy
from kvpolicy.policy.ranking import leveled
from kvpolicy.policy.view import CacheView
from kvpolicy.slots import SlotShape

__all__ = ["GroupOracle", "Horizon", "LineRecord", "Oracle", "Recorder", "oracle_bits"]

#: The next line alone, or all lines to come.
Horizon = Literal["next", "all"]
_BLOCK = 32  # images of which all mass is held at once


class LineRecord:
    """Mass that each line of a full cache gave to each position: ``[B, H, lines, positions]``."""

    needs: ClassVar[Need] = Need.MASS

    def __init__(self, shape: SlotShape) -> None:
        layout = shape.layout
        if layout.length is None:
            raise ParameterError(f"an oracle needs a layout with a length, not {layout!r}")
        lines = layout.line(layout.length - 1) + 1
        # An observer's reading is by slot; this one has nothing to say there.
        self.mass = torch.zeros(shape.batch, shape.heads, shape.slots, device=shape.device)
        size = (shape.batch, shape.heads, lines, layout.length)
        self.by_line = torch.zeros(size, device=shape.device)

    def observe(self, report: AttentionReport) -> None:
        """Add the queries' mass to their lines; those of the prefix belong to none."""
        for query in range(report.count):
            position = report.first + query
            if position >= report.layout.prefix:
                given = report.mass[:, :, query]
                line = report.layout.line(position)
                self.by_line[:, :, line, : given.shape[-1]] += given

    def forget(self, slots: Tensor) -> None:
        """Nothing is ever evicted from a full cache."""
        raise ParameterError("an oracle's first pass must cache everything")


class Recorder(Full):
    """A full cache that records, layer by layer, what lines looked at."""

    _records: list[LineRecord] = PrivateAttr(default_factory=list)

    def observers(self, shape: SlotShape) -> tuple[AttentionObserver, ...]:
        """A record; layers ask in their order, as their first token comes."""
        self._records.append(LineRecord(shape))
        return (self._records[-1],)

    def worth(self, horizon: Horizon) -> list[Tensor]:
        """Of each layer, what a position is worth where a line begins, ``[B, H, lines, P]``."""
        given = [record.by_line for record in self._records]
        if horizon == "next":
            return given
        return [mass.flip(2).cumsum(2).flip(2) for mass in given]


class Oracle(Linear):
    """``linear``, but with the mass of lines to come in place of that of the last line."""

    _worth: list[Tensor] = PrivateAttr(default_factory=list)

    @classmethod
    def of(cls, recorder: Recorder, horizon: Horizon, like: Linear) -> Oracle:
        """With what a first pass over the same images has recorded."""
        made = cls(**like.model_dump())
        made._worth = recorder.worth(horizon)
        return made

    def score(self, view: CacheView) -> Tensor:
        """What was recorded for the positions of this view, ``[B, H, S]``."""
        worth = self._worth[view.layer]
        if worth.shape[0] != view.positions.shape[0]:
            raise ParameterError(
                f"the oracle has recorded {worth.shape[0]} images and is asked about "
                f"{view.positions.shape[0]}: score no more than one batch at once"
            )
        coming = worth[:, :, min(view.line, worth.shape[2] - 1)]
        return coming.gather(2, view.positions.long().clamp(min=0))


class GroupOracle(ScoredPolicy):
    """The clairvoyant cache of an order: what coming groups give most, recorded beforehand.

    ``score(j) = sum over the next groups of the mass that they give j`` with everything cached.
    What is ``together`` is chosen as in ``ahead``, with that mass in place of an estimate.
    """

    groups: int = Field(4, ge=1, description="coming groups whose mass counts")
    how: Literal["mass", "together"] = "mass"
    _given: list[Tensor] = PrivateAttr(default_factory=list)

    @classmethod
    def of(cls, given: list[Tensor], **parameters: Any) -> GroupOracle:
        """With what groups gave, of each layer ``[B, H, groups, length]``."""
        made = cls(**parameters)
        made._given = given
        return made

    def score(self, view: CacheView) -> Tensor:
        """What was recorded for the positions of this view, ``[B, H, S]``."""
        return self._coming(view).sum(2)

    def choose(self, view: CacheView, count: int, protected: Tensor | None) -> Tensor:
        """What is given least, or changes least of what is read."""
        if self.how == "mass":
            return super().choose(view, count, protected)
        mass = self._coming(view)
        cost = leveled(view, change.alone(view.values, mass), protected)
        return change.together(view.values, mass, cost, view.positions, count)

    def _coming(self, view: CacheView) -> Tensor:
        """Of the coming groups, ``[B, H, groups, S]``; 0 in empty slots.

        Raises:
            ParameterError: other images were recorded, or the layout has no groups.
        """
        layout, given = view.layout, self._given[view.layer]
        if not isinstance(layout, OrderedLayout):
            raise ParameterError(f"an oracle of groups needs an OrderedLayout, not {layout!r}")
        if given.shape[0] != view.positions.shape[0]:
            raise ParameterError(
                f"the oracle has recorded {given.shape[0]} images and is asked about "
                f"{view.positions.shape[0]}: score no more than one batch at once"
            )
        ends = list(accumulate(layout.groups, initial=layout.prefix))
        group = bisect_right(ends, view.seen) - 1
        coming = given[:, :, max(group, 0) : group + self.groups]
        places = view.positions.clamp(min=0).long().unsqueeze(2)
        found = coming.gather(3, places.expand(-1, -1, coming.shape[2], -1))
        return found * (view.positions >= 0).unsqueeze(2)


def oracle_bits(
    subject: ImageSubject,
    budget: str,
    images: int,
    horizon: Horizon,
    *,
    like: Linear | None = None,
    first: int = 0,
) -> NDArray[np.float64]:
    """Bits per pixel of real images under an oracle.

    Args:
        subject: whose real images are scored, in batches of at least 32.
        budget: in any spelling.
        images: how many.
        horizon: the next line alone, or all lines to come.
        like: anchors and recent lines; the defaults of ``linear`` where None.
        first: image to begin with.

    Returns:
        Of each image, float64 ``[images]``.
    """
    bits = []
    for start in range(first, first + images, _BLOCK):
        count = min(_BLOCK, first + images - start)
        recorder = Recorder()
        subject.score(Setting(recorder, None), count, _ignore, first=start)
        oracle = Oracle.of(recorder, horizon, like or Linear())
        bits.append(subject.score(Setting(oracle, budget), count, _ignore, first=start).bits)
    return np.concatenate(bits)


def _ignore(count: int) -> None:
    """Progress that nobody watches."""
