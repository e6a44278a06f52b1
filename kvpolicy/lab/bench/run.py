"""A whole bench: who takes part, the rounds, the memory, and the files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvpolicy.budget.budget import Budget
from kvpolicy.errors import ParameterError, first_line, near_matches
from kvpolicy.lab.bench.contender import (
    BASELINES,
    VARIANTS,
    BenchModel,
    Contender,
    Session,
    Workload,
)
from kvpolicy.lab.bench.fit import Fit, Largest, largest_batch
from kvpolicy.lab.bench.machine import Machine
from kvpolicy.lab.bench.peers import OWN_WORKER, PRESSES, PeerSession
from kvpolicy.lab.bench.report import conditions, grids, markdown, plot
from kvpolicy.lab.bench.rounds import Plan, Rounds, lines_of_round
from kvpolicy.lab.bench.session import LocalSession
from kvpolicy.lab.bench.summary import Summary, summarise
from kvpolicy.lab.run.files import write_whole
from kvpolicy.layout import RasterLayout
from kvpolicy.ops.cpu import native
from kvpolicy.registry import create

__all__ = ["Bench", "capacity_of", "enlist", "plan_of"]


def enlist(
    policies: Sequence[str], baselines: Sequence[str], *, presses: bool, llamagen: bool
) -> list[Contender]:
    """Who takes part, in the order of the tables.

    Args:
        policies: names, each with its variants: ``linear``, ``linear@compiled@skinny``.
        baselines: the same, of :data:`BASELINES`.
        presses: whether kvpress takes part.
        llamagen: whether LlamaGen's own model does.

    Raises:
        UnknownNameError: there is no such policy.
        ParameterError: there is no such baseline or variant, or nobody is left.
    """
    entries: list[Contender] = []
    for spelled in dict.fromkeys(policies):
        name, how = _variants(spelled)
        create(name)
        entries.append(_contender(name, "policy", how))
    for spelled in dict.fromkeys(baselines):
        name, how = _variants(spelled)
        if name not in BASELINES:
            raise ParameterError(f"no baseline is called {name!r}; {near_matches(name, BASELINES)}")
        if name == "dynamic" and "compiled" in how:
            raise ParameterError(
                "dynamic@compiled would be compiled anew at every step, for its shapes grow; "
                "take static@compiled"
            )
        entries.append(_contender(name, name, how))
    if presses:
        entries += [Contender(f"kvpress {press}", "peer", peer="kvpress") for press in PRESSES]
        if any(entry.kind == "skip" for entry in entries):
            entries.append(Contender("kvpress skip", "skip", peer="kvpress"))
    if llamagen:
        entries.append(Contender("llamagen official", "peer", peer="llamagen"))
    if not entries:
        raise ParameterError("nobody takes part: name policies, baselines or both")
    return entries


def _variants(spelled: str) -> tuple[str, list[str]]:
    """A contender's name, and how its model runs.

    Raises:
        ParameterError: there is no such variant, or the kernel that it needs has not been built.
    """
    name, *given = spelled.split("@")
    for variant in given:
        if variant not in VARIANTS:
            raise ParameterError(
                f"{spelled!r}: no variant is called {variant!r}; {near_matches(variant, VARIANTS)}"
            )
    if "skinny" in given and native.linear() is None:
        raise ParameterError(f"{spelled!r} needs the CPU kernel: run `kvpolicy build-kernel` first")
    return name, [variant for variant in VARIANTS if variant in given]


def _contender(name: str, kind: str, how: Collection[str]) -> Contender:
    return Contender(
        name=" ".join([name, *how]),
        kind=kind,
        policy=name if kind == "policy" else "",
        compiled="compiled" in how,
        skinny="skinny" in how,
    )


def capacity_of(budget: str, layout: RasterLayout) -> int:
    """Slots that a budget makes, prefix included.

    Raises:
        BudgetError: this is no budget.
    """
    return layout.prefix + Budget.parse(budget).tokens(layout)


def plan_of(
    layout: RasterLayout,
    *,
    steps: int | None,
    rounds: int,
    every: int,
    minutes: float | None,
    whole_images: bool,
) -> Plan:
    """Cut an image into lines."""
    lines = layout.rows if steps is None else -(-steps // layout.line_length)
    return Plan(
        lines=max(1, min(lines, layout.rows)),
        line_length=layout.line_length,
        rounds=rounds,
        every=every,
        minutes=minutes,
        whole_images=whole_images,
    )


@dataclass
class Bench:
    """One bench.

    Attributes:
        model: whose step is timed.
        workload: what is decoded.
        plan: for how long.
        contenders: who decodes.
        machine: where.
        real_layers: layers of the shape, where the model has fewer.
        command: as the user wrote it.
        environment: Python that has kvpress; None without it.
        checkout: LlamaGen's repository; None without it.
    """

    model: BenchModel
    workload: Workload
    plan: Plan
    contenders: list[Contender]
    machine: Machine
    real_layers: int
    command: str
    environment: Path | None = None
    checkout: Path | None = None

    def session(
        self, contender: Contender, *, watched: bool = False, batch: int | None = None
    ) -> Session:
        """A session of one contender, in a process of its own where it must be or is watched.

        Args:
            contender: who decodes.
            watched: whether its memory will be asked for.
            batch: sequences, where it is not the workload's number.

        Raises:
            BudgetError: the budget is too small for this policy.
            PeerError: the other process could not begin.
        """
        options: dict[str, Any]
        workload = self.workload if batch is None else replace(self.workload, batch=batch)
        if contender.peer == "kvpress":
            assert self.environment is not None
            press = contender.name.partition(" ")[2]
            python, options = self.environment, {"press": press}
            script = self.model.peers / "kvpress_worker.py"
        elif contender.peer == "llamagen":
            python, options = Path(sys.executable), {"checkout": str(self.checkout)}
            script = self.model.peers / "llamagen_worker.py"
        elif watched:
            python, script = Path(sys.executable), OWN_WORKER
            options = {"contender": asdict(contender)}
        else:
            return LocalSession(self.model, contender, workload)
        return PeerSession(
            contender,
            script,
            python,
            workload,
            self.model.dimensions,
            self.model.layout,
            options=options,
            watched=watched,
        )

    def measure(self, advance: Callable[[int], object], keep: Callable[[Rounds], object]) -> Rounds:
        """Warm up, and measure until the rounds are done, the time is up, or Ctrl-C."""
        with ExitStack() as stack:
            sessions = []
            for contender in self.contenders:
                sessions.append(self.session(contender))
                stack.callback(sessions[-1].close)
            rounds = Rounds(sessions, self.plan, advance)
            rounds.warm_up()
            if self.plan.whole_images:
                for session in sessions:
                    session.release()
            rounds.run(lambda: keep(rounds))
        return rounds

    def watch_memory(self, advance: Callable[[int], object]) -> dict[str, int]:
        """Peak growth of each contender during one image, in a process of its own, in bytes."""
        grown: dict[str, int] = {}
        chosen = set(lines_of_round(self.plan, 0))
        for contender in self.contenders:
            session = self.session(contender, watched=True)
            assert isinstance(session, PeerSession)
            try:
                # Through an image once, decisions and all: what a process loads but once, and what
                # its heap keeps from then on, is no cache's.
                self._decode(session, {0, self.plan.lines - 1})
                session.watch()
                self._decode(session, chosen)
                grown[contender.name] = session.memory()
            finally:
                session.close()
            advance(1)
        return grown

    def fit(self, limit: int, advance: Callable[[int], object]) -> Fit:
        """The largest batch of each contender whose image fits into ``limit`` bytes, with weights.

        Each trial is a process of its own, which is filled up to the image's last line and decodes
        that: caches are at their largest there.
        """
        largest: dict[str, Largest] = {}
        for contender in self.contenders:

            def grown(batch: int, contender: Contender = contender) -> int:
                session = self.session(contender, watched=True, batch=batch)
                assert isinstance(session, PeerSession)
                try:
                    session.watch()
                    self._decode(session, {self.plan.lines - 1})
                    return session.memory()
                finally:
                    session.close()

            largest[contender.name] = largest_batch(
                grown, self.model.dimensions, self.workload.torch_dtype.itemsize, limit
            )
            advance(1)
        return Fit(limit, largest)

    def _decode(self, session: Session, chosen: Collection[int]) -> None:
        """Decode the chosen lines of an image, and skip the others."""
        session.restart()
        for line in range(self.plan.lines):
            if line in chosen:
                session.run(self.plan.line_length)
            else:
                session.skip(self.plan.line_length)

    def summarise(self, rounds: Rounds, memory: dict[str, int]) -> Summary:
        """Medians, ratios and bytes of what the rounds have measured; see :func:`summarise`."""
        return summarise(
            rounds.blocks,
            self.contenders,
            plan=self.plan,
            workload=self.workload,
            dimensions=self.model.dimensions,
            prefix=self.model.layout.prefix,
            machine=self.machine,
            cache_bytes=rounds.cache_bytes,
            memory=memory,
        )

    def write(
        self, out: Path, rounds: Rounds, memory: dict[str, int], fit: Fit | None = None
    ) -> Summary:
        """Write results.json, tables.md and steps.png."""
        summary = self.summarise(rounds, memory)
        content: dict[str, Any] = {
            "command": self.command,
            "workload": self.workload.as_dict(),
            "real_layers": self.real_layers,
            "plan": asdict(self.plan),
            "machine": self.machine.as_dict(),
            "rounds_finished": rounds.finished,
            "interrupted": rounds.interrupted,
            **summary.as_dict(),
            "fit": None if fit is None else asdict(fit),
            "blocks": [block.as_dict() for block in rounds.blocks],
        }
        write_whole(out / "results.json", json.dumps(content, indent=1) + "\n")
        write_whole(
            out / "tables.md",
            markdown(grids(summary, self.contenders, fit), self.facts(rounds), self.command),
        )
        figure = plot(summary, self.workload, self.plan, self.model.layout.prefix)
        figure.savefig(out / "steps.png", dpi=160)
        return summary

    def facts(self, rounds: Rounds) -> list[str]:
        """The conditions of this run."""
        facts = conditions(
            self.workload, self.plan, self.machine, self.real_layers, rounds.finished
        )
        if rounds.interrupted:
            facts.append("interrupted: what was finished counts")
        return facts


def torch_device(name: str) -> str:
    """Check a device's name.

    Raises:
        ParameterError: torch knows no such device, or has none.
    """
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        first = first_line(error)
        raise ParameterError(f"device={name!r} can't be used: {first}") from None
    return name
