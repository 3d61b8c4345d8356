r"""Which shape to train: the least predicted loss under caps on parameters, tokens and latency.

The paper (section 2.3) replaces the FLOP budget of Chinchilla by three caps,

.. math::
    \min_{N, D, R} L(N, D, R) \quad \text{subject to} \quad N \le N_C,\; D \le D_C,\; T_\mathrm{inf} \le T_C ,

and solves it by hand: list shapes, predict the loss of each, measure its latency, rank, train the best few, evaluate,
release the best. `select` is the list and the ranking, `optimum` the same problem over any width and depth, and
`predict_rank_select` the whole method, with every step to be plugged in.

What the fit and the latency leave open is carried through by draws: each is one set of parameters of the law (a
refit of resampled runs) and one set of latencies, and has a best candidate of its own. From these come the probability
that a candidate is the best, and its expected regret, the loss by which it misses the best. The law itself is taken to be
right, so all of this is too sure where it is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from morphlib import runs
from morphlib.errors import InputError
from morphlib.fitting import Fit
from morphlib.latency.analytic import ENDS, Machine, Workload
from morphlib.laws import Array
from morphlib.shapes import Bits, Shape, Shapes

KINDS = ("measured", "quoted", "predicted")
LATENCIES = ("latency_low_s", "latency_s", "latency_high_s")

CONTAIN = 0.9  # probability that the candidates to train contain the best one
NOT_WORSE = 0.05  # a candidate that is no worse than the chosen one more often than this cannot be told apart from it
SHAPE_VARIABLES = {"R", "d", "L", "W", "M"}
RANGES = {"N": "n_params", "D": "tokens", "R": "aspect_ratio"}
Ranges = dict[str, tuple[float, float]]  # the least and the greatest N, D and R
EDGE = 1 + 1e-9  # rounding of a limit that a shape meets exactly
PRICE_STEP = 0.01  # of a cap, by which it is raised to see what that is worth
WORTH = 1e-6  # nats that a raised cap must save to be called binding; the solver is good to a hundredth of it
CHUNK_NUMBERS = 2_000_000  # elements of the largest array of a chunk of draws; a dozen or so live at once
TOKEN_RANGE = (1e3, 1e15)  # from the smallest toy to beyond any plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """Upper limits: ``params`` as the fit counts them, training ``tokens``, end-to-end ``latency_s`` of the workload,
    and, where they are given, bytes of the cache of keys and values when the last token is written, and of the weights.

    Raises ``InputError`` for a cap that is not a number above zero.
    """

    params: float
    tokens: float
    latency_s: float
    kv_bytes: float = np.inf
    weight_bytes: float = np.inf

    def __post_init__(self) -> None:
        for cap in fields(self):
            if not getattr(self, cap.name) > 0:
                raise InputError(f"the cap on {cap.name} is {getattr(self, cap.name)}; give a number above zero")


# what each cap limits, by its name in `scored`, then the name and the unit of its shadow price
CAPPED = {
    "params": ("n_params", "nats_per_parameter", 1.0),
    "tokens": ("tokens", "nats_per_token", 1.0),
    "latency_s": ("latency_s", "nats_per_ms", 1e-3),
    "kv_bytes": ("kv_bytes", "nats_per_kv_byte", 1.0),
    "weight_bytes": ("weight_bytes", "nats_per_weight_byte", 1.0),
}


@dataclass(frozen=True, slots=True)
class Predicted:
    """Latencies of shapes by the analytic model. Draws share the constants, which belong to the machine, not to a shape."""

    shapes: Shapes
    machine: Machine
    work: Workload = field(default_factory=Workload)

    def estimates(self) -> pd.DataFrame:
        """One row for each shape: ``latency_s`` with its ends, ``latency_kind``, and whether it ``fits`` the memory."""
        ends = zip(LATENCIES, ENDS, strict=True)
        times = {name: self.machine.times(self.shapes, self.work, self.machine.at(end))["e2e_s"] for name, end in ends}
        fits = self.work.memory_bytes(self.shapes) <= self.machine.device.memory_bytes
        return pd.DataFrame(times).assign(latency_kind="predicted", fits=fits)

    def drawn(self, mask: np.ndarray, n_draws: int, rng: np.random.Generator) -> Array:
        """Latencies in seconds of the n shapes that a boolean array picks, shape (n_draws, n)."""
        constants = self.machine.drawn(n_draws, rng)
        return np.asarray(self.machine.times(self.shapes.where(mask), self.work, constants)["e2e_s"])


@dataclass(frozen=True, slots=True)
class Tabled:
    """Latencies of shapes from a table; draws of two shapes are independent.

    ``rows`` has the columns of ``Predicted.estimates``, the ends being those of 95 % intervals.
    """

    shapes: Shapes
    rows: pd.DataFrame
    work: Workload = field(default_factory=Workload)

    @classmethod
    def of(cls, table: pd.DataFrame, where: str = "the table", **asked: Any) -> Tabled:
        """From columns ``shape`` and ``latency_s``, and where they are there its ends and its kind; or from rows as
        `timing` records them, which must be of one engine, dtype, batch and length, and say most of the workload themselves.

        ``asked`` are fields of `Workload`. Without ends the value stands for them. Raises ``InputError`` for what is missing,
        mixed or no latency, for units other than seconds, and for rows of another workload than is asked for.
        """
        work = Workload(**asked)
        if "e2e_s" in table and "latency_s" not in table:
            table, measured = _as_latencies(table, where)
            work = replace(measured, **asked)
            for name in ("batch", "in_tokens", "out_tokens", "weight_bits"):
                if (wanted := getattr(work, name)) != (there := getattr(measured, name)):
                    raise InputError(f"{where}: its rows have {name} {there}, not {wanted}; leave one of the two out")
        if other_unit := [name for name in map(str, table) if re.fullmatch(r"latency(_low|_high)?_(ms|us|ns|min|h)", name)]:
            raise InputError(f"{where}: column {', '.join(other_unit)} is not in seconds; give latency_s and no other unit")
        runs.need(table, ("shape", "latency_s"), where, "give shape and latency_s, in seconds")
        ends = {name: pd.to_numeric(table.get(name, table["latency_s"]), errors="coerce") for name in LATENCIES}
        rows = pd.DataFrame(ends).assign(latency_kind=table.get("latency_kind", "measured"), fits=True).reset_index(drop=True)
        low, value, high = (rows[name] for name in LATENCIES)
        right = (low > 0) & (low <= value) & (value <= high) & np.isfinite(high) & rows["latency_kind"].isin(KINDS)
        if rows.empty or not right.all():
            row = f"row {int((~right).to_numpy().argmax()) + 2} has no latency" if len(rows) else "has no rows"
            raise InputError(
                f"{where}: {row}; give seconds with 0 < latency_low_s <= latency_s <= latency_high_s, and a latency_kind "
                f"of {', '.join(KINDS)}"
            )
        try:
            shapes = [Shape.parse(str(text)) for text in table["shape"]]
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        if len(set(shapes)) < len(shapes):
            twice = next(shape for shape in shapes if shapes.count(shape) > 1)
            raise InputError(f"{where}: {twice} stands in several rows; keep one latency for each shape")
        return cls(Shapes.of(shapes), rows, work)

    @classmethod
    def read(cls, path: str | Path, **asked: Any) -> Tabled:
        """``of`` the rows of a CSV file."""
        return cls.of(runs.read(path), str(path), **asked)

    def estimates(self) -> pd.DataFrame:
        return self.rows

    def drawn(self, mask: np.ndarray, n_draws: int, rng: np.random.Generator) -> Array:
        low, value, high = (self.rows[name].to_numpy()[mask] for name in LATENCIES)
        z = rng.standard_normal((n_draws, len(value))) / 1.96
        return np.asarray(value * np.exp(np.where(z > 0, z * np.log(high / value), z * np.log(value / low))))


Latencies = Predicted | Tabled
Draw = Callable[[int, np.random.Generator], Array]


def _as_latencies(rows: pd.DataFrame, where: str) -> tuple[pd.DataFrame, Workload]:
    """Rows of `timing` as a table of latencies, and the workload that they are of; rows without a shape are left out."""
    from morphlib.latency.timing import median_interval

    one = ["engine", "dtype", "batch", "in_tokens", "out_tokens"]
    runs.need(rows, ("shape", *one, "e2e_samples_s"), where, "give rows as morph latency measure records them")
    rows = rows.dropna(subset=["shape", "e2e_samples_s"])
    if mixed := [name for name in one if rows[name].nunique() > 1]:
        raise InputError(f"{where}: its rows differ in {', '.join(mixed)}; keep those of one")
    medians = [median_interval(np.array(text.split(), dtype=float)) for text in rows["e2e_samples_s"]]
    ends = {name: [getattr(median, end) for median in medians] for name, end in zip(LATENCIES, ENDS, strict=True)}
    work = Workload()
    for _, dtype, batch, in_tokens, out_tokens in rows[one].head(1).itertuples(index=False):
        bits: Bits = 32 if dtype == "fp32" else 16
        work = Workload(batch=int(batch), in_tokens=int(in_tokens), out_tokens=int(out_tokens), weight_bits=bits)
    return pd.DataFrame({"shape": rows["shape"].to_numpy(), **ends}), work


def without_latency(fit: Fit, shapes: Shapes, tokens: ArrayLike, work: Workload) -> dict[str, Array]:
    """What is known of shapes but for their latency, by the names of the columns of `scored`; arrays of shape (n,)."""
    numbers = {name: getattr(shapes, name) for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")}
    numbers |= {"n_params": shapes.n_params(fit.count), "tokens": np.broadcast_to(np.asarray(tokens, dtype=float), len(shapes))}
    return numbers | {
        "aspect_ratio": shapes.aspect_ratio,
        "loss": fit.law.predict(fit.values, runs.variables(numbers)),
        "kv_bytes": work.cache_bytes_per_token(shapes) * (work.in_tokens + work.out_tokens),
        "weight_bytes": shapes.weight_bytes(work.weight_bits),
    }


def scored(fit: Fit, latencies: Latencies, tokens: float) -> pd.DataFrame:
    """Every shape of ``latencies`` with its predicted loss (nats per token), latency, and bytes of weights and cache.

    Columns: the sizes of the shape, n_params (as the fit counts it), tokens, aspect_ratio, loss, ``kv_bytes`` (of all
    sequences when the last token is written), weight_bytes, and those of ``latencies.estimates``. Raises ``InputError``
    for a law that has no term for the shape.
    """
    if not SHAPE_VARIABLES & set(fit.law.variables):
        raise InputError(
            f"{fit.law.name} has no term for the shape, so it cannot choose one; take inference-aware, or BASE+SHAPE"
        )
    return pd.concat(
        [pd.DataFrame(without_latency(fit, latencies.shapes, tokens, latencies.work)), latencies.estimates()], axis=1
    )


def fitted_ranges(table: pd.DataFrame, fit: Fit) -> Ranges:
    """The least and the greatest N, D and R of the rows of ``table`` that were fitted."""
    variables = runs.variables(fit.rows(table))
    return {name: (float(variables[name].min()), float(variables[name].max())) for name in RANGES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """The best width and depth where both may be any number; ``loss`` in nats per token, with all tokens that are allowed.

    ``at_edge`` names the ranges of the fitted rows at whose edge it lies.
    """

    d_model: float
    n_layers: float
    n_params: float
    tokens: float
    loss: float
    latency_s: float
    at_edge: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What `select` found.

    ``candidates``: those within all caps, least loss first, with the columns of `scored`, ``shape`` and ``extrapolated``.
    With draws also ``loss_low`` and ``loss_high`` (95 %), ``probability_within`` the latency cap, ``probability_best`` among
    the candidates, ``expected_regret`` (nats, over the draws in which it is within), ``probability_not_worse`` than the
    chosen one, ``told_apart`` from it, and ``train``: the fewest that contain the best with the probability asked for.
    ``front``: what no other shape within the other caps beats in both loss and latency, fastest first.
    ``left_out``: how many shapes each reason leaves out that none before it does.
    ``shadow_prices``: nats of loss that one more unit of each cap saves; None for latencies from a table.
    ``probability_beyond``: that a shape whose latency is put above the cap is within it and better than all candidates;
    ``probability_none``: that no candidate is within it.
    """

    chosen: Shape
    candidates: pd.DataFrame
    front: pd.DataFrame
    left_out: dict[str, int]
    binding_caps: tuple[str, ...]
    shadow_prices: dict[str, float] | None
    optimum: Optimum | None
    probability_beyond: float = np.nan
    probability_none: float = np.nan


