import dataclasses
import re
import subprocess
import sys
from itertools import combinations, permutations

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, rankdata, spearmanr
from scipy.stats import t as student_t
from sklearn.metrics import mean_absolute_percentage_error, mean_squared_error, r2_score
from statsmodels.stats.outliers_influence import OLSInfluence

from morphlib import diagnostics, fitting, laws, runs
from morphlib.errors import InputError

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
    assert result.mape == pytest.approx(100 * mean_absolute_percentage_error(measured, predicted))


def test_metrics_of_nothing_and_of_one_row():
    nothing = diagnostics.metrics(np.array([]), np.array([]))
    assert nothing.n == 0 and np.isnan([nothing.mse, nothing.rmse, nothing.r2, nothing.mape]).all()
    one = diagnostics.metrics(np.array([2.0]), np.array([2.5]))
    assert (one.mse, one.mape) == (0.25, 25.0) and np.isnan(one.r2)


def test_spearman_of_a_family_of_one_is_not_a_number(paper):
    rows = paper[paper["name"].isin(["80M_v1", "80M_v4"]) | (paper["name"] == "1B_v1")]
    ranks = diagnostics.spearman_by_family(rows, rows["loss"].to_numpy())
    assert ranks["80M"] == pytest.approx(1)
    assert np.isnan(ranks["1B"])


# --- What the rows can say about the parameters


def test_a_verdict_on_rows_that_determine_the_law(paper):
    verdict = diagnostics.identifiability(paper, fitting.fit(paper, laws.get("inference-aware")))
    assert verdict.identified and not verdict.undetermined and not verdict.confounded
    assert verdict.correlations["N", "D"] == pytest.approx(
        np.corrcoef(np.log(paper["n_params"]), np.log(paper["tokens"]))[0, 1]
    )
    assert len(verdict.sentences) == 1 and "determine every parameter" in verdict.sentences[0]


def test_a_verdict_on_free_exponents_and_few_budgets(paper):
    verdict = diagnostics.identifiability(paper, fitting.fit(paper, laws.get("inference-aware", "free"), "fit_main"))
    assert not verdict.identified and verdict.undetermined == ("A", "alpha")
    assert {"A", "alpha"} in [set(pair[:2]) for pair in verdict.confounded]
    words = " ".join(verdict.sentences)
    assert "do not determine A and alpha of inference-aware" in words
    assert "rests on 3 of 27 rows" in words  # the three 160N points
    assert "A and alpha: add runs with N outside 7.77e+07 to 3.12e+08" in words


def test_constant_tokens_per_parameter_are_named(paper):
    verdict = diagnostics.identifiability(paper, fitting.fit(paper, laws.get("chinchilla"), "fit_20N_only"))
    assert not verdict.identified and verdict.undetermined == ("A",)
    assert verdict.correlations["N", "D"] > 0.999
    assert any("D / N is constant (all rows have 19.6 to 20.8 tokens" in sentence for sentence in verdict.sentences)
    assert any("held at zero" in sentence for sentence in verdict.sentences)


@pytest.mark.parametrize("law", ["inference-aware", "chinchilla+log-quadratic-drift", "over-training"])
def test_a_verdict_does_not_depend_on_units(paper, law):
    """In raw units A is the term at N = 1, and its standard error moves with what N is counted in."""
    law = laws.get(law, "free")
    verdicts = []
    for power in (0, -6, 3):
        table = paper.assign(n_params=paper["n_params"] * 10.0**power, tokens=paper["tokens"] * 10.0**power)
        verdicts.append(diagnostics.identifiability(table, fitting.fit(table, law)))
    for other in verdicts[1:]:
        assert (other.identified, other.undetermined) == (verdicts[0].identified, verdicts[0].undetermined)
        assert [pair[:2] for pair in other.confounded] == [pair[:2] for pair in verdicts[0].confounded]


