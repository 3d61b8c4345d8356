"""Choices among the paper's runs: the six-run draws of its random-shape ablation, many subsets fitted at once,
and the mean loss between the marks of a run.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd

from morphlib import fitting, runs
from morphlib.laws import Array, Law

SIZES = ("80M", "116M", "164M", "237M", "313M")


def six_run_draws(table: pd.DataFrame) -> np.ndarray:
    """Every draw the random-shape ablation can make, as row positions of the paper's table, shape (7200, 6).

    One 20N row of each of ``SIZES`` and one 80M row at 160N, out of the rows of the main fit; the
    last column varies fastest.
    """
    main = table["fit_main"] == 1
    slots = [(size, "20N") for size in SIZES] + [("80M", "160N")]
    pools = [np.flatnonzero(main & (table["family"] == size) & (table["budget"] == budget)) for size, budget in slots]
    return np.array(list(product(*pools)))


def random_subsets(draws: np.ndarray, pool: np.ndarray, n_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Each draw of shape (P, k) enlarged to ``n_rows`` rows, by rows of ``pool`` drawn without repetition."""
    order = rng.permuted(np.tile(pool, (len(draws), 1)), axis=1)
    taken = (order[:, :, None] == draws[:, None, :]).any(axis=2)
    rest = np.take_along_axis(order, np.argsort(taken, axis=1, kind="stable"), axis=1)
    return np.concatenate([draws, rest[:, : n_rows - draws.shape[1]]], axis=1)


def fit_subsets(
    table: pd.DataFrame, law: Law, subsets: np.ndarray, *, n_starts: int = 6, seed: int = 0
) -> tuple[fitting.Solutions, Array]:
    """The law fitted to each subset of rows, given as positions of shape (P, k).

    No coefficient is bounded, as in the authors' fits. Returns the solutions and the loss they
    predict for every row of the table, shape (P, n).
    """
    union, place = np.unique(subsets, return_inverse=True)
    weights = np.zeros((len(subsets), len(union)))
    np.put_along_axis(weights, place.reshape(subsets.shape), 1.0, axis=1)
    found = fitting.solve(table.iloc[union], law, weights, n_starts=n_starts, seed=seed, positive=False)
    return found, law.predict(found.values, runs.variables(table))


def between_marks(table: pd.DataFrame) -> pd.DataFrame:
    r"""The mean loss between the token marks of each shape, if its losses are means of one run from the start.

    Means L1 to D1 and L2 to D2 give (D2 L2 - D1 L1) / (D2 - D1) in between. ``tokens`` becomes the
    :math:`((\sqrt{D_1} + \sqrt{D_2}) / 2)^2` at which :math:`D^{-1/2}` has its mean over the interval; for
    exponents from 0 to 1 that is off by at most about 4 % where D2 = 4 D1 and 8 % where D2 = 8 D1.
    """
    rows = table.sort_values(["name", "tokens"])
    before = rows.groupby("name")[["tokens", "loss", "budget"]].shift()
    start, end = before["tokens"], rows["tokens"]
    return rows.assign(
        interval=before["budget"] + " to " + rows["budget"],
        loss=(end * rows["loss"] - start * before["loss"]) / (end - start),
        tokens=((np.sqrt(start) + np.sqrt(end)) / 2) ** 2,
    ).dropna(subset=["interval"])
