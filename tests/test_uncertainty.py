import dataclasses

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares
from scipy.stats import t as student

from morphlib import fitting, laws, runs
from morphlib import uncertainty as u
from morphlib.errors import InputError
from morphlib.fitting import Status

# A law without exponents is linear in its parameters: every formula has an oracle.
LINEAR = laws.get("width-depth-fixed")
CURVED = laws.get("inference-aware")


@pytest.fixture(scope="module")
def linear(paper):
    return fitting.fit(paper, LINEAR)


@pytest.fixture(scope="module")
def curved(paper):
    return fitting.fit(paper, CURVED)


def six_rows(paper):
    """The six rows of the paper's first random draw."""
    names = ["80M_v5", "116M_v4", "164M_v7", "237M_v2", "313M_v3"]
    long = (paper["name"] == "80M_v4") & (paper["tokens"] > 1e10)
    return paper[long | (paper["name"].isin(names) & (paper["fit_20N_only"] == 1))].reset_index(drop=True)


def design(table):
    x = runs.variables(table)
    return np.column_stack([x["d"] ** -1, x["L"] ** -1, x["D"] ** (-1 / 3), np.ones(len(table))])


def by_hand(table, **options):
    """statsmodels' regression on the columns of the linear law, each scaled to length one; estimates and covariance unscaled.

    The columns' condition number is about 20 then, so that its covariances, of J'J, are good to 1e-16 * 20^2.
    """
    columns = design(table)
    lengths = np.linalg.norm(columns, axis=0)
    result = sm.OLS(table["loss"].to_numpy(), columns / lengths).fit(**options)
    return result.params / lengths, result.cov_params() / np.outer(lengths, lengths)


def assert_same_covariance(found, expected, tolerance):
    errors = np.sqrt(np.diag(expected))
    # elements relative to the errors of their parameters, as correlations are
    assert np.allclose(found / np.outer(errors, errors), expected / np.outer(errors, errors), rtol=0, atol=tolerance)


def test_every_row_its_own_cluster_is_hc3(paper, linear):
    found = u.cluster_covariance(paper, linear)
    assert_same_covariance(found.matrix, by_hand(paper, cov_type="HC3")[1], tolerance=1e-11)
    assert (found.n_clusters, found.degrees_of_freedom) == (76, 72)


@pytest.mark.parametrize("cluster", ["name", "family"])
def test_cr3_is_the_jackknife_over_clusters(paper, linear, cluster):
    """For a linear law the sum over clusters of (b_-g - b)(b_-g - b)', by refitting without each."""
    found = u.cluster_covariance(paper, linear, cluster)
    without = [by_hand(paper[paper[cluster] != label])[0] for label in paper[cluster].unique()]
    moved = np.array(without) - by_hand(paper)[0]
    assert_same_covariance(found.matrix, moved.T @ moved, tolerance=1e-10)  # differences of estimates: a digit less than HC3
    assert found.n_clusters == len(without) and found.degrees_of_freedom == len(without) - 1


def test_without_corrections_cr3_would_be_statsmodels_cluster_covariance(paper, linear):
    """CR0 (statsmodels) leaves out (I - H)^-1: CR3 is larger in every direction, and by no more than (1 - h)^-2."""
    codes = pd.factorize(paper["name"])[0]
    plain = by_hand(paper, cov_type="cluster", cov_kwds={"groups": codes, "use_correction": False})[1]
    basis = np.linalg.qr(design(paper) / np.linalg.norm(design(paper), axis=0))[0]
    leverage = max(np.linalg.norm(basis[codes == code], ord=2) ** 2 for code in range(codes.max() + 1))
    ratio = np.diag(u.cluster_covariance(paper, linear, "name").matrix) / np.diag(plain)
    assert (ratio > 1).all() and (ratio < (1 - leverage) ** -2).all()


def wald(fit, level=0.95):
    """Estimate -+ t standard errors."""
    t = student.ppf((1 + level) / 2, fit.fitted.sum() - len(fit.values))
    return {name: (value - t * fit.standard_errors[name], value + t * fit.standard_errors[name])
            for name, value in fit.parameters.items()}  # fmt: skip