def test_an_exact_fit_and_a_variable_that_hardly_varies(paper):
    exact = diagnostics.identifiability(paper, fitting.fit(paper, laws.get("inference-aware"), "fit_random_trial1"))
    assert exact.identified  # six rows, five parameters
    law = laws.get("chinchilla+log-quadratic")
    rows = fitting.fit(paper, law, "fit_random_trial1")
    assert not diagnostics.identifiability(paper, rows).identified
    square = paper[(paper["d_model"] / paper["n_layers"]).between(60, 110)]
    words = " ".join(diagnostics.identifiability(square, fitting.fit(square, laws.get("inference-aware"))).sentences)
    assert "R hardly varies (64 to 108): add runs with R twice as large or half as large." in words


def test_a_fit_of_another_table_is_refused(paper):
    fit = fitting.fit(paper, laws.get("chinchilla"))
    for ask in (
        diagnostics.identifiability,
        lambda table, fit: diagnostics.information_criteria(fit, table),
        diagnostics.audit,
    ):
        with pytest.raises(InputError, match="the fit is of 76 rows and this table has 5"):
            ask(paper.head(5), fit)


# --- Held-out rows


def test_folds(paper):
    shape = diagnostics.splits(paper, "shape")
    assert (shape == paper["name"]).all() and shape.nunique() == 35
    assert diagnostics.splits(paper, "size").equals(paper["family"])
    largest = diagnostics.splits(paper, "largest-n")
    assert set(largest.dropna()) == {"1B"} and (largest.notna() == (paper["family"] == "1B")).all()
    assert largest.notna().sum() == 4
    widest = diagnostics.splits(paper, "widest-r").isna()
    ratio = paper["d_model"] / paper["n_layers"]
    # a fifth of 76 rows is 15.2; the 16th widest shares its R of 160 with two more
    assert (~widest).sum() == 18 and ratio[~widest].min() > ratio[widest].max()


def test_a_shape_under_two_names_is_left_out_as_one(paper):
    twice = pd.concat([paper, paper[paper["name"] == "80M_v1"].assign(name="80M_v1_again")], ignore_index=True)
    folds = diagnostics.splits(twice, "shape")
    assert folds.nunique() == 35
    assert set(twice["name"][folds == "80M_v1"]) == {"80M_v1", "80M_v1_again"}


def test_shapes_that_share_a_name_are_left_out_one_by_one(paper):
    named = paper.assign(name=paper["family"])
    folds = diagnostics.splits(named, "shape")
    apart = diagnostics.splits(paper, "shape")
    assert (folds.groupby(apart).nunique() == 1).all() and (apart.groupby(folds).nunique() == 1).all()
    assert folds[0].startswith("80M (") and f"{paper['n_layers'][0]}x{paper['d_model'][0]}" in folds[0]
    # counted in another way, too, a shape is another one
    twins = pd.concat([paper, paper[paper["name"] == "80M_v1"].assign(n_params=1.0)], ignore_index=True)
    assert diagnostics.splits(twins, "shape").nunique() == 36


def test_folds_that_cannot_be_made(paper):
    with pytest.raises(InputError, match="'depth' is not a way to hold rows out; choose one of shape"):
        diagnostics.splits(paper, "depth")
    with pytest.raises(InputError, match="holding out by size leaves no rows to train on"):
        diagnostics.splits(paper[paper["family"] == "80M"], "size")
    with pytest.raises(InputError, match="holding out by widest-r"):
        diagnostics.splits(paper.assign(d_model=640, n_layers=10), "widest-r")


@pytest.mark.parametrize("exponents", ["tied", "gamma"])
def test_leaving_shapes_out_agrees_with_one_fit_per_shape(paper, exponents):
    """The fold's own fit, from its own starts and in its own units, against all folds in one array operation."""
    law = laws.get("inference-aware", exponents)
    table = paper[paper["fit_main"] == 1].reset_index(drop=True)
    held = diagnostics.held_out_losses(table, law, "shape")
    assert not held.undetermined and (held.predictions["name"] == held.predictions["fold"]).all()
    for name in table["name"].unique():
        out = table["name"] == name
        fit = fitting.fit(table[~out].reset_index(drop=True), law)
        # both stop where a step promises 1e-13 of the sum of squares (27 x 0.02^2), so a loss may be the root of
        # that off, 3e-8, times the leverage of a row outside the fit, which stays below ten
        assert held.predictions.loc[out, "loss_predicted"].to_numpy() == pytest.approx(fit.predict(table[out]), abs=1e-6)


