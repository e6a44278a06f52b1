"""Decoders in turn on one subject: passes an image, and how many times as fast as one by one.

A decode step is timed with random weights (:mod:`kvpolicy.lab.bench.rounds`); how many tokens a
pass settles is a matter of real ones, so that here whole images are drawn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvpolicy.cache.cache import PolicyCache
from kvpolicy.decoding import Decoder, Parallel
from kvpolicy.errors import LayoutError, ParameterError
from kvpolicy.lab.bench.report import Grid
from kvpolicy.lab.bench.summary import Ratio
from kvpolicy.lab.run.demo import GROUPS_UNDER
from kvpolicy.lab.run.plan import BASELINE, SEQUENTIAL
from kvpolicy.lab.run.subject import ImageSubject, Setting, layout_under
from kvpolicy.layout import LateLayout, TokenLayout
from kvpolicy.named import make_policy

__all__ = ["Drawer", "Drawing", "Drawn", "Turn", "drawers", "images_of_turn"]

#: What draws classes in turn has then drawn each of ten.
_IMAGES = 10


@dataclass(frozen=True)
class Drawer:
    """Who draws.

    Attributes:
        policy: as it was named.
        decoder: its label.
        setting: both, with the budget.
    """

    policy: str
    decoder: str
    setting: Setting

    @property
    def name(self) -> str:
        """How tables call it, as an ablation would."""
        return self.policy if self.decoder == SEQUENTIAL else f"{self.policy}@{self.decoder}"


@dataclass(frozen=True)
class Turn:
    """The images that one drawer has drawn in one round.

    Attributes:
        round: number of the round.
        drawer: its name.
        seconds: an image, of the clock.
        passes: of the model over the batch that an image is in, mean.
    """

    round: int
    drawer: str
    seconds: float
    passes: float


@dataclass(frozen=True)
class Drawn:
    """What the rounds say of one drawer.

    Attributes:
        name: who.
        passes: of the model over the batch that an image is in, mean over all images.
        seconds: an image, median over the rounds.
        faster: how many times as fast as the same policy's sequential decoding.
    """

    name: str
    passes: float
    seconds: float
    faster: Ratio


def drawers(
    subject: Any, name: str, policies: Sequence[str], decoders: Sequence[str], budget: str
) -> list[Drawer]:
    """Each policy with each decoder, sequential decoding first: the others are compared with it.

    Raises:
        UnknownNameError: there is no such policy or decoder.
        ParameterError: the subject does not draw, nobody takes part, or a decoder does not go with
            the subject's layout.
        LayoutError: a decoder needs another kind of layout.
        BudgetError: the budget is too small for a policy.
    """
    if not isinstance(subject, ImageSubject) or not getattr(subject, "draws", False):
        raise ParameterError(
            f"subject {name!r} does not draw images with decoders (it needs a generate() and "
            f"`draws = True`); try fashion-ar"
        )
    if not policies:
        raise ParameterError("nobody takes part: name at least one policy")
    every = []
    for policy in dict.fromkeys(policies):
        for label in dict.fromkeys(Decoder.parse(d).label for d in (SEQUENTIAL, *decoders)):
            decoder = Decoder.parse(label)
            layout = _layout(subject, decoder)
            made, limit = make_policy(policy, {}), None if policy == BASELINE else budget
            PolicyCache(made, limit, layout=layout, num_layers=subject.num_layers)
            every.append(Drawer(policy, label, Setting(made, limit, decoder)))
    return every


def _layout(subject: ImageSubject, decoder: Decoder) -> TokenLayout | LateLayout:
    """Where tokens sit; says which subject has groups, if this one has none."""
    try:
        return layout_under(subject, decoder)
    except LayoutError as error:
        if not isinstance(decoder, Parallel):
            raise
        raise LayoutError(
            f"subject {subject.name!r} is not asked for tokens in groups, as decoder "
            f"{decoder.label!r} does; 'sequential' and 'sjd' draw with it, and fashion-lpd has "
            f"groups: --subject fashion-lpd --policies {GROUPS_UNDER}"
        ) from error


def images_of_turn(batch: int) -> int:
    """Whole batches, of ten images at least."""
    return batch * -(-_IMAGES // batch)


class Drawing:
    """Rounds in which all draw the same classes, and what has come of those that are finished.

    Args:
        subject: whose images; it draws ``batch`` of them at once.
        drawers: who draws.
        batch: sequences.
        seed: of the first round; each round has its own.
        advance: is told how many turns have been taken, for a progress bar.
    """

    def __init__(
        self,
        subject: ImageSubject,
        drawers: Sequence[Drawer],
        batch: int,
        seed: int,
        advance: Callable[[int], object],
    ) -> None:
        self.subject, self.drawers, self.batch, self.seed = subject, drawers, batch, seed
        self.advance = advance
        self.turns: list[Turn] = []
        self.finished = 0
        self.interrupted = False

    def run(self, rounds: int, minutes: float | None) -> None:
        """Warm up, and draw until the rounds are done, the time is up, or Ctrl-C."""
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        try:
            for drawer in self.drawers:  # not timed: kernels are chosen, code is loaded
                self.subject.generate(drawer.setting, self.batch, self.seed, _ignore)
                self.advance(1)
            for number in range(rounds):
                # Another one begins each time: coming first must not be anybody's privilege.
                first = number % len(self.drawers)
                order = [*self.drawers[first:], *self.drawers[:first]]
                self.turns += [self._turn(drawer, number) for drawer in order]
                self.finished += 1
                if deadline is not None and time.monotonic() > deadline:
                    break
        except KeyboardInterrupt:
            self.interrupted = True

    def _turn(self, drawer: Drawer, number: int) -> Turn:
        images = images_of_turn(self.batch)
        drawn = self.subject.generate(drawer.setting, images, self.seed + 1000 * number, _ignore)
        self.advance(1)
        return Turn(number, drawer.name, drawn.seconds / images, float(drawn.passes.mean()))

    def summary(self) -> list[Drawn]:
        """What the finished rounds say; of one at least."""
        turns = {drawer.name: self._turns_of(drawer.name) for drawer in self.drawers}
        found = []
        for drawer in self.drawers:
            own, plain = (
                [turn.seconds for turn in turns[name]] for name in (drawer.name, drawer.policy)
            )
            value = statistics.median(plain) / statistics.median(own)
            rounds = [one / other for one, other in zip(plain, own, strict=True)]
            found.append(
                Drawn(
                    name=drawer.name,
                    passes=statistics.mean(turn.passes for turn in turns[drawer.name]),
                    seconds=statistics.median(own),
                    faster=Ratio(value, min(value, *rounds), max(value, *rounds)),
                )
            )
        return found

    def _turns_of(self, name: str) -> list[Turn]:
        """A drawer's turns, round by round."""
        return [turn for turn in self.turns if turn.drawer == name]

    def table(self) -> Grid:
        """The summary as a table."""
        rows = [
            (
                drawn.name,
                f"{drawn.passes:.0f}",
                f"{drawn.seconds:.3f}",
                f"{1 / drawn.seconds:.2f}",
                f"{drawn.faster.value:.2f} [{drawn.faster.low:.2f}, {drawn.faster.high:.2f}]",
            )
            for drawn in self.summary()
        ]
        return Grid(
            "Decoding",
            ("", "passes", "s/image", "images/s", "times as fast"),
            rows,
            "passes: of the model over the batch that an image is drawn in. s/image: median over "
            "the rounds. times as fast: as the same policy's sequential decoding "
            "[smallest, largest round].",
        )

    def as_dict(self) -> dict[str, Any]:
        """What ``results.json`` holds of it."""
        return {
            "rounds_finished": self.finished,
            "interrupted": self.interrupted,
            "drawn": [asdict(drawn) for drawn in self.summary()],
            "turns": [asdict(turn) for turn in self.turns],
        }


def _ignore(count: int) -> None:
    """Progress within a turn, which nobody watches: its time is taken."""
