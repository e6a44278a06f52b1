"""Where the repository's files lie."""

from pathlib import Path

__all__ = ["ROOT", "TESTS"]

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