def weighted(paper):
    """The linear law with weights from 0.1 to 10, and statsmodels' fit of it in columns of length one."""
    weights = np.random.default_rng(0).uniform(0.1, 10, len(paper))
    lengths = np.linalg.norm(design(paper), axis=0)
    return (
        fitting.fit(paper, LINEAR, weights=weights),
        sm.WLS(paper["loss"].to_numpy(), design(paper) / lengths, weights),
        lengths,
    )


def test_weighted_errors_and_intervals_are_those_of_statsmodels(paper):
    fit, oracle, lengths = weighted(paper)
    plain = oracle.fit()
    # the columns' condition number is about 20: 1e-16 * 20^2, and raw columns lose more
    assert fit.values == pytest.approx(plain.params / lengths, rel=1e-9)
    assert_same_covariance(fit.covariance, plain.cov_params() / np.outer(lengths, lengths), tolerance=1e-9)
    found = u.cluster_covariance(paper, fit)
    assert_same_covariance(found.matrix, oracle.fit(cov_type="HC3").cov_params() / np.outer(lengths, lengths), tolerance=1e-9)
    new = paper.tail(4).assign(tokens=3e11)
    expected = plain.get_prediction(design(new) / lengths).summary_frame(alpha=0.1)
    predicted = u.prediction_interval(new, fit, paper, 0.9)
    assert np.allclose(predicted["low"], expected["obs_ci_lower"], rtol=1e-7)
    for name, (low, high) in wald(fit).items():
        assert u.profile_interval(paper, fit, name) == pytest.approx((low, high), abs=2e-8 * (high - low), rel=0), name


def test_only_the_ratios_of_weights_matter(paper, curved):
    weights = np.where(paper["tokens"] < 2e9, 0.5, 1.0)
    # 16: its root is exact in binary
    once, twice = (fitting.fit(paper, CURVED, weights=factor * weights) for factor in (1, 16))
    assert once.values == pytest.approx(twice.values, rel=1e-12)
    assert once.covariance == pytest.approx(twice.covariance, rel=1e-10)
    for interval in (
        lambda fit: u.parameter_interval(fit, covariance=u.cluster_covariance(paper, fit, "name")),
        lambda fit: u.bootstrap(paper, fit, 20, cluster="name").interval(),
    ):
        assert interval(once).to_numpy() == pytest.approx(interval(twice).to_numpy(), rel=1e-6)
    # not so for a run of weight one, whose noise is 1 / 8 of that of rows of weight 8
    new = paper.tail(2)
    once_wide, twice_wide = (np.ptp(u.prediction_interval(new, fit, paper)[["low", "high"]], axis=1) for fit in (once, twice))
    assert (twice_wide > 2 * once_wide).all()


def test_cr3_of_a_curved_law_is_that_of_its_tangent(paper, curved):
    """The jackknife of the linearized problem, one cluster left out at a time."""
    jacobian = CURVED.jacobian(curved.values, runs.variables(paper))
    lengths = np.linalg.norm(jacobian, axis=0)
    residual = paper["loss"].to_numpy() - curved.loss_predicted
    moved = []
    for label in paper["name"].unique():
        kept = (paper["name"] != label).to_numpy()
        moved.append(np.linalg.lstsq(jacobian[kept] / lengths, residual[kept])[0] / lengths)
    # the formula takes J'r for zero; it is 1e-6 of its size, the square root of what the search leaves of the sum of squares
    assert_same_covariance(u.cluster_covariance(paper, curved, "name").matrix, np.transpose(moved) @ moved, tolerance=1e-4)


def test_wald_intervals_are_t_standard_errors(paper, curved):
    for level in (0.5, 0.95):
        t = student.ppf((1 + level) / 2, 76 - 5)
        errors, values = np.array(list(curved.standard_errors.values())), curved.values
        usual = u.parameter_interval(curved, level)
        assert u.logarithmic(curved) == ("A", "B", "epsilon")
        assert list(usual.index) == ["A", "B", "E", "alpha", "epsilon"]
        # two libraries' t, to 1e-12
        for name in ("E", "alpha"):
            assert tuple(usual.loc[name, ["low", "high"]]) == pytest.approx(wald(curved, level)[name], rel=1e-10)
        assert np.allclose(np.log(usual["high"] / usual["value"])[["A", "B"]], t * (errors / values)[:2], rtol=1e-10)
        assert np.allclose(
            (usual["high"] / usual["value"])[["A", "B"]], (usual["value"] / usual["low"])[["A", "B"]], rtol=1e-10
        )
        clustered = u.cluster_covariance(paper, curved, "name")
        half = student.ppf((1 + level) / 2, 34) * np.sqrt(np.diag(clustered.matrix))
        high = u.parameter_interval(curved, level, clustered)["high"]
        assert np.allclose(high[["E", "alpha"]], (values + half)[2:4], rtol=1e-10)


