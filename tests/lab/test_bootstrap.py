"""The bootstrap against its definition."""

import numpy as np
import pytest

from kvpolicy import ParameterError, ShapeError
from kvpolicy.lab.compare.bootstrap import paired_bootstrap, replicates


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        _, low, high = paired_bootstrap(random.normal(0.3, 1, size=60))
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_mean_lies_inside_and_more_confidence_is_wider():
    values = np.random.default_rng(1).normal(size=50)
    mean, low, high = paired_bootstrap(values)
    _, lower, higher = paired_bootstrap(values, confidence=0.99)
    assert mean == pytest.approx(values.mean())
    assert lower < low < mean < high < higher


def test_resamples_are_the_same_whatever_was_drawn_before_and_in_however_many_pieces(monkeypatch):
    values = np.random.default_rng(2).normal(size=50)
    first = replicates(values)
    np.random.default_rng().normal()
    assert (replicates(values) == first).all()
    monkeypatch.setattr("kvpolicy.lab.compare.bootstrap._CHUNK", 1000)
    assert (replicates(values) == first).all()


@pytest.mark.parametrize("statistic", [None, lambda rows: float(rows.mean())])
def test_a_difference_of_replicates_is_that_of_the_same_rows(statistic):
    """What pairs two policies: the same resamples for equal numbers of rows."""
    a, b = np.random.default_rng(3).normal(size=(2, 40))
    apart = replicates(a, statistic) - replicates(b, statistic)
    assert apart == pytest.approx(replicates(a - b, statistic))


@pytest.mark.parametrize(
    ("differences", "options", "error"),
    [
        ([], {}, ShapeError),
        ([1.0], {}, ShapeError),
        ([[1.0, 2.0]], {}, ShapeError),
        ([1.0, np.inf], {}, ParameterError),
        ([1.0, 2.0], {"confidence": 1.0}, ParameterError),
    ],
)
def test_wrong_differences_are_refused(differences, options, error):
    with pytest.raises(error):
        paired_bootstrap(differences, **options)