def test_rows_outside_the_fit_set_never_train(paper):
    law = laws.get("inference-aware")
    held = diagnostics.held_out_losses(paper, law, "shape", "fit_main").predictions
    never = ~paper["name"].isin(paper["name"][paper["fit_main"] == 1])
    main = fitting.fit(paper, law, "fit_main")
    assert len(held) == 76
    assert held.loc[never, "loss_predicted"].to_numpy() == pytest.approx(main.loss_predicted[never], abs=1e-6)
    changed = paper.assign(loss=paper["loss"].where(paper["fit_main"] == 1, 9.0))
    again = diagnostics.held_out_losses(changed, law, "shape", "fit_main").predictions
    assert again["loss_predicted"].to_numpy() == pytest.approx(held["loss_predicted"].to_numpy(), abs=1e-9)


def test_weights_hold_in_every_fold_and_zero_leaves_a_row_out(paper):
    law, weights = laws.get("inference-aware"), np.where(paper["tokens"] < 2e9, 0.5, 1.0)
    weights[5] = 0.0
    held = diagnostics.held_out_losses(paper, law, "largest-n", weights=weights).predictions
    trained = paper["family"] != "1B"
    fit = fitting.fit(paper[trained].reset_index(drop=True), law, weights=weights[trained])
    # as in the test above
    assert held["loss_predicted"].to_numpy() == pytest.approx(fit.predict(paper[~trained]), abs=1e-6)


def test_leave_one_shape_out_on_the_papers_runs(paper):
    """Width and depth in place of N predict an unseen shape to 0.010; the paper's law to 0.023."""
    rmse = {
        name: diagnostics.held_out_losses(paper, laws.get(name, exponents), "shape").metrics.rmse
        for name, exponents in (
            ("inference-aware", "tied"),
            ("chinchilla+log-quadratic-drift", "free"),
            ("width-depth", "free"),
        )
    }
    assert {name: round(value, 4) for name, value in rmse.items()} == {
        "inference-aware": 0.0227, "chinchilla+log-quadratic-drift": 0.0129, "width-depth": 0.0098,
    }  # fmt: skip


def test_weak_folds_are_reported_with_their_reason(paper):
    five_left = diagnostics.held_out_losses(paper, laws.get("inference-aware"), "shape", "fit_random_trial1")
    assert len(five_left.undetermined) == 6 and all("as many rows as parameters" in r for r in five_left.undetermined.values())
    assert five_left.metrics.n == 76
    too_few = diagnostics.held_out_losses(paper, laws.get("inference-aware", "gamma"), "shape", "fit_random_trial1")
    lost = too_few.predictions["loss_predicted"].isna()
    trained = paper["name"].isin(paper["name"][paper["fit_random_trial1"] == 1])
    assert (lost == trained).all()  # without one of the six rows, five are left for six parameters
    assert all("5 rows are too few" in too_few.undetermined[name] for name in paper["name"][trained])
    # all six rows pass through six parameters exactly: those folds have predictions, and a warning
    reasons = {fitting.Status.EXACT.value, fitting.Status.DEGENERATE.value, fitting.Status.AT_BOUND.value}
    assert len(too_few.undetermined) == 35 and too_few.undetermined["80M_v1"] in reasons
    two = paper[paper["family"].isin(["80M", "116M"])].reset_index(drop=True)
    one_size = diagnostics.held_out_losses(two, laws.get("chinchilla"), "size")
    assert set(one_size.undetermined) == {"80M", "116M"} and "of one size" in one_size.undetermined["80M"]
    assert one_size.metrics.n == 0
    zero = diagnostics.held_out_losses(paper, laws.get("chinchilla"), "largest-n", "fit_20N_only")
    assert "held at zero" in zero.undetermined["1B"]


