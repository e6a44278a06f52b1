"""Speculation draws what sequential decoding draws, over the same evicting cache.

Exactness is two claims. *The rule*: given the model's distributions, drafts that are judged by it
have the joint distribution of sequential sampling; many draws against the enumerated one, by
chi-square. *The cache*: what a pass sees behind each staged token is what sequential decoding would
have seen; compared for every pass.
"""

from __future__ import annotations

import pytest
import torch
from support.toy_decoding import ToyModel, chi_square, draw_many, table

import kvpolicy
from kvpolicy import Sampling, SpeculativeJacobi
from kvpolicy.decoding import speculative
from kvpolicy.decoding.sampling import draw
from kvpolicy.decoding.speculative import Drafts

LAYOUT = kvpolicy.RasterLayout(rows=3, cols=2, prefix=1)
MODEL = ToyModel(vocabulary=3, length=LAYOUT.length)
POLICIES = {
    "linear": kvpolicy.create("linear", anchors=0, recent_lines=0),
    "linear2d": kvpolicy.create("linear2d", anchors=0, recent=1),
    "h2o": kvpolicy.create("h2o"),
    "streaming_llm": kvpolicy.create("streaming_llm", sinks=1),
    "random": kvpolicy.create("random"),
}
BUDGETS = dict.fromkeys(POLICIES, 3)
WAYS = [(draft, coupled) for draft in ("above", "left", "last", "uniform") for coupled in (0, 1)]
#: A fraction of honest runs this small is refused by mistake; there are about a hundred of them.
SMALL = 1e-4


@pytest.fixture(scope="module")
def tables():
    return {
        (name, prompt): table(MODEL, policy, BUDGETS[name], LAYOUT, prompt=prompt)
        for name, policy in POLICIES.items()
        for prompt in (0, 1)
    }


def test_eviction_changes_what_is_drawn(tables):
    """Otherwise the tests below would say nothing about evicting caches."""
    full = table(MODEL, "full", None, LAYOUT).joint(Sampling())
    for name in POLICIES:
        distance = (tables[name, 0].joint(Sampling()) - full).abs().sum() / 2
        assert distance > 0.01, name


@pytest.mark.parametrize(
    ("name", "draft", "coupled"),
    [("linear", *way) for way in WAYS]
    + [(name, *way) for name in POLICIES if name != "linear" for way in (WAYS[1], WAYS[4])],
)
def test_joint_distribution_is_that_of_sequential_sampling(tables, name, draft, coupled):
    decoder = SpeculativeJacobi(window=4, draft=draft, coupled=bool(coupled))
    drawn = draw_many(decoder, tables[name, 0], 40_000, Sampling(), seed=1)
    assert chi_square(drawn, tables[name, 0].joint(Sampling())) > SMALL


@pytest.mark.parametrize("sampling", [Sampling(top_k=2), Sampling(temperature=1.5, top_p=0.9)])
@pytest.mark.parametrize(("draft", "coupled"), [("above", True), ("last", False)])
def test_joint_distribution_of_guided_and_truncated_sampling(tables, sampling, draft, coupled):
    guided = tables["linear", 0].guided(tables["linear", 1], 1.5)
    decoder = SpeculativeJacobi(window=3, draft=draft, coupled=coupled)
    drawn = draw_many(decoder, guided, 40_000, sampling, seed=2)
    assert chi_square(drawn, guided.joint(sampling)) > SMALL


@pytest.mark.parametrize(("draft", "coupled"), WAYS)
def test_sequences_of_a_batch_wait_for_the_slowest(tables, draft, coupled):
    """A batch begins each pass behind its slowest sequence; what the others know stays known."""
    decoder = SpeculativeJacobi(window=4, draft=draft, coupled=bool(coupled))
    drawn = draw_many(decoder, tables["h2o", 0], 42_000, Sampling(), seed=3, together=3)
    assert chi_square(drawn, tables["h2o", 0].joint(Sampling())) > SMALL


