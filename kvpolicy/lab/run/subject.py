"""Subjects: what policies are tried on.

A subject brings a model, real data and measures. Packages add theirs through the entry-point
group ``kvpolicy.subjects``; the lab never imports an adapter by itself.

An ablation needs no more than a :class:`Subject`; the oracles of ``lab.search`` score real images
of an :class:`ImageSubject`. What ships is both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from kvpolicy.cache.stats import CacheStats
from kvpolicy.decoding import Decoder, Sequential
from kvpolicy.errors import ParameterError, near_matches
from kvpolicy.layout import LateLayout, RasterLayout, TokenLayout
from kvpolicy.named import is_path, load_object
from kvpolicy.policy.policy import EvictionPolicy
from kvpolicy.registry import Registry

__all__ = [
    "SUBJECTS",
    "Advance",
    "Generated",
    "ImageSubject",
    "Measurement",
    "Metric",
    "MetricInfo",
    "Scored",
    "Setting",
    "Subject",
    "Watch",
    "Watchable",
    "layout_under",
    "load_subject",
]

#: Called with the number of finished steps since the last call.
Advance = Callable[[int], None]

#: Looks on at a cache while a block runs, and gives what it has seen: ``kvpolicy.trace``, say.
Watch = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Setting:
    """One policy at one budget, and how tokens are drawn under it.

    Attributes:
        policy: the policy.
        budget: as a user would spell it; None for everything.
        decoder: what draws tokens; it must not be passed over where a subject draws.
    """

    policy: EvictionPolicy
    budget: str | None
    decoder: Decoder = field(default_factory=Sequential)


@dataclass(frozen=True)
class Scored:
    """How well real images are predicted under a setting.

    Attributes:
        bits: bits per pixel of each image, float64 ``[n]``.
        stats: what the cache of the last batch cost.
    """

    bits: NDArray[np.float64]
    stats: CacheStats


@dataclass(frozen=True)
class Generated:
    """Images drawn under a setting.

    Attributes:
        images: grey images, uint8 ``[n, rows, cols]``.
        features: what the Fréchet distance compares, float64 ``[n, F]``.
        correct: whether a classifier sees the class that was asked for, bool ``[n]``.
        classes: the class asked for, int64 ``[n]``.
        seconds: time that generating took.
        stats: what the cache of the last batch cost.
        batch: sequences in that batch.
        passes: of the model over the batch that each image was drawn in, int64 ``[n]``.
    """

    images: NDArray[np.uint8]
    features: NDArray[np.float64]
    correct: NDArray[np.bool_]
    classes: NDArray[np.int64]
    seconds: float
    stats: CacheStats
    batch: int
    passes: NDArray[np.int64]


class MetricInfo(BaseModel):
    """What a figure means.

    Attributes:
        name: column of the tables.
        label: for people, with its unit: ``bits per pixel``.
        better: which way it is better; None where it is neither (a size of the cache).
        array: per-item array of a :class:`Measurement` that it is computed from, and by which it
            is compared pairwise; None for a figure without items.
        items: array that says which item each row of ``array`` is; rows of one item (scored under
            two seeds, say) count as one. None where every row of every seed is another item.
        timing: whether it is a matter of the machine, and not repeatable to the bit.
        about: one sentence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    label: str
    better: Literal["lower", "higher"] | None = "lower"
    array: str | None = None
    items: str | None = None
    timing: bool = False
    about: str = ""


class Metric(MetricInfo):
    """A figure, and how it is computed.

    Attributes:
        statistic: of ``array``, ``[n, ...]`` to a number; the mean where it is None.
    """

    statistic: Callable[[NDArray[Any]], float] | None = Field(None, exclude=True, repr=False)


@dataclass(frozen=True)
class Measurement:
    """What a subject found out about one setting.

    Attributes:
        arrays: per-item arrays by name, ``[n, ...]``.
        stats: what the cache of one batch cost.
        batch: sequences in that batch.
        figures: figures that come from no array, by the name of their metric.
        images: what was drawn, uint8 ``[n, rows, cols]``, or ``[n, rows, cols, 3]`` in colour; None
            where nothing was.
        trace: every decision as the bytes of a safetensors file, where it was asked for.
    """

    arrays: Mapping[str, NDArray[Any]]
    stats: CacheStats
    batch: int = 1
    figures: Mapping[str, float] = field(default_factory=dict)
    images: NDArray[np.uint8] | None = None
    trace: bytes | None = None


