import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares as scipy_least_squares

from conftest import ROOT
from morphlib.errors import InputError
from morphlib.least_squares import TOLERANCE, Status, minimize

EPSILON = np.finfo(float).eps
NIST = {problem["name"]: problem for problem in json.loads((ROOT / "tests/data/nist_strd.json").read_text())["problems"]}
FORMULA_NAMES = {name: getattr(np, name) for name in ("exp", "log", "cos", "sin", "arctan", "pi")}
X = np.linspace(0.0, 5.0, 60)


def problem_of(nist):
    """Residuals and Jacobian of a NIST problem, from its formula.

    A step of 1e-100 i has a real part without it to the last digit, and its imaginary part, divided by
    1e-100, is the derivative with an error of 1e-200: exact to rounding, as no difference is taken.
    """
    model = compile(nist["model"], nist["name"], "eval")
    names = FORMULA_NAMES | {name: np.array(nist[name]) for name in ("y", "x", "x1", "x2") if name in nist}
    response = eval(nist["response"], names)

    def predict(values):
        return eval(model, names | {f"b{i}": value for i, value in enumerate(values, 1)})

    def jacobian(values):
        columns = [predict(values + 1e-100j * unit).imag / 1e-100 for unit in np.eye(len(values))]
        return np.stack(columns, axis=1)

    return response, lambda values: predict(values) - response, jacobian


def decay(noise=0.05, seed=0):
    """Exponential decay to a floor, 60 rows: residuals and Jacobian."""
    y = 3 * np.exp(-1.2 * X) + 0.5 + np.random.default_rng(seed).normal(0, noise, len(X))
    return (
        lambda b: b[0] * np.exp(-b[1] * X) + b[2] - y,
        lambda b: np.stack([np.exp(-b[1] * X), -b[0] * X * np.exp(-b[1] * X), np.ones_like(X)], axis=1),
    )


def with_outliers(seed=0):
    residuals, jacobian = decay(seed=seed)
    far = np.where(np.arange(len(X)) % 9 == 0, 3.0, 0.0)
    return lambda b: residuals(b) - far, jacobian


def test_the_nist_problems_are_all_there():
    assert len(NIST) == 27
    assert sorted(p["difficulty"] for p in NIST.values()) == ["average"] * 11 + ["higher"] * 8 + ["lower"] * 8


@pytest.mark.parametrize("start", ["start_1", "start_2"])
@pytest.mark.parametrize("name", NIST)
def test_nist_certified_values(name, start):
    """All 27 problems from both starts, to eight digits of the certificate's eleven.

    Measured: 9.0 (ENSO) to 11 digits of the values, and 9.3 (Nelson) to 11 of the standard deviations
    but for Lanczos1 with 3.6: its residuals, 9e-14, are differences of numbers up to 2.5, rounded by 2e-16.
    """
    nist = NIST[name]
    response, residuals, jacobian = problem_of(nist)
    found = minimize(residuals, jacobian, nist[start])
    assert found.status is Status.CONVERGED
    certified, deviations = np.array(nist["certified"]), np.array(nist["standard_deviations"])
    freedom = len(response) - len(certified)
    # What is left of the offset moves a value by that times the root of n - p of its standard deviation, and so does
    # a rounding of residuals, which are differences of numbers as large as the response; the certificate is rounded.
    size = np.sqrt(nist["sum_of_squares"])
    rounding = EPSILON * np.linalg.norm(response) / size
    tolerance = (TOLERANCE + rounding) * np.sqrt(freedom) * deviations + 1e-10 * np.abs(certified)
    assert (np.abs(found.values - certified) <= tolerance).all()
    assert found.values == pytest.approx(certified, rel=1e-8)
    # The sum of squares is flat at its minimum: no offset shows, rounding does. Derivatives of values that differ by
    # 1e-9 change the deviations by some ten times as much.
    assert found.sse == pytest.approx(nist["sum_of_squares"], rel=1e-9 + 2 * rounding)
    assert found.standard_errors == pytest.approx(deviations, rel=1e-8 + 2 * rounding)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01, 1e-3])
