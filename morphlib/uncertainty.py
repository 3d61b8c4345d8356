r"""How well a fit determines its parameters and predictions.

Four kinds of interval, from cheap to dear: by linearization (``parameter_interval``,
``prediction_interval``), with a covariance that allows rows of one cluster to share their errors
(``cluster_covariance``), by the sum of squares itself (``profile_interval``) and by refitting resampled
rows (``bootstrap``). Rows that share a training run or a shape are not independent: name the column
that says which belong together as ``cluster``.

Of 95 % intervals on the design of the paper's 76 rows (``benchmarks/coverage.py``), those with
``cluster_covariance`` by shape hold each parameter in 94 % of simulated tables or more, whether or
not the rows of a shape share their errors; with shared errors those for independent rows hold the
worst parameter in 80 to 91 %. On 27 rows with seven parameters no kind is safe, and ``basic`` fails.

Weights of the fit are taken as they are meant there: the noise of a row has the variance s^2 / weight. Covariances and
profiles weight the squares with them, a bootstrap draws rows with their weights, and the run of a prediction has weight one.
All but ``parameter_interval`` refuse a fit with a robust loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
import pandas as pd
from scipy.optimize import brentq, least_squares, nnls
from scipy.special import stdtrit

from morphlib import fitting, runs
from morphlib.errors import InputError
from morphlib.fitting import Fit, Status
from morphlib.laws import Array

Kind = Literal["t", "percentile", "basic"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# The cosine between the residuals and the tangent plane, zero at a least-squares optimum: each parameter is
# then within this times sqrt(n - p) standard errors of it. MINPACK's tolerance leaves about 1e-4.
COSINE_LIMIT = 1e-3
ROUNDING = 1e-10  # residuals under this part of the losses: the law passes through every row
SINGULAR = 1e8  # condition number beyond which a refit says nothing: half of the sixteen digits are lost
CHUNK_NUMBERS = 5_000_000  # array elements of the largest array of a chunk of refits; four or so live at once
N_STARTS = 1  # random starts of a refit besides the fit's own optimum, which is the best in all but 1 of 100
MAX_DOUBLINGS = 40  # of a standard error, beyond which an end of a profile interval is infinite
PROFILE_SEARCH = {"ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12, "max_nfev": 60}  # most take ten evaluations
LOG_LIMIT = 690.0  # of the logarithm of a coefficient, short of overflow
SHAPE_RANGE = 50.0  # distance from the estimate over which an exponent or optimum of a shape term is searched


@dataclass(frozen=True, slots=True)
class Covariance:
    """A covariance of the parameters in raw units, shape (p, p), and the degrees of freedom of its t intervals."""

    matrix: Array
    degrees_of_freedom: int
    n_clusters: int


@dataclass(frozen=True)
class Bootstrap:
    """Refits of resampled rows: ``values`` (n, p) in raw units, in the order of ``fit.law.parameters``.

    ``n_left_out`` resamples did not determine the law and are not among the values;
    ``share_converged`` of the others met the tolerance of the search.
    """

    fit: Fit
    values: Array
    cluster: str | None
    n_clusters: int
    n_left_out: int
    share_converged: float

    @property
    def standard_errors(self) -> dict[str, float]:
        """The standard deviation of each parameter over the resamples."""
        return dict(zip(self.fit.law.parameters, _deviations(self.values).tolist(), strict=True))

    def interval(self, level: float = 0.95, kind: Kind = "t", *, log: Collection[str] | None = None) -> pd.DataFrame:
        """Columns ``value``, ``low`` and ``high``, one row per parameter.

        ``t``: estimate -+ t_{K-1} standard deviations of K clusters. ``percentile``: quantiles of the values
        q. ``basic``: 2 estimate - q (Davison and Hinkley 1997, section 5.2). ``t`` and ``basic`` work with
        the logarithm of the parameters in ``log``, by default ``logarithmic(fit)``; where a resample put
        one at zero or below, its ``t`` interval is 0 to infinity.
        """
        _check_level(level)
        if kind not in KINDS:
            raise InputError(f"{kind!r} is not a kind of bootstrap interval; choose one of {', '.join(KINDS)}")
        on_log = _log_mask(self.fit, log)
        with np.errstate(divide="ignore"):
            estimate = np.where(on_log, np.log(np.where(on_log, self.fit.values, 1.0)), self.fit.values)
            values = np.where(on_log, np.log(np.where(on_log, np.maximum(self.values, 0.0), 1.0)), self.values)
        if kind == "t":
            half = _t(level, self.n_clusters - 1) * _deviations(values)
            low, high = estimate - half, estimate + half
        else:
            # 'lower' and 'higher' and no mean of two, which would be NaN beside an infinite logarithm
            low = np.quantile(values, (1 - level) / 2, axis=0, method="lower")
            high = np.quantile(values, (1 + level) / 2, axis=0, method="higher")
            if kind == "basic":
                low, high = 2 * estimate - high, 2 * estimate - low
        return _frame(self.fit, low, high, on_log)


def logarithmic(fit: Fit) -> tuple[str, ...]:
    """The positive parameters whose unit depends on an exponent: coefficients of powers, and epsilon.

    They vary by factors, A = a u^alpha with u of the size of N, so their logarithms are nearer to normal.
    """
    names = (*fit.law.base.coefficients[:-1], *(name for name in fit.law.nonlinear if name.startswith("epsilon")))
    return tuple(name for name in names if fit.parameters[name] > 0)


def parameter_interval(
    fit: Fit, level: float = 0.95, covariance: Covariance | None = None, *, log: Collection[str] | None = None
) -> pd.DataFrame:
    """Wald intervals, estimate -+ t standard errors: columns ``value``, ``low``, ``high``, one row per parameter.

    ``covariance``: of ``cluster_covariance``; by default the fit's own with n - p degrees of freedom. For
    the parameters in ``log`` (default: ``logarithmic(fit)``) the interval is of the logarithm, whose
    standard error is, to first order, that of the parameter over its value. Raises ``InputError`` for a
    fit whose standard errors are not known.
    """
    _check_level(level)
    covariance = covariance or _own_covariance(fit)
    on_log = _log_mask(fit, log)
    half = _t(level, covariance.degrees_of_freedom) * np.sqrt(np.diag(covariance.matrix))
    centre = np.where(on_log, np.log(np.where(on_log, fit.values, 1.0)), fit.values)
    half = np.where(on_log, half / fit.values, half)
    return _frame(fit, centre - half, centre + half, on_log)


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
    linear = _Linearized.of(table, fit)
    codes, labels = _clusters(linear.rows, cluster)
    n_parameters = linear.basis.shape[1]
    scores = np.empty((len(labels), n_parameters))
    for g, label in enumerate(labels):
        basis, residuals = linear.basis[codes == g], linear.residuals[codes == g]
        # Q'(I - Q Q')^-1 = (I - Q'Q)^-1 Q', so the matrix is as small as the law
        rest = np.eye(n_parameters) - basis.T @ basis
        if np.linalg.cond(rest) > SINGULAR:
            raise InputError(
                f"without the rows of {'row' if cluster is None else cluster} {label} the law is not determined, so their "
                "influence cannot be told; leave them out of the fit, or take smaller clusters"
            )
        scores[g] = np.linalg.solve(rest, basis.T @ residuals)
    half = linear.root @ scores.T
    freedom = len(linear.rows) - n_parameters if cluster is None else len(labels) - 1
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
    _check_known(fit, at_bound=True)
    _check_squared(fit)
    # at a bound the optimum is no stationary point; elsewhere it must be that of the squared residuals
    rows = fit.rows(table) if fit.status is Status.AT_BOUND else _Linearized.of(table, fit).rows
    codes, labels = _clusters(rows, cluster)
    law, n_clusters = fit.law, len(labels)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), n_resamples)[:, codes] * fit.weights
    weights = weights[(weights > 0).sum(axis=1) >= len(law.parameters)]
    found, converged = [], []
    searches = CHUNK_NUMBERS // (len(rows) * len(law.linear) * (len(law.nonlinear) + 1)) // (N_STARTS + 1)
    for start in range(0, len(weights), max(1, searches)):
        chunk = weights[start : start + max(1, searches)]
        solutions = fitting.solve(
            rows,
            law,
            chunk,
            n_starts=N_STARTS,
            seed=seed,
            positive=fit.status is not Status.NEGATIVE,
            near=fit.values[len(law.linear) :],
        )
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            jacobians = law.jacobian(solutions.values, runs.variables(rows)) * np.sqrt(chunk)[:, :, np.newaxis]
        determined = fitting.condition_numbers(jacobians) < SINGULAR
        found.append(solutions.values[determined])
        converged.append(solutions.converged[determined])
    values = np.concatenate(found) if found else np.empty((0, len(law.parameters)))
    if len(values) < max(2, n_resamples / 2):
        raise InputError(
            f"only {len(values)} of {n_resamples} resamples determine {law.name} ({law.exponents} exponents); "
            "tie exponents, add runs, or take smaller clusters"
        )
    values.setflags(write=False)
    share = float(np.concatenate(converged).mean())
    return Bootstrap(fit, values, cluster, n_clusters, n_resamples - len(values), share)


def profile_interval(table: pd.DataFrame, fit: Fit, parameter: str, level: float = 0.95) -> tuple[float, float]:
    """The values of one parameter at which the sum of squares, least over all others, rises by a factor 1 + t^2 / (n - p).

    Bates and Watts 1988, section 6.1. An end is infinite where the sum of squares never rises so far,
    and zero for a parameter that the fit holds above zero. Raises ``InputError`` for a name that is no
    free parameter of the law, and where the search meets a better optimum than the fit's.
    """
    _check_level(level)
    linear = _Linearized.of(table, fit)
    law = fit.law
    if parameter not in law.parameters:
        raise InputError(f"{parameter!r} is not a free parameter of {law.name}; choose one of {', '.join(law.parameters)}")
    index = law.parameters.index(parameter)
    n_rows, n_parameters = linear.basis.shape
    least = linear.residuals @ linear.residuals
    t = _t(level, n_rows - n_parameters)
    step = t * np.sqrt(least / (n_rows - n_parameters)) * np.linalg.norm(linear.root[index])
    if np.sqrt(least) <= ROUNDING * np.linalg.norm(linear.rows["loss"] * np.sqrt(fit.weights)):
        raise InputError("the law passes through every row, so no sum of squares can rise by a factor; add runs with noise")
    # where a search ends depends on the ones before; of one value there must be one answer
    profile = cache(_profile(linear.rows, fit, index))
    estimate, held = fit.parameters[parameter], fit.status is not Status.NEGATIVE
    to_value: Callable[[float], float] = float
    low, high = -np.inf, np.inf
    if parameter in law.linear[:-1] and held:  # a coefficient may end orders of magnitude away
        to_value, low, high = math.exp, -LOG_LIMIT, LOG_LIMIT
        estimate, step = np.log(estimate), min(step / estimate, 1.0)
    elif parameter in law.linear and held:
        low = 0.0
    elif parameter in law.base.exponents:
        low, high = fitting.EXPONENT_RANGE
    elif parameter not in law.linear and not parameter.startswith("epsilon"):
        low, high = estimate - SHAPE_RANGE, estimate + SHAPE_RANGE

    def excess(searched: float) -> float:
        sse = profile(to_value(searched))
        if sse < least * (1 - 10 * COSINE_LIMIT**2):
            raise InputError(f"a better optimum lies at {parameter} = {to_value(searched):.6g}; fit with more starts")
        return sse / least - 1 - t**2 / (n_rows - n_parameters)

    ends = [_crossing(excess, estimate, signed, limit) for signed, limit in ((-step, low), (step, high))]
    none_below = 0.0 if (parameter in law.linear and held) or parameter in law.base.exponents else -np.inf
    return none_below if ends[0] == low else to_value(ends[0]), np.inf if ends[1] == high else to_value(ends[1])


def prediction_interval(
    table_new: pd.DataFrame,
    fit: Fit,
    table: pd.DataFrame,
    level: float = 0.95,
    *,
    covariance: Covariance | None = None,
    new_observation: bool = True,
) -> pd.DataFrame:
    """Predicted losses (nats per token) of new runs: columns ``loss``, ``low``, ``high``, with the index of ``table_new``.

    The delta method: prediction -+ t sqrt(J0 V J0' + s^2), with s^2 = SSE / (n - p) of the rows of ``table``
    that were fitted. ``new_observation=False`` leaves out s^2 and speaks of the law, not of a run.
    ``covariance`` as in ``parameter_interval``. None of it covers the error of the law itself, which
    grows outside the range of the rows. Raises ``InputError`` where N is not counted as in the fit.
    """
    _check_level(level)
    linear = _Linearized.of(table, fit)
    counts = set(table_new.get("n_count", pd.Series([fit.count])))
    if counts != {fit.count}:
        raise InputError(f"the new runs count N as {', '.join(sorted(counts))}, the fit as {fit.count}; convert them to that")
    covariance = covariance or _own_covariance(fit)
    variables = runs.variables(table_new)
    if missing := [name for name in fit.law.variables if name not in variables]:
        raise InputError(f"{fit.law.name} reads {', '.join(missing)}, which needs the column d_ff; add it to the new runs")
    jacobian = fit.law.jacobian(fit.values, variables)
    variance = np.einsum("np,pq,nq->n", jacobian, covariance.matrix, jacobian)
    if new_observation:
        n_rows, n_parameters = linear.basis.shape
        variance += linear.residuals @ linear.residuals / (n_rows - n_parameters)
    loss = fit.predict(table_new)
    # rounding can take a variance of zero just below it
    half = _t(level, covariance.degrees_of_freedom) * np.sqrt(np.maximum(variance, 0.0))
    return pd.DataFrame({"loss": loss, "low": loss - half, "high": loss + half}, index=table_new.index)


@dataclass(frozen=True, slots=True)
class _Linearized:
    """The fit near its optimum, J and residuals times the root of the weights; ``fitting.orthonormal`` makes basis and root."""

    rows: pd.DataFrame
    basis: Array
    root: Array
    residuals: Array

    @classmethod
    def of(cls, table: pd.DataFrame, fit: Fit) -> _Linearized:
        """Raises ``InputError`` where the fit is no optimum of the sum of squares of these rows."""
        _check_known(fit)
        _check_squared(fit)
        rows, root = fit.rows(table), np.sqrt(fit.weights)
        basis, inverse_root = fitting.orthonormal(fit.law.jacobian(fit.values, runs.variables(rows)) * root[:, np.newaxis])
        loss = rows["loss"].to_numpy()
        residuals = (loss - fit.loss_predicted[fit.fitted]) * root
        size = np.linalg.norm(residuals)
        if size > ROUNDING * np.linalg.norm(loss * root) and np.linalg.norm(basis.T @ residuals) > COSINE_LIMIT * size:
            raise InputError(
                "the fit is no least-squares fit of these rows; give a converged fit and the table it was made from"
            )
        return cls(rows, basis, inverse_root, residuals)


def _profile(rows: pd.DataFrame, fit: Fit, index: int) -> Callable[[float], float]:
    """The least sum of squares as a function of one parameter.

    The others that the law is linear in are solved for at every step (variable projection). The rest is
    searched in variables divided by their geometric means, from where the nearest earlier search ended.
    """
    law, n_linear = fit.law, len(fit.law.linear)
    units, back, variables = fitting.in_units(law, rows)
    root = np.sqrt(fit.weights)
    loss = rows["loss"].to_numpy() * root
    estimate = law.to_raw(fit.values, back)
    searched = np.array([i for i in range(n_linear, len(estimate)) if i != index], dtype=int)
    held = fit.status is not Status.NEGATIVE
    is_exponent = np.array([law.parameters[i] in law.base.exponents for i in searched], dtype=bool)
    low, high = fitting.EXPONENT_RANGE
    bounds = (
        np.where(is_exponent, low, estimate[searched] - SHAPE_RANGE),
        np.where(is_exponent, high, estimate[searched] + SHAPE_RANGE),
    )
    ends = [(fit.values[index], estimate[searched])]

    # a raw coefficient a u^e that is given moves the exponent, while a, which the rows determine, stays
    slopes = np.zeros(len(searched))
    if law.parameters[index] in logarithmic(fit):
        moved = estimate + np.eye(len(estimate))[searched]
        slopes = np.log(law.to_raw(moved, units)[:, index] / fit.values[index])

    def residuals(search: Array, value: float) -> Array:
        scaled = estimate.copy()
        # an exponent reads the same in both units, and no other parameter's unit depends on the one that is fixed otherwise
        scaled[searched], scaled[index] = search, value
        with np.errstate(over="ignore", invalid="ignore"):
            raw = law.to_raw(scaled, units)
            raw[index] = value
            scaled = law.to_raw(raw, back)
            columns = law.jacobian(scaled, variables)[:, :n_linear] * root[:, np.newaxis]
        if not np.isfinite(columns).all():
            return np.full(len(loss), np.inf)  # from which the search steps back
        target = loss
        if index < n_linear:
            target = loss - scaled[index] * columns[:, index]
            columns = np.delete(columns, index, axis=1)
        columns /= np.abs(columns).max(axis=0)
        solution = nnls(columns, target)[0] if held else np.linalg.lstsq(columns, target)[0]
        return target - columns @ solution

    def profile(value: float) -> float:
        if not len(searched):
            return float((residuals(np.empty(0), value) ** 2).sum())
        # the fit's own optimum and the nearest earlier one: where a term vanishes the sum of squares has two valleys
        near = min(ends, key=lambda end: abs(end[0] - value))
        found = []
        for earlier, there in {end[0]: end for end in (ends[0], near)}.values():
            moves = slopes.any() and value > 0 and earlier > 0
            start = np.clip(there + (np.log(value / earlier) * slopes / (slopes @ slopes) if moves else 0.0), *bounds)
            found.append(least_squares(residuals, start, args=(value,), bounds=bounds, x_scale="jac", **PROFILE_SEARCH))
        best = min(found, key=lambda end: end.cost)
        ends.append((value, best.x))
        return float(2 * best.cost)

    return profile


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


def _check_known(fit: Fit, *, at_bound: bool = False) -> None:
    """Refuse a fit whose errors nothing is known of, and one with a parameter at its bound unless ``at_bound``."""
    if fit.status is Status.EXACT:
        raise InputError(
            f"the fit of {fit.law.name} has as many rows as parameters, so nothing is known about its errors; add runs"
        )
    if not at_bound and fit.status is Status.AT_BOUND:
        zero = ", ".join(name for name in fit.law.linear if fit.parameters[name] == 0)
        raise InputError(
            f"the fit of {fit.law.name} holds {zero} at its bound of zero, where linearization says nothing; "
            "use bootstrap, add runs, or choose a law without the term"
        )
    if not (np.isfinite(fit.values).all() and (at_bound or np.isfinite(fit.covariance).all())):
        raise InputError(f"the fit of {fit.law.name} has parameters or standard errors that are not finite; tie exponents")


def _check_squared(fit: Fit) -> None:
    if fit.loss != "squared":
        raise InputError(f"intervals other than by standard errors are of squared residuals; this fit is of loss {fit.loss}")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level is {level}; give a number between 0 and 1, such as 0.95")


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


def _deviations(values: Array) -> Array:
    """The standard deviation of each column of (n, p); infinite where a value is, or where its square overflows."""
    finite = np.isfinite(values).all(axis=0)
    with np.errstate(over="ignore"):
        return np.where(finite, np.where(finite, values, 0.0).std(axis=0, ddof=1), np.inf)


def _log_mask(fit: Fit, log: Collection[str] | None) -> np.ndarray:
    names = logarithmic(fit) if log is None else log
    if wrong := [name for name in names if not fit.parameters.get(name, 0.0) > 0]:
        raise InputError(f"{', '.join(wrong)} has no logarithm; log may name the parameters of {fit.law.name} above zero")
    return np.array([name in names for name in fit.law.parameters])


def _frame(fit: Fit, low: Array, high: Array, on_log: np.ndarray) -> pd.DataFrame:
    """The intervals as a table, those of logarithms turned back."""
    with np.errstate(over="ignore"):
        low = np.where(on_log, np.exp(np.where(on_log, low, 0.0)), low)
        high = np.where(on_log, np.exp(np.where(on_log, high, 0.0)), high)
    return pd.DataFrame({"value": fit.values, "low": low, "high": high}, index=list(fit.law.parameters))


def _t(level: float, degrees_of_freedom: int) -> float:
    """The t of a two-sided interval."""
    return float(stdtrit(degrees_of_freedom, (1 + level) / 2))