@runtime_checkable
class Subject(Protocol):
    """What an ablation needs: a layout to check budgets with, metrics, and one method.

    A subject may also have ``class_names`` (a tuple of strings), ``device``, and
    ``estimate(setting) -> float``, the seconds that ``measure`` will take, found out in about one,
    and ``trace(setting, seed) -> bytes``, the file of a :class:`kvpolicy.Trace` of a few items, the
    same ones for every setting: for a run with ``trace``, and the report's viewer. One that draws
    with ``setting.decoder`` says so: ``draws = True``; another is tried sequentially only. One
    whose tokens come in an order that depends on the decoder has
    ``layout_under(decoder) -> TokenLayout``, which raises where it can't draw with that one.

    Attributes:
        name: for people.
        layout: where tokens sit.
        num_layers: layers that have a cache.
        metrics: what is measured; the first one is the main one.
    """

    name: str
    layout: TokenLayout | LateLayout
    num_layers: int
    metrics: tuple[Metric, ...]

    def measure(self, setting: Setting, seed: int, wanted: Collection[str]) -> Measurement:
        """Measure one setting.

        Args:
            setting: policy and budget.
            seed: which items, and which random numbers: with one seed, every setting must see
                the same ones, because settings are compared item by item. Seeds should see
                different items.
            wanted: names of the metrics that are asked for; what only others need can be left out.
        """


@runtime_checkable
class Watchable(Protocol):
    """A subject whose cache can be watched while it scores real images."""

    def watched(self, setting: Setting, seed: int, images: int, watch: Watch) -> Any:
        """Score a seed's first images while ``watch(cache)`` looks on; what that gave."""


@runtime_checkable
class ImageSubject(Protocol):
    """An autoregressive image model with real images and measures."""

    name: str
    layout: RasterLayout
    num_layers: int
    class_names: tuple[str, ...]

    def score(self, setting: Setting, images: int, advance: Advance, *, first: int = 0) -> Scored:
        """Teacher-force real held-out images from ``first`` on; ``advance`` counts images."""

    def generate(self, setting: Setting, images: int, seed: int, advance: Advance) -> Generated:
        """Draw images, classes in turn; ``advance`` counts tokens of a batch."""

    def reference(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean ``[F]`` and covariance ``[F, F]`` of the features of real images."""


SUBJECTS: Registry[Callable[..., Subject]] = Registry("subject", "kvpolicy.subjects")


def layout_under(drawing: Any, decoder: Decoder) -> TokenLayout | LateLayout:
    """Where the tokens of a subject, or of an image model, sit when a decoder draws them.

    Raises:
        ParameterError: it can't draw with this decoder.
        LayoutError: likewise.
    """
    under = getattr(drawing, "layout_under", None)
    layout: TokenLayout | LateLayout = drawing.layout if under is None else under(decoder)
    if isinstance(layout, TokenLayout):
        decoder.check(layout)
    return layout


def load_subject(name: str, options: Mapping[str, Any] | None = None) -> Subject:
    """Make a subject.

    Args:
        name: in the registry, or ``package.module:Class``.
        options: keyword arguments for it.

    Raises:
        UnknownNameError: no subject has this name; near matches are listed.
        ParameterError: it can't be loaded, has no such option, or what it makes is no subject.
    """
    options = options or {}
    if is_path(name):
        maker = load_object("subject", name)
        # Before it is called: a name must not be a way to call whatever Python has.
        if not (isinstance(maker, type) and callable(getattr(maker, "measure", None))):
            raise ParameterError(
                f"subject {name!r} is {maker!r}, not a class with a method measure(); see "
                f"kvpolicy.lab.run.subject.Subject"
            )
    else:
        maker = SUBJECTS.get(name)
    _check_options(name, maker, options)
    subject = maker(**options)
    if not isinstance(subject, Subject):
        needed = ("name", "layout", "num_layers", "metrics", "measure")
        missing = [member for member in needed if not hasattr(subject, member)]
        raise ParameterError(f"subject {name!r} made {subject!r}, which lacks {', '.join(missing)}")
    _check_metrics(name, [metric.name for metric in subject.metrics])
    return subject


#: Columns that every table has; see :mod:`kvpolicy.lab.show.tables`.
_COLUMNS = frozenset(
    [
        "cell",
        "subject",
        "policy",
        "label",
        "decoder",
        "parameters",
        "budget",
        "budget_tokens",
        "seed",
        "seeds",
        "overhead_bytes",
        "evictions",
        "seconds",
        "peak_tokens",
        "cache_bytes",
    ]
)
#: What a metric's further columns end in.
_ENDS = ("_low", "_high", "_delta", "_delta_low", "_delta_high", "_p", "_clear")


def _check_metrics(subject: str, names: Sequence[str]) -> None:
    """Refuse names that would share a column of a table."""
    if not names or len(set(names)) != len(names):
        raise ParameterError(
            f"subject {subject!r}: its metrics must have different names, not {list(names)}"
        )
    taken = _COLUMNS | {name + end for name in names for end in _ENDS}
    for name in names:
        if name in taken:
            raise ParameterError(
                f"subject {subject!r}: metric {name!r} is also the name of a column of the tables; "
                f"give it another name"
            )


def _check_options(name: str, maker: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        takes = inspect.signature(maker).parameters
    except (TypeError, ValueError):  # some things built in do not say what they take
        return
    missing = [
        f"{option}=..."
        for option, parameter in takes.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and option not in options
    ]
    if missing:
        raise ParameterError(f"subject {name!r} needs the options {' '.join(missing)}")
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return
    for option in options:
        if option not in takes:
            raise ParameterError(
                f"subject {name!r} has no option {option!r}; {near_matches(option, takes)}"
            )
