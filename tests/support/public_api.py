"""Names and signatures that others build on.

``python tests/support/public_api.py`` writes them anew.
"""

from __future__ import annotations

import importlib
import inspect
import re
from enum import Enum
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("public_api.txt")
COMMAND = "python tests/support/public_api.py"
MODULES = ("kvpolicy", "kvpolicy.policies", "kvpolicy.testing", "kvpolicy_adapters")


def lines() -> list[str]:
    """One line a name, one more for each public method, attribute or field of a class."""
    found: list[str] = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            found += _told(f"{module_name}.{name}", getattr(module, name))
    return found


def _told(path: str, thing: object) -> list[str]:
    if inspect.ismodule(thing):
        return [f"{path}: module"]
    if inspect.isclass(thing):
        return [f"class {path}({', '.join(_bases(thing))})", *_members(path, thing)]
    if callable(thing) and hasattr(thing, "__name__"):
        return [f"{path}{_signature(thing)}"]
    return [f"{path}: {type(thing).__name__}"]


def _bases(kind: type) -> list[str]:
    return [base.__name__ for base in kind.__bases__ if base is not object]


def _members(path: str, kind: type) -> list[str]:
    found = []
    if issubclass(kind, Enum):
        return [f"  {path}.{member.name} = {member.value}" for member in kind]
    fields = getattr(kind, "model_fields", None)
    if fields is not None:
        for name, field in fields.items():
            default = "" if field.is_required() else f" = {field.default!r}"
            found.append(f"  {path}.{name}: {_spelled(field.annotation)}{default}")
    elif "__init__" in vars(kind):
        found.append(f"  {path}{_signature(kind)}")
    for name, member in sorted(vars(kind).items()):
        if name.startswith("_") or name.startswith("model_") or name in (fields or {}):
            continue
        member = getattr(member, "__func__", member)
        if inspect.isfunction(member):
            found.append(f"  {path}.{name}{_signature(member)}")
        elif isinstance(member, property) or type(member).__name__ == "cached_property":
            found.append(f"  {path}.{name}: property")
    return found


def _signature(thing: object) -> str:
    return _spelled(inspect.signature(thing))  # type: ignore[arg-type]


def _spelled(thing: object) -> str:
    text = thing.__name__ if isinstance(thing, type) else str(thing)
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    # Where a name is defined is ours to change.
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+([A-Za-z_]\w*)", r"\1", text).replace("'", "")


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(lines()) + "\n", encoding="utf-8")
    print(f"wrote {SNAPSHOT.name}")
