import dataclasses
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import published_fits
from morphlib import diagnostics, fitting, laws, runs
from morphlib.errors import InputError
from morphlib.fitting import Status

PUBLISHED = published_fits()
# MINPACK and scipy's trust region stop when the sum of squares is about to change by this fraction,
# so a parameter may stop this root, in units of its standard error times sqrt(n - p), off the optimum.
FTOL = 1.49e-8


def identify(row):
    return f"{row['fit_on']}-{row['law']}-{row['exponents']}"


@pytest.mark.parametrize("row", PUBLISHED, ids=identify)
@pytest.mark.parametrize("search", [fitting.fit_published, partial(fitting.fit, positive=False)], ids=["published", "fresh"])
def test_the_authors_fits(paper, row, search):
    law = laws.get(row["law"], row["exponents"])
    fit = search(paper, law, row["fit_on"])
    freedom = fit.fitted.sum() - len(law.parameters)
    for name in law.parameters:
        tolerance = fit.standard_errors[name] * np.sqrt(FTOL * freedom)
        assert fit.parameters[name] == pytest.approx(float(row[name]), abs=tolerance, rel=0), name

    metrics = diagnostics.metrics_by_use(paper, fit)
    assert metrics["held_out"].n == int(row["n_held_out"])
    for use, quantity in (("fitted", "mse"), ("all", "mse"), ("all", "r2"), ("held_out", "mse"), ("held_out", "r2")):
        value = getattr(metrics[use], quantity)
        agrees_as_printed(value, row[f"{quantity}_{use}"], scale=1 - value if quantity == "r2" else value)
    for model in ("1B_v1", "1B_v3", "1B_v6", "1B_v8"):
        rows = paper["name"] == model
        error = diagnostics.relative_error_pct(paper.loc[rows, "loss"], fit.loss_predicted[rows])
        agrees_as_printed(error.item(), row[f"error_{model}_pct"], scale=error.item())
    ranks = diagnostics.spearman_by_family(paper, fit.loss_predicted)
    for family in ("80M", "116M", "164M", "237M", "313M", "1B"):
        agrees_as_printed(ranks[family], row[f"spearman_{family}"], scale=0)


def agrees_as_printed(value, printed, scale):
    """Equal up to half a unit of the last printed digit and what stopping early changes of the scale of the value."""
    decimals = len(printed.partition(".")[2])
    assert value == pytest.approx(float(printed), abs=0.5 * 10**-decimals + np.sqrt(FTOL) * abs(scale) + 1e-12, rel=0)


def test_the_published_procedure_gives_the_papers_digits(paper):
    """The issue's figures for the main fit, as many digits as are printed."""
    fit = fitting.fit_published(paper, laws.get("inference-aware"), "fit_main")
    assert {name: float(f"{value:.5g}") for name, value in fit.parameters.items()} == {
        "A": 54754, "B": 778350, "E": 2.4475, "alpha": 0.61457, "epsilon": 0.0011462,
    }  # fmt: skip


@settings(max_examples=25)
@given(
    scales=st.tuples(*[st.floats(-3, 3)] * 2),
    alpha=st.floats(0.2, 0.9),
    beta=st.floats(0.2, 0.9),
    irreducible=st.floats(0.5, 3),
)
def test_noiseless_data_give_back_their_parameters(scales, alpha, beta, irreducible):
    """A 7 x 7 grid of N and D without noise: the sum of squares at the optimum is zero, so every digit is determined."""
    n, d = (
        g.ravel()
        for g in np.meshgrid(np.geomspace(1e7, 1e9, 7) * 10 ** scales[0], np.geomspace(1e9, 1e11, 7) * 10 ** scales[1])
    )
    true = {"A": 0.8 * np.exp(np.log(n).mean() * alpha), "B": 1.2 * np.exp(np.log(d).mean() * beta), "E": irreducible,
            "alpha": alpha, "beta": beta}  # fmt: skip
    law = laws.get("chinchilla", "free")
    loss = law.predict(list(true.values()), {"N": n, "D": d})
    table = table_of(n, d, loss)
    fit = fitting.fit(table, law)
    assert fit.status is Status.CONVERGED
    # rounding of the losses (2e-16) times the condition of the problem, squared in the worst direction
    assert fit.parameters == pytest.approx(true, rel=1e-16 * fit.condition_number**2 + 1e-7)


