"""What a figure depends on besides its cell: versions, code, threads."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import kvpolicy
from kvpolicy.lab.run.records import Provenance
from kvpolicy.lab.run.subject import Setting, Subject
from kvpolicy.ops.cpu import native

__all__ = ["differences", "provenance", "versions"]

_PACKAGES = ("kvpolicy", "torch", "transformers", "numpy")
#: Packages whose version stands for their code.
_BY_VERSION = {*sys.stdlib_module_names, "pydantic", "numpy", "torch", "transformers"}
#: What of kvpolicy decides no figure: it prints, draws, tests, searches or times.
_ASIDE = ("cli.py", "__main__.py", "commands", "testing", "lab/bench", "lab/search", "lab/show")


@lru_cache
def versions() -> dict[str, str]:
    """Of Python, of the packages that compute, and of the CPU kernel where there is one."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if (library := native.in_use()) is not None:
        found["kvpolicy's CPU kernel"] = library.path.stem
    return found


def provenance(setting: Setting, subject: Subject, threads: int) -> Provenance:
    """What figures of this setting on this subject depend on, in this process.

    Code counts by its sources: those of kvpolicy that compute, and the whole package (or the one
    file) that the policy's, the decoder's and the subject's classes are from. A schedule that was
    read from a file counts by what it says.
    """
    policy, decoder = setting.policy, setting.decoder
    said = f"{policy!r} {policy.schedule()!r}"
    return Provenance(
        versions=versions(),
        code={
            "kvpolicy": _kvpolicy(),
            "the policy": _sources(_kinds(policy), said),
            "the decoder": _sources(_kinds(decoder), repr(decoder)),
            "the subject": _sources([type(subject)]),
        },
        threads=threads,
    )


def differences(then: Provenance | None, now: Provenance) -> list[str]:
    """What has changed, in words; nothing where the figures would be the same."""
    if then is None:
        return ["not known what it was measured with"]
    found = []
    for name in sorted({*then.versions, *now.versions}):
        before, after = (of.versions.get(name, "none") for of in (then, now))
        if before != after:
            found.append(f"{name} was {before}, is {after}")
    found += [
        f"the code of {name} is another"
        for name in now.code
        if then.code.get(name) != now.code[name]
    ]
    if then.threads != now.threads:
        found.append(f"threads were {then.threads}, are {now.threads}")
    return found


def _kinds(model: BaseModel) -> list[type]:
    """The class of a policy or decoder, and those of the parts that it is made of."""
    return [type(model), *(type(value) for value in _flat(vars(model).values()))]


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


@lru_cache
def _kvpolicy() -> str:
    root = Path(kvpolicy.__file__).parent
    aside = [root / name for name in _ASIDE]
    return _digest(
        file
        for file in root.rglob("*.py")
        if not any(file == place or place in file.parents for place in aside)
    )


def _sources(kinds: Iterable[Callable[..., Any]], said: str = "") -> str:
    """A digest of the packages, or files, that classes and their bases are from."""
    tops = {
        base.__module__.partition(".")[0]
        for kind in kinds
        for base in getattr(kind, "__mro__", (kind,))
    }
    digest = hashlib.sha256(said.encode())
    for top in sorted(tops - _BY_VERSION - {"kvpolicy"}):
        digest.update(_package(top).encode())
    return digest.hexdigest()[:16]


@lru_cache
def _package(top: str) -> str:
    module = sys.modules.get(top)
    folders = [Path(folder) for folder in getattr(module, "__path__", ())]
    if folders:
        return _digest(file for folder in folders for file in folder.rglob("*.py"))
    file = getattr(module, "__file__", None)
    return _digest([Path(file)] if file else [])


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