def test_the_profile_of_a_linear_law_is_its_wald_interval(paper, linear):
    """The sum of squares is a parabola in each parameter, so both ends are t standard errors away."""
    for name, (low, high) in wald(linear).items():
        # the root is sought to 1e-8 of a half width; the parabola is not flat there
        assert u.profile_interval(paper, linear, name) == pytest.approx((low, high), abs=2e-8 * (high - low), rel=0), name


@pytest.mark.parametrize("parameter", CURVED.parameters)
def test_at_the_ends_of_a_profile_the_sum_of_squares_has_risen_as_it_should(paper, curved, parameter):
    """Refitted with the parameter held, by an ordinary search over all the others at once, in logarithms."""
    sse = ((paper["loss"] - curved.loss_predicted) ** 2).sum()
    wanted = sse * (1 + student.ppf(0.975, 71) ** 2 / 71)
    index = CURVED.parameters.index(parameter)
    variables, loss = runs.variables(paper), paper["loss"].to_numpy()
    for end in u.profile_interval(paper, curved, parameter):

        def residuals(logarithms, end=end):
            return CURVED.predict(np.insert(np.exp(logarithms), index, end), variables) - loss

        start = np.log(np.delete(curved.values, index))
        refit = least_squares(residuals, start, x_scale="jac", method="lm", ftol=1e-14, xtol=1e-14, gtol=1e-14)
        # numerical derivatives of 1e-8 leave 1e-8 or less of the sum of squares; the search for the end as much
        assert 2 * refit.cost == pytest.approx(wanted, rel=1e-6)


def test_profiles_of_rows_that_say_little_have_open_ends(paper):
    """Six rows of the paper's first random draw, five parameters: one degree of freedom, and t is 637."""
    six = six_rows(paper)
    fit = fitting.fit(six, CURVED)
    assert u.profile_interval(six, fit, "alpha", 0.999)[0] == 0.0
    below, above = u.profile_interval(six, fit, "epsilon", 0.999)
    assert below < 0 and above == np.inf
    with pytest.raises(InputError, match="not a free parameter"):
        u.profile_interval(six, fit, "gamma")


def test_profiles_of_a_law_with_two_valleys_grow_with_the_level(paper):
    """beta of the free law on the 27 rows: past 0.3 the sum of squares is least where another term takes over."""
    free = fitting.fit(paper, laws.get("inference-aware", "free"), "fit_main")
    ends = [u.profile_interval(paper, free, "beta", level)[0] for level in (0.8, 0.95)]
    assert 0 < ends[1] < ends[0] < free.parameters["beta"]


def test_prediction_intervals_of_a_linear_law(paper, linear):
    new = paper.tail(4).assign(tokens=3e11)
    oracle = sm.OLS(paper["loss"].to_numpy(), design(paper)).fit().get_prediction(design(new))
    found = u.prediction_interval(new, linear, paper, 0.9)
    expected = oracle.summary_frame(alpha=0.1)
    assert list(found.index) == list(new.index)
    # raw columns have a condition number of 1e4, squared in J'J: 1e-16 * 1e8
    assert np.allclose(found["loss"], expected["mean"], rtol=1e-9)
    assert np.allclose(found["low"], expected["obs_ci_lower"], rtol=1e-7)
    assert np.allclose(found["high"], expected["obs_ci_upper"], rtol=1e-7)
    clustered = u.cluster_covariance(paper, linear, "name")
    found = u.prediction_interval(new, linear, paper, covariance=clustered)
    noise = ((paper["loss"] - linear.loss_predicted) ** 2).sum() / 72
    expected = student.ppf(0.975, 34) * np.sqrt(np.diag(design(new) @ clustered.matrix @ design(new).T) + noise)
    assert np.allclose(found["high"] - found["loss"], expected, rtol=1e-7)


