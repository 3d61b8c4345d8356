"""Fitting a law to a run table by nonlinear least squares (Levenberg-Marquardt).

The residuals are raw losses, unweighted, as in the paper. Two ways to search:

- ``fit``: each variable divided by its geometric mean, so that all parameters are of order one;
  several starts; the analytic Jacobian.
- ``fit_published``: as the authors' code does it, raw variables and parameters from one start.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import numpy as np
import pandas as pd
from scipy.optimize import OptimizeWarning, curve_fit, least_squares

from morphlib import runs
from morphlib.errors import InputError
from morphlib.laws import Array, Factor, Law

MAX_EVALUATIONS = 500  # of one start; on the paper's rows a start that converges takes tens
SAME_OPTIMUM = 1e-6  # relative difference in the sum of squares under which two starts agree
# The Jacobian in units of order one, its columns scaled to length one. Beyond this condition number
# parameters can change by their own size while no loss changes in its fourth decimal, the last one
# that is published (5e-5 of a loss of about 3).
CONDITION_LIMIT = 6e4
ONE_SIZE = 1.1  # largest over smallest value of a variable under which its term is a constant

# The start of the authors' untied-gamma fit, and its bound on gamma
# (law_nonequal/all_20N_partial_160N_data_fit/fit_scaling_laws_shape.py).
PUBLISHED_GAMMA_START = {"A": 50000.0, "B": 500000.0, "E": 2.0, "alpha": 0.5, "epsilon": 0.0011, "gamma": 0.5}
PUBLISHED_GAMMA_BOUND = 100.0


class Status(Enum):
    """How a fit ended; the value is one sentence of meaning and advice."""

    CONVERGED = "The search met its tolerance; the standard errors say how well the rows determine each parameter."
    NOT_CONVERGED = (
        "The search stopped before it met its tolerance; the values are where it stopped. "
        "Try more starts, or a law with fewer parameters."
    )
    DEGENERATE = (
        "The rows cannot tell some parameters apart; predictions inside the range of "
        "the rows may be good, single parameters mean nothing. Tie exponents, or add runs that vary N, D and R apart."
    )
    NEGATIVE = (
        "The search met its tolerance with a negative term or exponent of N, D or the irreducible loss, which has no "
        "physical meaning; do not extrapolate. Add runs that vary N and D apart."
    )
    EXACT = (
        "There are as many rows as parameters, so the law passes through every row and nothing is known about its "
        "errors. Add runs."
    )


@dataclass(frozen=True)
class Fit:
    """A fitted law. Arrays are read-only; ``fitted`` and ``loss_predicted`` follow the table's rows.

    ``covariance`` and ``standard_errors`` assume independent rows of equal noise and the law to be
    right: s^2 (J'J)^-1 with s^2 = SSE / (n - p). They are NaN where n = p.
    """

    law: Law
    count: str
    parameters: Mapping[str, float]
    standard_errors: Mapping[str, float]
    covariance: Array
    status: Status
    fitted: np.ndarray
    loss_predicted: Array
    n_starts: int
    share_of_starts_at_best: float
    condition_number: float

    def predict(self, table: pd.DataFrame) -> Array:
        """The loss, in nats per token, predicted for the rows of a run table, shape (n,)."""
        return self.law.predict(list(self.parameters.values()), runs.variables(table))


def fit(
    table: pd.DataFrame,
    law: Law,
    fit_on: str | None = None,
    *,
    n_starts: int = 24,
    seed: int = 0,
) -> Fit:
    """Least squares over the rows that the 0/1 column ``fit_on`` marks (all without it).

    The global search starts from ``n_starts`` random exponents, the linear parameters solved for
    each, and runs MINPACK's Levenberg-Marquardt (More 1978) from every start. Raises ``InputError``
    where the rows cannot determine the law: fewer rows than parameters, or a variable of the law
    that does not vary.
    """
    if n_starts < 1:
        raise InputError(f"n_starts is {n_starts}; give at least 1")
    fitted = runs.fit_mask(table, fit_on)
    _check_rows(table[fitted], law)
    variables = runs.variables(table[fitted])
    loss = table.loc[fitted, "loss"].to_numpy()
    units = _units(law, variables)
    scaled = {name: variables[name] / units[name] for name in law.variables}

    searches = []
    for start in _starts(law, scaled, loss, n_starts, np.random.default_rng(seed)):
        # a start far off can overflow x ** exponent; the search then fails and another start wins
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            try:
                searches.append(
                    least_squares(
                        lambda values: law.predict(values, scaled) - loss,
                        start,
                        jac=lambda values: law.jacobian(values, scaled),
                        method="lm",
                        ftol=1e-14,
                        xtol=1e-14,
                        gtol=1e-14,
                        max_nfev=MAX_EVALUATIONS,
                    )
                )
            except ValueError:
                continue
    if not searches:
        raise InputError(f"no start of the search could evaluate {law.name}; check the units of the table")
    best = min(searches, key=lambda search: search.cost)
    at_best = [search.cost <= best.cost * (1 + SAME_OPTIMUM) for search in searches]
    return _result(table, law, fitted, best.x, units, best.status > 0, n_starts, sum(at_best) / n_starts)


def fit_published(table: pd.DataFrame, law: Law, fit_on: str | None = None) -> Fit:
    """The fit as the authors' public code makes it, with scipy's ``curve_fit`` on raw variables.

    Tied exponents: every parameter starts at 1, no bounds, Levenberg-Marquardt. Gamma freed: their
    start and their bound of 100 on gamma, which makes scipy use its trust-region method. The
    authors fitted nothing else; other exponents raise ``InputError``.
    """
    if law.exponents == "free":
        raise InputError("the authors published no fit with free exponents; choose tied or gamma, or fit afresh")
    fitted = runs.fit_mask(table, fit_on)
    _check_rows(table[fitted], law)
    variables = runs.variables(table[fitted])
    loss = table.loc[fitted, "loss"].to_numpy()

    def predict(_: Array, *values: float) -> Array:
        return law.predict(values, variables)

    bounded = law.exponents == "gamma" and "gamma" in law.parameters
    options = (
        {
            "p0": [PUBLISHED_GAMMA_START[name] for name in law.parameters],
            "bounds": (-np.inf, [PUBLISHED_GAMMA_BOUND if name == "gamma" else np.inf for name in law.parameters]),
        }
        if bounded
        else {"p0": np.ones(len(law.parameters))}
    )
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", OptimizeWarning)  # no covariance; the status says so
        try:
            values, _ = curve_fit(predict, np.arange(len(loss)), loss, maxfev=100_000, **options)
        except RuntimeError as error:
            raise InputError(f"the published procedure does not converge on these rows ({error}); fit afresh") from None
    units = _units(law, variables)
    back = {name: 1 / unit for name, unit in units.items()}
    return _result(table, law, fitted, _in_units(law, values, back)[0], units, True, 1, 1.0)


def _check_rows(rows: pd.DataFrame, law: Law) -> None:
    n_parameters = len(law.parameters)
    if len(rows) < n_parameters:
        raise InputError(
            f"{len(rows)} rows are too few for {law.name} with {n_parameters} free parameters "
            f"({law.exponents} exponents); give at least {n_parameters + 1}"
        )
    meaning = {"N": "size (n_params)", "D": "budget (tokens)", "R": "aspect ratio (d_model / n_layers)"}
    for name, values in runs.variables(rows).items():
        if name in law.variables and values.max() < ONE_SIZE * values.min():
            raise InputError(
                f"all rows are of one {meaning[name]}, {values.min():.4g} to {values.max():.4g}, so {law.name} cannot be "
                f"fitted; add runs that differ in it by a tenth or more"
            )


def _starts(law: Law, scaled: Mapping[str, Array], loss: Array, n_starts: int, rng: np.random.Generator) -> list[Array]:
    """Starting values in scaled units: random exponents, and the base's linear parameters for them.

    Exponents are log-uniform over 0.1 to 2, which holds every published one; the share of the loss
    due to a shape factor, over 0.001 to 0.3.
    """
    starts = []
    for _ in range(n_starts):
        values = {name: float(np.exp(rng.uniform(np.log(0.1), np.log(2)))) for name in law.parameters}
        base, *others = law.factors
        for factor in others:
            values |= {p.coefficient: float(np.exp(rng.uniform(np.log(1e-3), np.log(0.3)))) for p in factor.powers}
        values |= _linear_parameters(law, base, values, scaled, loss)
        starts.append(np.array([values[name] for name in law.parameters]))
    return starts


def _linear_parameters(
    law: Law, base: Factor, values: Mapping[str, float], scaled: Mapping[str, Array], loss: Array
) -> dict[str, float]:
    """Least squares for the constant and the coefficients of the base, its exponents given."""
    names = [power.coefficient for power in base.powers]
    columns = [scaled[p.variable] ** (p.sign * values[law.free_name(p.exponent)]) for p in base.powers]
    if isinstance(base.constant, str):
        names.append(base.constant)
        columns.append(np.ones_like(loss))
    solution = np.linalg.lstsq(np.column_stack(columns), loss, rcond=None)[0]
    return dict(zip(names, solution.tolist(), strict=True))


def _units(law: Law, variables: Mapping[str, Array]) -> dict[str, float]:
    """The geometric mean of each variable, by which it is divided: parameters are then of order one."""
    return {name: float(np.exp(np.log(variables[name]).mean())) for name in law.variables}


def _in_units(law: Law, values: Array, units: Mapping[str, float]) -> tuple[Array, Array]:
    """Parameters for raw variables x from those for x / u, and their derivative by the latter.

    c x^(s e) = c' (x / u)^(s e), hence c = c' u^(-s e), dc/dc' = u^(-s e), dc/de = -s ln(u) c.
    """
    position = {name: index for index, name in enumerate(law.parameters)}
    raw = values.copy()
    derivative = np.eye(len(values))
    for power in law.powers:
        coefficient, exponent = position[power.coefficient], position[law.free_name(power.exponent)]
        unit = units[power.variable]
        factor = np.float64(unit) ** (-power.sign * values[exponent])
        raw[coefficient] = values[coefficient] * factor
        derivative[coefficient, coefficient] = factor
        derivative[coefficient, exponent] = -power.sign * np.log(unit) * raw[coefficient]
    return raw, derivative


def _result(
    table: pd.DataFrame,
    law: Law,
    fitted: np.ndarray,
    scaled_values: Array,
    units: Mapping[str, float],
    converged: bool,
    n_starts: int,
    share_of_starts_at_best: float,
) -> Fit:
    """The result object, from the parameters for variables divided by ``units``."""
    every = {name: values / units[name] for name, values in runs.variables(table).items() if name in units}
    # nonsense rows can drive an exponent so far that the raw coefficients overflow; in scaled units they do not
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        jacobian = law.jacobian(scaled_values, {name: values[fitted] for name, values in every.items()})
        loss_predicted = law.predict(scaled_values, every)
        values, to_raw = _in_units(law, scaled_values, units)
    residuals = loss_predicted[fitted] - table.loc[fitted, "loss"].to_numpy()
    n_rows, n_parameters = jacobian.shape
    lengths = np.linalg.norm(jacobian, axis=0)
    _, singular, rotation = np.linalg.svd(jacobian / np.where(lengths > 0, lengths, 1), full_matrices=False)
    condition = float(singular[0] / singular[-1]) if singular[-1] > 0 else np.inf
    variance = residuals @ residuals / (n_rows - n_parameters) if n_rows > n_parameters else np.nan
    # rows that leave a parameter open by hundreds of orders of magnitude give it an infinite error
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        root = (to_raw / lengths) @ (rotation.T / singular)
        covariance = variance * root @ root.T
    for array in (loss_predicted, covariance, fitted):
        array.setflags(write=False)
    by_name = dict(zip(law.parameters, values.tolist(), strict=True))
    if not (condition < CONDITION_LIMIT and np.isfinite(values).all()):
        status = Status.DEGENERATE
    elif not converged:
        status = Status.NOT_CONVERGED
    elif n_rows == n_parameters:
        status = Status.EXACT
    elif any(by_name[law.free_name(name)] < 0 for name in law.factors[0].parameters):
        status = Status.NEGATIVE
    else:
        status = Status.CONVERGED
    errors = np.sqrt(np.diag(covariance)).tolist()
    return Fit(
        law=law,
        count=table["n_count"].iloc[0],
        parameters=MappingProxyType(by_name),
        standard_errors=MappingProxyType(dict(zip(law.parameters, errors, strict=True))),
        covariance=covariance,
        status=status,
        fitted=fitted,
        loss_predicted=loss_predicted,
        n_starts=n_starts,
        share_of_starts_at_best=share_of_starts_at_best,
        condition_number=condition,
    )
