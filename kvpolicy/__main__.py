"""Where the ``kvpolicy`` command and ``python -m kvpolicy`` begin.

The command line needs packages of the ``lab`` extra; without them, it says so in one line.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["main"]

#: Packages that only an extra brings, and the extra to ask for.
EXTRAS = {
    "filelock": "lab",
    "hypothesis": "testing",
    "jinja2": "lab",
    "matplotlib": "lab",
    "optuna": "tune",
    "PIL": "lab",
    "plotly": "lab",
    "pyarrow": "lab",
    "pytest": "testing",
    "ray": "ray",
    "rich": "lab",
    "safetensors": "lab",
    "transformers": "lab",
    "typer": "lab",
    "yaml": "lab",
}


def main() -> None:
    """Run the command line; exit with status 2 and one line where an extra is missing."""
    # ``python -m`` puts the current folder first on the path, where a file of the user's that is
    # called as a package would be taken for it. Commands add the folder where they are asked to.
    here = os.getcwd()
    if sys.path and sys.path[0] in ("", here) and here != str(Path(__file__).parents[1]):
        del sys.path[0]
    try:
        from kvpolicy.cli import main as command

        command()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        print(
            f"kvpolicy: this command needs {missing}, which is not installed; "
            f"pip install 'kvpolicy[{EXTRAS[missing]}]' brings it",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