def table_of(n, d, loss, ratio=None):
    width = 1024 if ratio is None else np.round(ratio * 16).astype(int)
    return pd.DataFrame(
        {"name": [f"m{i}" for i in range(len(n))], "n_params": n, "tokens": d, "loss": loss, "d_model": width,
         "n_layers": 16, "n_count": "total", "family": "any"}
    )  # fmt: skip


@pytest.mark.parametrize("power", [-6, 6])
def test_units_do_not_matter(paper, power):
    """N and D in other units change A and B by a known factor and nothing else."""
    law = laws.get("inference-aware", "free")
    here = fitting.fit(paper, law)
    scaled = paper.assign(n_params=paper["n_params"] * 10.0**power, tokens=paper["tokens"] * 10.0**power)
    there = fitting.fit(scaled, law)
    assert there.loss_predicted == pytest.approx(here.loss_predicted, rel=1e-8)
    for name, exponent in (("A", "alpha"), ("B", "beta")):
        factor = 10.0 ** (power * here.parameters[exponent])
        assert there.parameters[name] == pytest.approx(here.parameters[name] * factor, rel=1e-4)


def test_covariance_is_that_of_the_linearized_problem(paper):
    """s^2 (J'J)^-1 in raw units, computed with extended care: columns scaled, QR instead of the SVD."""
    law = laws.get("inference-aware", "free")
    fit = fitting.fit(paper, law)
    jacobian = law.jacobian(list(fit.parameters.values()), runs.variables(paper))
    lengths = np.linalg.norm(jacobian, axis=0)
    inverse = np.linalg.inv(np.linalg.qr(jacobian / lengths)[1]) / lengths[:, None]
    residual = fit.loss_predicted - paper["loss"].to_numpy()
    expected = residual @ residual / (76 - 7) * inverse @ inverse.T
    errors = np.sqrt(np.diag(expected))
    # raw columns are nearly parallel (condition about 1e4), so six digits are left of sixteen
    assert np.allclose(list(fit.standard_errors.values()), errors, rtol=1e-6)
    assert np.allclose(fit.covariance, expected, rtol=1e-5, atol=1e-6 * np.outer(errors, errors))


def test_rows_of_weight_zero_are_not_there(paper):
    """Weights of one and zero give the fit, the errors and the status of the rows with weight one alone."""
    law = laws.get("inference-aware")
    weights = (np.arange(76) % 3 == 0).astype(float)
    weighted = fitting.fit(paper, law, weights=weights)
    alone = fitting.fit(paper[weights == 1].reset_index(drop=True), law)
    # both searches stop within their tolerance of one optimum; their units, and so their paths, differ
    assert weighted.parameters == pytest.approx(dict(alone.parameters), rel=1e-4)
    assert weighted.standard_errors == pytest.approx(dict(alone.standard_errors), rel=1e-3)
    assert weighted.status is alone.status
    assert not weighted.fitted[weights == 0].any()
    with pytest.raises(InputError, match="too few"):
        fitting.fit(paper, law, weights=np.eye(76)[0])
    for wrong in (np.ones(75), -np.ones(76), np.full(76, np.nan), np.full(76, np.inf), np.zeros(76), paper["name"]):
        with pytest.raises(InputError, match="weights must be 76 finite numbers"):
            fitting.fit(paper, law, weights=wrong)