def test_bootstrap_errors_of_a_linear_law_are_those_of_hc0(paper, linear):
    """Resampling rows of a linear law gives, to order 1 / n, White's covariance.

    B resamples tell a standard deviation to 1 / sqrt(2 B), four times which none of four parameters
    exceeds by chance. The order 1 / n is shown by tables of the same rows repeated: 76 rows alone are 5 % off.
    """
    n_resamples = 4000
    repeated = pd.concat([paper] * 10, ignore_index=True)
    fit = fitting.fit(repeated, LINEAR)
    found = u.bootstrap(repeated, fit, n_resamples)
    expected = np.sqrt(np.diag(by_hand(repeated, cov_type="HC0")[1]))
    assert found.values.std(axis=0, ddof=1) == pytest.approx(expected, rel=4 / np.sqrt(2 * n_resamples) + 1 / 76)
    assert (found.n_left_out, found.n_clusters) == (0, 760)


def test_bootstrap_refits_are_fits_of_the_resampled_rows(paper, curved):
    """The first refits again, by the whole search on tables with the rows repeated as drawn."""
    found = u.bootstrap(paper, curved, 3, cluster="name", seed=5)
    codes, labels = pd.factorize(paper["name"])
    drawn = np.random.default_rng(5).multinomial(len(labels), np.full(len(labels), 1 / len(labels)), 3)
    for counts, values in zip(drawn[:, codes], found.values, strict=True):
        again = fitting.fit(paper.loc[paper.index.repeat(counts)].reset_index(drop=True), CURVED)
        # both end within the search's tolerance, 1e-6 of a standard error or so
        assert values == pytest.approx(again.values, rel=1e-4)


def test_clusters_of_one_row_are_rows_and_the_seed_decides(paper, curved):
    own = paper.assign(run=[f"r{i}" for i in range(76)])
    rows, again, clusters, other = (
        u.bootstrap(own, curved, 20, cluster=cluster, seed=seed)
        for cluster, seed in ((None, 1), (None, 1), ("run", 1), (None, 2))
    )
    assert (rows.values == again.values).all() and (rows.values == clusters.values).all()
    assert not (rows.values == other.values).all()
    same = u.cluster_covariance(own, curved, "run"), u.cluster_covariance(own, curved)
    assert (same[0].matrix == same[1].matrix).all()
    with pytest.raises(ValueError, match="read-only"):
        rows.values[0, 0] = 0.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows.n_left_out = 1


def test_chunks_of_refits_do_not_matter(paper, curved, monkeypatch):
    whole = u.bootstrap(paper, curved, 7)
    monkeypatch.setattr(u, "CHUNK_NUMBERS", 1)
    # each search of a stack is on its own, but sums may be taken in another order
    assert u.bootstrap(paper, curved, 7).values == pytest.approx(whole.values, rel=1e-6)


def made_up(fit, values, n_clusters=30):
    return u.Bootstrap(fit, np.asarray(values), n_clusters, 0)


def test_bootstrap_intervals_by_their_formulas(curved):
    rng = np.random.default_rng(0)
    values = curved.values * np.exp(0.1 * rng.normal(size=(999, 5)))
    resampled = made_up(curved, values)
    on_log = np.array([True, True, False, False, True])
    estimate, spread = (np.where(on_log, np.log(a), a) for a in (curved.values, values))
    half = student.ppf(0.95, 29) * spread.std(axis=0, ddof=1)
    expected = np.where(on_log, np.exp(estimate + half), estimate + half)
    assert resampled.interval(0.9)["high"].to_numpy() == pytest.approx(expected, rel=1e-10)


def test_a_resample_at_zero_opens_the_interval_of_a_logarithm(curved):
    values = curved.values * np.ones((10, 5)) * np.linspace(0.9, 1.1, 10)[:, None]
    values[0, 0] = 0.0
    table = made_up(curved, values).interval()
    assert tuple(table.loc["A", ["low", "high"]]) == (0.0, np.inf)
    assert np.isfinite(table.drop(index="A").to_numpy()).all()