def test_comparing_laws(paper):
    chosen = [laws.get("chinchilla"), laws.get("inference-aware"), laws.get("width-depth"), laws.get("inference-aware")]
    table = diagnostics.compare(paper, chosen, "largest-n", "fit_main")
    assert list(table["law"]) == ["width-depth", "inference-aware", "inference-aware", "chinchilla"]
    assert set(table["holdout"]) == {"largest-n"} and set(table["n"]) == {4} and set(table["count"]) == {"total"}
    errors = diagnostics.relative_error_pct(
        paper["loss"], fitting.fit(paper, chosen[0], "fit_main").loss_predicted
    )[paper["family"] == "1B"]  # fmt: skip
    assert table["mape"].iloc[3] == pytest.approx(errors.mean(), rel=1e-5)  # the paper's 2.7 to 4.1 %, averaged
    assert table["rmse_difference"].to_numpy() == pytest.approx(table["rmse"] - table["rmse"].iloc[0], abs=1e-12)
    assert (table[["rmse_difference", "rmse_difference_low", "rmse_difference_high"]].iloc[0] == 0).all()
    assert (table["rmse_difference_low"] <= table["rmse_difference"]).all()
    assert (table["rmse_difference"] <= table["rmse_difference_high"]).all()
    assert diagnostics.compare(paper, chosen, "largest-n", "fit_main").equals(table)
    with pytest.raises(InputError, match="no laws to compare"):
        diagnostics.compare(paper, [], "shape")


def test_a_law_that_predicts_fewer_rows_comes_last(paper):
    table = diagnostics.compare(
        paper, [laws.get("inference-aware", "gamma"), laws.get("chinchilla")], "shape", "fit_random_trial1"
    )  # fmt: skip
    assert list(table["law"]) == ["chinchilla", "inference-aware"]
    assert list(table["n"]) == [76, 62]  # six shapes with fourteen rows cannot be predicted


def test_the_interval_of_a_difference_resamples_shapes():
    """Two shapes: a draw holds one twice, both, or the other twice, so the interval ends at two known values."""
    ours, best = np.array([1.0, 1.0, 4.0]), np.array([0.25, 0.25, 1.0])
    difference, low, high = diagnostics._rmse_difference(ours, best, np.array([0, 0, 1]), 2000, 0)
    assert difference == pytest.approx(np.sqrt(2) - np.sqrt(0.5))
    assert (low, high) == pytest.approx((0.5, 1.0))  # rmse 1 less 0.5, and 2 less 1
    one = diagnostics._rmse_difference(ours, best, np.zeros(3, dtype=int), 100, 0)
    assert one[0] == difference and np.isnan(one[1:]).all()


def test_information_criteria_agree_with_statsmodels(paper):
    """A law without exponents is a linear model. statsmodels leaves the noise variance out of the count: k is one less."""
    law = laws.get("width-depth-fixed")
    fit = fitting.fit(paper, law, "fit_20N_only", positive=False)
    rows = paper[fit.fitted]
    basis = law.jacobian(fit.values, runs.variables(rows))
    linear = sm.OLS(rows["loss"].to_numpy(), basis / np.linalg.norm(basis, axis=0)).fit()
    n, k = 24, 5
    criteria = diagnostics.information_criteria(fit, paper)
    # the sum of squares is the optimum of both to rounding times the condition of the basis, 1e-16 * 1e3
    assert criteria.aic == pytest.approx(linear.aic + 2, rel=1e-9)
    assert criteria.bic == pytest.approx(linear.bic + np.log(n), rel=1e-9)
    assert criteria.aicc == pytest.approx(linear.aic + 2 + 2 * k * (k + 1) / (n - k - 1), rel=1e-9)


