"""ahead: what each coming token will read, with and without a token, in any order of tokens."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from kvpolicy.budget.span import Span
from kvpolicy.ops import change
from kvpolicy.parts import anchors, register_part
from kvpolicy.parts.offsets import OffsetsFile
from kvpolicy.policies.near import Horizon, coming, squared_distances
from kvpolicy.policy.policy import CacheView, ScoredPolicy
from kvpolicy.policy.ranking import leveled, lowest
from kvpolicy.registry import register

__all__ = ["Ahead", "change_ahead", "foreseen", "least_change_ahead"]

_TINY = 1e-30

_BESIDE = 0.1

Fall = Annotated[
    float,
    Field(ge=0, le=16, description="attention falls off with the distance d as 1 / d^fall"),
]
Far = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="attention that a token gets at any distance, where one beside gets 1",
    ),
]
How = Annotated[
    Literal["alone", "together", "mass"],
    Field(
        description="what is kept small: the change of what is read, by each token alone or by all "
        "that goes together; or the attention that goes"
    ),
]
Offsets = Annotated[
    OffsetsFile | None,
    Field(description="file of what each head gives by offset, from kvpolicy offsets"),
]


@register("ahead")
class Ahead(ScoredPolicy):
    """Evict what changes least of what the coming tokens will read.

    Which tokens come next is known, and so is what lies near them: each is taken to look at cached
    tokens of the image by their distance alone,

    ``A[t, j] = a(t, j) / sum over i of a(t, i)``, where ``a(t, j) = d(t, j)^-fall + far``

    and d is the distance in rows and columns (:class:`kvpolicy.OrderedLayout`; without one,
    tokens come line by line). Heads of a model differ: some look one row up, some everywhere. Where
    that has been measured (:func:`kvpolicy.watch_offsets`), ``a(t, j)`` is what queries of the head
    gave on average to tokens that lay so from them, and a tenth of the above beside it. Token t
    then reads ``o_t = sum_j A[t, j] v_j``, and without token j something else: but for a factor
    the change is ``A[t, j] (o_t - v_j)``, so that

    ``score(j) = sum over the next tokens t of A[t, j]^2 |o_t - v_j|^2``

    A token may go although it is near, if what lies beside it says the same. Nothing is observed:
    the score follows from the order and the cached values.
    """

    anchors: Span = Field(
        0, description="first image tokens that are never evicted, or lines of them"
    )
    horizon: Horizon = "4 lines"
    fall: Fall = 4.0
    far: Far = 0.003
    offsets: Offsets = None

    def check(self, num_layers: int) -> None:
        """Refuse offsets of another model."""
        if self.offsets is not None:
            self.offsets.found.check(num_layers)

    def protect(self, view: CacheView) -> Tensor:
        """The first tokens of the image stay, if any are to."""
        return anchors(view, self.anchors)

    def score(self, view: CacheView) -> Tensor:
        """How much each token changes what the next ones read, if it goes."""
        return change_ahead(view, self.horizon, self.fall, far=self.far, offsets=self.offsets)


def foreseen(
    view: CacheView,
    horizon: int | str,
    fall: float,
    far: float = 0.0,
    offsets: OffsetsFile | None = None,
) -> Tensor:
    """How each coming token is taken to look at each cached one, float32 ``[B, H, T, S]``.

    The prefix stays in any case, and has no distance: it gets 0, as empty slots do. Behind the last
    token nothing comes, and the last one is thought of again.

    Raises:
        ParameterError: offsets are of another number of layers or heads.
    """
    first, end = coming(view.layout, view.seen, view.tokens(horizon))
    first = min(first, end - 1)
    squares = squared_distances(view.layout, view.seen, first, end)
    # By place; only the last token, thought of again, has no distance to itself.
    by_place = (squares.clamp(min=1) ** (-fall / 2)).add_(far).to(view.positions.device)
    places = view.positions.clamp(min=0).long()
    if offsets is not None:
        found, device = offsets.found, places.device
        found.check(view.num_layers)
        found.check_heads(view.layer, places.shape[1])
        measured = found.given(view.layer, view.layout, view.seen, first, end, device)
        # A head that hardly looks there still prefers what is near to what is far.
        by_place = measured.add_(by_place, alpha=_BESIDE).flatten(0, 1)
        of_head = torch.arange(0, len(by_place), view.seen, device=device)
        places = places + of_head.unsqueeze(-1)
    looks = functional.embedding(places, by_place)
    looks *= (view.positions >= view.layout.prefix).unsqueeze(-1)
    looks /= looks.sum(2, keepdim=True).clamp_(min=_TINY)
    return looks.transpose(2, 3).clone(memory_format=torch.contiguous_format)


def change_ahead(
    view: CacheView,
    horizon: Horizon = "4 lines",
    fall: Fall = 4.0,
    how: How = "alone",
    far: Far = 0.003,
    offsets: Offsets = None,
) -> Tensor:
    """What changes if a token goes alone: ``sum_t A[t, j]^2 |o_t - v_j|^2``, ``[B, H, S]``.

    Values of a head are in units of the largest number among them, once they are centred. Where
    ``how`` is ``mass``, how much is looked at it: ``sum_t A[t, j]``.
    """
    looks = foreseen(view, horizon, fall, far, offsets)
    return looks.sum(2) if how == "mass" else change.alone(view.values, looks)


def least_change_ahead(
    view: CacheView,
    count: int,
    protected: Tensor | None,
    horizon: int | str,
    fall: float,
    how: str = "alone",
    far: float = 0.003,
    offsets: OffsetsFile | None = None,
) -> Tensor:
    """The lowest of :func:`change_ahead`; ``together``, each adds least to what has gone before it.

    ``together`` is for comparison: ``sum over t of |sum_{j in E} A[t, j] (o_t - v_j)|^2`` is kept
    small by adding the token to E that increases it least, again and again, as in ``linear2d``.

    Returns:
        Slots, int64 ``[B, H, count]``, in the order in which they go.
    """
    looks = foreseen(view, horizon, fall, far, offsets)
    alone = looks.sum(2) if how == "mass" else change.alone(view.values, looks)
    if how != "together":
        return lowest(view, count, alone, protected)
    cost = leveled(view, alone, protected)
    return change.together(view.values, looks, cost, view.positions, count)


register_part("score", "change_ahead", choose=least_change_ahead)(change_ahead)
