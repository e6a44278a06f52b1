"""The plan of an ablation: policies × parameters × budgets × decoders × seeds, as cells."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import Any, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kvpolicy.budget.budget import Budget
from kvpolicy.decoding import Decoder
from kvpolicy.errors import BudgetError, KVPolicyError, ParameterError, parameter_error
from kvpolicy.named import is_path

__all__ = [
    "BASELINE",
    "SEQUENTIAL",
    "Cell",
    "Plan",
    "PolicyPlan",
    "Value",
    "read_plan",
    "require_json",
]

#: Values of parameters and options: what JSON can hold.
Value: TypeAlias = Any

#: What the others are compared with; its cells have no budget.
BASELINE = "full"
#: How it draws, and every other policy unless a plan says otherwise.
SEQUENTIAL = "sequential"


class Cell(BaseModel):
    """One measurement of an ablation.

    Attributes:
        subject: what the policy is tried on, as the plan names it.
        options: what the subject was made with.
        policy: as the plan names it.
        parameters: those that the plan sets; the others have the policy's defaults.
        budget: in its shortest spelling; None for everything (the full cache).
        seed: of the subject: which images are drawn and scored.
        metrics: what is measured; None for all that the subject has.
        decoder: what draws tokens, in its shortest spelling.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    options: dict[str, Value] = {}
    policy: str
    parameters: dict[str, Value] = {}
    budget: str | None
    seed: int
    metrics: tuple[str, ...] | None = None
    decoder: str = SEQUENTIAL

    @property
    def id(self) -> str:
        """A name for its folder: readable, and different for different cells."""
        fields = self.model_dump(mode="json")
        words = f"{self.policy}-{self.budget or 'all'}-s{self.seed}"
        if self.decoder == SEQUENTIAL:
            del fields["decoder"]  # folders of runs that knew no others keep their names
        else:
            words = f"{words}-{self.decoder}"
        text = json.dumps(fields, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in words)
        return f"{safe[:80]}-{digest}"

    @property
    def label(self) -> str:
        """The policy with what was set of it, and its decoder: ``linear(anchors=3)@sjd``."""
        by = "" if self.decoder == SEQUENTIAL else f"@{self.decoder}"
        if not self.parameters:
            return self.policy + by
        inner = ", ".join(f"{name}={_spell(value)}" for name, value in self.parameters.items())
        return f"{self.policy}({inner}){by}"

    @property
    def is_baseline(self) -> bool:
        """Whether this is what the others are compared with: the full cache, token by token."""
        return self.policy == BASELINE and self.decoder == SEQUENTIAL

    @property
    def entry(self) -> tuple[str, str | None]:
        """What cells of different seeds have in common: label and budget."""
        return self.label, self.budget