def test_a_robust_fit_is_not_dragged_away_by_outliers(paper):
    """Some losses replaced by noise: the law meets the others ten times better than that of least squares does."""
    rng = np.random.default_rng(4)
    table = paper.assign(loss=paper["loss"])
    table.loc[rng.choice(76, rng.integers(1, 12), replace=False), "loss"] = 0.0
    spoiled = table["loss"] == 0
    table.loc[spoiled, "loss"] = rng.uniform(0.5, 30, spoiled.sum())
    law = laws.get("inference-aware", "free")

    def rest(fit):
        return np.sqrt(((fit.loss_predicted - table["loss"])[~spoiled] ** 2).mean())

    robust, squared = fitting.fit(table, law, loss="huber"), fitting.fit(table, law)
    assert rest(robust) < 0.1 * rest(squared)


def test_a_robust_fit_holds_coefficients_at_zero(paper):
    law = laws.get("chinchilla")
    for loss in ("huber", "log-huber"):
        held = fitting.fit(paper, law, "fit_20N_only", loss=loss)
        assert held.status is Status.AT_BOUND and held.parameters["A"] == 0
        assert np.isnan(held.standard_errors["A"]) and held.standard_errors["B"] > 0
        free = fitting.fit(paper, law, "fit_20N_only", loss=loss, positive=False)
        assert free.status is Status.NEGATIVE and free.parameters["A"] < 0


@pytest.mark.parametrize("loss", ["huber", "log-huber"])
def test_errors_of_robust_fits_are_of_the_size_of_the_estimates_scatter(paper, loss, monkeypatch):
    """Sixty simulated tables: the mean reported variance over the scatter of the estimates, chi-squared with 59 degrees."""
    monkeypatch.setattr(fitting, "ROBUST_STARTS", 0)  # without outliers there is one optimum
    law = laws.get("chinchilla", "free")
    truth = fitting.fit(paper, law)
    estimates, errors = [], []
    for seed in range(60):
        noise = np.random.default_rng(seed).normal(0, 0.02, 76)
        fit = fitting.fit(paper.assign(loss=truth.loss_predicted + noise), law, loss=loss)
        estimates.append(fit.parameters["beta"])
        errors.append(fit.standard_errors["beta"])
    ratio = np.mean(np.square(errors)) / np.var(estimates, ddof=1)
    # four standard deviations of the logarithm of a variance from 60 draws, sqrt(2 / 59) each
    assert abs(np.log(ratio)) < 4 * np.sqrt(2 / 59)


def test_the_seed_decides_the_search_and_the_optimum_does_not_depend_on_it(paper):
    law = laws.get("inference-aware", "free")
    fits = [fitting.fit(paper, law, "fit_main", seed=seed) for seed in (1, 1, 2)]
    assert dict(fits[0].parameters) == dict(fits[1].parameters)
    assert fits[2].loss_predicted == pytest.approx(fits[0].loss_predicted, abs=1e-6)


