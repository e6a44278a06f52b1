"""JointCache: caches of one generation that take tokens, and take them back, together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from kvpolicy.decoding.decoder import StagingCache
from kvpolicy.errors import ParameterError
from kvpolicy.layout import TokenLayout

__all__ = ["JointCache"]


class JointCache:
    """Several caches that are staged and committed as one.

    Guidance runs a conditional and an unconditional half; where each has a cache of its own, both
    must keep and forget the same tokens.

    Args:
        caches: at least one; the first one says where tokens sit.

    Raises:
        ParameterError: there is none.
    """

    def __init__(self, *caches: StagingCache) -> None:
        if not caches:
            raise ParameterError("JointCache() joins at least one cache; give it some")
        self.caches = caches

    @property
    def layout(self) -> TokenLayout | None:
        """Where tokens sit in the first cache."""
        return self.caches[0].layout

    @contextmanager
    def stage(self, lookahead: int, *, together: bool = False) -> Iterator[None]:
        """Stage all of them; see :meth:`kvpolicy.PolicyCache.stage`."""
        with ExitStack() as stack:
            for cache in self.caches:
                stack.enter_context(cache.stage(lookahead, together=together))
            yield

    def commit(self, count: int) -> None:
        """Keep the first ``count`` staged tokens of each."""
        for cache in self.caches:
            cache.commit(count)
