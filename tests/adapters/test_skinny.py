"""skinny_gemm: the same products, by a kernel that reads the weights once."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernel_library import needs_compiler
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kvpolicy import KernelError, ParameterError, RasterLayout
from kvpolicy.ops.cpu import native
from kvpolicy_adapters import attach, compile_decode, skinny_gemm
from kvpolicy_adapters.transformers.cache_argument import as_argument

LAYOUT = RasterLayout(rows=6, cols=6, prefix=2)


@pytest.fixture
def linear(kernel):
    return native.linear()


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=50)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_compiler
@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 35),
    columns=st.sampled_from([1, 7, 16, 40, 768, 1024, 1025, 2100]),
    outputs=st.sampled_from([1, 2, 3, 11, 12, 13, 100]),
    with_bias=st.booleans(),
)
def test_products_against_float64(operators, seed, rows, columns, outputs, with_bias):
    linear = operators.linear.default
    x, weight = numbers(rows, columns, seed=seed), numbers(outputs, columns, seed=seed + 1)
    bias = numbers(outputs, seed=seed + 2) if with_bias else None
    found = linear(x, weight, bias)
    expected = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T  # what rounding is measured by
    if bias is not None:
        expected, scale = expected + bias, scale + bias.abs()
    assert found.shape == (rows, outputs)
    assert ((found - expected).abs() <= 2e-6 * scale + 1e-30).all()
    # A row's numbers are its own: bit for bit the same, whoever its neighbours are.
    alone = linear(x[-1:].contiguous(), weight, bias)
    assert torch.equal(alone[0], found[-1])


@needs_compiler
def test_rows_of_any_shape_and_stride(linear):
    weight = numbers(5, 8)
    x = numbers(3, 8, 4).transpose(1, 2)
    torch.testing.assert_close(linear(x, weight, None), x @ weight.T)
    assert linear(x[:0], weight, None).shape == (0, 4, 5)


@needs_compiler
@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (numbers(2, 7), numbers(5, 8), None),
        (numbers(2, 8).double(), numbers(5, 8), None),
        (numbers(2, 8), numbers(5, 8).half(), None),
        (numbers(2, 8), numbers(8, 5).T, None),
        (numbers(2, 8), numbers(5, 8), numbers(6)),
    ],
    ids=["columns", "float64", "half weights", "transposed weights", "bias"],
)
def test_what_it_can_not_multiply_is_refused(linear, x, weight, bias):
    with pytest.raises(RuntimeError, match="must be float32 and fit"):
        linear(x, weight, bias)


@pytest.fixture
def products(linear, monkeypatch):
    """Rows of each product that was left to the kernel."""
    seen = []

    def counted(x, weight, bias):
        seen.append(x.numel() // x.shape[-1])
        return linear(x, weight, bias)

    monkeypatch.setattr(native, "linear", lambda: counted)
    monkeypatch.setattr(native, "most_rows", lambda: 32)
    return seen


@needs_compiler
@pytest.mark.parametrize(("rows", "served"), [(1, 0), (2, 15), (32, 15), (33, 0)])
def test_a_models_products_of_a_few_rows(model, products, rows, served):
    tokens = torch.arange(rows).view(-1, 1)
    with torch.inference_mode():
        expected = model(tokens).logits
        with skinny_gemm(model):
            found = model(tokens).logits
    torch.testing.assert_close(found, expected)
    assert len(products) == served  # 7 of each layer, and the head
    assert set(products) <= {rows}


@needs_compiler
def test_gradients_and_other_types_go_around_it(model, products):
    with skinny_gemm(model):
        model(torch.tensor([[1], [2]])).logits.sum().backward()
        assert model.lm_head.weight.grad is not None
        model.to(torch.bfloat16)
        with torch.no_grad():
            model(torch.tensor([[1], [2]]))
    assert not products


@needs_compiler
def test_the_model_is_as_it_was_afterwards(model, kernel):
    def raising():
        with skinny_gemm(model):
            assert "forward" in vars(model.lm_head)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 (its own)
        raising()
    assert not any("forward" in vars(module) for module in model.modules())


@needs_compiler
def test_subclasses_and_layers_that_others_replaced_are_left_alone(kernel):
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    theirs = nn.Linear(4, 4)
    theirs.forward = lambda input: input
    both = nn.Sequential(Doubled(4, 4), theirs, nn.Linear(4, 4))
    x = numbers(3, 4)
    with torch.no_grad():
        expected = both(x)
        with skinny_gemm(both):
            torch.testing.assert_close(both(x), expected)
    assert "forward" in vars(theirs)


def test_without_the_kernel_it_says_what_to_do(model):
    with pytest.raises(KernelError, match="kvpolicy build-kernel"), skinny_gemm(model):
        pass


@needs_compiler
def test_a_model_without_a_layer_for_it_is_refused(model, kernel):
    with pytest.raises(ParameterError, match="LlamaForCausalLM has none"):  # noqa: SIM117
        with skinny_gemm(model.to(torch.bfloat16)):
            pass


@needs_compiler
@pytest.mark.parametrize("compiled", [False, True])
def test_with_a_policy(model, kernel, compiled):
    """What streaming_llm evicts depends on no number, so logits agree through the whole image."""
    tokens = torch.randint(50, (3, LAYOUT.length), generator=torch.Generator().manual_seed(1))
    logits = []
    for skinny in (False, True):
        with (
            torch.inference_mode(),
            attach(model, policy="streaming_llm", budget=18, layout=LAYOUT) as cache,
            skinny_gemm(model) if skinny else nullcontext(),
            compile_decode(model, cache, backend="eager") if compiled and skinny else nullcontext(),
        ):
            steps = [
                model(tokens[:, at : at + 1], **as_argument(cache)).logits
                for at in range(LAYOUT.length)
            ]
        logits.append(torch.cat(steps, 1))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