def test_a_fit_cannot_be_changed(paper):
    fit = fitting.fit(paper, laws.get("chinchilla"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit.status = Status.EXACT
    with pytest.raises(TypeError):
        fit.parameters["A"] = 0.0
    for array in (fit.loss_predicted, fit.covariance, fit.fitted):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_statuses_say_what_happened(paper):
    tied, free = laws.get("chinchilla"), laws.get("chinchilla", "free")
    assert fitting.fit(paper, tied).status is Status.CONVERGED
    assert fitting.fit(paper, tied, "fit_20N_only", positive=False).status is Status.NEGATIVE
    held = fitting.fit(paper, tied, "fit_20N_only")
    assert held.status is Status.AT_BOUND and held.parameters["A"] == 0
    # without the bound E runs away, to -400 and lower; with it, it is held at zero
    assert fitting.fit(paper, free, "fit_main", positive=False).status is Status.DEGENERATE
    assert fitting.fit(paper, free, "fit_main").parameters["E"] == 0
    exact = fitting.fit(paper.iloc[[0, 20, 40, 60]].reset_index(drop=True), tied)
    assert exact.status is Status.EXACT
    assert np.isnan(list(exact.standard_errors.values())).all()


def test_rows_that_cannot_determine_the_law_are_refused(paper):
    law = laws.get("inference-aware")
    family = paper[paper["family"] == "80M"].reset_index(drop=True)
    for table, message in (
        (paper.head(4), "too few"),
        (paper.assign(n_params=1e8), "all rows are of one size"),
        (family, "all rows are of one size"),
        (paper.assign(tokens=1e9), "all rows are of one budget"),
        (paper.assign(d_model=64, n_layers=2), "all rows are of one aspect ratio"),
    ):
        for search in (fitting.fit, fitting.fit_published):
            with pytest.raises(InputError, match=message):
                search(table, law)
    with pytest.raises(InputError, match=r"all rows are of one size \(n_params\), 1e\+08 to 1e\+08"):
        fitting.fit(paper.assign(n_params=1e8), laws.get("over-training"))  # it reads C/M, a power of N
    with pytest.raises(InputError, match="fit_other"):
        fitting.fit(paper, law, "fit_other")
    with pytest.raises(InputError, match="only 0 and 1"):
        fitting.fit(paper, law, "tokens")
    with pytest.raises(InputError, match="n_starts"):
        fitting.fit(paper, law, n_starts=0)
    with pytest.raises(InputError, match="with free exponents"):
        fitting.fit_published(paper, laws.get("chinchilla", "free"))


def fit_or_clear_error(seed, n_rows, spread, loss_kind="squared"):
    """Nonsense data, over up to 24 orders of magnitude: never an exception from inside numpy, never a NaN prediction."""
    rng = np.random.default_rng(seed)
    n, d, loss = np.exp(rng.normal(0, 1, (3, n_rows)) * [[spread], [spread], [1]]) * [[1e8], [1e9], [3]]
    table = table_of(n, d, loss, ratio=np.exp(rng.normal(3, 1, n_rows)) + 1)
    try:
        fit = fitting.fit(table, laws.get("inference-aware"), n_starts=4, loss=loss_kind)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(fit.loss_predicted).all()


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), n_rows=st.integers(5, 12), spread=st.floats(0, 12))
def test_any_positive_losses_give_a_fit_or_a_clear_error(seed, n_rows, spread):
    fit_or_clear_error(seed, n_rows, spread)


@pytest.mark.parametrize("loss", ["huber", "log-huber"])
@pytest.mark.parametrize("seed", [53, 488808, 1])
def test_so_do_robust_losses(seed, loss):
    """The first two ran off to infinite exponents, where raw coefficients are no numbers."""
    fit_or_clear_error(seed, n_rows=5, spread=1.0, loss_kind=loss)


def robust_parts(fit, table, weights):
    """Residuals of a robust fit, their scale by the docstring, and the Jacobian, both as weighted."""
    measured = table["loss"].to_numpy()
    jacobian = fit.law.jacobian(fit.values, runs.variables(table)) * np.sqrt(weights)[:, None]
    if fit.loss == "huber":
        return fit.loss_predicted - measured, 1e-3 * measured.mean(), jacobian
    return np.log(fit.loss_predicted / measured), 1e-3, jacobian / fit.loss_predicted[:, None]


@pytest.mark.parametrize("loss", ["huber", "log-huber"])
def test_a_robust_fit_is_where_the_weighted_gradient_vanishes_and_its_covariance_is_hubers(paper, loss):
    law, weights = laws.get("chinchilla", "free"), np.where(paper["tokens"] < 2e9, 0.5, 2.0)
    fit = fitting.fit(paper, law, weights=weights, loss=loss)
    assert fit.status is Status.CONVERGED
    residual, scale, jacobian = robust_parts(fit, paper, weights)
    psi = np.sqrt(weights) * np.clip(residual, -scale, scale)
    size = np.linalg.norm(np.sqrt(weights * np.minimum(1, scale / np.abs(residual))) * residual)
    # the search ends at a relative offset of 1e-10, of residuals reweighted by no more than one; units cost a few digits
    assert (np.abs(psi @ jacobian) <= 1e-7 * size * np.linalg.norm(jacobian, axis=0)).all()
    n, p, inside = 76, 5, np.mean(np.abs(residual) < scale)
    lengths = np.linalg.norm(jacobian, axis=0)
    inverse = np.linalg.inv(np.linalg.qr(jacobian / lengths)[1]) / lengths[:, None]
    correction = (1 + p * (1 - inside) / (n * inside)) / inside
    errors = np.sqrt(np.diag(correction**2 * (psi @ psi) / (n - p) * inverse @ inverse.T))
    assert list(fit.standard_errors.values()) == pytest.approx(errors, rel=1e-6)  # as of squares, above


