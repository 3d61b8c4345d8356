r"""Which run to train next: the one that teaches most about what the fit is for.

Near the fitted parameters a law is linear, with the Jacobian J of its n fitted rows (n, p), and the
variance of a predicted loss is :math:`s^2 c^\top (J^\top J)^{-1} c`, with c the derivative of that
loss by the parameters. Training one more run, of derivative x, changes it by the rank-one update of
Sherman and Morrison,

.. math::
    c^\top (J^\top J + x x^\top)^{-1} c = c^\top M c - \frac{(c^\top M x)^2}{1 + x^\top M x},
    \quad M = (J^\top J)^{-1},

so no run has to be trained, and no loss guessed, to say what it would teach. Summed over several c this
is the V-criterion of optimal design, for one c the c-criterion (Fedorov 1972; Pukelsheim 1993, chapter 2).
It is local: it holds for the fitted parameters and the fitted law, and knows nothing of a wrong law.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from morphlib import fitting, runs
from morphlib.errors import InputError
from morphlib.fitting import CONDITION_LIMIT, Fit
from morphlib.laws import Array, Law


def rank_next_runs(
    table: pd.DataFrame,
    fit: Fit,
    candidates: pd.DataFrame,
    target: pd.DataFrame | None = None,
    parameter: str | None = None,
) -> pd.DataFrame:
    """Candidates by what one more run of them would teach per FLOP, best first.

    ``candidates`` and ``target`` are run tables that need no loss. Columns of the result: name; ``gain``, the
    fraction, 0 to 1, by which the summed variance of the losses predicted for ``target`` (by default: the
    candidates), or of ``parameter`` in the units of ``diagnostics.Verdict``, would fall; ``flops``, 6 N D;
    gain_per_flop. Rows keep the index of ``candidates``.

    New runs have weight one. In directions that the rows leave open the variance is not infinite but
    what it would be at the largest condition number that a fit may have, so runs that would close them
    rank first. Raises ``InputError`` for a fit of another table, both or an unknown aim, or unusable candidates.
    """
    if target is not None and parameter is not None:
        raise InputError("a design has one aim; give target rows or a parameter, not both")
    law = fit.law
    rows, _, jacobian, _ = fitting.linearized(table, fit)
    lengths = np.linalg.norm(jacobian, axis=0)
    if not np.isfinite(lengths).all():
        raise InputError("the fit has parameters without finite derivatives; fit again with fewer free parameters")
    lengths[lengths == 0] = 1.0

    def slopes(new: pd.DataFrame, what: str) -> Array:
        runs.check(new, what, measured=False)
        fit.variables(new)
        return fitting.scaled_jacobian(law, fit.values, rows, new)[1] / lengths

    x = slopes(candidates, "candidates")
    if parameter is None:
        c = x if target is None else slopes(target, "target rows")
    elif law.free_name(parameter) in law.parameters:
        c = np.eye(len(law.parameters))[[law.parameters.index(law.free_name(parameter))]]
    else:
        raise InputError(f"{law.name} has no parameter {parameter!r}; choose one of {', '.join(law.parameters)}")
    _, singular, rotation = np.linalg.svd(jacobian / lengths, full_matrices=False)
    whitening = rotation.T / np.hypot(singular, singular[0] / CONDITION_LIMIT)  # W W' = (J'J + floor^2)^-1
    c, x = c @ whitening, x @ whitening
    # the fraction of sum_c c' M c that each candidate would take away
    gain = ((c @ x.T) ** 2).sum(axis=0) / (1 + (x**2).sum(axis=1)) / (c**2).sum()
    cost = _training_flops(candidates)
    ranked = candidates[["name"]].assign(gain=gain, flops=cost, gain_per_flop=gain / cost)
    return ranked.sort_values("gain_per_flop", ascending=False, kind="stable")


def _training_flops(rows: pd.DataFrame) -> Array:
    """6 N D, in floating point: the product of whole numbers would overflow."""
    return 6 * rows["n_params"].to_numpy(dtype=float) * rows["tokens"].to_numpy(dtype=float)


def simulate_design(
    table: pd.DataFrame,
    law: Law,
    start: str,
    target: str | None = None,
    *,
    n_added: int = 12,
    n_random: int = 20,
    n_starts: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """What choosing runs by their gain would have brought on a table whose losses are known.

    From the rows that the 0/1 column ``start`` marks, rows are added one at a time: of largest ``gain``, of
    largest ``gain_per_flop``, the ``cheapest``, and in ``n_random`` random orders (repeats 0, 1, ...). The gain is
    about the rows that the column ``target`` marks, which are then never added, or else all rows left.
    Columns: strategy, repeat, n_rows, ``flops`` spent (6 N D, the start included), ``rmse`` on the target rows,
    or else on the rows not added yet: those differ between strategies, a fixed target does not.
    """
    trained, aimed = runs.fit_mask(table, start), np.zeros(len(table), dtype=bool)
    if target is not None:
        aimed = runs.fit_mask(table, target) & ~trained
        if not aimed.any():
            raise InputError(f"column {target!r} marks no rows outside {start!r}; mark rows to predict")
    pool = np.flatnonzero(~trained & ~aimed)
    if not 1 <= n_added < len(pool) + (target is not None) or n_random < 1:
        raise InputError(f"{n_added} runs cannot be added from {len(pool)}, some left to predict, in {n_random} random orders")
    cost = _training_flops(table)
    rng = np.random.default_rng(seed)

    def by_gain(by: str) -> np.ndarray:
        """The rows that a planner would add, one at a time, each after a fit to what is trained by then."""
        known, order = trained.copy(), []
        for _ in range(n_added):
            fit = fitting.fit(table.assign(fit_step=known.astype(int)), law, "fit_step", n_starts=n_starts, seed=seed)
            left = np.flatnonzero(~known & ~aimed)
            ranked = rank_next_runs(table, fit, table.iloc[left].set_axis(left), table[aimed] if target is not None else None)
            order.append(int(ranked.index.to_numpy()[ranked[by].to_numpy().argmax()]))
            known[order[-1]] = True
        return np.array(order)

    orders = [(by, by_gain(by)) for by in ("gain", "gain_per_flop")]
    orders += [("cheapest", pool[np.argsort(cost[pool], kind="stable")][:n_added])]
    orders += [("random", rng.permutation(pool)[:n_added]) for _ in range(n_random)]
    masks = np.tile(trained, (len(orders), n_added + 1, 1))
    for k, (_, order) in enumerate(orders):
        for step, row in enumerate(order, start=1):
            masks[k, step:, row] = True
    masks = masks.reshape(-1, len(table))
    values = fitting.solve(table, law, masks.astype(float), n_starts=n_starts, seed=seed).values
    squared = (law.predict(values, runs.variables(table)) - table["loss"].to_numpy()) ** 2
    scored = np.broadcast_to(aimed, masks.shape) if target is not None else ~masks
    return pd.DataFrame(
        {
            "strategy": np.repeat([strategy for strategy, _ in orders], n_added + 1),
            "repeat": np.repeat([max(0, k - 3) for k in range(len(orders))], n_added + 1),
            "n_rows": masks.sum(axis=1),
            "flops": masks @ cost,
            "rmse": np.sqrt((squared * scored).sum(axis=1) / scored.sum(axis=1)),
        }
    )
