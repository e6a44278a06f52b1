"""Stock parts: the functions that strategies call. Importing this registers them by name.

A part says one thing of a view (what may not go, what a token is worth, how much room is wanted).
A policy calls it in its method of that kind; ``kvpolicy.compose`` puts it in place of another
policy's.
"""

import kvpolicy.parts.observe  # noqa: F401  (registers the observers)
from kvpolicy.parts.decide import each_line, each_part, each_token, every
from kvpolicy.parts.key_lengths import KeyLengths, key_lengths
from kvpolicy.parts.moving import moved_mass, moving_mass
from kvpolicy.parts.named import available_parts, register_part
from kvpolicy.parts.protect import anchors, recent_lines, recent_share, recent_tokens
from kvpolicy.parts.score import head_mean, mass, pooled_mass, recency, short_keys

__all__ = [
    "KeyLengths",
    "anchors",
    "available_parts",
    "each_line",
    "each_part",
    "each_token",
    "every",
    "head_mean",
    "key_lengths",
    "mass",
    "moved_mass",
    "moving_mass",
    "pooled_mass",
    "recency",
    "recent_lines",
    "recent_share",
    "recent_tokens",
    "register_part",
    "short_keys",
]