def select(
    table: pd.DataFrame,
    fit: Fit,
    latencies: Latencies,
    caps: Caps,
    *,
    parameters: Array | None = None,
    run_noise: bool = False,
    contain: float = CONTAIN,
    extrapolate: bool = False,
    seed: int = 0,
) -> Selection:
    """The shape of least predicted loss within the caps, and how sure it is the best.

    ``table`` is the one that was fitted. A run takes all tokens that are allowed. ``parameters``, shape (k, p), are draws
    of the law's parameters, such as ``uncertainty.bootstrap(...).values``; without them nothing is said about
    uncertainty. ``run_noise`` adds to each draw of each candidate the deviation of a single run from the law. Shapes
    outside the range of N, D and R of the fitted rows are left out unless ``extrapolate``. Raises ``InputError`` where no
    shape is left, naming the nearest one, and for a fit in which more tokens raise the loss.
    """
    every, ranges = scored(fit, latencies, caps.tokens), fitted_ranges(table, fit)
    if (without_latency(fit, latencies.shapes, 2 * caps.tokens, latencies.work)["loss"] > every["loss"]).all():
        raise InputError("by this fit more tokens raise the loss, so it cannot choose; add runs that vary N and D apart")
    # which shapes each reason leaves out, those that no cap can mend first
    outside = pd.DataFrame(
        {f"range of {name}": ~every[RANGES[name]].between(low / EDGE, high * EDGE) for name, (low, high) in ranges.items()}
    )
    beyond = pd.DataFrame({name: every[column] > getattr(caps, name) * EDGE for name, (column, *_) in CAPPED.items()})
    out = pd.concat([~every["fits"].rename("memory"), outside.iloc[:, : 0 if extrapolate else None], beyond], axis=1)
    kept = ~out.any(axis=1).to_numpy()
    if not kept.any():
        raise InputError(_nearest(every, latencies.shapes, caps, out, ranges))
    first_reason = out[~kept].idxmax(axis=1)

    eligible = ~out.drop(columns="latency_s").any(axis=1).to_numpy()
    shapes, inside = latencies.shapes.where(eligible), kept[eligible]
    listed = every[eligible].reset_index(drop=True)
    listed["shape"] = [str(shapes[i]) for i in range(len(shapes))]
    listed["extrapolated"] = outside[eligible].any(axis=1).to_numpy()
    best = int(np.flatnonzero(inside)[listed["loss"].to_numpy()[inside].argmin()])
    probabilities: dict[str, float] = {}
    if parameters is not None:
        deviation = _run_deviation(table, fit) if run_noise else 0.0
        drawn = partial(latencies.drawn, eligible)
        columns, probabilities = _odds(listed, fit, drawn, caps.latency_s, parameters, best, deviation, seed)
        listed = listed.assign(**columns)
    candidates = listed[inside].sort_values("loss", kind="stable").reset_index(drop=True)
    if parameters is not None:
        candidates["train"] = to_train(candidates["probability_best"].to_numpy(), contain)
    found, prices = None, None
    if isinstance(latencies, Predicted):
        bounds = None if extrapolate else ranges
        found = optimum(fit, shapes[best], latencies, caps, bounds)
        raised = {name: replace(caps, **{name: getattr(caps, name) * (1 + PRICE_STEP)}) for name in _finite(caps)}
        saved = {name: found.loss - optimum(fit, shapes[best], latencies, more, bounds).loss for name, more in raised.items()}
        prices = {CAPPED[name][1]: s / (PRICE_STEP * getattr(caps, name)) * CAPPED[name][2] for name, s in saved.items()}
        binding = (*(name for name, s in saved.items() if s > WORTH), *found.at_edge)
    else:
        # without it another shape of the table, that meets the other caps, would be better
        least = {name: every["loss"][~out.drop(columns=name).any(axis=1)].min() for name in out}
        binding = tuple(str(name) for name in out if name == "tokens" or least[name] < candidates["loss"][0])
    return Selection(
        chosen=shapes[best],
        candidates=candidates,
        front=listed[undominated(listed["loss"].to_numpy(), listed["latency_s"].to_numpy())].sort_values("latency_s"),
        left_out={str(reason): n for reason in out if (n := int((first_reason == reason).sum()))},
        binding_caps=binding,
        shadow_prices=prices,
        optimum=found,
        **probabilities,
    )


