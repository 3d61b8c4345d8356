r"""How well a fit determines its parameters and predictions.

Four kinds of interval, from cheap to dear: by linearization (``parameter_interval``,
``prediction_interval``), with a covariance that allows rows of one cluster to share their errors
(``cluster_covariance``), by the sum of squares itself (``profile_interval``) and by refitting resampled
rows (``bootstrap``). Rows that share a training run or a shape are not independent: name the column
that says which belong together as ``cluster``.

Intervals of coefficients of powers and of epsilon are those of their logarithms (``logarithmic``).

Of 95 % intervals on the design of the paper's 76 rows (``benchmarks/coverage.py``), those with
``cluster_covariance`` by shape hold each parameter in 94 % of simulated tables or more, whether or
not the rows of a shape share their errors; with shared errors those for independent rows hold the
worst parameter in 80 to 91 %. On 27 rows with seven parameters no kind is safe.

Weights of the fit are taken as they are meant there: the noise of a row has the variance s^2 / weight. Covariances and
profiles weight the squares with them, a bootstrap draws rows with their weights, and the run of a prediction has weight one.
All but ``parameter_interval`` refuse a fit with a robust loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import stdtrit

from morphlib import fitting, runs
from morphlib.errors import InputError
from morphlib.fitting import Fit, Status
from morphlib.laws import Array

# The cosine between the residuals and the tangent plane, zero at a least-squares optimum: each parameter is
# then within this times sqrt(n - p) standard errors of it. MINPACK's tolerance leaves about 1e-4.
COSINE_LIMIT = 1e-3
ROUNDING = 1e-10  # residuals under this part of the losses: the law passes through every row
SINGULAR = 1e8  # condition number beyond which a refit says nothing: half of the sixteen digits are lost
CHUNK_NUMBERS = 5_000_000  # array elements of the largest array of a chunk of refits; four or so live at once
N_STARTS = 1  # random starts of a refit besides the fit's own optimum, which is the best in all but 1 of 100
PROFILE_STARTS = 4  # the same where a parameter is held: where a term vanishes the sum of squares has two valleys
MAX_DOUBLINGS = 40  # of a standard error, beyond which an end of a profile interval is infinite
LOG_LIMIT = 690.0  # of the logarithm of a coefficient, short of overflow
SHAPE_RANGE = 50.0  # distance from the estimate over which an exponent or optimum of a shape term is searched


class Covariance(NamedTuple):
    """A covariance of the parameters in raw units, shape (p, p), and the degrees of freedom of its t intervals."""

    matrix: Array
    degrees_of_freedom: int
    n_clusters: int


@dataclass(frozen=True)
class Bootstrap:
    """Refits of resampled rows: ``values`` (n, p) in raw units, in the order of ``fit.law.parameters``.

    ``n_left_out`` resamples did not determine the law and are not among the values.
    """

    fit: Fit
    values: Array
    n_clusters: int
    n_left_out: int

    def interval(self, level: float = 0.95) -> pd.DataFrame:
        """Estimate -+ t_{K-1} standard deviations of K clusters: columns ``value``, ``low``, ``high``, a row per parameter.

        Of a logarithm where a resample put the parameter at zero or below, it is 0 to infinity.
        """
        on_log = _on_log(self.fit)
        with np.errstate(divide="ignore", over="ignore"):
            values = np.where(on_log, np.log(np.where(on_log, np.maximum(self.values, 0.0), 1.0)), self.values)
            finite = np.isfinite(values).all(axis=0)
            deviations = np.where(finite, np.where(finite, values, 0.0).std(axis=0, ddof=1), np.inf)
        return _interval(self.fit, _t(level, self.n_clusters - 1) * deviations)


def logarithmic(fit: Fit) -> tuple[str, ...]:
    """The positive parameters whose unit depends on an exponent: coefficients of powers, and epsilon.

    They vary by factors, A = a u^alpha with u of the size of N, so their logarithms are nearer to normal.
    """
    names = (*fit.law.base.coefficients[:-1], *(name for name in fit.law.nonlinear if name.startswith("epsilon")))
    return tuple(name for name in names if fit.parameters[name] > 0)


def parameter_interval(fit: Fit, level: float = 0.95, covariance: Covariance | None = None) -> pd.DataFrame:
    """Wald intervals, estimate -+ t standard errors: columns ``value``, ``low``, ``high``, one row per parameter.

    ``covariance``: of ``cluster_covariance``; by default the fit's own with n - p degrees of freedom. The standard
    error of a logarithm is, to first order, that of the parameter over its value. Raises ``InputError`` for a
    fit whose standard errors are not known.
    """
    covariance = covariance or _own_covariance(fit)
    errors = np.sqrt(np.diag(covariance.matrix)) / np.where(_on_log(fit), fit.values, 1.0)
    return _interval(fit, _t(level, covariance.degrees_of_freedom) * errors)


def cluster_covariance(table: pd.DataFrame, fit: Fit, cluster: str | None = None) -> Covariance:
    r"""CR3: a covariance that stays right where rows of one cluster share their errors.

    .. math::
        (J'J)^{-1} \Big[ \sum_g J_g' (I - H_{gg})^{-1} r_g r_g' (I - H_{gg})^{-1} J_g \Big] (J'J)^{-1},
        \quad H_{gg} = J_g (J'J)^{-1} J_g'

    (Bell and McCaffrey 2002; Cameron and Miller 2015, section 6.B): to first order the jackknife that
    leaves out one cluster at a time, without its factor (K - 1) / K. K - 1 degrees of freedom.
    ``cluster`` is a column of the table, such as ``name`` (the shape), ``run`` or ``family``; without it
    every row is its own cluster, which is HC3, with n - p degrees of freedom. Raises ``InputError``
    where a cluster alone determines a direction of the parameters: without it nothing is known of it.
    """
    rows, basis, root, residuals = _linearized(table, fit)
    codes, labels = _clusters(rows, cluster)
    n_parameters = basis.shape[1]
    scores = np.empty((len(labels), n_parameters))
    for g, label in enumerate(labels):
        own = basis[codes == g]
        # Q'(I - Q Q')^-1 = (I - Q'Q)^-1 Q', so the matrix is as small as the law
        rest = np.eye(n_parameters) - own.T @ own
        if np.linalg.cond(rest) > SINGULAR:
            raise InputError(f"without {cluster or 'row'} {label} the law is not determined; drop it, or take smaller clusters")
        scores[g] = np.linalg.solve(rest, own.T @ residuals[codes == g])
    half = root @ scores.T
    freedom = len(rows) - n_parameters if cluster is None else len(labels) - 1
    return Covariance(half @ half.T, freedom, len(labels))


def bootstrap(
    table: pd.DataFrame, fit: Fit, n_resamples: int = 1000, *, cluster: str | None = None, seed: int = 0
) -> Bootstrap:
    """Refit resamples of the fitted rows, drawn with replacement: whole clusters, or single rows without ``cluster``.

    ``cluster`` is a column, as in ``cluster_covariance``. The search for each resample starts at the fit
    and at a few random places, and holds coefficients at zero or above unless the fit has negative
    ones. Resamples with fewer distinct rows than parameters, or whose rows cannot tell the parameters
    apart (a term that vanished leaves its exponent undetermined), are left out and counted.
    Raises ``InputError`` where fewer than half of the resamples, or fewer than two, are left.
    """
    if n_resamples < 2:
        raise InputError(f"n_resamples is {n_resamples}; give at least 2, and 1000 for an interval")
    _check_known(fit, squared=True, at_bound=True)
    # at a bound the optimum is no stationary point; elsewhere it must be that of the squared residuals
    rows = fit.rows(table) if fit.status is Status.AT_BOUND else _linearized(table, fit)[0]
    codes, labels = _clusters(rows, cluster)
    law, n_clusters = fit.law, len(labels)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), n_resamples)[:, codes] * fit.weights
    weights = weights[(weights > 0).sum(axis=1) >= len(law.parameters)]
    found = [np.empty((0, len(law.parameters)))]
    searches = max(1, CHUNK_NUMBERS // (len(rows) * len(law.linear) * (len(law.nonlinear) + 1)) // (N_STARTS + 1))
    for start in range(0, len(weights), searches):
        chunk = weights[start : start + searches]
        near, positive = fit.values[len(law.linear) :], fit.status is not Status.NEGATIVE
        refits = fitting.solve(rows, law, chunk, n_starts=N_STARTS, seed=seed, positive=positive, near=near).values
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            jacobians = law.jacobian(refits, runs.variables(rows)) * np.sqrt(chunk)[:, :, np.newaxis]
        found.append(refits[fitting.condition_numbers(jacobians) < SINGULAR])
    values = np.concatenate(found)
    if len(values) < max(2, n_resamples / 2):
        raise InputError(f"only {len(values)} of {n_resamples} resamples determine {law.name}; tie exponents or add runs")
    values.setflags(write=False)
    return Bootstrap(fit, values, n_clusters, n_resamples - len(values))


def profile_interval(table: pd.DataFrame, fit: Fit, parameter: str, level: float = 0.95) -> tuple[float, float]:
    """The values of one parameter at which the sum of squares, least over all others, rises by a factor 1 + t^2 / (n - p).

    Bates and Watts 1988, section 6.1. An end is infinite where the sum of squares never rises so far,
    and zero for a parameter that the fit holds above zero. Raises ``InputError`` for a name that is no
    free parameter of the law, and where the search meets a better optimum than the fit's.
    """
    rows, basis, root, residuals = _linearized(table, fit)
    law, positive = fit.law, fit.status is not Status.NEGATIVE
    if parameter not in law.parameters:
        raise InputError(f"{parameter!r} is not a free parameter of {law.name}; choose one of {', '.join(law.parameters)}")
    index = law.parameters.index(parameter)
    n_rows, n_parameters = basis.shape
    least = residuals @ residuals
    t = _t(level, n_rows - n_parameters)
    step = t * np.sqrt(least / (n_rows - n_parameters)) * np.linalg.norm(root[index])
    if np.sqrt(least) <= ROUNDING * np.linalg.norm(rows["loss"] * np.sqrt(fit.weights)):
        raise InputError("the law passes through every row, so no sum of squares can rise by a factor; add runs with noise")
    estimate = fit.parameters[parameter]
    to_value: Callable[[float], float] = float
    low, high = -np.inf, np.inf
    never_negative = parameter in law.base.exponents or (parameter in law.linear and positive)
    if never_negative:  # a coefficient may end orders of magnitude away
        to_value = math.exp
        low, high = np.log(fitting.EXPONENT_RANGE) if parameter in law.base.exponents else (-LOG_LIMIT, LOG_LIMIT)
        estimate, step = np.log(estimate), min(step / estimate, 1.0)
    elif parameter not in law.linear and not parameter.startswith("epsilon"):
        low, high = estimate - SHAPE_RANGE, estimate + SHAPE_RANGE

    # to first order the others move as their covariance with it says
    moves = fit.covariance[index] / fit.covariance[index, index] * (fit.parameters[parameter] if never_negative else 1.0)

    def excess(searched: float) -> float:
        held = law.holding({parameter: to_value(searched)})
        near = np.delete([fit.values, fit.values + (searched - estimate) * moves], index, axis=1)[:, len(held.linear) :]
        found = fitting.solve(rows, held, fit.weights[np.newaxis], n_starts=PROFILE_STARTS, positive=positive, near=near)
        sse = float(found.sse[0])
        if sse < least * (1 - 10 * COSINE_LIMIT**2):
            raise InputError(f"a better optimum lies at {parameter} = {to_value(searched):.6g}; fit with more starts")
        return sse / least - 1 - t**2 / (n_rows - n_parameters)

    ends = [_crossing(excess, estimate, signed, limit) for signed, limit in ((-step, low), (step, high))]
    none_below = 0.0 if never_negative else -np.inf
    return none_below if ends[0] == low else to_value(ends[0]), np.inf if ends[1] == high else to_value(ends[1])


def prediction_interval(
    table_new: pd.DataFrame, fit: Fit, table: pd.DataFrame, level: float = 0.95, *, covariance: Covariance | None = None
) -> pd.DataFrame:
    """Predicted losses (nats per token) of new runs: columns ``loss``, ``low``, ``high``, with the index of ``table_new``.

    The delta method: prediction -+ t sqrt(J0 V J0' + s^2), with s^2 = SSE / (n - p) of the rows of ``table``
    that were fitted. ``covariance`` as in ``parameter_interval``. None of it covers the error of the law itself,
    which grows outside the range of the rows. Raises ``InputError`` where N is not counted as in the fit.
    """
    _, basis, _, residuals = _linearized(table, fit)
    covariance = covariance or _own_covariance(fit)
    jacobian = fit.law.jacobian(fit.values, fit.variables(table_new))
    noise = residuals @ residuals / (len(basis) - len(fit.values))
    variance = noise + np.einsum("np,pq,nq->n", jacobian, covariance.matrix, jacobian)
    loss = fit.predict(table_new)
    # rounding can take a variance of zero just below it
    half = _t(level, covariance.degrees_of_freedom) * np.sqrt(np.maximum(variance, 0.0))
    return pd.DataFrame({"loss": loss, "low": loss - half, "high": loss + half}, index=table_new.index)


def _linearized(table: pd.DataFrame, fit: Fit) -> tuple[pd.DataFrame, Array, Array, Array]:
    """The fitted rows, then, of the Jacobian and as weighted, basis and root by ``fitting.orthonormal``, and residuals (n,).

    Raises ``InputError`` where the fit is no optimum of the sum of squares of these rows.
    """
    _check_known(fit, squared=True)
    rows, weight = fit.rows(table), np.sqrt(fit.weights)
    basis, root = fitting.orthonormal(fit.law.jacobian(fit.values, runs.variables(rows)) * weight[:, np.newaxis])
    loss = rows["loss"].to_numpy()
    residuals = (loss - fit.loss_predicted[fit.fitted]) * weight
    size = np.linalg.norm(residuals)
    if size > ROUNDING * np.linalg.norm(loss * weight) and np.linalg.norm(basis.T @ residuals) > COSINE_LIMIT * size:
        raise InputError("the fit is no least-squares fit of these rows; give a converged fit and the table it was made from")
    return rows, basis, root, residuals


def _crossing(excess: Callable[[float], float], inside: float, step: float, limit: float) -> float:
    """Where ``excess``, negative at ``inside``, becomes positive towards ``limit``; the limit where it does not."""
    width = step
    for _ in range(MAX_DOUBLINGS):
        outside = min(inside + width, limit) if step > 0 else max(inside + width, limit)
        if excess(outside) > 0:
            return float(brentq(excess, inside, outside, xtol=1e-8 * abs(step)))
        if outside == limit:
            break
        inside, width = outside, 2 * width
    return limit


def _own_covariance(fit: Fit) -> Covariance:
    _check_known(fit)
    n_rows = int(fit.fitted.sum())
    return Covariance(fit.covariance, n_rows - len(fit.law.parameters), n_rows)


def _check_known(fit: Fit, *, squared: bool = False, at_bound: bool = False) -> None:
    """Refuse a fit whose errors nothing is known of; a robust one if ``squared``, one at a bound unless ``at_bound``."""
    if squared and fit.loss != "squared":
        raise InputError(f"intervals other than by standard errors are of squared residuals; this fit is of loss {fit.loss}")
    if fit.status is Status.EXACT or (fit.status is Status.AT_BOUND and not at_bound):
        raise InputError(f"{fit.law.name} has no standard errors. {fit.status.value}")
    if not (np.isfinite(fit.values).all() and (at_bound or np.isfinite(fit.covariance).all())):
        raise InputError(f"the fit of {fit.law.name} has parameters or standard errors that are not finite; tie exponents")


def _clusters(rows: pd.DataFrame, cluster: str | None) -> tuple[np.ndarray, list[object]]:
    """A code for each row, in order of appearance, and the label of each code; every row its own without ``cluster``."""
    if cluster is None:
        return np.arange(len(rows)), list(rows.index)
    if cluster not in rows:
        known = ", ".join(name for name in ("name", "run", "family") if name in rows)
        raise InputError(f"the table has no column {cluster!r} to cluster by; choose one that it has, such as {known}")
    codes, labels = pd.factorize(rows[cluster])
    if (codes < 0).any():
        raise InputError(f"column {cluster!r} has no label in {(codes < 0).sum()} fitted rows; fill them in to cluster by it")
    if len(labels) < 2:
        raise InputError(f"all fitted rows have one label in column {cluster!r}; clusters must be at least 2")
    return codes, list(labels)


def _on_log(fit: Fit) -> np.ndarray:
    return np.isin(fit.law.parameters, logarithmic(fit))


def _interval(fit: Fit, half: Array) -> pd.DataFrame:
    """The estimates -+ ``half``, which is of the logarithm where one is taken."""
    on_log = _on_log(fit)
    with np.errstate(over="ignore"):
        factor = np.exp(np.where(on_log, half, 0.0))
    low, high = (np.where(on_log, fit.values * factor**sign, fit.values + sign * half) for sign in (-1, 1))
    low = np.where(fit.values == 0, 0.0, low)  # held there, since it must not be negative
    return pd.DataFrame({"value": fit.values, "low": low, "high": high}, index=list(fit.law.parameters))


def _t(level: float, degrees_of_freedom: int) -> float:
    """The t of a two-sided interval."""
    if not 0 < level < 1:
        raise InputError(f"level is {level}; give a number between 0 and 1, such as 0.95")
    return float(stdtrit(degrees_of_freedom, (1 + level) / 2))