def test_information_criteria_need_independent_rows(paper):
    fit = fitting.fit(paper, laws.get("chinchilla"), "fit_main")  # three shapes are there with two budgets
    assert np.isnan(diagnostics.information_criteria(fit, paper)).all()
    assert np.isfinite(diagnostics.information_criteria(fit, paper, assume_independent=True)).all()
    apart = fitting.fit(paper, laws.get("chinchilla"), "fit_20N_only")
    assert np.isfinite(diagnostics.information_criteria(apart, paper)).all()
    assert np.isnan(diagnostics.information_criteria(apart, paper.assign(run="one"))).all()
    for options in ({"weights": paper["tokens"]}, {"loss": "huber"}):
        unlike = fitting.fit(paper, laws.get("chinchilla"), "fit_20N_only", **options)
        assert np.isnan(diagnostics.information_criteria(unlike, paper)).all()
    few = paper.iloc[[0, 20, 40, 60]].reset_index(drop=True)
    assert np.isnan(diagnostics.information_criteria(fitting.fit(few, laws.get("chinchilla")), few)).all()


# --- The order of a few models

grades = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=6)


@given(grades)
def test_exact_rank_correlation_agrees_with_scipy(pairs):
    a, b = np.array(pairs, dtype=float).T
    rho, p_value = diagnostics.spearman_exact(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert np.isnan([rho, p_value]).all()
        return
    assert rho == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    x, y = rankdata(a), rankdata(b)
    # by definition, over all orders; ranks are halves, so 1e-9 only forgives rounding of the sums
    strengths = [abs(np.dot(x - x.mean(), y[list(order)] - y.mean())) for order in permutations(range(len(a)))]
    assert p_value == pytest.approx(np.mean(np.array(strengths) >= abs(np.dot(x - x.mean(), y - y.mean())) - 1e-9))


def test_four_models_can_never_be_significant():
    assert diagnostics.spearman_exact([1, 2, 3, 4], [10, 20, 30, 40]) == (1.0, pytest.approx(2 / 24))
    assert diagnostics.spearman_exact([1, 2, 3, 4], [4, 3, 2, 1]) == (-1.0, pytest.approx(2 / 24))
    assert diagnostics.spearman_exact([1, 2], [1, 2]) == (1.0, 1.0)
    assert np.isnan(diagnostics.spearman_exact([1], [1])).all()


def test_more_than_nine_rows_use_the_t_approximation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 10))
    assert diagnostics.spearman_exact(a, b) == pytest.approx(tuple(spearmanr(a, b)))
    exact, approximate = diagnostics.spearman_exact(a[:9], b[:9])[1], spearmanr(a[:9], b[:9]).pvalue
    assert exact == pytest.approx(approximate, abs=0.01)  # why nine is enough
    for wrong in ([1.0, np.nan], [1.0, 2.0, 3.0]):
        with pytest.raises(InputError, match="ranks need"):
            diagnostics.spearman_exact([1.0, 2.0], wrong)


def test_orders_and_pairs():
    mean, covariance = np.array([2.90, 2.91, 2.94]), np.array([[4, 1, 0], [1, 4, 0], [0, 0, 9]]) * 1e-4
    orderings = diagnostics.ordering_probability(mean, covariance, n_draws=20_000, seed=1)
    assert orderings.probabilities.sum() == pytest.approx(1) and (np.diff(orderings.probabilities) <= 0).all()
    assert tuple(orderings.orders[0]) == (0, 1, 2)
    for i, j in permutations(range(3), 2):
        spread = np.sqrt(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j])
        exact = norm.cdf((mean[j] - mean[i]) / spread)
        first = [list(order).index(i) < list(order).index(j) for order in orderings.orders]
        # a share of 20 000 draws: five standard deviations of a binomial
        assert orderings.probabilities[first].sum() == pytest.approx(exact, abs=5 * np.sqrt(0.25 / 20_000))


