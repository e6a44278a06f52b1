"""What a check of a GPU is made of: parts, what they are given, and what they find."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

__all__ = ["Finding", "Outcome", "Part", "Setting", "Tell"]


@dataclass(frozen=True)
class Setting:
    """What every part is given.

    Attributes:
        device: of torch.
        tiny: small enough for a CPU: nothing that it measures means anything.
        dtype: of models and caches whose speed is measured, a name of torch's.
        kvpress: a Python that has kvpress; None without it.
        llamagen: a checkout of LlamaGen; None without it.
    """

    device: str
    tiny: bool
    dtype: str
    kvpress: Path | None = None
    llamagen: Path | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch's own type."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def shape(self, name: str) -> str:
        """The shape of this name; one that a CPU decodes in a moment where all is to be tiny."""
        return "tiny" if self.tiny else name

    @property
    def budget(self) -> str:
        """Of policies: a sixth, or of an image that is tiny as many lines."""
        return "1/2" if self.tiny else "1/6"

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU of CUDA's kind."""
        return torch.device(self.device).type == "cuda"


@dataclass(frozen=True)
class Finding:
    """A row of a part's table.

    Attributes:
        what: was looked at.
        figures: by column; numbers, or words.
        wrong: what is wrong with them, in words; empty if nothing is.
    """

    what: str
    figures: Mapping[str, float | int | str]
    wrong: str = ""


#: Says what was found, as soon as it was.
Tell = Callable[[Finding], None]


@dataclass(frozen=True)
class Part:
    """One thing that is looked at, in a process of its own.

    Attributes:
        name: for people.
        seconds: after which it is ended.
        run: looks, and tells what it finds. A function at the top of a module, so that another
            process can be given it.
        gpu_only: whether a CPU has nothing to show there, however tiny.
    """

    name: str
    seconds: float
    run: Callable[[Setting, Tell], None]
    gpu_only: bool = False


@dataclass
class Outcome:
    """What has become of a part.

    Attributes:
        part: its name.
        state: ``done``, ``failed``, ``out of time``, or ``not begun``.
        seconds: that it took.
        error: how it failed, in words.
        findings: up to then, by what was looked at: the newest of each counts.
    """

    part: str
    state: str
    seconds: float = 0.0
    error: str = ""
    findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether it came to its end and found nothing wrong."""
        return self.state == "done" and not any(each.wrong for each in self.findings.values())
