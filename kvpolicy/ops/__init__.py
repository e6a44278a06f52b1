"""One function an operation: plain torch that says what it is, and the choice of a faster backend.

Callers give tensors and numbers, and never know which backend served: C++ on a CPU where it has
been built (``cpu/``), Triton on a GPU (``triton/``), torch's own operators anywhere else.

Masks are bool, positions int32 ``[B, H, S]`` with -1 in empty slots, scores float32.
"""

from kvpolicy.ops import products

__all__ = ["products"]