def test_errors_that_models_share_do_not_change_their_order():
    """A covariance of rank one, all ones: every prediction is off by the same amount."""
    orderings = diagnostics.ordering_probability([3.0, 2.9, 2.8], np.ones((3, 3)), seed=3)
    assert orderings.orders.tolist() == [[2, 1, 0]] and orderings.probabilities.tolist() == [1.0]


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        ([1.0, 2.0], np.eye(3), "m x m"),
        ([1.0, np.nan], np.eye(2), "m x m"),
        ([], np.zeros((0, 0)), "m x m"),
        ([1.0, 2.0], [[1, 2], [2, 1]], "negative variances"),
        ([1.0, 2.0], [[1, 0.5], [0, 1]], "not symmetric"),
    ],
)
def test_what_is_no_covariance_is_refused(mean, covariance, message):
    with pytest.raises(InputError, match=message):
        diagnostics.ordering_probability(mean, covariance)


# --- Slips in a table


def test_the_papers_table_has_two_pairs_that_look_copied_and_one_wrong_label(paper):
    findings = diagnostics.audit(paper)
    pairs = [sentence.replace(" at ", " and ").split(" and ")[:4:2] for sentence in findings[:2]]
    assert len(findings) == 3 and pairs == [["116M_v1", "126M_v1"], ["116M_v2", "126M_v2"]]
    assert "losses 3.4816 and 3.4816, though" in findings[0]
    assert findings[2].startswith("1B_v8") and "17.4 tokens per parameter" in findings[2]


def test_labels_are_not_held_against_n_counted_otherwise():
    """20N of all parameters are 59 tokens for each that is not in an embedding."""
    assert not any("labelled" in finding for finding in diagnostics.audit(runs.load("paper", "non_embedding")))
    assert any("labelled" in finding for finding in diagnostics.audit(runs.load("paper", "total")))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40))
def test_shapes_that_agree_once_are_those_that_all_pairs_show(seed, n_rows):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"name": [f"row {i}" for i in range(n_rows)], "n_params": 1e6, "d_model": rng.integers(1, 5, n_rows)})
    table = table.assign(n_layers=1, tokens=rng.integers(1, 4, n_rows), loss=1 + rng.integers(0, 40, n_rows) * 4e-4)
    kept, expected = table[~diagnostics.repeated_rows(table)], set()
    curves = table.drop_duplicates(["d_model", "tokens"], keep="last").pivot(index="d_model", columns="tokens", values="loss")
    for (i, a), (j, b) in combinations(kept.iterrows(), 2):
        if a["d_model"] != b["d_model"] and a["tokens"] == b["tokens"] and abs(a["loss"] - b["loss"]) <= 5e-4:
            elsewhere = (curves.loc[a["d_model"]] - curves.loc[b["d_model"]]).drop(a["tokens"]).abs().min()
            expected |= {(f"row {i} ", f"row {j} ")} if elsewhere >= 5e-3 else set()
    told = [finding for finding in diagnostics.audit(table) if "though at every other budget" in finding]
    assert {tuple(f"row {number} " for number in re.findall(r"row (\d+) at", line)) for line in told} == expected
    assert len(told) == len(expected)


def test_planted_slips_are_found(paper):
    table = paper.copy()
    table.loc[table["budget"] == "40N", "budget"] = "80N"
    again = table[(table["name"] == "80M_v1") & (table["budget"] == "20N")].assign(name="80M_v9")
    table = pd.concat([table, again], ignore_index=True)
    findings = diagnostics.audit(table)
    for text, number in (("repeat the shape", 1), ("is labelled", 23 + 1), ("though at every other budget", 2)):
        assert sum(text in finding for finding in findings) == number
    assert diagnostics.audit(paper.drop(columns="budget").drop(index=[66, 67]).set_index("source")) == []