def test_huber_agrees_with_scipy(scale):
    """scipy's cost is half of the sum of the same rho. It is flat at the minimum, so it agrees beyond where scipy stops."""
    residuals, jacobian = with_outliers()
    found = minimize(residuals, jacobian, [1, 1, 0], huber_scale=scale)
    theirs = scipy_least_squares(
        residuals, [1, 1, 0], jacobian, method="trf", loss="huber", f_scale=scale, xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    assert found.converged
    # sixty terms are summed, each rounded a few times
    assert found.cost == pytest.approx(2 * theirs.cost, rel=100 * EPSILON)
    # a relative change of the cost by EPSILON is the square of this offset, and scipy sees no smaller one
    assert found.values == pytest.approx(theirs.x, abs=np.sqrt(EPSILON * 57) * found.standard_errors.max())


def test_huber_is_the_sum_of_rho_and_shrugs_off_outliers():
    residuals, jacobian = with_outliers()
    robust = minimize(residuals, jacobian, [1, 1, 0], huber_scale=0.1)
    distance = np.abs(residuals(robust.values))
    rho = np.where(distance <= 0.1, distance**2, 0.2 * distance - 0.01)
    assert robust.cost == pytest.approx(rho.sum(), rel=100 * EPSILON)
    assert robust.sse == pytest.approx((distance**2 * np.minimum(1, 0.1 / distance)).sum(), rel=100 * EPSILON)
    squared = minimize(residuals, jacobian, [1, 1, 0])
    true = [3, 1.2, 0.5]
    assert np.linalg.norm(robust.values - true) < 0.3 * np.linalg.norm(squared.values - true)
    # with no residual beyond the scale it is the sum of squares, and the search the same to the last digit
    wide = minimize(residuals, jacobian, [1, 1, 0], huber_scale=1e6)
    assert (wide.values == squared.values).all() and wide.cost == squared.cost
    assert squared.sse == pytest.approx(squared.cost, rel=100 * EPSILON)


@pytest.mark.parametrize("scale", [np.inf, 0.1])
def test_weights_count_rows(scale):
    """A weight of two is a row given twice, and of zero a row left out; standard errors count rows, not weights."""
    residuals, jacobian = with_outliers()
    weights = np.arange(len(X)) % 3
    times = np.repeat(np.arange(len(X)), weights)
    weighted = minimize(residuals, jacobian, [1, 1, 0], weights=weights, huber_scale=scale)
    repeated = minimize(lambda b: residuals(b)[times], lambda b: jacobian(b)[times], [1, 1, 0], huber_scale=scale)
    # both end within the tolerance of one minimum, in units of standard errors times the root of n - p
    assert weighted.values == pytest.approx(repeated.values, abs=2 * TOLERANCE * 8 * repeated.standard_errors.max())
    assert weighted.cost == pytest.approx(repeated.cost, rel=100 * EPSILON)
    freedom, their_freedom = np.count_nonzero(weights) - 3, len(times) - 3
    # derivatives at values as near as that
    assert weighted.covariance * freedom == pytest.approx(repeated.covariance * their_freedom, rel=1e-7, abs=1e-14)


@settings(max_examples=100)
@given(powers=st.tuples(*[st.integers(-60, 60)] * 3), own=st.integers(-60, 60))
def test_units_do_not_matter(powers, own):
    """Units that are powers of two are exact in binary, so the search takes the same path."""
    residuals, jacobian = decay()
    units = 2.0 ** np.array(powers)
    here = minimize(residuals, jacobian, [1, 1, 0])
    there = minimize(
        lambda b: residuals(b * units) * 2.0**own, lambda b: jacobian(b * units) * units * 2.0**own, [1, 1, 0] / units
    )
    assert there.status is here.status and there.n_iterations == here.n_iterations
    # room for a linear algebra library that scales columns on its own
    assert there.values * units == pytest.approx(here.values, rel=1e-10)
    assert there.standard_errors * units == pytest.approx(here.standard_errors, rel=1e-8)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 6), st.integers(0, 12)),
    noise=st.floats(-12, 4),
    spread=st.floats(0, 8),
)
def test_a_linear_problem_is_solved_as_by_linear_algebra(seed, shape, noise, spread):
    rng = np.random.default_rng(seed)
    n_parameters, freedom = shape
    matrix = rng.normal(size=(n_parameters + freedom, n_parameters)) * 10 ** rng.uniform(-spread, spread, n_parameters)
    y = matrix @ rng.normal(size=n_parameters) + rng.normal(size=len(matrix)) * 10**noise
    found = minimize(lambda b: matrix @ b - y, lambda b: matrix, rng.normal(size=n_parameters))
    lengths = np.linalg.norm(matrix, axis=0)
    expected = np.linalg.lstsq(matrix / lengths, y, rcond=None)[0] / lengths
    inverse = np.linalg.inv(np.linalg.qr(matrix / lengths)[1])
    condition = np.linalg.norm(matrix / lengths, 2) * np.linalg.norm(inverse, 2)
    assert found.status is Status.CONVERGED
    residual = matrix @ expected - y
    # The offset, and roundings of the numbers that residuals are the difference of, where the columns are most nearly
    # parallel. A residual sums up to eight, and the search ends at a slope of some of their errors: ten were seen.
    rounding = EPSILON * (np.linalg.norm(y) + lengths @ np.abs(expected))
    error = 30 * (TOLERANCE * np.linalg.norm(residual) + rounding) * condition
    assert (np.abs(found.values - expected) * lengths <= error).all()
    if not freedom:
        assert np.isnan(found.covariance).all()
        return
    assert found.sse == pytest.approx(residual @ residual, rel=1e-12, abs=error * np.linalg.norm(residual) + error**2)
    covariance = found.sse / freedom * (inverse @ inverse.T) / np.outer(lengths, lengths)
    # the inverse has the rounding of the matrix times its condition
    bound = 100 * EPSILON * condition * np.outer(found.standard_errors, found.standard_errors)
    assert (np.abs(found.covariance - covariance) <= bound).all()


