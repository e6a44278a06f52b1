"""Fréchet distance against closed forms, the bootstrap against its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpolicy import ParameterError, ShapeError
from kvpolicy.lab.compare.metrics import frechet_distance, paired_bootstrap


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


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        _, low, high = paired_bootstrap(random.normal(0.3, 1, size=60), resamples=400)
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_mean_lies_inside_and_more_confidence_is_wider():
    values = np.random.default_rng(1).normal(size=50)
    mean, low, high = paired_bootstrap(values)
    _, lower, higher = paired_bootstrap(values, confidence=0.99)
    assert mean == pytest.approx(values.mean())
    assert lower < low < mean < high < higher


def test_seed_decides_and_nothing_else(monkeypatch):
    values = np.random.default_rng(2).normal(size=50)
    first = paired_bootstrap(values, seed=3)
    np.random.default_rng().normal()
    assert paired_bootstrap(values, seed=3) == first
    assert paired_bootstrap(values, seed=4) != first
    monkeypatch.setattr(
        "kvpolicy.lab.compare.metrics._CHUNK", 1000
    )  # in many pieces: the same draws
    assert paired_bootstrap(values, seed=3) == first


@pytest.mark.parametrize(
    ("differences", "options", "error"),
    [
        ([], {}, ShapeError),
        ([[1.0]], {}, ShapeError),
        ([1.0, np.inf], {}, ParameterError),
        ([1.0], {"confidence": 1.0}, ParameterError),
        ([1.0], {"resamples": 0}, ParameterError),
    ],
)
def test_wrong_differences_are_refused(differences, options, error):
    with pytest.raises(error):
        paired_bootstrap(differences, **options)
