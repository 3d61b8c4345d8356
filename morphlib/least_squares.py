r"""Nonlinear least squares: Levenberg-Marquardt with geodesic acceleration, for one problem of any model.

Near the values :math:`\theta` the residuals are :math:`r + J\delta`. Their sum of squares is least
where :math:`J^\top J\,\delta = -J^\top r`, far from :math:`\theta` if columns of :math:`J` are nearly
parallel, and there the line is not the model. A damped step also pays for its length,

.. math::
    \min_\delta \; |r + J\delta|^2 + \lambda |D\delta|^2
    \quad\Longleftrightarrow\quad
    (J^\top J + \lambda D^2)\,\delta = -J^\top r .

The product :math:`J^\top J` squares the condition number and loses half the digits, so the left form is
solved, by orthogonal factorization: :math:`J = U S V^\top` once per point, its columns scaled to length
one, and then the small stack :math:`[S V^\top; \sqrt\lambda D]`. Directions that :math:`J` does not
see to rounding are left out of :math:`U`.

* :math:`D` holds the largest length each column of :math:`J` has had (Moré 1978), so the units of a
  parameter do not matter, and one that loses its influence on the way is not thrown to infinity.
* :math:`\lambda` follows the gain, the reduction got over the reduction promised (Nielsen 1999).
* The second derivative of the residuals along the step bends it, and rejects it where it bends too
  much (Transtrum and Sethna 2012). Narrow curved valleys take a quarter of the steps.
* A point whose residuals or derivatives are not finite, or too large to square, is a rejected step.
* The search ends by the relative offset of Bates and Watts 1981, :math:`|U^\top r| / |r|`: the cosine of
  the angle between the residuals and all they can be changed by, and the root of the relative
  reduction that an undamped step promises. Once that promise is below the rounding of the cost, a
  step counts as better when it lowers :math:`|U^\top r|`, and the first that does not ends the search.

Huber's loss is minimized by reweighting at every step (Holland and Welsch 1977): with weights
:math:`\rho'(r) / 2r` the squares have the gradient of :math:`\rho`, and lie above it elsewhere.

Sources: J. J. Moré, The Levenberg-Marquardt algorithm, Lecture Notes in Mathematics 630 (1978);
H. B. Nielsen, Damping parameter in Marquardt's method, IMM-REP-1999-05; M. K. Transtrum and
J. P. Sethna, arXiv:1201.5885; D. M. Bates and D. G. Watts, Technometrics 23 (1981) 179;
P. W. Holland and R. E. Welsch, Communications in Statistics A6 (1977) 813.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from morphlib.errors import InputError

Array = NDArray[np.float64]
Function = Callable[[Array], ArrayLike]

MAX_ITERATIONS = 5000  # most problems take ten to a hundred; the longest valley of NIST's, MGH10, takes 1800
TOLERANCE = 1e-10  # of the offset: values end within this fraction of their standard errors times sqrt(n - p)
# Of the first step, which it makes a thousandth of a Gauss-Newton step where columns are not parallel. Less lets
# the first step jump over the valley (BoxBOD of NIST, at 10 and below); more costs a step for each factor of three.
START_DAMPING = 1e3
DAMPING_LIMIT = 1e100  # after some 26 rejected steps in a row, the last ones too short to change the values
BEND_LIMIT = 0.75  # of the second-order part of a step over the first, as Transtrum and Sethna
PROBE = 0.1  # of a step, where the second derivative along it is measured
SMALLEST_START = 1e-100  # of the largest residual; it can fall by 46 orders until squares lose digits to underflow
EPSILON = float(np.finfo(float).eps)


class Status(Enum):
    """How a search ended; the value is one sentence of meaning and one of advice."""

    CONVERGED = "No step lowers the cost beyond tolerance or rounding. Try other starts if it may have several minima."
    SINGULAR = "The data cannot tell some parameters apart, so none has a standard error. Leave one out, or start elsewhere."
    STALLED = (
        "The derivatives promise a lower cost, but no step finds one. Check the Jacobian, or whether values run to infinity."
    )
    NOT_CONVERGED = "The search used up its iterations. Give more, a better start, or a model with fewer parameters."


@dataclass(frozen=True)
class Minimum:
    """Where a search ended. Arrays are read-only.

    - ``values``: shape (p,), in the units of the start
    - ``covariance``: shape (p, p), s^2 (J'J)^-1 with s^2 = sse / (n - p), n the rows of positive weight. It assumes
      independent rows, noise of one size over the root of the weight, and the model to be right. NaN where n = p or
      J is singular.
    - ``standard_errors``: shape (p,), the root of its diagonal
    - ``cost``: what was minimized, the sum of weight times rho(residual)
    - ``sse``: the sum of squares at the final weights, those of Huber's loss included
    - ``n_iterations``: steps tried
    """

    values: Array
    covariance: Array
    standard_errors: Array
    cost: float
    sse: float
    n_iterations: int
    status: Status

    @property
    def converged(self) -> bool:
        """Whether the search met its tolerance at values that the data determine."""
        return self.status is Status.CONVERGED


def minimize(
    residuals: Function,
    jacobian: Function,
    start: ArrayLike,
    *,
    huber_scale: float = np.inf,
    weights: ArrayLike | None = None,
    max_iterations: int = MAX_ITERATIONS,
) -> Minimum:
    """The values, near ``start`` of shape (p,), with the least sum of weight times rho(residual) over n rows.

    ``residuals`` maps values (p,) to (n,), and ``jacobian`` to their derivatives (n, p). rho(r) is Huber's loss, r^2
    up to the scale s = ``huber_scale`` and 2 s abs(r) - s^2 beyond, in the units of the residuals; without a scale, r^2.
    ``weights``, shape (n,), of at least zero, are one by default. The search has converged when the relative offset
    is at most ``TOLERANCE``.

    Raises ``InputError`` for a start, weights or settings that make no sense, for arrays that are no
    numbers or of other shapes than these, for fewer rows than parameters, and where residuals or
    derivatives are not finite at the start, or their squares overflow or underflow. Later points that
    are not finite or overflow only turn the search back.
    """
    values = _numbers("start", start, 1)
    if not (len(values) and np.isfinite(values).all()):
        raise InputError(f"start is {values.tolist()}; give a finite number for each parameter, and at least one")
    if not huber_scale > 0 or max_iterations < 1:
        raise InputError(f"huber_scale is {huber_scale}, max_iterations {max_iterations}; give a number above zero for both")
    with np.errstate(all="ignore"):
        n_rows = len(_numbers("residuals", residuals(values.copy()), 1))
        row_weights = np.ones(n_rows) if weights is None else _numbers("weights", weights, 1, (n_rows,))
        if not (np.isfinite(row_weights) & (row_weights >= 0)).all():
            raise InputError("weights hold a negative number or one that is not finite; give at least zero for each residual")
        used = np.count_nonzero(row_weights)
        if used < len(values):
            raise InputError(f"{used} residuals of positive weight are too few for {len(values)} parameters; give more rows")
        problem = _Problem(residuals, jacobian, row_weights, huber_scale)
        here = problem.evaluate(values)
        if here is None or 0 < np.abs(here.residual).max() < SMALLEST_START:
            wrong = ~np.isfinite(np.column_stack([residuals(values.copy()), jacobian(values.copy())])).all(axis=1)
            first = f"are not finite at the start, the first in row {wrong.argmax()}, counted from 0"
            what = first if wrong.any() else "overflow or underflow when squared"
            raise InputError(f"residuals or jacobian {what}; use other units, leave rows out, or start elsewhere")
        here, n_iterations, status = _search(problem, here, max_iterations)
        covariance = here.inverse * (here.size**2 / (used - len(values)) if used > len(values) else np.nan)
        errors = np.sqrt(np.diag(covariance))
    if status is Status.CONVERGED and not np.isfinite(here.inverse).all():
        status = Status.SINGULAR
    for array in (here.values, covariance, errors):
        array.setflags(write=False)
    return Minimum(here.values, covariance, errors, here.cost, here.size**2, n_iterations, status)


class _Point(NamedTuple):
    """Values and what a step from them needs: J = basis @ reduced and the residuals r, times the root of the weights.

    ``projected`` is basis' r; ``lengths`` are those of the columns of J, ``size`` that of r, ``slope`` that of
    ``projected``. ``error`` is how far off r is if it is as wrong as rounding of the values, and its own, makes it,
    and ``rounding`` how far off the cost is then.
    ``inverse`` is (J'J)^-1, NaN where columns of J scaled to length one are dependent to rounding.
    """

    values: Array
    residual: Array
    root: Array
    basis: Array
    reduced: Array
    projected: Array
    inverse: Array
    lengths: Array
    size: float
    slope: float
    cost: float
    error: float
    rounding: float


class _Problem(NamedTuple):
    residuals: Function
    jacobian: Function
    weights: Array
    scale: float

    def evaluate(self, values: Array) -> _Point | None:
        """The point, or None where something is not finite."""
        if not np.isfinite(values).all():
            return None
        raw = _numbers("residuals", self.residuals(values.copy()), 1, self.weights.shape)
        slopes = _numbers("jacobian", self.jacobian(values.copy()), 2, (*self.weights.shape, len(values)))
        distance = np.abs(raw)
        cost = float(self.weights @ np.where(distance <= self.scale, raw**2, 2 * self.scale * distance - self.scale**2))
        root = np.sqrt(self.weights * np.minimum(1.0, self.scale / distance))
        residual, weighted = raw * root, slopes * root[:, None]
        lengths, size = np.linalg.norm(weighted, axis=0), float(np.linalg.norm(residual))
        error = EPSILON * (float(np.linalg.norm(np.abs(weighted) @ np.abs(values))) + size)
        if not np.isfinite([cost, size**2, error**2, *lengths]).all():
            return None
        units = np.where(lengths > 0, lengths, 1.0)
        basis, singular, rotation = np.linalg.svd(weighted / units, full_matrices=False)
        seen = singular > len(raw) * EPSILON * singular[0]
        basis, reduced = basis * seen, singular[:, None] * rotation * units
        projected, slope = basis.T @ residual, float(np.linalg.norm(basis.T @ residual))
        inverse_root = (rotation.T / singular if seen.all() else np.full_like(rotation, np.nan)) / units[:, None]
        inverse = inverse_root @ inverse_root.T
        rounding = error * (2 * size + error)
        return _Point(values, residual, root, basis, reduced, projected, inverse, lengths, size, slope, cost, error, rounding)

    def step(self, here: _Point, longest: Array, damping: float) -> tuple[Array, float]:
        """A step (p,) and the reduction it promises; a step of NaN, to be rejected, where the residuals bend too much."""
        penalty = np.sqrt(damping) * longest
        columns = np.hypot(here.lengths, penalty)
        stacked = np.vstack([here.reduced, np.diag(penalty)]) / columns
        if not np.isfinite(stacked).all():
            return np.full_like(longest, np.nan), 0.0

        def solve(right: Array) -> Array:
            return np.linalg.lstsq(stacked, np.concatenate([right, np.zeros_like(right)]), rcond=None)[0] / columns

        step = solve(-here.projected)
        change = here.reduced @ step
        promised = -float(change @ (2 * here.projected + change))
        # the bend is a difference over PROBE^2, so here.error must be small enough to leave it two digits
        if here.slope > 100 * 2 / PROBE**2 * here.error and np.isfinite(step).all():
            probed = _numbers("residuals", self.residuals(here.values + PROBE * step), 1, self.weights.shape) * here.root
            moved = here.basis.T @ (probed - here.residual)
            curvature = 2 / PROBE * (moved / PROBE - change)
            bent = solve(-curvature / 2) if np.isfinite(curvature).all() else np.full_like(step, np.inf)
            limit = BEND_LIMIT / 2 * np.linalg.norm(longest * step)
            step = step + (bent if np.linalg.norm(longest * bent) <= limit else np.nan)
        return step, promised


def _search(problem: _Problem, here: _Point, max_iterations: int) -> tuple[_Point, int, Status]:
    """The point where the search ends, the steps tried, and how it ended."""
    longest = np.where(here.lengths > 0, here.lengths, 1.0)
    damping, growth = START_DAMPING, 2.0
    for n_iterations in range(max_iterations):
        if here.slope <= TOLERANCE * here.size:
            return here, n_iterations, Status.CONVERGED
        at_rounding = here.slope**2 <= here.rounding
        step, promised = problem.step(here, longest, damping)
        if damping > DAMPING_LIMIT or (here.values + step == here.values).all():
            return here, n_iterations, Status.CONVERGED if at_rounding else Status.STALLED
        there = problem.evaluate(here.values + step)
        if at_rounding:
            if there is None or there.slope >= here.slope or there.cost > here.cost + here.rounding:
                return here, n_iterations + 1, Status.CONVERGED
            gain = 1.0
        else:
            gain = -1.0 if there is None else float(np.divide(here.cost - there.cost, promised))
        if there is not None and gain > 0:
            here, longest = there, np.maximum(longest, there.lengths)
            damping, growth = damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
        else:
            damping, growth = damping * growth, growth * 2
    return here, max_iterations, Status.CONVERGED if here.slope <= TOLERANCE * here.size else Status.NOT_CONVERGED


def _numbers(name: str, given: ArrayLike, n_axes: int, shape: tuple[int, ...] | None = None) -> Array:
    """A copy as floats, or ``InputError`` where it is no array of real numbers with that shape."""
    try:
        array = np.asarray(given).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError):
        raise InputError(f"{name} must be an array of real numbers; give equal rows, without text or gaps") from None
    if array.ndim != n_axes or (shape is not None and array.shape != shape):
        expected = f"shape {shape}" if shape else f"{n_axes} axis"
        raise InputError(f"{name} has shape {array.shape}; give {expected}, a row per residual and a column per parameter")
    return array
