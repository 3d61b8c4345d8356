r"""Fitting a law to a run table: Levenberg-Marquardt over the nonlinear parameters, many problems at once.

Given its exponents and the parameters of its shape term, a law is linear in the rest. **Variable
projection** (Golub and Pereyra 1973) solves for those at every step, so the search is over one to
four parameters. With the weighted basis :math:`\Phi(q) = Q T` and losses :math:`y`,

.. math::
    c = T^{-1} Q^\top y, \quad r = y - Q Q^\top y, \quad
    \partial r / \partial q_j \approx -(I - Q Q^\top) (\partial \Phi / \partial q_j) c

(Kaufman's approximation of the Jacobian), and a step solves
:math:`(J^\top J + \lambda\, \mathrm{diag}(J^\top J))\, \delta = -J^\top r`. All starts, and all
resamples of a bootstrap, are one array operation.

The residuals are raw losses, unweighted, as in the paper, unless a robust loss or weights are given.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from itertools import product
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from scipy.optimize import OptimizeWarning, curve_fit

from morphlib import runs
from morphlib.errors import InputError
from morphlib.laws import Array, Law
from morphlib.least_squares import minimize
from morphlib.shapes import Convention

Loss = Literal["squared", "huber", "log-huber"]
LOSSES: tuple[Loss, ...] = get_args(Loss)

MAX_ITERATIONS = 200  # of one start; one that converges takes about fifteen
TOLERANCE = 1e-13  # relative decrease of the sum of squares that a step promises, under which the search stops
SAME_OPTIMUM = 1e-6  # relative difference in the sum of squares under which two starts agree
# The Jacobian in units of order one, its columns scaled to length one. Beyond this condition number
# parameters can change by their own size while no loss changes in its fourth decimal, the last one
# that is published (5e-5 of a loss of about 3).
CONDITION_LIMIT = 6e4
HUBER_SCALE = 1e-3  # of Huber's loss, as Hoffmann et al. 2022 use on ln L
ROBUST_STARTS = 3  # resamples whose solutions a robust search also starts from
ROBUST_ITERATIONS = 400  # of each; the paper's rows take about a hundred
ONE_SIZE = 1.1  # largest over smallest value of a variable under which its term is a constant
EXPONENT_RANGE = (1e-3, 20.0)  # x^-e beyond it is a constant or a step on any table of runs

# The start of the authors' untied-gamma fit, and its bound on gamma
# (law_nonequal/all_20N_partial_160N_data_fit/fit_scaling_laws_shape.py).
PUBLISHED_GAMMA_START = {"A": 50000.0, "B": 500000.0, "E": 2.0, "alpha": 0.5, "epsilon": 0.0011, "gamma": 0.5}
PUBLISHED_GAMMA_BOUND = 100.0


class Status(Enum):
    """How a fit ended; the value is one sentence of meaning and one of advice."""

    CONVERGED = "The search met its tolerance. The standard errors say how well the rows determine each parameter."
    NOT_CONVERGED = "The search stopped before it met its tolerance. Try more starts, or a law with fewer parameters."
    DEGENERATE = (
        "The rows cannot tell some parameters apart; predictions inside the range of the rows may be good, single "
        "parameters mean nothing. Tie exponents, or add runs that vary N, D and R apart."
    )
    AT_BOUND = (
        "A coefficient that must not be negative is held at zero, so its term is missing and its exponent means nothing. "
        "Add runs that vary N and D apart, choose a law without the term, or take intervals by bootstrap."
    )
    NEGATIVE = (
        "The search met its tolerance with a negative coefficient of N or D or a negative irreducible loss, which has no "
        "physical meaning. Do not extrapolate; add runs that vary N and D apart."
    )
    EXACT = "There are as many rows as parameters, so the law passes through all of them and its errors are unknown. Add runs."


@dataclass(frozen=True)
class Fit:
    """A fitted law. Arrays are read-only; ``fitted`` and ``loss_predicted`` follow the table's rows.

    ``covariance`` and ``standard_errors`` assume independent rows and the law to be right:
    s^2 (J'WJ)^-1 with s^2 = r'Wr / (n - p), W the ``weights`` of the n fitted rows, shape (n,). So the noise of
    a row has the variance s^2 / weight, and only the ratios of weights matter. They are NaN where
    n = p, and for a parameter at a bound or its exponent.
    """

    law: Law
    count: Convention
    parameters: Mapping[str, float]
    standard_errors: Mapping[str, float]
    covariance: Array
    status: Status
    fitted: np.ndarray
    weights: Array
    loss: Loss
    loss_predicted: Array
    n_starts: int
    share_of_starts_at_best: float
    condition_number: float

    @property
    def values(self) -> Array:
        """The parameters as an array, in the order of ``law.parameters``."""
        return np.array(list(self.parameters.values()))

    def rows(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of the table that were fitted; raises ``InputError`` where their number says it is another table."""
        if len(self.fitted) != len(table):
            raise InputError(f"the fit is of {len(self.fitted)} rows and this table has {len(table)}; give the table fitted")
        return table[self.fitted]

    def variables(self, table: pd.DataFrame) -> dict[str, Array]:
        """The variables of a run table that the law reads; raises ``InputError`` where N is not counted as in the fit."""
        if "n_count" in table and (table["n_count"] != self.count).any():
            raise InputError(f"N of these runs is not counted as in the fit ({self.count}); convert n_params to that")
        return read_by(self.law, table)

    def predict(self, table: pd.DataFrame) -> Array:
        """The loss, in nats per token, predicted for the rows of a run table, shape (n,)."""
        return self.law.predict(self.values, self.variables(table))


class Solutions(NamedTuple):
    """What the search found for each of P problems: values (P, p) in raw units, sums of squares, and how it went."""

    values: Array
    sse: Array
    converged: np.ndarray
    share_of_starts_at_best: Array


def fit(
    table: pd.DataFrame,
    law: Law,
    fit_on: str | None = None,
    *,
    n_starts: int = 12,
    seed: int = 0,
    positive: bool = True,
    weights: Array | pd.Series | None = None,
    loss: Loss = "squared",
) -> Fit:
    """Fit a law to the rows that the 0/1 column ``fit_on`` marks (all without it).

    ``n_starts`` random exponents, drawn with ``seed``, start the search. ``positive`` holds the
    coefficients of the base and the irreducible loss at zero or above. ``weights``, shape (n,) over
    the table, multiply the squared residuals; rows of weight zero are not fitted. ``loss``: ``squared``, or
    ``huber`` on the residuals or ``log-huber`` on those of ln L, both as sums, quadratic up to ``HUBER_SCALE``,
    for ``huber`` times the mean loss. A robust search starts from the least-squares solution and those of
    ``ROBUST_STARTS`` resamples.

    Raises ``InputError`` where the rows cannot determine the law: fewer rows than parameters, or a
    variable of the law that does not vary.
    """
    if n_starts < 1:
        raise InputError(f"n_starts is {n_starts}; give at least 1")
    if loss not in LOSSES:
        raise InputError(f"{loss!r} is not a loss; choose one of {', '.join(LOSSES)}")
    row_weights = weights_of(table, fit_on, weights)
    rows, used = table[row_weights > 0], row_weights[row_weights > 0]
    check_rows(rows, law, fit_on)
    found = solve(rows, law, used[np.newaxis], n_starts=n_starts, seed=seed, positive=positive)
    values, converged = found.values[0], bool(found.converged[0])
    if loss != "squared":
        values, converged = _robust(rows, law, used, values, loss, positive, seed)
    return _result(table, law, row_weights, loss, values, converged, n_starts, float(found.share_of_starts_at_best[0]))


def fit_published(table: pd.DataFrame, law: Law, fit_on: str | None = None) -> Fit:
    """The fit as the authors' public code makes it, with scipy's ``curve_fit`` on raw variables.

    Tied exponents: every parameter starts at 1, no bounds, Levenberg-Marquardt. Gamma freed: their
    start and their bound of 100 on gamma, which makes scipy use its trust-region method. The
    authors fitted nothing else; other laws and exponents raise ``InputError``.
    """
    if law.name not in ("chinchilla", "inference-aware") or law.exponents == "free":
        raise InputError(
            f"the authors published no fit of {law.name} with {law.exponents} exponents; choose chinchilla or "
            "inference-aware with tied or gamma, or fit afresh"
        )
    fitted = runs.fit_mask(table, fit_on)
    check_rows(table[fitted], law, fit_on)
    variables = runs.variables(table[fitted])
    loss = table.loc[fitted, "loss"].to_numpy()

    def predict(_: Array, *values: float) -> Array:
        return law.predict(values, variables)

    start, high = np.ones(len(law.parameters)), np.full(len(law.parameters), np.inf)
    if "gamma" in law.parameters:
        start = np.array([PUBLISHED_GAMMA_START[name] for name in law.parameters])
        high[law.parameters.index("gamma")] = PUBLISHED_GAMMA_BOUND
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", OptimizeWarning)  # no covariance; the status says so
        try:
            values, _ = curve_fit(predict, np.arange(len(loss)), loss, start, maxfev=100_000, bounds=(-np.inf, high))
        except RuntimeError as error:
            raise InputError(f"the published procedure does not converge on these rows ({error}); fit afresh") from None
    return _result(table, law, fitted.astype(float), "squared", values, True, 1, 1.0)


def solve(
    rows: pd.DataFrame,
    law: Law,
    weights: Array,
    *,
    n_starts: int = 12,
    seed: int = 0,
    positive: bool = True,
    near: Array | None = None,
) -> Solutions:
    """The best of ``n_starts`` searches for each of P problems that weight the same rows differently.

    ``weights`` has shape (P, n): ones for a fit, counts for a resample, zeros for rows left out.
    ``near``, nonlinear values in raw units of shape (m,) or (s, m), are more starts for every problem.
    """
    units, back, scaled = in_units(law, rows)
    loss = rows["loss"].to_numpy()
    problem = _Problem(law, scaled, loss, np.sqrt(weights), positive=False)
    starts = _starts(law, n_starts, np.random.default_rng(seed))
    if near is not None:
        near = np.atleast_2d(near)
        with np.errstate(over="ignore", invalid="ignore"):
            there = law.to_raw(np.hstack([np.ones((len(near), len(law.linear))), near]), back)[:, len(law.linear) :]
        starts = np.vstack([starts, problem.searched(there)])
    searched, linear, sse, converged, share_at_best = found = _best_of_starts(problem, starts)
    # where the free optimum has no negative coefficient, it is the optimum without them, too
    if positive and len(negative := np.flatnonzero((linear < 0).any(axis=1))):
        held = _best_of_starts(_Problem(law, scaled, loss, np.sqrt(weights[negative]), positive=True), starts)
        for whole, part in zip(found, held, strict=True):
            whole[negative] = part
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        values = law.to_raw(np.concatenate([linear, problem.nonlinear(searched)], axis=1), units)
    return Solutions(values, sse, converged, share_at_best)


class _Problem:
    """P weightings of the same rows, in units of order one; ``root_weights`` is the root of the weights, (P, n).

    Exponents of the base are positive and are searched as their logarithms; what is searched stays in a
    box far beyond any data and short of overflow.
    """

    def __init__(self, law: Law, variables: Mapping[str, Array], loss: Array, root_weights: Array, positive: bool) -> None:
        self.law, self.variables, self.loss = law, variables, loss
        self.root_weights, self.positive = root_weights, positive
        self.is_exponent = np.array([name in law.base.exponents for name in law.nonlinear], dtype=bool)
        self.low = np.where(self.is_exponent, np.log(EXPONENT_RANGE[0]), -50.0)
        self.high = np.where(self.is_exponent, np.log(EXPONENT_RANGE[1]), 50.0)

    def nonlinear(self, searched: Array) -> Array:
        return np.where(self.is_exponent, np.exp(searched), searched)

    def searched(self, nonlinear: Array) -> Array:
        exponents = np.log(np.where(self.is_exponent, np.maximum(nonlinear, EXPONENT_RANGE[0]), 1.0))
        return np.clip(np.where(self.is_exponent, exponents, nonlinear), self.low, self.high)

    def evaluate(self, searched: Array, which: np.ndarray) -> tuple[Array, Array, Array, Array]:
        """Linear parameters (B, k), sum of squares (B,), residuals (B, n), Kaufman's Jacobian (m, B, n).

        ``searched`` has shape (B, m); ``which`` says which problem each row belongs to.
        """
        nonlinear = self.nonlinear(searched)
        columns, rest, slopes = self.law.basis(nonlinear, self.variables)
        root = self.root_weights[which]
        weighted = [column * root for column in columns]
        target = (self.loss - rest) * root
        linear, orthonormal, residual = _least_squares(weighted, target)
        if self.positive and len(negative := np.flatnonzero((linear < 0).any(axis=1))):
            columns_there = [column[negative] for column in weighted]
            linear[negative], held, residual[negative] = _nonnegative(columns_there, target[negative])
            for whole, part in zip(orthonormal, held, strict=True):
                whole[negative] = part
        jacobian = np.empty((searched.shape[1], *target.shape))
        for index, slope in enumerate(slopes(linear)):
            # d/d(ln e) = e d/de for an exponent
            unit = nonlinear[:, index, None] if self.is_exponent[index] else 1.0
            jacobian[index] = -_project(orthonormal, slope * root * unit)[1]
        sse = np.einsum("bn,bn->b", residual, residual)
        return linear, np.where(np.isfinite(sse), sse, np.inf), residual, jacobian


def _project(orthonormal: list[Array], target: Array) -> tuple[Array, Array]:
    """Q'y, (k, B), and what is left, (I - Q Q') y, (B, n), for a stack of problems; Q is given by its columns."""
    along, left = np.empty((len(orthonormal), len(target))), target
    for k, column in enumerate(orthonormal):
        along[k] = np.einsum("bn,bn->b", column, left)
        left = left - along[k][:, None] * column
    return along, left


def _least_squares(columns: list[Array], target: Array) -> tuple[Array, list[Array], Array]:
    """Linear least squares for a stack of problems: solutions (B, k), an orthonormal basis, residuals (B, n).

    Modified Gram-Schmidt on the columns and then the target, which is backward stable (Bjorck 1967); one
    column at a time over all problems is several times faster than a QR for each. A column that the
    others already span is left out and gets zero instead of infinity.
    """
    n_columns = len(columns)
    orthonormal: list[Array] = []
    triangle = np.zeros((n_columns, n_columns, len(target)))
    for k, column in enumerate(columns):
        triangle[:k, k], rest = _project(orthonormal, column)
        square = np.einsum("bn,bn->b", rest, rest)
        spanned = square <= 1e-28 * (square + (triangle[:k, k] ** 2).sum(axis=0))
        triangle[k, k] = np.where(spanned, np.inf, np.sqrt(square))
        orthonormal.append(rest / triangle[k, k][:, None])
    right, residual = _project(orthonormal, target)
    solution = np.empty((len(target), n_columns))
    for k in reversed(range(n_columns)):
        known = (triangle[k, k + 1 :] * solution.T[k + 1 :]).sum(axis=0)
        solution[:, k] = (right[k] - known) / triangle[k, k]
    return solution, orthonormal, residual


def _nonnegative(columns: list[Array], target: Array) -> tuple[Array, list[Array], Array]:
    """The same with no linear parameter below zero: the best of all sets of columns whose solution has none.

    There are at most five linear parameters, so all sets are tried. Columns left out are zero in the basis.
    """
    linear, orthonormal = np.zeros((len(target), len(columns))), [np.zeros_like(target) for _ in columns]
    left, least = target.copy(), np.einsum("bn,bn->b", target, target)
    for kept in product((0.0, 1.0), repeat=len(columns)):  # a column of zeros gets a coefficient of zero
        tried = [keep * column for keep, column in zip(kept, columns, strict=True)]
        solution, spanning, residual = _least_squares(tried, target)
        sse = np.einsum("bn,bn->b", residual, residual)
        better = (solution >= 0).all(axis=1) & (sse < least)
        for best, new in zip((linear, left, least, *orthonormal), (np.abs(solution), residual, sse, *spanning), strict=True):
            best[better] = new[better]
    return linear, orthonormal, left


def _best_of_starts(problem: _Problem, starts: Array) -> tuple[Array, Array, Array, np.ndarray, Array]:
    """What the best search for each problem ends with, as ``_levenberg_marquardt``, and the share of starts that end there."""
    n_problems, n_starts = len(problem.root_weights), len(starts)
    which = np.repeat(np.arange(n_problems), n_starts)
    searched, linear, sse, converged = _levenberg_marquardt(problem, np.tile(starts, (n_problems, 1)), which)
    by_start = sse.reshape(n_problems, n_starts)
    picked = np.arange(n_problems) * n_starts + by_start.argmin(axis=1)
    # noiseless rows leave nothing but rounding of the sum of squares
    floor = 1e-24 * (problem.root_weights**2 @ problem.loss**2)
    share_at_best = (by_start <= (sse[picked] * (1 + SAME_OPTIMUM) + floor)[:, None]).mean(axis=1)
    return searched[picked], linear[picked], sse[picked], converged[picked], share_at_best


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # where numbers run away, a step is rejected
def _levenberg_marquardt(problem: _Problem, start: Array, which: np.ndarray) -> tuple[Array, Array, Array, np.ndarray]:
    """B searches at once, each from its row of ``start`` for the problem ``which`` names.

    Returns where they end, (B, m), the linear parameters there, (B, k), the sums of squares and whether they converged.
    """
    linear, sse, residual, jacobian = problem.evaluate(start, which)
    searched, converged = start.copy(), np.zeros(len(start), dtype=bool)
    floor = 1e-28 * (problem.root_weights**2 @ problem.loss**2)[which]  # below it the residuals are rounding
    best_converged = np.full(len(problem.root_weights), np.inf)
    damping, growth = np.full(len(start), 3e-2), np.full(len(start), 2.0)
    active = np.flatnonzero(np.isfinite(sse))
    residual, jacobian = residual[active], jacobian[:, active]
    identity = np.eye(start.shape[1])
    for _ in range(MAX_ITERATIONS):
        if not len(active):
            break
        gradient = np.einsum("mbn,bn->bm", jacobian, residual)
        square = np.einsum("mbn,lbn->bml", jacobian, jacobian)
        diagonal = np.einsum("bmm->bm", square) + 1e-30
        scale = np.sqrt(diagonal)
        # in units of the columns' lengths the matrix has ones on its diagonal, and the damping is added to them
        normal = square / scale[:, :, None] / scale[:, None, :] + damping[active, None, None] * identity
        step = -np.linalg.solve(normal, (gradient / scale)[:, :, None])[:, :, 0] / scale
        # the decrease that the linear model promises, -2 g's - s'J'J s
        promised = -np.einsum("bm,bm->b", gradient, step) + damping[active] * np.einsum("bm,bm->b", diagonal, step**2)
        moved = np.clip(searched[active] + np.clip(step, -2.0, 2.0), problem.low, problem.high)
        new_linear, new_sse, new_residual, new_jacobian = problem.evaluate(moved, which[active])
        before = sse[active]
        better = new_sse < before
        accepted = active[better]
        searched[accepted], linear[accepted] = moved[better], new_linear[better]
        sse[accepted] = new_sse[better]
        residual[better], jacobian[:, better] = new_residual[better], new_jacobian[:, better]
        # Nielsen's rule: the better the linear model foretold the decrease, the more it is trusted
        gain = np.where(better, (before - new_sse) / np.maximum(promised, 1e-300), 0.0)
        damping[active] *= np.where(better, np.maximum(1 / 5, 1 - (2 * gain - 1) ** 3), growth[active])
        growth[active] = np.where(better, 2.0, 2 * growth[active])
        done = (promised <= TOLERANCE * before) | (before <= floor[active])
        converged[active[done]] = True
        np.minimum.at(best_converged, which[active[done]], sse[active[done]])
        # one that promises a hundredth of what parts it from an optimum already found will not get there
        hopeless = before - 100 * promised > best_converged[which[active]] * (1 + SAME_OPTIMUM)
        keep = ~(done | hopeless | (damping[active] > 1e12))
        if not keep.all():
            active, residual, jacobian = active[keep], residual[keep], jacobian[:, keep]
    return searched, linear, sse, converged


def _starts(law: Law, n_starts: int, rng: np.random.Generator) -> Array:
    """Starting values of the search in scaled units, shape (n_starts, m).

    Exponents are log-uniform over 0.1 to 2, which holds every published one; the share of the loss
    due to a shape term over 0.001 to 0.3; an optimum lies within a factor of about four of the mean.
    """
    columns = []
    for name in law.nonlinear:
        if name in law.base.exponents:
            columns.append(rng.uniform(np.log(0.1), np.log(2.0), n_starts))
        elif name == "gamma":
            # of either sign: counted without the embedding tables, the same runs want a negative one
            columns.append(rng.choice([-1.0, 1.0], n_starts) * np.exp(rng.uniform(np.log(0.1), np.log(2.0), n_starts)))
        elif name.startswith("epsilon"):
            columns.append(np.exp(rng.uniform(np.log(1e-3), np.log(0.3), n_starts)))
        else:
            columns.append(rng.normal(0.0, 0.7, n_starts))
    return np.stack(columns, axis=1) if columns else np.zeros((n_starts, 0))


def in_units(law: Law, rows: pd.DataFrame) -> tuple[dict[str, float], dict[str, float], dict[str, Array]]:
    """Units, their inverses, and the variables of the rows in them: the unit of each is its geometric mean.

    Parameters are then of order one: a coefficient is the size of its term in the middle of the rows. The unit is one
    for variables that a fixed parameter of the law reads.
    """
    variables = read_by(law, rows)
    means = {name: float(np.exp(np.log(values).mean())) for name, values in variables.items()}
    units = means | dict.fromkeys(law.unscaled, 1.0)
    back = {name: 1 / unit for name, unit in units.items()}
    return units, back, {name: variables[name] * back[name] for name in units}


def read_by(law: Law, rows: pd.DataFrame) -> dict[str, Array]:
    """The variables of the rows that a law reads; raises ``InputError`` where a column for one is missing."""
    variables = runs.variables(rows)
    if missing := [name for name in law.variables if name not in variables]:
        raise InputError(f"{law.name} reads {', '.join(missing)}, which needs the column d_ff; add it to the table")
    return {name: variables[name] for name in law.variables}


def check_rows(rows: pd.DataFrame, law: Law, fit_on: str | None = None) -> None:
    """Raise ``InputError`` where rows cannot determine a law: too few, or a variable that does not vary."""
    n_parameters = len(law.parameters)
    where = f"{rows.attrs.get('source', 'the table')}{f', rows with {fit_on} = 1' if fit_on else ''}"
    if len(rows) < n_parameters:
        raise InputError(
            f"{where}: {len(rows)} rows are too few for {law.name} with {n_parameters} free parameters "
            f"({law.exponents} exponents); give at least {n_parameters + 1}"
        )
    meaning = {
        "N": "size (n_params)",
        "D": "budget (tokens)",
        "R": "aspect ratio (d_model / n_layers)",
        "d": "width (d_model)",
        "L": "depth (n_layers)",
    }
    variables = runs.variables(rows)
    for name in dict.fromkeys(runs.POWER_OF.get(name, name) for name in law.variables):
        if name in meaning and (values := variables[name]).max() < ONE_SIZE * values.min():
            raise InputError(
                f"{where}: all rows are of one {meaning[name]}, {values.min():.4g} to {values.max():.4g}, so "
                f"{law.name} cannot be fitted; add runs that differ in it by a tenth or more"
            )


def weights_of(table: pd.DataFrame, fit_on: str | None, weights: Array | pd.Series | None) -> Array:
    """The weight of each row, zero where ``fit_on`` leaves it out; ``InputError`` where weights are none of this table."""
    values = np.ones(len(table)) if weights is None else np.asarray(pd.to_numeric(weights, errors="coerce"), dtype=float)
    if values.shape != (len(table),) or not (np.isfinite(values) & (values >= 0)).all() or not values.any():
        raise InputError(f"weights must be {len(table)} finite numbers of at least zero, one per row and not all zero")
    return values * runs.fit_mask(table, fit_on)


def _robust(
    rows: pd.DataFrame, law: Law, weights: Array, values: Array, loss: Loss, positive: bool, seed: int
) -> tuple[Array, bool]:
    """Minimize a sum of Huber losses over all parameters, from the least-squares solution and those of resamples.

    Coefficients that end below zero are set to it and held, unless not ``positive``. Returns the values and whether
    the search converged.
    """
    measured, n_rows = rows["loss"].to_numpy(), len(rows)
    scale = _residuals(measured, measured, loss)[2]
    units, back, variables = in_units(law, rows)

    def search(held: Law, start: Array) -> tuple[float, bool, Array]:
        """The least loss, whether the search for it converged, and the values there, of the whole law and in raw units."""

        def residuals(values: Array) -> Array:
            return _residuals(held.predict(values, variables), measured, loss)[0]

        def jacobian(values: Array) -> Array:
            slopes = _residuals(held.predict(values, variables), measured, loss)[1]
            return held.jacobian(values, variables) * slopes[:, np.newaxis]

        found = minimize(residuals, jacobian, start, huber_scale=scale, weights=weights, max_iterations=ROBUST_ITERATIONS)
        negative = found.values[: len(held.linear)] < 0
        if positive and negative.any():
            names = [name for name, below in zip(held.linear, negative, strict=True) if below]
            return search(held.holding(dict.fromkeys(names, 0.0)), np.delete(found.values, np.flatnonzero(negative)))
        known = held.by_name(found.values, held.parameters)
        return found.cost, found.converged, law.to_raw(np.concatenate([known[name] for name in law.parameters]), units)

    # outliers drag the least-squares solutions of resamples to different places
    drawn = np.random.default_rng(seed).multinomial(n_rows, np.full(n_rows, 1 / n_rows), ROBUST_STARTS) * weights
    near = values[len(law.linear) :]
    resampled = solve(rows, law, drawn, n_starts=1, seed=seed, positive=positive, near=near).values
    ends: list[tuple[float, bool, Array]] = []
    with np.errstate(all="ignore"):
        for start in law.to_raw(np.vstack([values, resampled]), back):
            with suppress(InputError):  # it predicts no finite losses there
                end = search(law, start)
                if np.isfinite(end[2]).all() and np.isfinite(law.predict(end[2], runs.variables(rows))).all():
                    ends.append(end)
    if not ends:
        raise InputError(f"every search for a least {loss} loss runs off to infinity; choose another loss or fewer terms")
    _, converged, best = min(ends, key=lambda end: end[0])
    return best, converged


def _residuals(predicted: Array, measured: Array, loss: Loss) -> tuple[Array, Array, float]:
    """What a loss is a function of, its derivative by the predicted loss, (n,) both, and up to where it is quadratic."""
    if loss == "log-huber":
        return np.log(predicted / measured), 1 / predicted, HUBER_SCALE
    return predicted - measured, np.ones(len(measured)), HUBER_SCALE * measured.mean() if loss == "huber" else np.inf


def scaled_jacobian(law: Law, values: Array, reference: pd.DataFrame, rows: pd.DataFrame) -> tuple[Array, Array]:
    """Parameters, (p,), and the Jacobian at ``rows``, (n, p), in the units of ``reference`` (``in_units``)."""
    _, back, _ = in_units(law, reference)
    variables = read_by(law, rows)
    # nonsense rows can drive an exponent so far that raw coefficients overflow
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scaled = law.to_raw(values, back)
        return scaled, law.jacobian(scaled, {name: column * back[name] for name, column in variables.items()})


def linearized(table: pd.DataFrame, fit: Fit) -> tuple[pd.DataFrame, Array, Array, Array]:
    """The fitted rows, then in their own units parameters (p,), Jacobian (n, p) and residuals (n,), as weighted."""
    rows, root = fit.rows(table), np.sqrt(fit.weights)
    values, jacobian = scaled_jacobian(fit.law, fit.values, rows, rows)
    residuals = rows["loss"].to_numpy() - fit.loss_predicted[fit.fitted]
    return rows, values, jacobian * root[:, np.newaxis], residuals * root


def status_of(law: Law, values: Array, rows: pd.DataFrame, converged: bool, weights: Array) -> tuple[Status, float]:
    """How a fit of these values to these rows ended, and its condition number."""
    jacobian = scaled_jacobian(law, values, rows, rows)[1] * np.sqrt(weights)[:, np.newaxis]
    condition = float(condition_numbers(jacobian[np.newaxis])[0])
    base = values[: len(law.linear)]
    exponents = np.array([value for name, value in zip(law.parameters, values, strict=True) if name in law.base.exponents])
    low, high = EXPONENT_RANGE
    if (base == 0).any():
        return Status.AT_BOUND, condition
    inside = ((exponents > low * 1.001) & (exponents < high / 1.001)).all()
    if not (inside and condition < CONDITION_LIMIT and np.isfinite(values).all()):
        return Status.DEGENERATE, condition
    if not converged:
        return Status.NOT_CONVERGED, condition
    if len(rows) == len(values):
        return Status.EXACT, condition
    return (Status.NEGATIVE if (base < 0).any() else Status.CONVERGED), condition


def _result(
    table: pd.DataFrame, law: Law, weights: Array, loss: Loss, values: Array, converged: bool, n_starts: int, share: float
) -> Fit:
    """The result object, from parameters for raw variables and weights of the table's rows, zero of those not fitted.

    The covariance is Huber's (1973), K^2 [sum psi^2 / (n - p)] / m^2 (J'J)^-1, with psi the residual cut off at the
    scale, m the share of residuals inside it and K = 1 + p (1 - m) / (n m); of squares, psi is the residual and K = m = 1.
    """
    fitted = weights > 0
    rows, weights = table[fitted], weights[fitted]
    root = np.sqrt(weights)
    measured = rows["loss"].to_numpy()
    status, condition = status_of(law, values, rows, converged, weights)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        loss_predicted = law.predict(values, runs.variables(table))
        residuals, slopes, scale = _residuals(loss_predicted[fitted], measured, loss)
        inside = float(np.mean(np.abs(residuals) < scale))
        correction = (1 + len(values) * (1 - inside) / (len(rows) * inside)) / inside if inside else np.nan
        jacobian = law.jacobian(values, runs.variables(rows)) * (slopes * root)[:, np.newaxis]
        jacobian[:, : len(law.linear)][:, values[: len(law.linear)] == 0] = 0.0  # held, not estimated
        covariance = covariance_of(jacobian, np.clip(residuals, -scale, scale) * correction * root)
        errors = np.sqrt(np.diag(covariance)).tolist()
    for array in (loss_predicted, covariance, fitted, weights):
        array.setflags(write=False)
    return Fit(
        law=law,
        count=table["n_count"].iloc[0],
        parameters=MappingProxyType(dict(zip(law.parameters, values.tolist(), strict=True))),
        standard_errors=MappingProxyType(dict(zip(law.parameters, errors, strict=True))),
        covariance=covariance,
        status=status,
        fitted=fitted,
        weights=weights,
        loss=loss,
        loss_predicted=loss_predicted,
        n_starts=n_starts,
        share_of_starts_at_best=share,
        condition_number=condition,
    )


def condition_numbers(jacobian: Array) -> Array:
    """Of each of P Jacobians (P, n, p), its columns scaled to length one; infinite where one is zero or not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.linalg.norm(jacobian, axis=1)
    usable = (np.isfinite(lengths) & (lengths > 0)).all(axis=1)
    condition = np.full(len(jacobian), np.inf)
    condition[usable] = np.linalg.cond(jacobian[usable] / lengths[usable][:, np.newaxis, :])
    return condition


def orthonormal(jacobian: Array) -> tuple[Array, Array]:
    """An orthonormal basis (n, q) of the q columns that are finite and not zero, and a root (p, p): (J'J)^-1 = root root'.

    The root of other columns, such as those of a term held at zero, is NaN, and leaves the others alone.
    """
    lengths = np.linalg.norm(jacobian, axis=0)  # raw columns differ by ten orders of magnitude
    used = np.isfinite(lengths) & (lengths > 0)
    basis, singular, rotation = np.linalg.svd(jacobian[:, used] / lengths[used], full_matrices=False)
    root = np.zeros((len(used), len(used)))
    root[~used] = np.nan
    root[used, : len(singular)] = (rotation.T / singular) / lengths[used, np.newaxis]
    return basis, root


def covariance_of(jacobian: Array, residuals: Array) -> Array:
    """s^2 (J'J)^-1 with s^2 = SSE / (n - p), for J of shape (n, p); NaN where n = p, and for columns without influence."""
    n_rows, n_parameters = jacobian.shape
    root = orthonormal(jacobian)[1]
    return residuals @ residuals / (n_rows - n_parameters or np.nan) * root @ root.T
