"""Which transformers this release was tested with, and one line where a newer one runs."""

from __future__ import annotations

import warnings

import transformers
from packaging.version import Version

__all__ = ["NEWEST_TESTED", "say_if_newer"]

#: The version that ``constraints.txt`` pins, on which the whole suite has passed.
NEWEST_TESTED = "5.24.0"

_said = False


def say_if_newer(stacklevel: int) -> None:
    """Warn, once a process, where the installed transformers is newer than the tested one."""
    global _said
    if not _said and Version(transformers.__version__) > Version(NEWEST_TESTED):
        _said = True
        warnings.warn(
            f"kvpolicy was tested with transformers up to {NEWEST_TESTED}, and this is "
            f"{transformers.__version__}: compare a run whose budget has room for everything with "
            f"one without a policy before you rely on it",
            RuntimeWarning,
            stacklevel=stacklevel + 1,
        )