def _nearest(every: pd.DataFrame, shapes: Shapes, caps: Caps, out: pd.DataFrame, ranges: Ranges) -> str:
    """Why no shape is left: the one that comes nearest to the caps, or the reason that leaves most out."""
    hard = out.drop(columns=list(CAPPED))
    if hard.any(axis=1).all():
        reason = str(hard.sum().idxmax())
        where = "they do not fit the memory; take fewer bits, a smaller batch or shorter texts"
        if reason != "memory":
            name = reason.removeprefix("range of ")
            low, high = ranges[name]
            least, most = every[RANGES[name]].min(), every[RANGES[name]].max()
            there = f"{least:.4g} to {most:.4g}" if least < most else f"{least:.4g}"
            where = f"{name} of {there} is outside {low:.4g} to {high:.4g}, the range of the fitted rows"
            where += "; change the caps, or extrapolate"
        return f"none of {len(every)} shapes is left: {where}"
    ratios = pd.DataFrame({name: every[column] / getattr(caps, name) for name, (column, *_) in CAPPED.items()})
    nearest = int(ratios.max(axis=1).where(~hard.any(axis=1)).argmin())
    needed = ", ".join(
        f"{name} {every[CAPPED[name][0]][nearest]:.4g} where {getattr(caps, name):.4g} is allowed"
        for name in CAPPED
        if ratios[name][nearest] > EDGE
    )
    return f"no shape meets all caps: the nearest, {shapes[nearest]}, has {needed}; raise that cap or allow other shapes"


