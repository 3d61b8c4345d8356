"""How well a law predicts: errors over chosen rows, and the order it gives to models of one size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from morphlib.fitting import Fit
from morphlib.laws import Array


@dataclass(frozen=True, slots=True)
class Metrics:
    """Errors of predicted losses (nats per token). NaN where there are too few rows to say.

    ``r2`` is 1 - SSE / SST around the mean of the rows; ``mape_pct`` the mean of
    |predicted - measured| / measured, in percent.
    """

    n: int
    mse: float
    rmse: float
    r2: float
    mape_pct: float


def metrics(measured: Array, predicted: Array) -> Metrics:
    """Errors of ``predicted`` against ``measured``, both of shape (n,)."""
    if len(measured) == 0:
        return Metrics(0, np.nan, np.nan, np.nan, np.nan)
    squared = (predicted - measured) ** 2
    total = ((measured - measured.mean()) ** 2).sum()
    return Metrics(
        n=len(measured),
        mse=float(squared.mean()),
        rmse=float(np.sqrt(squared.mean())),
        r2=float(1 - squared.sum() / total) if total > 0 else np.nan,
        mape_pct=float(100 * (np.abs(predicted - measured) / measured).mean()),
    )


def metrics_by_use(table: pd.DataFrame, fit: Fit) -> dict[str, Metrics]:
    """Errors over ``all`` rows, as the paper reports them, over the ``fitted`` and the ``held_out`` ones.

    Only the last say how well the law predicts: the first two contain rows that the fit has seen.
    """
    loss = table["loss"].to_numpy()
    uses = {"all": np.ones(len(table), dtype=bool), "fitted": fit.fitted, "held_out": ~fit.fitted}
    return {use: metrics(loss[rows], fit.loss_predicted[rows]) for use, rows in uses.items()}


def relative_error_pct(measured: Array, predicted: Array) -> Array:
    """|predicted - measured| / measured in percent, shape (n,) (paper's error of the 1B models)."""
    return 100 * np.abs(predicted - measured) / measured


def spearman_by_family(table: pd.DataFrame, predicted: Array) -> pd.Series:
    """Spearman's rank correlation of predicted and measured loss within each family of sizes.

    All token budgets of a family are pooled, as the authors do (``comp_spearman.py``), and
    predictions are compared as they print them, to four decimals. NaN for fewer than two rows.
    """
    pairs = pd.DataFrame({"measured": table["loss"], "predicted": np.round(predicted, 4), "family": table["family"]})
    groups = pairs.groupby("family", sort=False)
    return groups.apply(lambda g: g["measured"].corr(g["predicted"], method="spearman") if len(g) > 1 else np.nan)
