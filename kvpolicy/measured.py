"""Files of what was measured: JSON that says what it is, read with one set of complaints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from kvpolicy.errors import ParameterError, parameter_error

__all__ = ["read_measured"]

Form = TypeVar("Form", bound=BaseModel)


def read_measured(path: str | Path, form: type[Form], what: str, command: str) -> Form:
    """Read a file that a command has written.

    Args:
        path: of the file.
        form: its fields; the default of ``kind`` is what the file must say that it is.
        what: it holds, for error messages (``"layer budgets"``).
        command: that writes such files.

    Raises:
        ParameterError: the file can't be read, is no such file, or contradicts itself.
    """
    try:
        fields = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ParameterError(
            f"{what} {path} can't be read ({error.strerror}); run `{command}`"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ParameterError(
            f"{what} {path} is not JSON ({error}); run `{command}` again"
        ) from None
    kind = form.model_fields["kind"].default
    if not isinstance(fields, dict) or fields.get("kind") != kind:
        raise ParameterError(f"{path} is no file of {what} as `{command}` writes it")
    try:
        return form(**fields)
    except ValidationError as error:
        raise parameter_error(f"{what} {path}", form, error) from None
