"""A policy of our own: what is looked at most per query, not what has been looked at longest."""

from pydantic import Field

from kvpolicy import CumulativeMass, ScoredPolicy, register
from kvpolicy.parts import recent_tokens


@register("mass_rate")
class MassRate(ScoredPolicy):
    """Keep a window, and the tokens with the most mass a query: sum over q of A[q, j], by age."""

    window: int = Field(4, ge=1, description="newest tokens, which are never evicted")

    def observers(self, shape):
        return (CumulativeMass(shape),)

    def protect(self, view):
        return recent_tokens(view, self.window)

    def score(self, view):
        return view.mass / view.age