#: Every way and every policy. Their product would say no more: to the rule, a policy is the numbers
#: in its table.
MANY = [(list(POLICIES)[i % len(POLICIES)], *way) for i, way in enumerate(WAYS)]


def of_many_draws(table, decoder):
    return chi_square(draw_many(decoder, table, 500_000, Sampling(), 7), table.joint(Sampling()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "draft", "coupled"), MANY)
def test_joint_distribution_of_many_draws(tables, name, draft, coupled):
    decoder = SpeculativeJacobi(window=4, draft=draft, coupled=bool(coupled))
    assert of_many_draws(tables[name, 0], decoder) > SMALL


# -- rules that are broken -----------------------------------------------------------------------


def accepts_with_p(token, old, new, generator=None):
    at = token.unsqueeze(-1)
    kept = torch.rand(token.shape, generator=generator) < new.gather(-1, at).squeeze(-1)
    rest = (new - old).clamp_(min=0) + 1e-9
    return torch.where(kept, token, draw(rest, generator)), kept


def redraws_from_p(token, old, new, generator=None):
    tokens, kept = honest(token, old, new, generator)
    return torch.where(kept, tokens, draw(new, generator)), kept


def residual_is_not_cut_at_zero(token, old, new, generator=None):
    tokens, kept = honest(token, old, new, generator)
    return torch.where(kept, tokens, draw((new - old).abs() + 1e-9, generator)), kept


def keeps_everything(token, old, new, generator=None):
    return token, torch.ones_like(token, dtype=torch.bool)


def keeps_half_of_what_it_should(token, old, new, generator=None):
    tokens, kept = honest(token, old, new, generator)
    kept &= torch.rand(token.shape, generator=generator) < 0.5
    rest = (new - old).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, new)
    return torch.where(kept, tokens, draw(rest, generator)), kept


def ratio_upside_down(token, old, new, generator=None):
    at = token.unsqueeze(-1)
    was, now = old.gather(-1, at).squeeze(-1), new.gather(-1, at).squeeze(-1)
    kept = torch.rand(token.shape, generator=generator) * now < was
    return torch.where(kept, token, draw(new, generator)), kept


class StaleDistributions(Drafts):
    """Drafts go on, but what they were drawn from stays what it was."""

    def settle(self, start, chances, generator):
        before = self.chances.clone()
        kept = super().settle(start, chances, generator)
        last = (start + chances.shape[1]) % self.decoder.window
        now, self.chances = self.chances, before
        self.chances[:, last] = now[:, last]
        return kept


class UniformWithoutSaying(Drafts):
    """Certain drafts that claim to have been drawn uniformly."""

    def feed(self, start, layout, generator):
        begun = self.begun
        fed = super().feed(start, layout, generator)
        for place in range(max(begun, start + 1), self.begun):
            self.chances[:, place % self.decoder.window] = 1 / self.chances.shape[-1]
        return fed


honest = speculative.couple
BROKEN = (
    accepts_with_p,
    redraws_from_p,
    residual_is_not_cut_at_zero,
    keeps_everything,
    keeps_half_of_what_it_should,
    ratio_upside_down,
)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_seen(tables, rule, monkeypatch):
    monkeypatch.setattr(speculative, "couple", rule)
    found = []
    for draft in ("above", "last"):
        decoder = SpeculativeJacobi(window=4, draft=draft)
        drawn = draw_many(decoder, tables["linear", 0], 40_000, Sampling(), seed=4)
        found.append(chi_square(drawn, tables["linear", 0].joint(Sampling())))
    assert min(found) < 1e-9


@pytest.mark.parametrize("kind", [StaleDistributions, UniformWithoutSaying])
def test_broken_drafts_are_seen(tables, kind):
    drawn = draw_many(
        SpeculativeJacobi(window=4), tables["linear", 0], 40_000, Sampling(), seed=5, kind=kind
    )
    assert chi_square(drawn, tables["linear", 0].joint(Sampling())) < 1e-9