def test_noiseless_data_give_back_their_parameters():
    residuals, jacobian = decay(noise=0)
    found = minimize(residuals, jacobian, [1, 1, 0])
    assert found.converged
    # rounding of values of three, times the condition of about ten of the columns
    assert found.values == pytest.approx([3, 1.2, 0.5], abs=3 * 10 * EPSILON)


def test_points_that_are_not_finite_turn_the_search_back():
    """A full step goes to a negative value, whose logarithm is no number; one to 1e6, where the exponential overflows."""
    shifted = np.array([-0.1, 0.1, 0.2])
    by_logarithm = minimize(lambda b: np.log(b[0]) - np.log(0.01) - shifted, lambda b: np.ones((3, 1)) / b, [10.0])
    assert by_logarithm.converged
    assert by_logarithm.values == pytest.approx([0.01 * np.exp(shifted.mean())], rel=1e-9)
    x = np.arange(21.0)
    y = np.exp(x) + np.cos(x)
    by_exponential = minimize(lambda b: np.exp(b[0] * x) - y, lambda b: (x * np.exp(b[0] * x))[:, None], [0.0])
    assert by_exponential.converged
    weighted = x * np.exp(x)  # the cosine moves the value by its share in the direction of the derivative
    assert by_exponential.values == pytest.approx([1 + weighted @ np.cos(x) / (weighted @ weighted)], rel=1e-12)
    # derivatives that are not finite where residuals are
    by_root = minimize(lambda b: np.sqrt(np.abs(b[0])) - np.array([0.9, 1.2]), lambda b: np.full((2, 1), 0.5 / b**0.5), [9.0])
    assert by_root.converged
    assert by_root.values == pytest.approx([1.05**2], rel=1e-9)


def test_statuses_say_what_happened():
    residuals, jacobian = decay()
    start = [1.0, 1.0, 0.0]
    few = minimize(residuals, jacobian, start, max_iterations=3)
    assert few.status is Status.NOT_CONVERGED and not few.converged and few.n_iterations == 3
    assert minimize(residuals, lambda b: -jacobian(b), start).status is Status.STALLED
    twice = minimize(lambda b: b[0] * b[1] * X - X**2, lambda b: np.stack([b[1] * X, b[0] * X], axis=1), [1, 1])
    flat = minimize(lambda b: b[0] * X - X**2, lambda b: np.stack([X, 0 * X], axis=1), [1, 1])
    for singular in (twice, flat):
        assert singular.status is Status.SINGULAR and not singular.converged
        assert np.isfinite(singular.values).all() and np.isnan(singular.standard_errors).all()
    assert flat.values[1] == 1
    exact = minimize(lambda b: residuals(b)[:3], lambda b: jacobian(b)[:3], start)
    assert exact.converged and np.isnan(exact.standard_errors).all()
    for status in Status:
        assert status.value.count(". ") == 1 and status.value.endswith(".")


