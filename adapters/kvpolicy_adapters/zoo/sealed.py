"""Files that a card vouches for: nothing is parsed before its SHA-256 has been compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.resources.abc import Traversable

from kvpolicy.errors import KVPolicyError

__all__ = ["CorruptFileError", "read_sealed"]


class CorruptFileError(KVPolicyError, OSError):
    """A file that ships with the package is missing, or not what its card says."""


def read_sealed(folder: Traversable, name: str, seals: Mapping[str, str]) -> bytes:
    """The bytes of ``folder/name``, which must have the SHA-256 that ``seals`` has for it.

    Args:
        folder: where the file lies; a folder on disk or inside an archive.
        name: the file.
        seals: file name to SHA-256, in hexadecimal.

    Raises:
        CorruptFileError: the file can't be read, differs, or has no seal.
    """
    if name not in seals:
        raise CorruptFileError(f"the card of {folder} has no SHA-256 for {name}")
    try:
        data = folder.joinpath(name).read_bytes()
    except OSError as error:
        raise CorruptFileError(
            f"{folder.joinpath(name)} can't be read ({error}); reinstall kvpolicy"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != seals[name]:
        raise CorruptFileError(
            f"{folder.joinpath(name)} is damaged: SHA-256 {found[:12]}…, "
            f"its card says {seals[name][:12]}…; reinstall kvpolicy"
        )
    return data