@pytest.mark.parametrize("weights", [np.ones(76), np.linspace(0.2, 3, 76)], ids=["equal", "weighted"])
def test_outliers_agree_with_statsmodels(paper, weights):
    law = laws.get("width-depth-fixed")
    table = paper.assign(loss=paper["loss"].where(paper.index != 40, paper["loss"] + 0.5))
    fit = fitting.fit(table, law, positive=False, weights=weights)
    basis = law.jacobian(fit.values, runs.variables(table)) * np.sqrt(weights)[:, None]
    scaled_loss = table["loss"].to_numpy() * np.sqrt(weights)
    studentized = OLSInfluence(sm.OLS(scaled_loss, basis).fit()).resid_studentized_external
    limit = student_t(76 - 4 - 1).ppf(1 - 0.025 / 76)
    outside = table[np.abs(studentized) > limit]
    found = [finding for finding in diagnostics.audit(table, fit) if "off the law" in finding]
    assert len(found) == len(outside) and all(map(str.startswith, found, diagnostics._runs(outside))) and 40 in outside.index
    assert any(f"is {studentized[40]:+.1f} standard deviations" in finding for finding in found)
    exact = paper.iloc[[0, 20, 40, 60]].reset_index(drop=True)
    assert not any("off the law" in f for f in diagnostics.audit(exact, fitting.fit(exact, laws.get("chinchilla"))))


def test_the_module_does_not_load_what_a_fit_has_no_use_for():
    code = "import sys, morphlib.diagnostics, morphlib.design; print({'scipy.stats', 'statsmodels'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_predictions_are_ranked_as_they_are_printed():
    """Two predictions alike to four decimals share a rank: ranks 1.5, 1.5, 3 against 1, 2, 3 correlate by the root of 3/4."""
    table = pd.DataFrame({"loss": [1.0, 2.0, 3.0], "family": "f"})
    ranks = diagnostics.spearman_by_family(table, np.array([2.00001, 2.00002, 3.0]))
    assert ranks["f"] == pytest.approx(np.sqrt(0.75), rel=1e-12)


def test_copies_make_a_fit_unsure(paper):
    twice = pd.concat([paper, paper.head(3)], ignore_index=True)
    verdict = diagnostics.identifiability(twice, fitting.fit(twice, laws.get("inference-aware")))
    assert not verdict.identified and not verdict.undetermined
    assert verdict.sentences[-1].startswith("3 of the rows are copies of others")


@pytest.mark.parametrize(
    ("law", "exponents", "fit_on"),
    [
        ("chinchilla", "tied", "fit_main"),
        ("inference-aware", "free", "fit_main"),
        ("inference-aware", "free", None),
        ("chinchilla+log-quadratic-drift", "free", None),
        ("gemstones", "free", None),
    ],
)
def test_confounded_are_estimates_that_correlate_beyond_a_hundredth_of_one(paper, law, exponents, fit_on):
    fit = fitting.fit(paper, laws.get(law, exponents), fit_on)
    _, _, jacobian, _ = fitting.linearized(paper, fit)
    covariance = np.linalg.inv(jacobian.T @ jacobian)
    errors = np.sqrt(np.diag(covariance))
    correlation = pd.DataFrame(covariance / np.outer(errors, errors), fit.law.parameters, fit.law.parameters)
    expected = {(a, b): correlation[a][b] for a, b in combinations(fit.law.parameters, 2) if abs(correlation[a][b]) > 0.99}
    found = {(a, b): value for a, b, value in diagnostics.identifiability(paper, fit).confounded}
    # the normal matrix is of a condition number up to 6e4 squared: 1e-16 x 4e9
    assert found == pytest.approx(expected, abs=1e-6)


def test_few_starts_at_the_best_optimum_are_told(paper):
    fit = fitting.fit(paper, laws.get("chinchilla"))
    for n, told in ((2, True), (3, False)):
        words = diagnostics.identifiability(paper, dataclasses.replace(fit, share_of_starts_at_best=n / 12)).sentences
        assert any(f"Only {n} of 12 starts" in sentence for sentence in words) is told