def test_resamples_that_cannot_determine_the_law_are_counted(paper):
    few = paper[paper["name"].isin(["80M_v1", "116M_v1", "164M_v1", "313M_v1", "313M_v2"])].reset_index(drop=True)
    fit = fitting.fit(few, CURVED, n_starts=4)
    found = u.bootstrap(few, fit, 200, cluster="name")
    assert 0 < found.n_left_out < 100 and len(found.values) == 200 - found.n_left_out
    six = six_rows(paper)
    # six draws of six rows are five or more distinct ones in (6! + 15 * 6!) / 6^6 = 25 % of resamples
    with pytest.raises(InputError, match="of 200 resamples determine"):
        u.bootstrap(six, fitting.fit(six, CURVED), 200)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), noise=st.floats(1e-4, 0.03), levels=st.tuples(*[st.floats(0.05, 0.999)] * 2))
def test_intervals_hold_the_estimate_and_grow_with_the_level(paper, seed, noise, levels):
    rng = np.random.default_rng(seed)
    loss = 2.4 + 5e4 * paper["n_params"] ** -0.6 + 6e5 * paper["tokens"] ** -0.6
    table = paper.assign(loss=loss * (1 + 1e-3 * (paper["d_model"] / paper["n_layers"]) ** 0.6) + noise * rng.normal(size=76))
    fit = fitting.fit(table, CURVED, n_starts=4)
    resampled = u.bootstrap(table, fit, 10, cluster="name", seed=seed)
    clustered = u.cluster_covariance(table, fit, "name")
    for make in (
        lambda level: u.parameter_interval(fit, level),
        lambda level: u.parameter_interval(fit, level, clustered),
        resampled.interval,
        lambda level: pd.DataFrame([(fit.parameters["E"], *u.profile_interval(table, fit, "E", level))]),
        lambda level: u.prediction_interval(paper.tail(3), fit, table, level),
    ):
        narrow, wide = (make(level).to_numpy().T for level in sorted(levels))
        value, low, high = narrow
        assert (low <= value).all() and (value <= high).all()
        slack = 1e-7 * (high - low)  # of two levels that are nearly one
        assert (wide[1] <= low + slack).all() and (high <= wide[2] + slack).all()


def test_wrong_input_is_refused_in_one_line(paper, curved):
    exact = fitting.fit(paper.iloc[[0, 20, 40, 50, 60]].reset_index(drop=True), CURVED)
    assert exact.status is Status.EXACT
    held = fitting.fit(paper, laws.get("chinchilla"), "fit_20N_only")
    assert held.status is Status.AT_BOUND
    assert u.bootstrap(paper, held, 50).interval().loc["A", "low"] == 0  # it must not be negative, nor may its interval
    five = paper.iloc[[0, 20, 40, 50, 60]].reset_index(drop=True)
    robust = fitting.fit(paper, CURVED, loss="huber")
    resampled = u.bootstrap(paper, curved, 2)
    noiseless = paper.assign(loss=curved.predict(paper))
    through = fitting.fit(noiseless, CURVED)
    cases = [
        ("number between 0 and 1", lambda: u.parameter_interval(curved, 1.0)),
        ("number between 0 and 1", lambda: u.profile_interval(paper, curved, "E", 0.0)),
        ("number between 0 and 1", lambda: u.prediction_interval(paper, curved, paper, float("nan"))),
        ("number between 0 and 1", lambda: resampled.interval(95)),
        ("at least 2", lambda: u.bootstrap(paper, curved, 1)),
        ("no column 'shape'", lambda: u.bootstrap(paper, curved, cluster="shape")),
        ("no column 'shape'", lambda: u.cluster_covariance(paper, curved, "shape")),
        ("at least 2", lambda: u.cluster_covariance(paper.assign(run="one"), curved, "run")),
        ("no label in 1 fitted", lambda: u.cluster_covariance(paper.assign(run=[None, *"a" * 40, *"b" * 35]), curved, "run")),
        ("without run a the law", lambda: u.cluster_covariance(paper.assign(run=[*"a" * 74, *"bb"]), curved, "run")),
        ("give the table fitted", lambda: u.bootstrap(paper.head(70), curved)),
        ("the table it was made from", lambda: u.cluster_covariance(paper.assign(loss=paper["loss"][::-1].to_numpy()), curved)),
        ("this fit is of loss huber", lambda: u.profile_interval(paper, robust, "E")),
        ("this fit is of loss huber", lambda: u.bootstrap(paper, robust)),
        ("as many rows as parameters", lambda: u.parameter_interval(exact)),
        ("as many rows as parameters", lambda: u.bootstrap(five, exact)),
        ("as many rows as parameters", lambda: u.cluster_covariance(five, exact)),
        ("as many rows as parameters", lambda: u.prediction_interval(five, exact, five)),
        ("is held at zero", lambda: u.parameter_interval(held)),
        ("is held at zero", lambda: u.cluster_covariance(paper, held)),
        ("not counted as in the fit", lambda: u.prediction_interval(paper.assign(n_count="non_embedding"), curved, paper)),
        ("passes through every row", lambda: u.profile_interval(noiseless, through, "E")),
    ]
    for message, call in cases:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    # at a bound the bootstrap still says something
    assert (u.bootstrap(paper, held, 20).values[:, 0] == 0).any()


