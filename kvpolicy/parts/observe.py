"""What is watched: the observers, by the names under which a composition takes them."""

from __future__ import annotations

from kvpolicy.observers import (
    CumulativeMass,
    FadingMass,
    LastQuery,
    LineMass,
    RollingMass,
    WindowMass,
)
from kvpolicy.parts.named import register_part

for _name, _observer in (
    ("cumulative_mass", CumulativeMass),
    ("fading_mass", FadingMass),
    ("last_query", LastQuery),
    ("line_mass", LineMass),
    ("rolling_mass", RollingMass),
    ("window_mass", WindowMass),
):
    register_part("observe", _name)(_observer)