def test_a_location_is_undetermined_where_its_error_exceeds_the_range_of_its_variable(paper):
    """Not where it exceeds its value, which depends on the unit: in the middle of the rows the logarithm is zero."""
    fit = fitting.fit(paper, laws.get("chinchilla+log-quadratic"))
    log_ratio = np.log(paper["d_model"] / paper["n_layers"])
    variables = {"R": np.exp(log_ratio), "N": paper["n_params"].to_numpy(dtype=float)}
    assert diagnostics._natural_scale(fit.law, "log_R0", 1e-9, variables) == pytest.approx(np.ptp(log_ratio))
    drift = laws.get("chinchilla+log-quadratic-drift")
    expected = np.ptp(log_ratio) / np.ptp(np.log(paper["n_params"]))
    assert diagnostics._natural_scale(drift, "drift", 1e-9, variables) == pytest.approx(expected)
    for end in fitting.EXPONENT_RANGE:
        assert diagnostics._natural_scale(drift, "alpha", end, variables) == 0


def test_variables_of_tied_exponents_are_those_of_all_their_terms():
    assert diagnostics._variables_of(laws.get("chinchilla"), "alpha") == {"N", "D"}
    assert diagnostics._variables_of(laws.get("chinchilla", "free"), "alpha") == {"N"}
    assert diagnostics._variables_of(laws.get("inference-aware"), "alpha") == {"N", "D", "R"}
    assert diagnostics._variables_of(laws.get("inference-aware", "gamma"), "alpha") == {"N", "D"}


def test_implausible_losses_and_wrong_labels_start_where_they_say(paper):
    table = paper.assign(loss=paper["loss"].where(paper.index != 3, 0.29)).drop(index=[66, 67])
    assert any(sentence.startswith("1 losses are below 0.3 nats") for sentence in diagnostics.audit(table))
    table["loss"] = table["loss"].where(table.index != 3, 0.31)
    assert not any("nats per token" in sentence for sentence in diagnostics.audit(table))
    for ratio, told in ((0.895, True), (0.905, False), (1.095, False), (1.105, True)):
        one = paper.head(1).assign(budget="20N", tokens=20 * ratio * paper["n_params"].iloc[0])
        assert any("is labelled 20N" in sentence for sentence in diagnostics.audit(one)) is told


def test_losses_alike_are_those_within_half_a_thousandth():
    rows = {"name": list("abab"), "n_params": 1e6, "d_model": [1, 2, 1, 2], "n_layers": 1, "tokens": [1, 1, 2, 2]}
    for gap, elsewhere, told in ((4.9e-4, 0.0051, True), (5.1e-4, 0.0051, False), (4.9e-4, 0.0049, False)):
        table = pd.DataFrame(rows | {"loss": [3.0, 3.0 + gap, 2.0, 2.0 + elsewhere]})
        assert any("at every other budget" in sentence for sentence in diagnostics.audit(table)) is told


def test_what_moves_together_is_told_beyond_95_per_cent(paper):
    """Of d and L in one law; the cure names the second."""
    law = laws.get("width-depth")
    rng = np.random.default_rng(0)
    for spread, told in ((0.2, True), (0.6, False)):
        log_width = rng.normal(7, 1, 76)
        depth = np.exp(log_width - 4 + spread * rng.normal(size=76)) + 0.5
        table = paper.assign(d_model=np.exp(log_width), n_layers=depth)
        correlation = np.corrcoef(log_width, np.log(depth))[0, 1]
        assert bool(correlation > 0.95) is told
        table["loss"] = 2 + 100 / table["d_model"] + 1 / depth + 800 * table["tokens"] ** -0.33 + 0.01 * rng.normal(size=76)
        words = " ".join(diagnostics.identifiability(table, fitting.fit(table, law)).sentences)
        assert (f"d and L move together (correlation {correlation:.3f}): add runs that vary L at fixed d" in words) is told


def test_variables_that_the_law_does_not_read_may_move_together(paper):
    """R rises with N; a law of N and D has nothing to tell apart there, one that reads R has."""
    rows = paper[paper["budget"] != "20N"]
    table = rows.assign(d_model=rows["n_params"] / 1e6, n_layers=1.0)
    for name, told in (("chinchilla", False), ("inference-aware", True)):
        words = diagnostics.identifiability(table, fitting.fit(table, laws.get(name))).sentences
        assert any("N and R move together (correlation 1.000)" in sentence for sentence in words) is told
