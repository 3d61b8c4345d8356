"""How well a law predicts, what the rows say about its parameters, and what looks wrong with the rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from morphlib import fitting, runs
from morphlib.errors import InputError
from morphlib.fitting import Fit, Status
from morphlib.laws import Array, Law, Values

Holdout = Literal["shape", "size", "largest-n", "widest-r"]
HOLDOUTS: tuple[Holdout, ...] = get_args(Holdout)

Correlations = Mapping[tuple[str, str], float]

SOUND = (Status.CONVERGED, Status.NEGATIVE)  # negative coefficients make no sense, but the rows determine them
CONFOUNDED = 0.99  # |correlation| of two estimates beyond which a change of one undoes a change of the other
TOGETHER = 0.95  # |correlation| of the logarithms of two variables beyond which their effects can hardly be told apart
MOST = 0.8  # share of the rows at one D / N from which the others alone tell N from D
MAX_EXACT = 9  # rows; 9! orders are 0.4 million, and beyond them the t approximation is off by less than 0.01
SAME_LOSS = 5e-4  # losses are published to 1e-4
IMPLAUSIBLE_LOSS = 0.3  # nats; Shannon (1951) puts English at 0.4 to 0.9 per character
BUDGET_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Metrics:
    """Errors of predicted losses (nats per token). NaN where there are too few rows to say.

    ``r2`` is 1 - SSE / SST around the mean of the rows; ``mape`` the mean of
    abs(predicted - measured) / measured, in percent.
    """

    n: int
    mse: float
    rmse: float
    r2: float
    mape: float


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
        mape=float(relative_error_pct(measured, predicted).mean()),
    )


def metrics_by_use(table: pd.DataFrame, fit: Fit) -> dict[str, Metrics]:
    """Errors over ``all`` rows, as the paper reports them, over the ``fitted`` and the ``held_out`` ones.

    Only the last say how well the law predicts: the first two contain rows that the fit has seen.
    """
    loss = table["loss"].to_numpy()
    uses = {"all": np.ones(len(table), dtype=bool), "fitted": fit.fitted, "held_out": ~fit.fitted}
    return {use: metrics(loss[rows], fit.loss_predicted[rows]) for use, rows in uses.items()}


def relative_error_pct(measured: Array, predicted: Array) -> Array:
    """abs(predicted - measured) / measured in percent, shape (n,) (paper's error of the 1B models)."""
    return 100 * np.abs(predicted - measured) / measured


def spearman_by_family(table: pd.DataFrame, predicted: Array) -> pd.Series:
    """Spearman's rank correlation of predicted and measured loss within each family of sizes.

    All token budgets of a family are pooled, as the authors do (``comp_spearman.py``), and
    predictions are compared as they print them, to four decimals. NaN for fewer than two rows.
    """
    pairs = pd.DataFrame({"measured": table["loss"], "predicted": np.round(predicted, 4), "family": table["family"]})
    groups = pairs.groupby("family", sort=False)
    return groups.apply(lambda g: g["measured"].corr(g["predicted"], method="spearman") if len(g) > 1 else np.nan)


# --- What the rows can say about the parameters


class Verdict(NamedTuple):
    """What the fitted rows say about the parameters of a law.

    Standard errors and correlations are of parameters in the units in which each variable has the
    geometric mean 1, so that a coefficient is the size of its term in the middle of the rows. In raw
    units A is the term at N = 1, eight decades away, and correlates with its exponent on any table.

    ``correlations`` holds those of the logarithms of two variables over the rows, ``undetermined``
    the parameters whose standard error exceeds their value (for a location such as ln R0: the range
    of its variable) or that are at a bound, ``confounded`` pairs with a correlation beyond 0.99 of either sign.
    """

    identified: bool
    sentences: tuple[str, ...]
    correlations: Correlations
    undetermined: tuple[str, ...]
    confounded: tuple[tuple[str, str, float], ...]


def identifiability(table: pd.DataFrame, fit: Fit) -> Verdict:
    """Whether the fitted rows determine each parameter of the law, and which runs would cure it if not.

    The rows are taken as independent, of noise s^2 / weight (of a robust fit: as if it were one of squares).
    Raises ``InputError`` where the fit is of another table.
    """
    law = fit.law
    rows, values, jacobian, residuals = fitting.linearized(table, fit)
    variables = {name: runs.variables(rows)[name] for name in dict.fromkeys(("N", "D", "R", *_plain(law.variables)))}
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        covariance = fitting.covariance_of(jacobian, residuals)
        errors = np.sqrt(np.diag(covariance))
        correlation = covariance / np.outer(errors, errors)
    names = law.parameters
    close = np.argwhere(np.triu(np.abs(correlation) > CONFOUNDED, k=1))
    confounded = tuple((names[i], names[j], float(correlation[i, j])) for i, j in close)
    scales = [_natural_scale(law, name, value, variables) for name, value in zip(names, values, strict=True)]
    # written so that a standard error that is not a number counts as undetermined
    undetermined = tuple(
        name for name, value, error, scale in zip(names, values, errors, scales, strict=True) if not error <= scale
    )
    of_logarithms = pd.DataFrame(variables).apply(np.log).corr()  # NaN of a variable that does not vary
    correlations = {(a, b): float(of_logarithms[a][b]) for a, b in combinations(variables, 2)}
    copies = int(repeated_rows(rows).sum())
    return Verdict(
        identified=fit.status in SOUND and not undetermined and not copies,
        sentences=(
            *_about_parameters(fit, undetermined, confounded),
            *_about_rows(law, variables, correlations, undetermined),
            *([f"{copies} of the rows are copies of others, so all errors are too small: remove them."] if copies else []),
        ),
        correlations=correlations,
        undetermined=undetermined,
        confounded=confounded,
    )


def _plain(names: Iterable[str]) -> dict[str, None]:
    """The variables that ``names`` are or are powers of: C/M and CM are powers of N and D."""
    return dict.fromkeys(runs.POWER_OF.get(name, name) for name in names)


def _natural_scale(law: Law, name: str, value: float, variables: Values) -> float:
    """The standard error beyond which a parameter is undetermined."""
    if name.startswith("log_"):
        return float(np.ptp(np.log(variables[name[4]])))
    if name == "drift":  # the slope of ln R0 by ln N, which may well be zero
        return float(np.ptp(np.log(variables["R"])) / np.ptp(np.log(variables["N"])))
    low, high = fitting.EXPONENT_RANGE
    if name in law.base.exponents and not 1.01 * low < value < 0.99 * high:
        return 0.0  # it ended where its range ends
    return abs(value)


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _about_parameters(fit: Fit, undetermined: tuple[str, ...], confounded: tuple[tuple[str, str, float], ...]) -> Iterator[str]:
    n_rows, condition = int(fit.fitted.sum()), f"condition number {fit.condition_number:.3g}"
    if undetermined:
        yield (
            f"The {n_rows} rows do not determine {_listed(undetermined)} of {fit.law.name} with {fit.law.exponents} "
            f"exponents ({condition})."
        )
    elif fit.status in SOUND:
        yield f"The {n_rows} rows determine every parameter of {fit.law.name} ({condition})."
    if fit.status is not Status.CONVERGED:
        yield fit.status.value
    if confounded:
        pairs = ", ".join(f"{a} and {b} ({value:.4f})" for a, b, value in confounded)
        yield f"The rows hardly tell some parameters apart; estimates that correlate: {pairs}."
    at_best = round(fit.share_of_starts_at_best * fit.n_starts)
    if at_best < min(3, fit.n_starts):
        yield f"Only {at_best} of {fit.n_starts} starts ended at the best optimum, so a better one may exist; raise n_starts."


def _about_rows(law: Law, variables: Values, correlations: Correlations, undetermined: tuple[str, ...]) -> Iterator[str]:
    """What about the rows leaves parameters open, each with the runs that would mend it."""
    read = _plain(law.variables)
    budget = variables["D"] / variables["N"]
    alike = np.abs(np.log(budget / np.median(budget))) < np.log(1.25)
    where = f"{budget[alike].min():.3g} to {budget[alike].max():.3g} tokens per parameter"
    if alike.all():
        yield f"D / N is constant (all rows have {where}): add runs at other tokens per parameter."
    elif alike.mean() >= MOST:
        yield (
            f"Telling size from tokens rests on {(~alike).sum()} of {len(alike)} rows, the others have {where}: add runs at "
            "other tokens per parameter, at several sizes."
        )
    for (a, b), value in correlations.items():
        if {a, b} <= read.keys() and abs(value) > TOGETHER and not (alike.all() and {a, b} == {"N", "D"}):
            cure = "runs at other tokens per parameter" if {a, b} == {"N", "D"} else f"runs that vary {b} at fixed {a}"
            yield f"{a} and {b} move together (correlation {value:.3f}): add {cure}."
    for name in read:
        low, high = variables[name].min(), variables[name].max()
        own = [parameter for parameter in undetermined if name in _variables_of(law, parameter)]
        if high < 2 * low:
            yield f"{name} hardly varies ({low:.3g} to {high:.3g}): add runs with {name} twice as large or half as large."
        elif own:
            yield f"{_listed(own)}: add runs with {name} outside {low:.3g} to {high:.3g}, the other variables held."


def _variables_of(law: Law, parameter: str) -> set[str]:
    """The variables whose term in the law a parameter belongs to."""
    powers = [power.variable for power in law.base.powers if parameter in (power.coefficient, law.free_name(power.exponent))]
    in_shape = law.shape is not None and parameter in map(law.free_name, law.shape.parameters)
    return {*_plain(powers), *(law.shape.variables if law.shape and in_shape else ())}


# --- Held-out rows


class HeldOut(NamedTuple):
    """Losses predicted for held-out rows, and the folds whose training rows are too weak for the law.

    ``predictions`` has the columns name, tokens, loss, loss_predicted and fold, and the table's index.
    A fold in ``undetermined`` (label to reason) has NaN where the law could not be fitted at all, and a
    prediction, not to be trusted, where it could.
    """

    predictions: pd.DataFrame
    undetermined: Mapping[str, str]

    @property
    def metrics(self) -> Metrics:
        """Errors over the rows that have a prediction."""
        rows = self.predictions[np.isfinite(self.predictions["loss_predicted"])]
        return metrics(rows["loss"].to_numpy(), rows["loss_predicted"].to_numpy())


def splits(table: pd.DataFrame, holdout: Holdout) -> pd.Series:
    """The label of the fold in which a row is held out; NaN where it never is.

    ``shape``: each shape (d_model, n_layers and n_params) with all its budgets and repeats, labelled by its
    first name; where other shapes have that name, too, with its sizes. ``size``: each family. ``largest-n``: the family
    with the largest model. ``widest-r``: the ceil(n / 5) rows with the largest R = d_model / n_layers, and all as
    wide as the last of them.
    Raises ``InputError`` where a fold would leave nothing to train on.
    """
    family = table["family"]
    if holdout == "shape":
        shapes = table.drop_duplicates(["d_model", "n_layers", "n_params"])
        shapes = shapes.set_index(shapes["name"].duplicated(keep=False))
        labels = [
            f"{name} ({depth}x{width}, N = {n:.17g})" if several else name
            for several, name, depth, width, n in shapes[["name", "n_layers", "d_model", "n_params"]].itertuples()
        ]
        fold = pd.Series(np.array(labels)[shape_numbers(table)], table.index)
    elif holdout == "size":
        fold = family
    elif holdout == "largest-n":
        fold = family.where(family == family.iloc[table["n_params"].to_numpy().argmax()])
    elif holdout == "widest-r":
        ratio = table["d_model"] / table["n_layers"]
        least = ratio.nlargest(math.ceil(len(ratio) / 5)).min()
        fold = pd.Series(f"R >= {least:.4g}", table.index).where(ratio >= least)
    else:
        raise InputError(f"{holdout!r} is not a way to hold rows out; choose one of {', '.join(HOLDOUTS)}")
    if (fold == fold.iloc[0]).all():
        raise InputError(f"holding out by {holdout} leaves no rows to train on; add runs that differ in it")
    return fold


def shape_numbers(table: pd.DataFrame) -> np.ndarray:
    """The same number for rows of one shape (d_model, n_layers, n_params), counted in the order of the table."""
    return table.groupby(["d_model", "n_layers", "n_params"], sort=False).ngroup().to_numpy()


def held_out_losses(
    table: pd.DataFrame,
    law: Law,
    holdout: Holdout,
    fit_on: str | None = None,
    *,
    weights: Array | pd.Series | None = None,
    n_starts: int = 8,
    seed: int = 0,
) -> HeldOut:
    """The loss of every held-out row, predicted by the fit that did not see it.

    Only rows that the 0/1 column ``fit_on`` marks train (all without it), with their ``weights`` as in
    ``fitting.fit``; every row of a fold is predicted, marked or not. All folds are fitted at once, from
    ``n_starts`` random starts and the optimum of all training rows, which is only one more place to start from.
    """
    fold = splits(table, holdout)
    labels = list(fold.dropna().unique())
    out = np.array([fold == label for label in labels])
    row_weights = fitting.weights_of(table, fit_on, weights)
    used = row_weights > 0
    rows, training = table[used], (~out * row_weights)[:, used]
    undetermined: dict[str, str] = {}
    for label, weight in zip(labels, training, strict=True):
        try:
            fitting.check_rows(rows[weight > 0], law)
        except InputError as error:
            undetermined[label] = str(error)
    predicted = np.full(len(table), np.nan)
    if fitted := [p for p, label in enumerate(labels) if label not in undetermined]:
        start = fitting.solve(rows, law, row_weights[np.newaxis, used], seed=seed).values[0, len(law.linear) :]
        found = fitting.solve(rows, law, training[fitted], n_starts=n_starts, seed=seed, near=start)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            losses = law.predict(found.values, runs.variables(table))
        for p, loss, values, converged in zip(fitted, losses, found.values, found.converged, strict=True):
            predicted[out[p]] = loss[out[p]]
            trained = training[p] > 0
            status, _ = fitting.status_of(law, values, rows[trained], bool(converged), training[p][trained])
            if status not in SOUND:
                undetermined[labels[p]] = status.value
    predictions = table[["name", "tokens", "loss"]].assign(loss_predicted=predicted, fold=fold)[fold.notna()]
    return HeldOut(predictions, undetermined)


def compare(
    table: pd.DataFrame,
    laws: Sequence[Law],
    holdout: Holdout,
    fit_on: str | None = None,
    *,
    n_starts: int = 8,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Laws by their error on held-out rows (``held_out_losses``), best first; one row per law.

    Columns: law, exponents, count, holdout, ``n`` held-out rows predicted, rmse (nats per token), mape
    (percent), ``undetermined`` folds; then the difference of the rmse to the first law's over the rows
    that both predict, with its 95 % percentile interval. The interval resamples shapes, whose rows are not
    independent, among the errors already made: no law is fitted again. It leaves out that other rows would
    have given other fits and perhaps another best law, so it is too narrow. Laws that predict fewer rows come last.
    """
    if not laws:
        raise InputError("there are no laws to compare; give at least one")
    held = [held_out_losses(table, law, holdout, fit_on, n_starts=n_starts, seed=seed) for law in laws]
    named = [(law.name, law.exponents, table["n_count"].iloc[0], holdout) for law in laws]
    errors = pd.DataFrame([result.metrics for result in held])[["n", "rmse", "mape"]]
    compared = pd.DataFrame(named, columns=["law", "exponents", "count", "holdout"]).join(errors)
    compared["undetermined"] = [len(result.undetermined) for result in held]
    order = compared.sort_values(["n", "rmse"], ascending=[False, True], kind="stable").index
    squared = [((held[i].predictions["loss_predicted"] - held[i].predictions["loss"]) ** 2).to_numpy() for i in order]
    shape = pd.Series(shape_numbers(table), table.index)[held[0].predictions.index].to_numpy()
    differences = [_rmse_difference(errors, squared[0], shape, n_resamples, seed) for errors in squared]
    names = ["rmse_difference", "rmse_difference_low", "rmse_difference_high"]
    return compared.loc[order].reset_index(drop=True).join(pd.DataFrame(differences, columns=names))


def _rmse_difference(
    squared: Array, best: Array, cluster: np.ndarray, n_resamples: int, seed: int
) -> tuple[float, float, float]:
    """The difference of two root mean squares and its 95 % interval, clusters of rows resampled with replacement."""
    both = np.isfinite(squared) & np.isfinite(best)
    if not both.any():
        return np.nan, np.nan, np.nan
    sums = pd.DataFrame({"law": squared[both], "best": best[both], "n": 1.0}).groupby(cluster[both]).sum().to_numpy()
    # the same draws for every law that predicts the same rows
    counts = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), n_resamples)
    totals = np.vstack([sums.sum(axis=0), counts @ sums])
    difference = np.sqrt(totals[:, 0] / totals[:, 2]) - np.sqrt(totals[:, 1] / totals[:, 2])
    low, high = np.quantile(difference[1:], [0.025, 0.975]) if len(sums) > 1 else (np.nan, np.nan)
    return float(difference[0]), float(low), float(high)


class InformationCriteria(NamedTuple):
    aic: float
    aicc: float
    bic: float


def information_criteria(fit: Fit, table: pd.DataFrame, *, assume_independent: bool = False) -> InformationCriteria:
    """AIC, AICc and BIC of a least-squares fit, for laws fitted to the same rows; NaN of a robust or weighted one.

    With k = p + 1 (the noise variance counts) and ln L = -n/2 (ln(2 pi SSE / n) + 1): AIC = 2k - 2 ln L,
    AICc = AIC + 2k(k+1)/(n-k-1), BIC = k ln n - 2 ln L (Burnham and Anderson 2002, chapter 2).

    They need independent rows of Gaussian noise. Rows of one shape share what the law does not know of
    it, and checkpoints of one run share their noise as well: then n overstates what is known and
    the criteria favour too many parameters. All are therefore NaN where a shape or a ``run`` repeats
    among the fitted rows, unless ``assume_independent``; ``compare`` needs no such assumption. NaN, too,
    where there are no more rows than parameters (AICc: than k + 1).
    """
    rows = fit.rows(table)
    n, k = len(rows), len(fit.values) + 1
    repeated = len(np.unique(shape_numbers(rows))) < n or ("run" in rows and rows["run"].duplicated().any())
    unlike = fit.loss != "squared" or np.ptp(fit.weights) > 0  # it has another likelihood
    if n < k or unlike or (repeated and not assume_independent):
        return InformationCriteria(np.nan, np.nan, np.nan)
    sse = float(((rows["loss"].to_numpy() - fit.loss_predicted[fit.fitted]) ** 2).sum())
    deviance = n * (math.log(2 * math.pi * sse / n) + 1) if sse > 0 else -math.inf
    correction = 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else np.nan
    return InformationCriteria(deviance + 2 * k, deviance + 2 * k + correction, deviance + k * math.log(n))


# --- The order of a few models


def spearman_exact(measured: ArrayLike, predicted: ArrayLike) -> tuple[float, float]:
    """Spearman's rank correlation and its two-sided p-value, for two arrays of shape (n,).

    Up to nine rows the p-value is exact: the share of all n! orders whose correlation is as strong, ties
    in mid-ranks. Even a perfect order of four models has 2/24 = 0.083. Beyond nine it is scipy's
    t approximation. NaN where one array does not vary. Raises ``InputError`` for unequal or non-finite arrays.
    """
    a, b = np.asarray(measured, dtype=float), np.asarray(predicted, dtype=float)
    if a.ndim != 1 or a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError(f"ranks need two equally long lists of finite numbers, not shapes {a.shape} and {b.shape} or NaN")
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return np.nan, np.nan
    if len(a) > MAX_EXACT:
        from scipy.stats import spearmanr

        rho, p_value = spearmanr(a, b)
        return float(rho), float(p_value)
    # twice the mid-rank less its mean is a whole number, so equal correlations compare equal
    x, y = (np.rint(2 * pd.Series(v).rank().to_numpy()).astype(np.int64) - len(v) - 1 for v in (a, b))
    products = np.array(list(permutations(range(len(y)))))
    inner = y[products] @ x
    strength = int(x @ y)
    return strength / math.sqrt(int(x @ x) * int(y @ y)), float((np.abs(inner) >= abs(strength)).mean())


class Orderings(NamedTuple):
    """``orders``, (k, m): models by position, lowest loss first, the most probable order first; ``probabilities``, (k,)."""

    orders: np.ndarray
    probabilities: Array


def ordering_probability(predicted: ArrayLike, covariance: ArrayLike, n_draws: int = 10_000, seed: int = 0) -> Orderings:
    """How probable each order of m models is, their predicted losses, (m,), being normal with that covariance, (m, m).

    Orders are counted over ``n_draws``. The covariance of what a law predicts is J C J', with C that of its
    parameters; add the noise of a run to the diagonal to ask about measured losses. Raises ``InputError`` for a
    matrix that is no covariance.
    """
    mean, matrix = np.asarray(predicted, dtype=float), np.asarray(covariance, dtype=float)
    m = mean.size
    if mean.shape != (m,) or matrix.shape != (m, m) or not (m and np.isfinite(mean).all() and np.isfinite(matrix).all()):
        raise InputError(f"orders need m predictions and a finite m x m covariance, not shapes {mean.shape}, {matrix.shape}")
    largest = np.abs(matrix).max()
    asymmetric = not np.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-9 * largest)
    if asymmetric or np.linalg.eigvalsh(matrix).min() < -1e-6 * largest:
        raise InputError("the covariance of the predictions is not symmetric or has negative variances; give J C J'")
    draws = np.random.default_rng(seed).multivariate_normal(mean, matrix, n_draws, check_valid="ignore", method="eigh")
    orders, counts = np.unique(np.argsort(draws, axis=1), axis=0, return_counts=True)
    likeliest = np.argsort(-counts, kind="stable")
    return Orderings(orders[likeliest], counts[likeliest] / n_draws)


# --- Slips in a table


def audit(table: pd.DataFrame, fit: Fit | None = None) -> list[str]:
    """Rows that look like slips; every sentence is a question to whoever made the table, not a verdict.

    - Rows with the shape, tokens and loss of a row before them, all in one sentence.
    - Losses below 0.3 nats, under any estimate of the entropy of text, even per byte.
    - Two shapes whose losses at some tokens agree within 5e-4 although at every other
      budget they share they differ by ten times as much or more.
    - A label such as 20N in the column ``budget`` that tokens / n_params misses by more than 10 %; not where N was
      converted to another way of counting than the label's.
    - With a ``fit``, fitted rows whose externally studentized residual is beyond Student's t at
      5 % shared over the rows (Bonferroni; Cook and Weisberg 1982, section 2.2.2).
    """
    names, sentences = _runs(table), [*_duplicates(table)]
    low = (table["loss"] < IMPLAUSIBLE_LOSS).to_numpy()
    if low.any():
        sentences.append(f"{low.sum()} losses are below {IMPLAUSIBLE_LOSS} nats per token, the first of {names[low.argmax()]}.")
    if "budget" in table and not table.attrs.get("converted"):
        nominal = pd.to_numeric(table["budget"].astype(str).str.extract(r"^([\d.]+)N$")[0], errors="coerce").to_numpy()
        actual = (table["tokens"] / table["n_params"]).to_numpy()
        sentences += [
            f"{names[i]} is labelled {nominal[i]:g}N but has {actual[i]:.1f} tokens per parameter."
            for i in np.flatnonzero(np.abs(actual - nominal) > BUDGET_TOLERANCE * nominal)
        ]
    return sentences + (_outliers(table, fit) if fit is not None else [])


def _runs(table: pd.DataFrame) -> list[str]:
    return [f"{name} at {tokens / 1e9:.4g}B tokens" for name, tokens in zip(table["name"], table["tokens"], strict=True)]


def _duplicates(table: pd.DataFrame) -> Iterator[str]:
    names, repeats = _runs(table), repeated_rows(table)
    if repeats.any():
        first = names[int(repeats.argmax())]
        yield f"{int(repeats.sum())} rows, the first {first}, repeat the shape, tokens and loss of a row before them."
    shape, tokens, loss = shape_numbers(table), table["tokens"].to_numpy(), table["loss"].to_numpy()
    last = pd.Series(loss, [shape, tokens]).groupby(level=(0, 1)).last()
    order = np.lexsort((loss, tokens))
    order = order[~repeats[order]]
    for place, one in enumerate(order):
        for other in order[place + 1 :]:
            if tokens[other] != tokens[one] or loss[other] - loss[one] > SAME_LOSS:
                break
            i, j = sorted((one, other))
            gap = (last[shape[i]] - last[shape[j]]).drop(tokens[i]).abs().min()
            if shape[i] != shape[j] and gap >= 10 * SAME_LOSS:  # NaN where they share no other budget
                yield (
                    f"{names[i]} and {names[j]} have losses {loss[i]:.4f} and {loss[j]:.4f}, though at every other budget "
                    f"they share they differ by {gap:.4f} or more."
                )


def repeated_rows(table: pd.DataFrame) -> np.ndarray:
    """Which rows have the shape, tokens and loss of a row before them, a boolean array: copies, not runs of their own."""
    return table[["d_model", "n_layers", "n_params", "tokens", "loss"]].duplicated().to_numpy()


def _outliers(table: pd.DataFrame, fit: Fit) -> list[str]:
    rows, _, jacobian, residual = fitting.linearized(table, fit)
    leverage = (fitting.orthonormal(jacobian)[0] ** 2).sum(axis=1)
    freedom = len(rows) - len(fit.values) - 1
    if freedom < 1:
        return []
    total = residual @ residual
    # what is left of it without the row, times 1 - leverage; nothing but rounding where the row makes up the whole sum
    rest = np.maximum(total * (1 - leverage) - residual**2, 1e-12 * total)
    with np.errstate(divide="ignore", invalid="ignore"):
        studentized = residual * np.sqrt(freedom / rest)
    limit = float(stdtrit(freedom, 1 - 0.025 / len(rows)))
    return [
        f"{run} is {t:+.1f} standard deviations off the law (limit {limit:.1f})."
        for run, t in zip(_runs(rows), studentized, strict=True)
        if abs(t) > limit
    ]