def _run_deviation(table: pd.DataFrame, fit: Fit) -> float:
    """s, the standard deviation of a run around the law, in nats per token; s^2 = SSE / (n - p), weighted as the fit."""
    rows = fit.rows(table)
    squares = fit.weights * (rows["loss"].to_numpy() - fit.loss_predicted[fit.fitted]) ** 2
    return float(np.sqrt(squares.sum() / max(1, len(rows) - len(fit.values))))


def _odds(
    listed: pd.DataFrame, fit: Fit, drawn: Draw, cap_s: float, refits: Array, best: int, deviation: float, seed: int
) -> tuple[dict[str, Array], dict[str, float]]:
    """What the draws say of every listed shape, those with a latency above the cap, which are no candidates, among them.

    Memory is some 35 bytes for each draw and shape, beside the chunk at work.
    """
    n_draws, n_shapes = len(refits), len(listed)
    candidate = (listed["latency_s"] <= cap_s * EDGE).to_numpy()
    variables, rng = runs.variables(listed), np.random.default_rng(seed)
    loss, within = np.empty((n_draws, n_shapes)), np.empty((n_draws, n_shapes), dtype=bool)
    step = max(1, CHUNK_NUMBERS // n_shapes)
    for start in range(0, n_draws, step):
        chunk = refits[start : start + step]
        noise = deviation * rng.standard_normal((len(chunk), n_shapes)) if deviation else 0.0
        loss[start : start + step] = fit.law.predict(chunk, variables) + noise
        within[start : start + step] = drawn(len(chunk), rng) <= cap_s
    counted = np.where(within, loss, np.inf)
    least = counted[:, candidate].min(axis=1)
    some = np.isfinite(least)
    winners = np.flatnonzero(candidate)[counted[some][:, candidate].argmin(axis=1)]
    with np.errstate(invalid="ignore"):  # infinity less infinity where no candidate is within the cap
        excess = np.where(within & some[:, np.newaxis], loss - least[:, np.newaxis], 0.0).sum(axis=0)
    not_worse = (loss <= loss[:, [best]]).mean(axis=0)
    low, high = np.quantile(loss, (0.025, 0.975), axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        columns = {
            "loss_low": low,
            "loss_high": high,
            "probability_within": within.mean(axis=0),
            "probability_best": np.bincount(winners, minlength=n_shapes) / n_draws,
            "expected_regret": excess / (within & some[:, np.newaxis]).sum(axis=0),
            "probability_not_worse": not_worse,
            "told_apart": not_worse < NOT_WORSE,
        }
    beyond = (counted[:, ~candidate].min(axis=1, initial=np.inf) < least).mean()
    return columns, {"probability_beyond": float(beyond), "probability_none": float((~some).mean())}


def to_train(probability_best: Array, contain: float = CONTAIN) -> np.ndarray:
    """The fewest candidates, as a boolean array, that contain the best one with probability ``contain``.

    ``probability_best``, shape (n,), is taken relative to its sum: there is no best where none is within the caps.
    Raises ``InputError`` for a probability that is none.
    """
    if not 0 < contain <= 1:
        raise InputError(f"the probability of containing the best is {contain}; give a number above 0, at most 1")
    order = np.argsort(-probability_best, kind="stable")
    before = np.cumsum(probability_best[order]) - probability_best[order]
    picked = np.zeros(len(order), dtype=bool)
    picked[order] = before < contain * probability_best.sum() * (1 - 1e-12)
    picked[order[0]] = True
    return picked


def undominated(loss: Array, latency_s: Array) -> np.ndarray:
    """The Pareto front as a boolean array: no other is as good in both loss and latency and better in one."""
    order = np.lexsort((loss, latency_s))
    least_before = np.minimum.accumulate(np.concatenate([[np.inf], loss[order][:-1]]))
    front = np.zeros(len(order), dtype=bool)
    front[order] = loss[order] < least_before
    return front


def _finite(caps: Caps) -> list[str]:
    return [name for name in CAPPED if np.isfinite(getattr(caps, name))]


def optimum(fit: Fit, like: Shape, latencies: Predicted, caps: Caps, ranges: Ranges | None = None) -> Optimum:
    """The least loss within the caps over any width and depth, by sequential quadratic programming (SLSQP of scipy).

    The rest of the shape follows ``like``, which must be within the caps: the feed-forward layer and the heads of keys
    and values keep their part of the width, vocabulary and tying stay. ``ranges`` as `fitted_ranges`, whose N and R
    bound it too. The searches start at ``like`` and around it; the best of those that end within the limits counts.
    """

    machine, work = latencies.machine, latencies.work
    limits = {name: ranges[name] for name in ("N", "R")} if ranges else {}

    @cache
    def at(log_width: float, log_depth: float) -> tuple[dict[str, float], list[float]]:
        """The numbers of a shape, and the pieces that its latency is the greatest of: that one has a kink, they have not."""
        width = np.exp([log_width])
        shape = replace(
            Shapes.of([like]),
            d_model=width,
            n_layers=np.exp([log_depth]),
            n_heads=np.ones(1),
            n_kv_heads=np.array([like.n_kv_heads / like.n_heads]),
            d_ff=width * like.d_ff / like.d_model,
        )
        numbers = without_latency(fit, shape, caps.tokens, work)
        numbers["latency_s"] = machine.times(shape, work, machine.at("value"))["e2e_s"]
        numbers["memory"] = work.memory_bytes(shape) / machine.device.memory_bytes
        pieces = machine.e2e_pieces_s(shape, work, machine.at("value"))
        return {name: float(number[0]) for name, number in numbers.items()}, [float(piece[0]) for piece in pieces]

    def room(x: Array) -> Array:
        """Logarithms of each limit over what is limited; at least zero within them."""
        row, pieces = at(*x)
        left = [-np.log(row["memory"]), *(np.log(caps.latency_s / np.array(pieces)) if np.isfinite(caps.latency_s) else ())]
        smooth = [name for name in _finite(caps) if name not in ("tokens", "latency_s")]
        left += [np.log(getattr(caps, name) / row[CAPPED[name][0]]) for name in smooth]
        for name, (low, high) in limits.items():
            left += [np.log(row[RANGES[name]] / low), np.log(high / row[RANGES[name]])]
        return np.array(left)

    centre = np.log([like.d_model, like.n_layers])
    ends = [centre]
    for away in ((0.0, 0.0), (-0.3, 0.3), (0.3, -0.3), (-0.6, 0.0)):
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            found = minimize(
                lambda x: at(*x)[0]["loss"],
                centre + away,
                method="SLSQP",
                constraints={"type": "ineq", "fun": room},
                options={"ftol": 1e-12, "maxiter": 200, "eps": 1e-6},
            ).x
            if np.isfinite(found).all() and room(found).min() > -1e-7:
                ends.append(found)
    row = min((at(*x)[0] for x in ends), key=lambda row: row["loss"])
    edges = {f"range of {name}": np.log(np.array(ends) / row[RANGES[name]]) for name, ends in limits.items()}
    return Optimum(
        **{name: row[name] for name in ("d_model", "n_layers", "n_params", "tokens", "loss", "latency_s")},
        at_edge=tuple(name for name, away in edges.items() if np.abs(away).min() < 1e-6),
    )


def lifetime(fit: Fit, shapes: Shapes, loss: float, inference_tokens: float, ranges: Ranges | None = None) -> pd.DataFrame:
    """What each shape costs over its life if it is trained until it has that loss: columns ``tokens`` and ``flops``.

    Sardana et al. 2024 (arXiv 2401.00448, section 2): 6 N D + 2 N D_inference FLOPs, with D the tokens at which
    L(N, D, R) = loss (nats per token), and N as the fit counts it. Both are infinite where no number of tokens reaches
    the loss, and where N, D or R is outside ``ranges``, as `fitted_ranges`. Raises ``InputError`` for a number of
    inference tokens below zero.
    """
    if not inference_tokens >= 0:
        raise InputError(f"inference_tokens is {inference_tokens}; give a number of at least zero")

    def numbers_at(tokens: ArrayLike) -> dict[str, Array]:
        return without_latency(fit, shapes, tokens, Workload())

    low, high = (np.full(len(shapes), np.log(end)) for end in TOKEN_RANGE)
    for _ in range(60):  # the loss falls with D: halving the range sixty times leaves nothing but rounding
        middle = (low + high) / 2
        above = numbers_at(np.exp(middle))["loss"] > loss
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    at_end = numbers_at(np.exp(high))
    reached = numbers_at(TOKEN_RANGE[1])["loss"] <= loss
    for name, (least, most) in (ranges or {}).items():
        reached &= (at_end[RANGES[name]] >= least / EDGE) & (at_end[RANGES[name]] <= most * EDGE)
    tokens, n_params = np.where(reached, at_end["tokens"], np.inf), at_end["n_params"]
    return pd.DataFrame({"tokens": tokens, "flops": 6 * n_params * tokens + 2 * n_params * inference_tokens})


class Study(NamedTuple):
    """What `predict_rank_select` did: the ``released`` shape, and what was ``trained``, least predicted loss first."""

    released: Shape
    trained: dict[Shape, Any]


def predict_rank_select(
    shapes: Shapes,
    *,
    predict: Callable[[Shapes], Array],
    measure: Callable[[Shape], float],
    train: Callable[[Shape], Any],
    evaluate: Callable[[Any], float],
    max_latency_s: float,
    contain: float = CONTAIN,
) -> Study:
    """The paper's method (section 2.3 and figure 6) with every step given: the best shape within a latency.

    ``predict`` gives losses of all n shapes, shape (1 + k, n): a row of values, then k draws. ``measure`` gives the
    latency of one in seconds. Those within ``max_latency_s`` are ranked by loss; the fewest that contain the best with
    probability ``contain`` over the draws (without draws: the first alone) go through ``train``, and what that returns
    through ``evaluate``, whose score is the better the higher. The best score is released, the lower predicted
    loss where scores are equal. Raises ``InputError`` where no shape is within the latency.
    """
    losses, latency_s = np.atleast_2d(predict(shapes)), np.array([measure(shapes[i]) for i in range(len(shapes))])
    within = np.flatnonzero(latency_s <= max_latency_s)
    if not len(within):
        fastest = int(latency_s.argmin())
        raise InputError(
            f"no shape is within {max_latency_s:.4g} s: the fastest, {shapes[fastest]}, takes {latency_s[fastest]:.4g} s; "
            "raise the latency or give other shapes"
        )
    ranked = within[losses[0, within].argsort(kind="stable")]
    draws = losses[1:, ranked] if len(losses) > 1 else losses[:, ranked]
    odds = np.bincount(draws.argmin(axis=1), minlength=len(ranked)) / len(draws)
    trained = {shapes[int(i)]: train(shapes[int(i)]) for i in ranked[to_train(odds, contain)]}
    # of equal scores the first, which has the lower predicted loss
    return Study(max(trained, key=lambda shape: evaluate(trained[shape])), trained)
