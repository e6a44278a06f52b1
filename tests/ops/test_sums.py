"""Equal tokens score equal to the last bit, wherever they lie, by every operation and backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.kernel_library import needs_compiler

import kvpolicy
from kvpolicy.ops import change
from kvpolicy.ops.cpu import native
from kvpolicy.ops.key_lengths import lengths
from kvpolicy.ops.redundancy import cosines
from kvpolicy.ops.sums import mean_over, sum_over
from kvpolicy.parts import head_mean

#: Around the ends of vectors and of unrolled loops.
HELD = [1, 7, 15, 17, 31, 33, 63, 97, 131, 259]


def drawn(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 16, 31, 64])
def test_sums_do_not_depend_on_the_place(count, held):
    """What each head gives the first token it gives to all of them."""
    mass = drawn(2, count, 1, seed=count).expand(2, count, held).contiguous()
    for found in (sum_over(mass, 1), mean_over(mass, 1)):
        assert found.shape == (2, held)
        assert (found == found[:, :1]).all()


@given(st.integers(1, 70), st.integers(0, 3), st.integers(0, 10**6))
def test_they_are_sums_and_means(count, dim, seed):
    shape = [3, 2, 4, 5]
    shape[dim] = count
    tensor = drawn(*shape, seed=seed)
    before = tensor.clone()
    exact = tensor.double()
    torch.testing.assert_close(sum_over(tensor, dim).double(), exact.sum(dim), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean_over(tensor, dim).double(), exact.mean(dim), rtol=1e-6, atol=0)
    assert torch.equal(tensor, before)


def test_gradients_flow_through_them():
    tensor = drawn(7, 3).requires_grad_()
    mean_over(tensor, 0).sum().backward()
    torch.testing.assert_close(tensor.grad, torch.full((7, 3), 1 / 7))


@pytest.mark.parametrize("heads", [1, 8, 12, 32])
@pytest.mark.parametrize("held", HELD)
def test_a_mean_over_heads_ties_equal_tokens(heads, held):
    """The score of ``tova``: of tokens that each head gives the same, the oldest must go."""
    mass = drawn(1, heads, 1, seed=heads).expand(1, heads, held).contiguous()

    class View:
        pass

    view = View()
    view.mass = mass
    found = head_mean(view)
    assert found.shape == mass.shape
    assert (found == found[:, :, :1]).all()


@pytest.fixture(params=["torch", pytest.param("kernel", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """Each backend that serves on a CPU."""
    operators = request.getfixturevalue("operators") if request.param == "kernel" else None
    monkeypatch.setattr(native, "operators", lambda: operators)


def equal_tokens(held, dim, pairs=2):
    """Tokens of a few kinds, which of them lies where is drawn; and the kind of each slot."""
    kind = torch.randint(0, pairs, (held,), generator=torch.Generator().manual_seed(held))
    tokens = torch.randn(1, 2, pairs, dim, generator=torch.Generator().manual_seed(dim))
    return tokens[:, :, kind].contiguous(), kind


def assert_kinds_tie(found, kind):
    for each in kind.unique():
        same = found[..., kind == each]
        assert (same == same[..., :1]).all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dim", [1, 8, 20, 64, 80, 128])
@pytest.mark.parametrize("held", HELD)
def test_equal_tokens_tie(held, dim):
    tokens, kind = equal_tokens(held, dim)
    assert_kinds_tie(lengths(tokens), kind)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dim", [1, 8, 20, 64, 80, 128])
@pytest.mark.parametrize("held", HELD)
def test_equal_tokens_are_compared_alike(held, dim):
    """Products of matrices add in another order at their edges: no slot may lie there."""
    tokens, kind = equal_tokens(held, dim)
    positions = torch.randperm(held, generator=torch.Generator().manual_seed(1))
    positions = positions.int().expand(1, 2, held).contiguous()
    mass = drawn(1, 2, 9, 2, seed=held)[..., kind].contiguous()
    assert_kinds_tie(change.alone(tokens, mass), kind)
    nobody = torch.zeros(1, 2, held, dtype=torch.bool)
    # None are alike here, or else the newest of a kind would be left out.
    assert_kinds_tie(cosines(tokens, positions, nobody, similar=1.5), kind)
    of_pairs = change.changes(mass, *change.foreseen(tokens, mass))
    assert_kinds_tie(of_pairs[:, :, -1], kind)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 8, 20, 64, 80, 128])
@pytest.mark.parametrize("held", HELD)
def test_the_kernel_attends_to_equal_tokens_alike(operators, held, dim, dtype):
    """Also to those behind the last whole group that goes by at once."""
    tokens, kind = equal_tokens(held, dim)
    tokens = tokens.to(dtype)
    query = torch.randn(1, 16, 1, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    positions = torch.arange(held, dtype=torch.int32).expand(1, 2, held).contiguous()
    last = torch.full((1, 2, 1), held - 1)
    terms = (positions, last, tokens[:, :, -1:].clone(), tokens[:, :, -1:].clone())
    _, mass, _ = operators.decode.default(
        query, tokens, tokens.clone(), *terms, held - 1, held, dim**-0.5, True
    )
    assert_kinds_tie(mass[:, :, 0], kind)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("policy", ["tova", "knorm", "h2o"])
def test_equal_tokens_go_in_the_order_of_their_age(policy):
    """A whole stream of one token again and again: what is left are the prefix and the newest."""
    layout = kvpolicy.TextLayout(sinks=1)
    cache = kvpolicy.PolicyCache(policy, 20, layout=layout, num_layers=1)
    key = torch.randn(1, 12, 1, 16, generator=torch.Generator().manual_seed(3))
    value = torch.randn(1, 12, 1, 16, generator=torch.Generator().manual_seed(4))
    query = torch.randn(1, 24, 1, 16, generator=torch.Generator().manual_seed(5))
    for _ in range(60):
        cache.attend(0, query, key, value)
    kept = cache.positions(0).sort(-1).values
    if policy == "h2o":  # mass adds up, so the newest has least; what is protected is a window
        kept = kept[..., -10:]
        assert (kept == torch.arange(50, 60)).all()
    else:
        assert (kept == torch.tensor([0, *range(40, 60)])).all()
