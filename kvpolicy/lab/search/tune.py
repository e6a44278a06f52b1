"""Search parameters with Optuna, and judge the best on items that the search has not seen.

Every try is a cell in the folder of the run, written whole or not at all. Going on means to search
again from the start with the values that are there: the sampler is seeded, so that it asks for the
same parameters in the same order, and an interrupted search ends where an undisturbed one does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from kvpolicy.errors import BudgetError, ParameterError
from kvpolicy.lab.compare.bootstrap import paired_bootstrap
from kvpolicy.lab.compare.comparison import Finding, compare
from kvpolicy.lab.run.environment import find_environment
from kvpolicy.lab.run.executors import Inline
from kvpolicy.lab.run.files import write_whole
from kvpolicy.lab.run.plan import BASELINE, SEQUENTIAL, Cell, Plan
from kvpolicy.lab.run.run_folder import FinishedCell, RunFolder
from kvpolicy.lab.run.runner import (
    Stale,
    alone,
    prepare,
    refuse_stale,
    stale_because,
    writing,
)
from kvpolicy.lab.run.subject import Metric, Subject
from kvpolicy.lab.run.worker import Raised, Task, measure_cell
from kvpolicy.lab.search.search_space import (
    Choice,
    Range,
    Space,
    check_setting,
    search_space,
    usual_parameters,
    with_parameters,
)

__all__ = ["Found", "Tried", "tune"]

_REFUSED = 50  # draws in a row that can't be, before the search is given up


@dataclass(frozen=True)
class Tried:
    """One try of the search.

    Attributes:
        number: from 1.
        parameters: of the policy, or of the decoder where that is searched.
        value: of the main metric on the items of the search.
        best: the best value so far.
        fresh: whether it was measured now, and not in an earlier run.
    """

    number: int
    parameters: dict[str, Any]
    value: float
    best: float
    fresh: bool


@dataclass(frozen=True)
class Found:
    """What came of a search; all but ``searched`` is measured on items that it has not seen.

    Attributes:
        parameters: the best.
        searched: its value on the items of the search.
        best: with its difference to the full cache.
        default: the same for the defaults.
        gain: best minus default, item by item, with its 95% interval; None for a metric that is
            no mean.
        items: unseen items.
    """

    parameters: dict[str, Any]
    searched: float
    best: Finding
    default: Finding
    gain: tuple[float, float, float] | None
    items: int


def tune(
    path: Path,
    subject_name: str,
    options: dict[str, Any],
    policy: str,
    budget: str,
    *,
    trials: int,
    unseen: Sequence[int],
    threads: int,
    tell_space: Callable[[Space], None],
    tell: Callable[[Tried], None],
    stale: Stale = "refuse",
    decoder: str = SEQUENTIAL,
    metric: str | None = None,
) -> Found:
    """Search, then judge the best, the defaults and the full cache on unseen items.

    Args:
        path: folder of the run.
        subject_name: in the registry, or ``package.module:name``.
        options: of the subject.
        policy: in the registry, or ``package.module:Class``.
        budget: in any spelling.
        trials: settings to measure; those of earlier runs in the folder count.
        unseen: seeds whose items judge; the search sees those of seed 0.
        threads: of torch.
        tell_space: is told what is searched.
        tell: is told of each try.
        stale: what becomes of tries that were measured otherwise; see
            :func:`kvpolicy.lab.run.runner.run`.
        decoder: what draws tokens; its parameters are searched, and the policy keeps its defaults,
            unless it is ``sequential``.
        metric: what is to become better: by default the subject's first one, which tells policies
            apart, or ``passes`` where a decoder is searched.

    Raises:
        ParameterError: the folder holds another search, or one that is stale, a name or option is
            wrong, or unseen items are among those of the search.
        BudgetError: the budget is too small for the policy's defaults.
        RunFolderError: the folder can't be written, or another run is at work in it.
    """
    plan = Plan(
        subject=subject_name,
        options=options,
        policies=[policy],
        budgets=[budget],
        seeds=[0, *unseen],
        decoders=[decoder],
    )
    (decoder,) = plan.decoders
    if metric is None and decoder != SEQUENTIAL:
        metric = "passes"
    if metric is not None:
        plan = plan.model_copy(update={"metrics": (metric,)})
    if policy == BASELINE or len(plan.seeds) < 2:
        raise ParameterError("tune needs a policy that evicts, and unseen seeds other than 0")
    prepared = prepare(plan)
    subject = prepared.subject
    main = next((m for m in subject.metrics if metric in (None, m.name)), None)
    if main is None or main.better is None:
        better = [m.name for m in subject.metrics if m.better is not None]
        raise ParameterError(f"metric {metric!r} can't become better; take one of {better}")
    plan = plan.model_copy(update={"metrics": (main.name,)})
    prepared = replace(prepared, plan=plan)
    space = search_space(policy, plan.budgets[0], subject, decoder)
    tell_space(space)
    with alone(path):
        with writing(path):
            folder = RunFolder.begin(path, plan)
            folder.describe(find_environment(subject, Inline(), threads), prepared.describe())
        measure = _Measure(plan, folder, subject, threads, stale)
        study = _search(measure, main, space, trials, subject, tell)
        best = study.best_params
        searched = measure(policy, best, 0)
        judged = {
            name: [measure(*setting, seed) for seed in unseen]
            for name, setting in {
                "full": (BASELINE, {}),
                "default": (policy, {}),
                "best": (policy, best),
            }.items()
        }
        seen = _items(searched, main)
        if seen is not None:
            for cell in judged["best"]:
                both = np.intersect1d(seen, _items(cell, main))
                if len(both):
                    raise ParameterError(
                        f"seed {cell.cell.seed} has {len(both)} items that the search has seen; "
                        f"take other unseen seeds, or fewer items"
                    )
        found = _judge(judged, main, best, searched.record.metrics[main.name])
        with writing(path):
            write_whole(path / "best.json", json.dumps(_words(found), indent=2) + "\n")
        return found


def _search(
    measure: _Measure,
    main: Metric,
    space: Space,
    trials: int,
    subject: Subject,
    tell: Callable[[Tried], None],
) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    direction = "maximize" if main.better == "higher" else "minimize"
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=0))
    # The defaults first: what is found is never worse than they are, on these items.
    policy, budget, decoder = measure.policy, measure.budget, measure.decoder
    defaults = usual_parameters(policy, subject, decoder)
    study.enqueue_trial({name: defaults[name] for name in space if name in defaults})
    number = refused = 0
    while number < trials:
        trial = study.ask()
        parameters = {name: _suggest(trial, name, part) for name, part in space.items()}
        try:
            check_setting(policy, parameters, budget, subject, decoder)
        except (BudgetError, ParameterError) as error:
            refused += 1
            if refused > _REFUSED:
                raise ParameterError(
                    f"{_REFUSED} settings in a row that can't be, the last one because: {error}"
                ) from error
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        number, refused = number + 1, 0
        fresh = measure.known(policy, parameters, 0) is None
        value = measure(policy, parameters, 0).record.metrics[main.name]
        study.tell(trial, value)
        tell(Tried(number, parameters, value, study.best_value, fresh))
    return study


class _Measure:
    """Measures a setting, or reads what an earlier run has measured."""

    def __init__(
        self, plan: Plan, folder: RunFolder, subject: Subject, threads: int, stale: Stale
    ) -> None:
        self._subject, self._stale = subject, stale
        self._fresh: set[str] = set()  # measured by this very run
        self.policy = next(p.name for p in plan.policies if p.name != BASELINE)
        self.budget, self.decoder = plan.budgets[0], plan.decoders[0]
        self._plan, self._folder, self._threads = plan, folder, threads

    def _cell(self, policy: str, parameters: dict[str, Any], seed: int) -> Cell:
        plan, decoder = self._plan, SEQUENTIAL
        if policy != BASELINE and self.decoder != SEQUENTIAL:
            parameters, decoder = {}, with_parameters(self.decoder, parameters).label
        return Cell(
            subject=plan.subject,
            options=plan.options,
            policy=policy,
            parameters=parameters,
            budget=None if policy == BASELINE else self.budget,
            seed=seed,
            metrics=plan.metrics,
            decoder=decoder,
        )

    def known(self, policy: str, parameters: dict[str, Any], seed: int) -> FinishedCell | None:
        """What an earlier run has measured; None where nothing has, or nothing that can be used.

        Raises:
            ParameterError: it was measured otherwise than it would be now.
        """
        found = None
        with suppress(ParameterError):  # a damaged cell is measured again
            found = self._folder.get(self._cell(policy, parameters, seed))
        if found is None or found.record.id in self._fresh or self._stale == "keep":
            return found
        reason = stale_because(found, self._subject, self._threads)
        if reason is None:
            return found
        if self._stale == "anew":
            return None
        raise refuse_stale(self._folder.path, {reason: found.cell.label}, 1)

    def __call__(self, policy: str, parameters: dict[str, Any], seed: int) -> FinishedCell:
        cell = self._cell(policy, parameters, seed)
        found = self.known(policy, parameters, seed)
        if found is None:
            outcome = measure_cell(Task(cell, self._threads))
            with writing(self._folder.path):
                if isinstance(outcome, Raised):
                    self._folder.fail(cell, outcome.error, outcome.traceback)
                    raise ParameterError(
                        f"{cell.label} can't be measured: {outcome.error} (traceback: "
                        f"{self._folder.path / 'failures' / cell.id}.json)"
                    )
                self._folder.keep(outcome.record, outcome.scores, outcome.images)
            self._fresh.add(cell.id)
            found = self._folder.get(cell)
            assert found is not None
        return found


def _judge(
    judged: dict[str, list[FinishedCell]], main: Metric, best: dict[str, Any], searched: float
) -> Found:
    cells = {cell.record.id: cell for group in judged.values() for cell in group}
    entries = compare(list(cells.values()), [main])
    findings = {entry.label: entry.findings[main.name] for entry in entries}
    labels = {name: group[0].cell.label for name, group in judged.items()}
    gain, items = None, 0
    if main.array is not None:
        arrays = {
            name: np.concatenate([cell.scores()[main.array] for cell in group])
            for name, group in judged.items()
        }
        items = len(arrays["best"])
        if main.statistic is None and items > 1:
            gain = paired_bootstrap(arrays["best"].astype(float) - arrays["default"].astype(float))
    return Found(best, searched, findings[labels["best"]], findings[labels["default"]], gain, items)


def _words(found: Found) -> dict[str, Any]:
    """What ``best.json`` says: parameters, figures with intervals, and the gain."""

    def finding(of: Finding) -> dict[str, Any]:
        parts = {"value": of.estimate, "difference_to_full": of.difference}
        return {
            name: None if e is None else {"value": e.value, "low": e.low, "high": e.high}
            for name, e in parts.items()
        }

    return {
        "parameters": found.parameters,
        "searched": found.searched,
        "unseen_items": found.items,
        "best": finding(found.best),
        "default": finding(found.default),
        "gain_over_default": None
        if found.gain is None
        else dict(zip(("value", "low", "high"), found.gain, strict=True)),
    }


def _items(cell: FinishedCell, main: Metric) -> Any:
    return None if main.items is None else cell.scores()[main.items]


def _suggest(trial: optuna.Trial, name: str, part: Range | Choice) -> Any:
    if isinstance(part, Choice):
        return trial.suggest_categorical(name, part.values)
    if part.whole:
        return trial.suggest_int(name, int(part.low), int(part.high), log=part.log)
    return trial.suggest_float(name, part.low, part.high, log=part.log)