class PolicyPlan(BaseModel):
    """A policy and the values to try of its parameters.

    A name will do for it, and ``name@decoder`` for one that a decoder of its own draws under.

    Attributes:
        name: in the registry, or ``package.module:Class``.
        parameters: a value for each parameter, or a list of values: every combination is tried.
        decoders: what draws under it; None for the plan's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    parameters: dict[str, Value] = {}
    decoders: tuple[str, ...] | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _a_name_will_do(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        name, at, decoder = value.partition("@")
        return {"name": name, "decoders": [decoder]} if at else {"name": name}

    @field_validator("decoders", mode="before")
    @classmethod
    def _shortest_decoders(cls, value: Any) -> Any:
        return None if value is None else _decoders(value)

    @field_validator("parameters")
    @classmethod
    def _parameters_are_json(cls, value: dict[str, Value]) -> dict[str, Value]:
        require_json(value, "")
        return value

    def grid(self) -> list[dict[str, Value]]:
        """Every combination of parameters, the last one changing fastest."""
        choices = [v if isinstance(v, list) else [v] for v in self.parameters.values()]
        return [dict(zip(self.parameters, chosen, strict=True)) for chosen in product(*choices)]


class Plan(BaseModel):
    """What an ablation compares.

    Example:
        >>> plan = Plan(subject="fashion-ar", policies=["full", "linear"], budgets=["1/6"])
        >>> ", ".join(cell.label for cell in plan.cells())
        'full, linear'

    Attributes:
        subject: a name in the registry of subjects, or ``package.module:name``.
        options: keyword arguments of the subject, e.g. how many images it draws.
        policies: names, or names with parameters; ``full`` is always there.
        budgets: in any spelling of :class:`kvpolicy.Budget`.
        seeds: of the subject.
        decoders: what draws tokens under each policy, in any spelling of :class:`kvpolicy.Decoder`;
            the full cache is always there token by token, too.
        metrics: what to measure; None for all that the subject has.
        trace: whether every decision is recorded.

    Raises:
        ParameterError: a field is unknown, missing, of the wrong type or empty.
        BudgetError: a budget can't be parsed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str = Field(min_length=1)
    options: dict[str, Value] = {}
    policies: tuple[PolicyPlan, ...] = Field(min_length=1)
    budgets: tuple[str, ...] = Field(("1/6",), min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    decoders: tuple[str, ...] = Field((SEQUENTIAL,), min_length=1)
    metrics: tuple[str, ...] | None = None
    trace: bool = False

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise parameter_error("plan", type(self), error) from None

    @field_validator("policies", mode="before")
    @classmethod
    def _baseline_first(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        names = [getattr(p, "name", p.get("name") if isinstance(p, dict) else p) for p in value]
        names = [name.partition("@")[0] if isinstance(name, str) else name for name in names]
        return list(value) if not value or BASELINE in names else [BASELINE, *value]

    @field_validator("budgets", mode="before")
    @classmethod
    def _shortest_spelling(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        try:
            return list(dict.fromkeys(str(Budget.parse(budget)) for budget in value))
        except BudgetError as error:
            raise ValueError(str(error)) from None

    @field_validator("decoders", mode="before")
    @classmethod
    def _shortest_decoders(cls, value: Any) -> Any:
        return _decoders(value)

    @field_validator("options")
    @classmethod
    def _options_are_json(cls, value: dict[str, Value]) -> dict[str, Value]:
        require_json(value, "")
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(seed < 0 for seed in value):
            raise ValueError("seeds must not be negative")
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _each_cell_once(self) -> Self:
        ids = [cell.id for cell in self.cells()]
        if len(ids) != len(set(ids)):
            raise ValueError(
                "policies: the same policy with the same parameters stands there twice"
            )
        return self

    def cells(self) -> list[Cell]:
        """Every cell, the baseline first; it has one cell a seed, whatever the budgets are."""
        ordered = sorted(self.policies, key=lambda policy: policy.name != BASELINE)
        return [
            Cell(
                subject=self.subject,
                options=self.options,
                policy=policy.name,
                parameters=parameters,
                budget=budget,
                seed=seed,
                metrics=self.metrics,
                decoder=decoder,
            )
            for number, policy in enumerate(ordered)
            for parameters in policy.grid()
            for decoder in self._decoders_of(policy, first=number == 0)
            for budget in ((None,) if policy.name == BASELINE else self.budgets)
            for seed in self.seeds
        ]

    def _decoders_of(self, policy: PolicyPlan, *, first: bool) -> tuple[str, ...]:
        """What draws under a policy; the baseline, which comes first, is never without its own."""
        own = self.decoders if policy.decoders is None else policy.decoders
        return tuple(dict.fromkeys((SEQUENTIAL, *own))) if first else own

    def text(self) -> str:
        """The plan as JSON, the same for equal plans."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


def read_plan(path: Path, own: Collection[str] = ()) -> Plan:
    """Read a plan from a ``.json``, ``.yaml`` or ``.yml`` file.

    A file is data: what it names is imported only where it is registered, or where the caller names
    it, too.

    Args:
        path: the file.
        own: ``package.module:name`` of policies and subjects that the plan may name.

    Raises:
        ParameterError: the file can't be read, what it says is no plan, or it names a module that
            is not among ``own``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f"plan {path} can't be read: {error}") from None
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            fields = yaml.safe_load(text)
        elif path.suffix == ".json":
            fields = json.loads(text)
        else:
            raise ParameterError(f"plan {path} must end in .yaml, .yml or .json")
    except (json.JSONDecodeError, RecursionError) as error:
        raise ParameterError(f"plan {path} is not JSON: {error}") from None
    except Exception as error:
        if isinstance(error, ParameterError | ModuleNotFoundError):
            raise
        said = " ".join(str(error).split())  # with the place, in several lines
        raise ParameterError(f"plan {path} is not YAML: {said}") from None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise ParameterError(
            f"plan {path} must be a mapping with at least 'subject' and 'policies'"
        )
    plan = Plan(**fields)
    for name in (plan.subject, *(policy.name for policy in plan.policies)):
        if is_path(name) and name not in own:
            raise ParameterError(
                f"plan {path} names {name!r}, which would import a module because a file says so; "
                f"if it is your own, name it on the command line, too: --own {name}"
            )
    return plan


def _decoders(value: Any) -> Any:
    """Spellings of decoders, each in its shortest form and once.

    Raises:
        ValueError: one of them is wrong.
    """
    if not isinstance(value, list | tuple):
        return value
    try:
        return list(dict.fromkeys(Decoder.parse(decoder).label for decoder in value))
    except KVPolicyError as error:
        raise ValueError(str(error)) from None


def require_json(value: Value, where: str) -> None:
    """Refuse what no file can hold so that the same command gives the same plan.

    Raises:
        ValueError: it is, or holds, something else.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            require_json(name, where)
            require_json(inner, f"{where}.{name}" if where else name)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            require_json(inner, f"{where}[{number}]")
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}={value!r} is no text that UTF-8 can hold") from None
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}={value} is not finite")
    elif not (value is None or isinstance(value, bool | int | float)):
        raise ValueError(
            f"{where}={value!r} is of type {type(value).__name__}; a plan holds numbers, text, "
            f"true, false, null, and lists and mappings of them (put a date in quotes)"
        )


def _spell(value: Value) -> str:
    return value if isinstance(value, str) else json.dumps(value)
