import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_percentage_error, mean_squared_error, r2_score

from morphlib import diagnostics

losses = st.lists(st.floats(0.5, 10), min_size=2, max_size=30).filter(lambda v: np.ptp(v) > 1e-3)


@given(losses, st.integers(0, 1000))
def test_metrics_agree_with_scikit_learn(measured, seed):
    measured = np.array(measured)
    predicted = measured + np.random.default_rng(seed).normal(0, 0.1, len(measured))
    result = diagnostics.metrics(measured, predicted)
    assert result.n == len(measured)
    assert result.mse == pytest.approx(mean_squared_error(measured, predicted))
    assert result.rmse == pytest.approx(np.sqrt(result.mse))
    assert result.r2 == pytest.approx(r2_score(measured, predicted))
    assert result.mape_pct == pytest.approx(100 * mean_absolute_percentage_error(measured, predicted))


def test_metrics_of_nothing_and_of_one_row():
    nothing = diagnostics.metrics(np.array([]), np.array([]))
    assert nothing.n == 0 and np.isnan([nothing.mse, nothing.rmse, nothing.r2, nothing.mape_pct]).all()
    one = diagnostics.metrics(np.array([2.0]), np.array([2.5]))
    assert (one.mse, one.mape_pct) == (0.25, 25.0) and np.isnan(one.r2)


def test_spearman_of_a_family_of_one_is_not_a_number(paper):
    rows = paper[paper["name"].isin(["80M_v1", "80M_v4"]) | (paper["name"] == "1B_v1")]
    ranks = diagnostics.spearman_by_family(rows, rows["loss"].to_numpy())
    assert ranks["80M"] == pytest.approx(1)
    assert np.isnan(ranks["1B"])
