"""Fréchet distance against closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy import ParameterError, ShapeError
from kvpolicy.lab.compare.frechet import frechet_distance


def gaussian(seed, features=6, samples=40):
    data = np.random.default_rng(seed).normal(size=(samples, features))
    return data.mean(0), np.cov(data, rowvar=False)


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(2, 30))
@settings(max_examples=50, deadline=None)
def test_equal_gaussians_are_at_distance_zero(seed, features, samples):
    mean, cov = gaussian(seed, features, samples)  # also with fewer samples than features
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_distance_is_symmetric_and_positive(seed):
    a, b = gaussian(seed), gaussian(seed + 1)
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), abs=1e-9)
    assert frechet_distance(*a, *b) > 0


def test_diagonal_gaussians_have_a_closed_form():
    s, t = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    mean = np.array([1.0, -2.0, 0.5])
    expected = (mean**2).sum() + ((np.sqrt(s) - np.sqrt(t)) ** 2).sum()
    assert frechet_distance(mean, np.diag(s), np.zeros(3), np.diag(t)) == pytest.approx(expected)


def test_distance_equals_the_textbook_form_with_a_general_matrix_root():
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(1), gaussian(2)
    # tr((AB)^½) from the eigenvalues of the product itself, which is not symmetric.
    cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real).sum()
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * cross
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([0.0, 0], np.eye(3), [0.0, 0], np.eye(2)), ShapeError, "cov_a"),
        (([0.0], np.eye(1), [0.0, 0], np.eye(2)), ShapeError, "1 features in a, 2 in b"),
        (([0.0, np.nan], np.eye(2), [0.0, 0], np.eye(2)), ParameterError, "mean_a"),
        (([0.0, 0], np.eye(2), [0.0, 0], [[1, 2], [0, 1]]), ParameterError, "cov_b is not symm"),
    ],
)
def test_wrong_moments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        frechet_distance(*arguments)