def test_a_weight_counts_rows_in_a_robust_fit(paper):
    law, counts = laws.get("chinchilla"), 1 + np.arange(76) % 3
    weighted = fitting.fit(paper, law, weights=counts, loss="log-huber")
    repeated = fitting.fit(paper.loc[paper.index.repeat(counts)].reset_index(drop=True), law, loss="log-huber")
    assert weighted.parameters == pytest.approx(dict(repeated.parameters), rel=1e-4)


def test_a_search_that_did_not_end_and_an_exponent_at_its_end_are_told(paper):
    law = laws.get("chinchilla")
    values, ones = fitting.fit(paper, law).values, np.ones(76)
    assert fitting.status_of(law, values, paper, True, ones)[0] is Status.CONVERGED
    assert fitting.status_of(law, values, paper, False, ones)[0] is Status.NOT_CONVERGED
    for end in fitting.EXPONENT_RANGE:
        assert fitting.status_of(law, np.array([*values[:3], end]), paper, True, ones)[0] is Status.DEGENERATE


def test_budgets_within_a_tenth_are_one(paper):
    law = laws.get("chinchilla")
    with pytest.raises(InputError, match="all rows are of one budget"):
        fitting.check_rows(paper.assign(tokens=1e9 * np.linspace(1, 1.09, 76)), law)
    fitting.check_rows(paper.assign(tokens=1e9 * np.linspace(1, 1.11, 76)), law)


def test_an_unknown_loss_is_told(paper):
    with pytest.raises(InputError, match="'cauchy' is not a loss; choose one of squared, huber, log-huber"):
        fitting.fit(paper, laws.get("chinchilla"), loss="cauchy")


def test_the_starts_of_a_robust_search_beside_the_least_squares_solution_find_less(paper, monkeypatch):
    """Eight losses replaced by noise: from the least-squares solution alone the search ends 14 % above the best it finds."""
    rng = np.random.default_rng(5)
    table = paper.assign(loss=paper["loss"])
    table.loc[rng.choice(76, rng.integers(1, 12), replace=False), "loss"] = 0.0
    spoiled = table["loss"] == 0
    table.loc[spoiled, "loss"] = rng.uniform(0.5, 30, spoiled.sum())
    scale = 1e-3 * table["loss"].mean()

    def cost(fit):
        distance = np.abs(fit.loss_predicted - table["loss"])
        return np.where(distance <= scale, distance**2, 2 * scale * distance - scale**2).sum()

    law = laws.get("inference-aware", "free")
    best = cost(fitting.fit(table, law, loss="huber"))
    monkeypatch.setattr(fitting, "ROBUST_STARTS", 0)
    assert cost(fitting.fit(table, law, loss="huber")) > 1.1 * best


def test_a_condition_number_of_thousands_is_no_degenerate_fit(paper):
    fit = fitting.fit(paper, laws.get("inference-aware", "free"), "fit_main")
    assert 1e3 < fit.condition_number < 6e4 and fit.status is Status.CONVERGED


def test_exponents_above_two_are_found():
    n, d = (g.ravel() for g in np.meshgrid(np.geomspace(1e7, 1e8, 7), np.geomspace(1e9, 1e10, 7)))
    loss = 2 + (n / 3e7) ** -2.5 + (d / 3e9) ** -3.5
    table = pd.DataFrame({"name": [f"m{i}" for i in range(49)], "n_params": n, "tokens": d, "loss": loss, "d_model": 512,
                          "n_layers": 8, "n_count": "total"})  # fmt: skip
    fit = fitting.fit(table, laws.get("chinchilla", "free"))
    assert (fit.parameters["alpha"], fit.parameters["beta"]) == pytest.approx((2.5, 3.5), rel=1e-7)
