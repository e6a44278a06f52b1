"""What a run ran on: versions, revision, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import kvpolicy
from kvpolicy.lab.run.executor import Executor
from kvpolicy.lab.run.executors import processors
from kvpolicy.lab.run.provenance import versions
from kvpolicy.lab.run.run_folder import Environment
from kvpolicy.lab.run.subject import Subject

__all__ = ["find_environment"]


def find_environment(subject: Subject, executor: Executor, threads: int) -> Environment:
    """Look around.

    Args:
        subject: names the device, where it has a ``device``; ``cpu`` otherwise.
        executor: what runs the cells.
        threads: of torch, in each worker.
    """
    return Environment(
        versions=versions(),
        revision=_revision(Path(kvpolicy.__file__).parent.parent),
        system=f"{platform.system()} {platform.machine()}",
        processors=processors(),
        device=str(getattr(subject, "device", "cpu")),
        threads=threads,
        executor=f"{executor.name} × {executor.workers}",
    )


def _revision(folder: Path) -> str | None:
    """The commit that a source tree is at, ``+`` behind it where files differ from it."""
    if not (folder / ".git").exists():
        return None
    found = []
    for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(
                ["git", *command],
                cwd=folder,
                env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
                capture_output=True,
                text=True,
                timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode:
            return None
        found.append(done.stdout.strip())
    commit, changed = found
    return commit + ("+" if changed else "")
