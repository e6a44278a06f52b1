"""Decoder: how the logits of a model become tokens; its name and its spelling on a command line.

A decoder knows a step function, a cache that can stage, and where tokens sit. It never sees a
model: whoever has one writes a step function of a few lines around it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from kvpolicy.decoding.sampling import Sampling
from kvpolicy.errors import LayoutError, ParameterError, ShapeError, parameter_error
from kvpolicy.layout import TokenLayout
from kvpolicy.registry import Registry

__all__ = [
    "DECODERS",
    "Advance",
    "Decoded",
    "Decoder",
    "Rule",
    "StagingCache",
    "Step",
    "register_decoder",
]

#: Told how many tokens of each sequence have been settled since the last call.
Advance: TypeAlias = Callable[[int], None]

Kind = TypeVar("Kind", bound="type[Decoder]")


class Step(Protocol):
    """A model as a decoder sees it."""

    def __call__(self, tokens: Tensor, /) -> Tensor:
        """Cache the tokens ``[B, T]`` behind what is cached; return the logits behind each.

        Returns:
            Logits ``[B, T, V]``. Of the prompt, which comes first, those behind its last token
            ``[B, 1, V]`` will do.
        """


class Rule(Protocol):
    """A grammar; a ``LogitsProcessor`` of transformers that keeps no state is one."""

    def __call__(self, tokens: Any, logits: Any, /) -> Tensor:
        """Change the logits ``[B, V]`` behind the tokens ``[B, T]`` of the sequence so far.

        Returns:
            Logits ``[B, V]``, ``-inf`` for what may not come.
        """


class StagingCache(Protocol):
    """What speculation asks of a cache: that newest tokens can be taken back.

    :class:`kvpolicy.PolicyCache` and the cache that ``attach`` gives are such caches.
    """

    @property
    def layout(self) -> TokenLayout | None:
        """Where tokens sit; None while that is unknown."""

    def stage(self, lookahead: int, *, together: bool = False) -> AbstractContextManager[Any]:
        """A block in which up to ``lookahead`` tokens at once may be taken back.

        Those of a call may attend ``together``: the same but for rounding.
        """

    def commit(self, count: int) -> Any:
        """Keep the first ``count`` of the tokens that are staged, and forget the others."""


@dataclass(frozen=True)
class Decoded:
    """What a decoder has drawn.

    Attributes:
        tokens: prompt and what was drawn behind it, int64 ``[B, P + count]``.
        passes: calls of the step function, that of the prompt included.
        settled: the pass, from 1, in which each drawn token was settled, int32 ``[B, count]``.
    """

    tokens: Tensor
    passes: int
    settled: Tensor


class Decoder(BaseModel, ABC):
    """How logits become tokens. Fields are its parameters; it holds no state of a generation.

    A subclass that is registered has a name, and with its parameters a spelling that command
    lines, plans and tables use: ``sjd:window=32:draft=above``.

    Example:
        >>> Decoder.parse("sjd:window=16:draft=left").label
        'sjd:window=16:draft=left'

    Raises:
        ParameterError: a parameter is unknown, of the wrong type or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    #: Name in the registry; set by :func:`register_decoder`.
    key: ClassVar[str] = ""

    def __init__(self, /, **parameters: Any) -> None:
        try:
            super().__init__(**parameters)
        except ValidationError as error:
            name = f"decoder {self.key or type(self).__name__!r}"
            raise parameter_error(name, type(self), error) from None

    @staticmethod
    def parse(spelled: Decoder | str) -> Decoder:
        """Make a decoder of its spelling: a name, then ``:parameter=value`` as often as wanted.

        Raises:
            UnknownNameError: no decoder has this name; near matches are listed.
            ParameterError: a parameter is malformed, unknown, out of range, or comes twice.
        """
        if isinstance(spelled, Decoder):
            return spelled
        if not isinstance(spelled, str):
            raise ParameterError(
                f"decoder={spelled!r} is neither a Decoder nor a spelling such as 'sequential' or "
                f"'sjd:window=32:draft=above'"
            )
        name, *settings = spelled.split(":")
        parameters: dict[str, Any] = {}
        for setting in settings:
            field, equals, value = setting.partition("=")
            if not (field and equals and value) or field in parameters:
                raise ParameterError(
                    f"decoder {spelled!r}: {setting!r} is not like window=32, each parameter once"
                )
            try:
                parameters[field] = json.loads(value)
            except json.JSONDecodeError:
                parameters[field] = value
        return DECODERS.get(name)(**parameters)

    @property
    def label(self) -> str:
        """Its spelling: the name, and the parameters that were set, in the order of the fields."""
        parts = [self.key or type(self).__name__]
        for field in type(self).model_fields:
            if field in self.model_fields_set:
                value = getattr(self, field)
                parts.append(f"{field}={value if isinstance(value, str) else json.dumps(value)}")
        return ":".join(parts)

    def check(self, layout: TokenLayout) -> None:
        """Refuse a layout that this decoder can't draw on; any will do by default.

        Raises:
            ParameterError: a parameter does not go with the layout.
            LayoutError: the decoder needs another kind of layout.
        """

    @abstractmethod
    def decode(
        self,
        step: Step,
        cache: Any,
        prompt: Tensor,
        count: int,
        *,
        sampling: Sampling | None = None,
        layout: TokenLayout | None = None,
        rules: Sequence[Rule] = (),
        generator: torch.Generator | None = None,
        advance: Advance | None = None,
    ) -> Decoded:
        """Draw ``count`` tokens behind a prompt, for each sequence of the batch.

        Args:
            step: caches tokens ``[B, T]``, and returns logits ``[B, T, V]``.
            cache: empty, and the one that ``step`` writes to.
            prompt: int64 ``[B, P]``, at least one token.
            count: tokens to draw.
            sampling: temperature, top-k and top-p; plain sampling by default.
            layout: where tokens sit; as the cache has it by default.
            rules: a grammar: each changes the logits of one place, given all tokens before it.
            generator: where chance comes from; torch's own by default.
            advance: is told how far it has come.

        Raises:
            ParameterError: an option is out of range, or this cache can't do it.
            LayoutError: the layout has fewer tokens.
            ShapeError: the prompt, or what ``step`` returns, has another shape.
        """