def test_a_bootstrap_draws_rows_with_their_weights(paper):
    """Each refit by statsmodels, with the weights of the rows times how often their cluster was drawn."""
    fit, _, lengths = weighted(paper)
    found = u.bootstrap(paper, fit, 3, cluster="name", seed=5)
    codes, labels = pd.factorize(paper["name"])
    drawn = np.random.default_rng(5).multinomial(len(labels), np.full(len(labels), 1 / len(labels)), 3)
    for counts, values in zip(drawn[:, codes], found.values, strict=True):
        again = sm.WLS(paper["loss"].to_numpy(), design(paper) / lengths, counts * fit.weights).fit()
        # the columns' condition number is about 20: 1e-16 * 20^2, and raw columns lose more
        assert values == pytest.approx(again.params / lengths, rel=1e-9)


def test_intervals_of_a_fit_with_a_negative_coefficient_are_not_cut_at_zero(paper):
    """A loss that rises with 1 / L less than zero: profiles are still Wald intervals, and refits still go below zero."""
    noise = 0.02 * np.random.default_rng(0).standard_normal(76)
    table = paper.assign(loss=design(paper) @ [100.0, -0.5, 800.0, 2.0] + noise)
    fit = fitting.fit(table, LINEAR, positive=False)
    assert fit.status is Status.NEGATIVE and fit.parameters["C"] < 0
    for name, (low, high) in wald(fit).items():
        assert u.profile_interval(table, fit, name) == pytest.approx((low, high), abs=2e-8 * (high - low), rel=0), name
    assert (u.bootstrap(table, fit, 20).values[:, 1] < 0).all()


@pytest.mark.filterwarnings("error")
def test_a_coefficient_held_above_zero_has_no_interval_below(paper):
    six = six_rows(paper)
    fit = fitting.fit(six, CURVED)
    for name in ("A", "B", "E"):
        assert u.profile_interval(six, fit, name, 0.999)[0] == 0, name


def test_errors_that_are_not_known_are_refused(paper, curved):
    unknown = dataclasses.replace(curved, covariance=np.full((5, 5), np.nan))
    with pytest.raises(InputError, match="not finite"):
        u.parameter_interval(unknown)
    with pytest.raises(InputError, match="the table it was made from"):
        u.bootstrap(paper.assign(loss=paper["loss"][::-1].to_numpy()), curved, 2)


def test_a_profile_that_meets_a_better_optimum_says_so(paper, curved, monkeypatch):
    """A search that ends a tenth below the fit's sum of squares, as one would from a fit in a worse valley."""
    solve = fitting.solve

    def better(*arguments, **options):
        found = solve(*arguments, **options)
        return found._replace(sse=0.9 * found.sse)

    monkeypatch.setattr(fitting, "solve", better)
    with pytest.raises(InputError, match="a better optimum lies at E"):
        u.profile_interval(paper, curved, "E")


def test_every_factor_of_a_shape_is_taken_by_its_logarithm(paper):
    law = laws.get("chinchilla+conditional-ratio")
    fit = fitting.fit(paper, law)
    positive = dataclasses.replace(fit, parameters=dict.fromkeys(law.parameters, 0.1))
    assert u.logarithmic(positive) == ("A", "B", "epsilon", "epsilon_M")