def test_a_minimum_cannot_be_changed():
    found = minimize(*decay(), [1, 1, 0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.cost = 0.0
    for array in (found.values, found.covariance, found.standard_errors):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_functions_may_change_what_they_are_given_and_reuse_what_they_return():
    residuals, jacobian = decay()
    buffer = np.empty(len(X))

    def careless(values):
        buffer[:] = residuals(values)
        values[:] = np.nan
        return buffer

    start = np.array([1.0, 1.0, 0.0])
    assert (minimize(careless, jacobian, start).values == minimize(residuals, jacobian, start).values).all()
    assert (start == [1, 1, 0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": [1, np.nan, 0]}, r"start is \[1.0, nan, 0.0\]; give a finite number"),
        ({"start": []}, "at least one"),
        ({"start": 3.0}, "start has shape"),
        ({"start": ["a"]}, "start must be an array of real numbers"),
        ({"huber_scale": 0}, "huber_scale is 0"),
        ({"huber_scale": np.nan}, "huber_scale is nan"),
        ({"max_iterations": 0}, "max_iterations 0"),
        ({"weights": -np.ones(60)}, "weights hold a negative"),
        ({"weights": np.full(60, np.inf)}, "not finite"),
        ({"weights": np.ones(59)}, r"weights has shape \(59,\); give shape \(60,\)"),
        ({"weights": np.arange(60) < 2}, "2 residuals of positive weight are too few for 3 parameters"),
        ({"residuals": lambda b: X[:2], "jacobian": lambda b: np.ones((2, 3))}, "2 residuals of positive weight are too few"),
        ({"residuals": lambda b: X[:, None]}, "residuals has shape"),
        ({"residuals": lambda b: X * 1j}, "residuals must be an array of real numbers"),
        ({"residuals": lambda b: [[1.0], [1.0, 2.0]]}, "residuals must be an array of real numbers"),
        ({"residuals": lambda b: None}, "residuals must be an array of real numbers"),
        ({"residuals": lambda b: np.log(X - 1)}, "residuals or jacobian are not finite at the start, the first in row 0,"),
        ({"residuals": lambda b: np.where(np.arange(len(X)) == 7, np.nan, X)}, "the first in row 7, counted from 0"),
        ({"residuals": lambda b: X * 1e300}, "overflow or underflow when squared"),
        ({"residuals": lambda b: X * 1e-300}, "underflow when squared"),
        ({"jacobian": lambda b: np.ones((60, 2))}, r"jacobian has shape \(60, 2\); give shape \(60, 3\)"),
        ({"jacobian": lambda b: np.full((60, 3), np.inf)}, "residuals or jacobian are not finite at the start"),
        ({"residuals": lambda b: X if b[0] == 1 else X[1:]}, r"residuals has shape \(59,\)"),
    ],
)
def test_wrong_input_is_refused(change, message):
    residuals, jacobian = decay()
    arguments = {"residuals": residuals, "jacobian": jacobian, "start": [1, 1, 0]} | change
    with pytest.raises(InputError, match=message) as caught:
        minimize(**arguments)
    assert "\n" not in str(caught.value)


@settings(max_examples=200)
@given(
    start=st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3),
    power=st.integers(-100, 160),
    huber_scale=st.sampled_from([np.inf, 1.0]),
)
def test_any_start_gives_a_minimum_or_says_that_it_is_none(start, power, huber_scale):
    """Data of any size, from anywhere: no exception but for wrong input, no warning, no NaN, and no cost above the start's."""
    residuals, jacobian = decay()
    scale = 10.0**power
    try:
        found = minimize(
            lambda b: residuals(b) * scale, lambda b: jacobian(b) * scale, start, huber_scale=huber_scale, max_iterations=200
        )
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert np.isfinite(found.values).all() and np.isfinite(found.cost)
    if found.converged:
        assert np.isfinite(found.covariance).all()
    if huber_scale == np.inf:
        with np.errstate(all="ignore"):
            first = residuals(np.array(start)) * scale
        assert found.cost <= first @ first * (1 + 100 * EPSILON)
        if found.converged:
            # no column of the Jacobian is nearer to the residuals than the tolerance, or what rounding hides: residuals
            # off by an error change the cost by twice their product, and that is the square of a slope
            with np.errstate(all="ignore"):
                left, slopes = residuals(found.values) * scale, jacobian(found.values) * scale
            size, lengths = np.linalg.norm(left), np.linalg.norm(slopes, axis=0)
            error = EPSILON * (np.linalg.norm(np.abs(slopes) @ np.abs(found.values)) + size)
            assert (np.abs(slopes.T @ left) <= lengths * (TOLERANCE * size + 2 * np.sqrt(error * (size + error)))).all()


@pytest.mark.parametrize("start", ["start_1", "start_2"])
@pytest.mark.parametrize("name", ["MGH09", "MGH10", "BoxBOD", "Eckerle4", "Rat43", "Bennett5", "Thurber"])
def test_a_step_that_raises_the_cost_is_not_taken(name, start):
    """Broken off after ever more steps, the search has an ever lower cost; the last steps are of the size of its rounding."""
    _, residuals, jacobian = problem_of(NIST[name])
    costs = [minimize(residuals, jacobian, NIST[name][start], max_iterations=n).cost for n in range(1, 40)]
    assert (np.diff(costs) <= 1e-9 * np.array(costs[1:])).all()