DECODERS: Registry[type[Decoder]] = Registry("decoder", "kvpolicy.decoders")


def register_decoder(name: str) -> Callable[[Kind], Kind]:
    """Class decorator: add a decoder to the registry under ``name``.

    Raises:
        ParameterError: the name is taken or malformed.
    """

    def add(kind: Kind) -> Kind:
        DECODERS.add(name, kind)
        kind.key = name
        return kind

    return add


def check_prompt(prompt: Tensor, count: int, layout: TokenLayout | None) -> None:
    """Refuse what can't be decoded, before the model runs."""
    if not isinstance(prompt, Tensor) or prompt.ndim != 2 or prompt.dtype != torch.int64:
        told = f"{prompt.dtype} {list(prompt.shape)}" if isinstance(prompt, Tensor) else prompt
        raise ShapeError(f"prompt is {told}; expected int64 [B, P]")
    if 0 in prompt.shape:
        raise ShapeError(f"prompt is {list(prompt.shape)}; it must have at least one token")
    if type(count) is not int or count < 1:
        raise ParameterError(f"count={count!r} must be a whole number, at least 1")
    if layout is not None and layout.length is not None:
        # The last token that is drawn is not cached.
        most = layout.length - prompt.shape[1]
        if count > most:
            raise LayoutError(
                f"count={count} tokens behind a prompt of {prompt.shape[1]} are more than the "
                f"{most} that {layout!r} has room for"
            )


def ruled(rules: Sequence[Rule], tokens: Tensor, first: int, logits: Tensor) -> Tensor:
    """Logits after all rules.

    Args:
        rules: a grammar.
        tokens: of the whole sequence, ``[B, L]``.
        first: place that the first logits are of.
        logits: ``[B, T, V]``, of T places in a row.
    """
    if not rules:
        return logits
    places = []
    for place in range(logits.shape[1]):
        scores = logits[:, place]
        for rule in rules:
            scores = rule(tokens[:, : first + place], scores)
        places.append(scores)
    return torch.stack(places, dim=1)


def prompt_logits(step: Step, prompt: Tensor) -> Tensor:
    """Run the prompt ``[B, P]``; the logits ``[B, 1, V]`` behind its last token."""
    logits = step(prompt)
    if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[1] == 1:
        return checked_logits(logits, prompt[:, -1:])
    return checked_logits(logits, prompt)[:, -1:]


def checked_logits(logits: Any, tokens: Tensor) -> Tensor:
    """What a step function returned, if it has the shape that was asked for."""
    if not isinstance(logits, Tensor) or logits.shape[:-1] != tokens.shape:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ShapeError(
            f"step returned {got} for tokens {list(tokens.shape)}; expected logits "
            f"[{tokens.shape[0]}, {tokens.shape[1]}, V], one row for each token"
        )
    return logits


def staging_cache(cache: Any) -> StagingCache:
    """The cache, if it can stage.

    Raises:
        ParameterError: it can't.
    """
    if not all(hasattr(cache, name) for name in ("stage", "commit", "layout")):
        raise ParameterError(
            f"this decoder takes tokens back, and {type(cache).__name__} has no stage() and "
            f"commit(); use a kvpolicy.PolicyCache (policy 'full' evicts nothing) or the cache of "
            f"attach(), or decode with 'sequential'"
        )
    found: StagingCache = cache
    return found
