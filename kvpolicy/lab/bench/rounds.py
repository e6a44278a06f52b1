"""Rounds: contenders take turns line by line: whatever the machine does hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvpolicy.lab.bench.contender import Session

__all__ = ["Block", "Plan", "Rounds", "lines_of_round"]


@dataclass(frozen=True)
class Block:
    """One line of one image, decoded by one contender.

    Attributes:
        round: number of the round.
        line: line of the image.
        contender: its name.
        seconds: of each step.
        read: cached tokens that attention read in each step, mean over layers.
    """

    round: int
    line: int
    contender: str
    seconds: list[float]
    read: list[float]

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, as ``results.json`` holds them."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        lines: lines of the image that are decoded.
        line_length: tokens of a line.
        rounds: images at most.
        every: measure every so-manieth line, the first and the last included, another choice in
            each round; the lines between are filled with random keys and values.
        minutes: stop after the first round that ends later, in the middle of one; None for never.
        whole_images: let each contender decode its whole image before the next one's turn, and give
            its cache back, so that only one cache is in memory at a time.
    """

    lines: int
    line_length: int
    rounds: int
    every: int = 1
    minutes: float | None = None
    whole_images: bool = False

    @property
    def measured(self) -> int:
        """Lines of each contender that are measured in all rounds together."""
        return sum(len(lines_of_round(self, number)) for number in range(self.rounds))


def lines_of_round(plan: Plan, number: int) -> list[int]:
    """The lines that a round measures."""
    chosen = range(number % plan.every, plan.lines, plan.every)
    return sorted({0, plan.lines - 1, *chosen})


class Rounds:
    """Measures, and keeps what is finished.

    Args:
        sessions: the contenders.
        plan: how long.
        advance: called with the number of lines done, for a progress bar.
    """

    def __init__(
        self, sessions: Sequence[Session], plan: Plan, advance: Callable[[int], object]
    ) -> None:
        self.sessions = sessions
        self.plan = plan
        self.advance = advance
        self.blocks: list[Block] = []
        self.cache_bytes: dict[str, int] = {}
        self.finished = 0
        self.interrupted = False

    def warm_up(self) -> None:
        """Let every contender decode a line that isn't timed: kernels are chosen, code compiled."""
        for session in self.sessions:
            session.restart()
            session.run(self.plan.line_length)

    def run(self, keep: Callable[[], object] = lambda: None) -> None:
        """Measure round after round; Ctrl-C ends it, and what is finished counts.

        Args:
            keep: called after each round, to save what there is.
        """
        deadline = None
        if self.plan.minutes is not None:
            deadline = time.monotonic() + 60 * self.plan.minutes
        one_round = self._by_image if self.plan.whole_images else self._by_line
        try:
            for number in range(self.plan.rounds):
                # The first round is always whole: without it there is nothing to say.
                if not one_round(number, deadline if number else None):
                    break
                self.finished += 1
                keep()
                if deadline is not None and time.monotonic() > deadline:
                    break
        except KeyboardInterrupt:
            self.interrupted = True

    def _by_line(self, number: int, deadline: float | None) -> bool:
        """All contenders decode the same line before the next one."""
        chosen = set(lines_of_round(self.plan, number))
        for session in self.sessions:
            session.restart()
        for line in range(self.plan.lines):
            if line not in chosen:
                for session in self.sessions:
                    session.skip(self.plan.line_length)
                continue
            if deadline is not None and time.monotonic() > deadline:
                return False
            # Another one begins each time: coming first must not be anybody's privilege.
            first = (line + number) % len(self.sessions)
            order = [*self.sessions[first:], *self.sessions[:first]]
            # All of them or none: a line that is interrupted does not count.
            self.blocks += [self._block(session, number, line) for session in order]
        for session in self.sessions:
            self.cache_bytes[session.contender.name] = session.cache_bytes()
        return True

    def _by_image(self, number: int, deadline: float | None) -> bool:
        """Each contender decodes all of its lines; an image that isn't finished doesn't count."""
        chosen = set(lines_of_round(self.plan, number))
        done: list[Block] = []
        first = number % len(self.sessions)
        for session in (*self.sessions[first:], *self.sessions[:first]):
            if deadline is not None and time.monotonic() > deadline:
                return False
            session.restart()
            for line in range(self.plan.lines):
                if line in chosen:
                    done.append(self._block(session, number, line))
                else:
                    session.skip(self.plan.line_length)
            self.cache_bytes[session.contender.name] = session.cache_bytes()
            session.release()
        self.blocks += done
        return True

    def _block(self, session: Session, number: int, line: int) -> Block:
        session.wake()
        seconds, read = session.run(self.plan.line_length)
        self.advance(1)
        return Block(number, line, session.contender.name, seconds, read)
