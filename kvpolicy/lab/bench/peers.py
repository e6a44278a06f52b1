"""Contenders that need packages of their own: they decode in another process.

kvpress asks for an older transformers than kvpolicy does, so it gets a virtual environment, which
borrows torch from this one: the same build of torch, or a comparison would mean nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvpolicy.errors import KVPolicyError
from kvpolicy.lab.bench.contender import Contender, Dimensions, Workload
from kvpolicy.layout import RasterLayout

__all__ = [
    "KVPRESS",
    "OWN_WORKER",
    "PRESSES",
    "PeerError",
    "PeerSession",
    "build_environment",
    "find_environment",
]

#: What pip installs for ``--peers``.
KVPRESS = "kvpress==0.5.5"
PRESSES = ("streaming_llm", "lagkv", "knorm")
#: What every script that is driven may import: how it is spoken to.
_PROTOCOL = Path(__file__).parent / "workers"
#: Decodes with what decodes in this process, too.
OWN_WORKER = _PROTOCOL / "own_worker.py"


class PeerError(KVPolicyError, RuntimeError):
    """Another project's code could not be installed or run."""


def build_environment(folder: Path) -> Path:
    """Make a virtual environment with kvpress, unless it is there; returns its Python.

    Raises:
        PeerError: pip failed.
    """
    found = find_environment(folder)
    if found is not None:
        return found
    python = folder / "bin" / "python"
    _call([sys.executable, "-m", "venv", "--clear", str(folder)], "a virtual environment")
    site = next((folder / "lib").glob("python*/site-packages"))
    # What is installed here comes after what is installed there: pip finds torch and leaves it.
    borrowed = Path(torch.__file__).parent.parent
    (site / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    version = torch.__version__.partition("+")[0]
    _call(
        [str(python), "-m", "pip", "install", "-q", KVPRESS, f"torch=={version}"],
        f"{KVPRESS} with pip",
    )
    _ready(folder).touch()
    return python


def find_environment(folder: Path) -> Path | None:
    """The Python of the environment that was made there for this torch; None if there is none."""
    return folder / "bin" / "python" if _ready(folder).exists() else None


def _ready(folder: Path) -> Path:
    return folder / f"ready-{KVPRESS}-torch-{torch.__version__}"


def _call(command: Sequence[str], what: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PeerError(f"can't install {what}: {_tail(result.stderr)}")


def _tail(text: str) -> str:
    return " / ".join(text.strip().splitlines()[-3:]) or "no message"


class PeerSession:
    """A contender in a process of its own, driven by a line of JSON each way.

    Args:
        contender: who decodes.
        script: what it runs; it may import ``protocol`` of ``workers/``.
        python: the interpreter that has the packages it needs.
        workload: what is decoded.
        dimensions: of the model.
        layout: of the image.
        options: what the worker needs besides.
        watched: whether its memory will be asked for.

    Raises:
        PeerError: the worker could not begin.
    """

    def __init__(
        self,
        contender: Contender,
        script: Path,
        python: Path,
        workload: Workload,
        dimensions: Dimensions,
        layout: RasterLayout,
        *,
        options: Mapping[str, Any],
        watched: bool = False,
    ) -> None:
        self.contender = contender
        threads = str(torch.get_num_threads())
        # A file, not a pipe: nobody reads it, and a pipe that is full would stop the worker.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the session)
        self.process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(
                    path for path in (str(_PROTOCOL), os.environ.get("PYTHONPATH")) if path
                ),
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                # What is freed goes back to the system at once, so that growth can be watched.
                # A layer's positions and readings are no larger than this.
                "MALLOC_MMAP_THRESHOLD_": str(1 << 14) if watched else "",
            },
            start_new_session=True,  # Ctrl-C is for the bench, which then closes its workers
        )
        self._ask(
            do="open",
            workload=workload.as_dict(),
            dimensions=asdict(dimensions),
            length=layout.length,
            prefix=layout.prefix,
            line=layout.line_length,
            threads=torch.get_num_threads(),
            **options,
        )

    def restart(self) -> None:
        """Empty the cache and read the prefix; ``run`` goes on from there."""
        self._ask(do="restart")

    def run(self, count: int) -> tuple[list[float], list[float]]:
        """Decode so many tokens; seconds, and cached tokens read, of each step."""
        answer = self._ask(do="run", count=count)
        return answer["seconds"], answer["read"]

    def skip(self, count: int) -> None:
        """Go on by so many tokens without the model."""
        self._ask(do="skip", count=count)

    def wake(self) -> None:
        """Read all weights and the cache once."""
        self._ask(do="wake")

    def cache_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return int(self._ask(do="cache_bytes")["bytes"])

    def release(self) -> None:
        """Give the cache back until the next image."""
        self._ask(do="release")

    def watch(self) -> None:
        """Give the cache back, and watch how the process grows from here."""
        self._ask(do="watch")

    def memory(self) -> int:
        """Bytes by which the process has grown since ``watch``, at its peak."""
        return int(self._ask(do="memory")["bytes"])

    def close(self) -> None:
        """End the other process, whatever it is at."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.errors.close()

    def _ask(self, **message: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.kill()
            self.process.wait()
            self.errors.seek(0)
            raise PeerError(
                f"{self.contender.name} ended at {message['do']!r}: {_tail(self.errors.read())}"
            )
        parsed: dict[str, Any] = json.loads(answer)
        return parsed
