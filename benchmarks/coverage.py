"""How often intervals hold the truth: simulated losses on the designs of the paper's tables.

The truth is the inference-aware law fitted to the 76 rows or to the 27 of ``fit_main``, with tied (5 parameters) and free
(7 parameters) exponents. The noise has the root-mean-square error of that fit: independent, or 70 % of its variance shared
by the rows of a shape. Each simulated table is fitted afresh and every 95 % interval is asked whether it holds the truth.

python benchmarks/coverage.py --datasets 1000     all eight settings, about two hours
python benchmarks/coverage.py --quick             50 data sets each, five minutes
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import product

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from morphlib import diagnostics, fitting, laws, runs
from morphlib import uncertainty as u
from morphlib.errors import InputError
from morphlib.fitting import Fit

SETTINGS = list(product((76, 27), ("tied", "free"), ("independent", "shape")))
SHARED = 0.7  # of the variance, between rows of one shape
PROFILE_EVERY = 10  # profiles are slow: of every tenth data set
SHAPES_1B = ("1B_v1", "1B_v3", "1B_v6", "1B_v8")


def noise_of(names: pd.Series, kind: str, size: float, rng: np.random.Generator) -> np.ndarray:
    """Normal noise of standard deviation ``size``, a share of its variance common to the rows of one name."""
    shared = SHARED if kind == "shape" else 0.0
    codes, labels = pd.factorize(names)
    common = rng.normal(0.0, np.sqrt(shared), len(labels))[codes]
    return size * (common + rng.normal(0.0, np.sqrt(1 - shared), len(names)))


def plain(fit: Fit, errors: np.ndarray, freedom: int) -> pd.DataFrame:
    """Estimate -+ t standard errors, without logarithms."""
    half = stdtrit(freedom, 0.975) * errors
    return pd.DataFrame({"low": fit.values - half, "high": fit.values + half}, index=list(fit.parameters))


def parameter_intervals(table: pd.DataFrame, fit: Fit, resamples: int, with_profile: bool) -> dict[str, pd.DataFrame | None]:
    """Every kind of interval of the parameters, None where there is none."""

    def attempt(make: Callable[[], pd.DataFrame]) -> pd.DataFrame | None:
        try:
            return make()
        except InputError:
            return None

    made: dict[str, pd.DataFrame | None] = {}
    wald = attempt(lambda: u.parameter_interval(fit))
    errors = np.array(list(fit.standard_errors.values()))
    made["Wald t, no logarithm"] = None if wald is None else plain(fit, errors, len(table) - len(errors))
    made["Wald t"] = wald
    made["HC3 t"] = attempt(lambda: u.parameter_interval(fit, covariance=u.cluster_covariance(table, fit)))
    made["CR3 by shape t"] = attempt(lambda: u.parameter_interval(fit, covariance=u.cluster_covariance(table, fit, "name")))
    for label, cluster in (("row", None), ("shape", "name")):
        kinds = [f"bootstrap by {label} {kind}" for kind in ("t, no logarithm", "t", "percentile")]
        made |= dict.fromkeys(kinds)
        try:
            resampled = u.bootstrap(table, fit, resamples, cluster=cluster)
        except InputError:
            continue
        low = np.quantile(resampled.values, 0.025, axis=0, method="lower")
        high = np.quantile(resampled.values, 0.975, axis=0, method="higher")
        percentile = pd.DataFrame({"low": low, "high": high}, index=list(fit.parameters))
        without = plain(fit, resampled.values.std(axis=0, ddof=1), resampled.n_clusters - 1)
        made |= dict(zip(kinds, (without, resampled.interval(), percentile), strict=True))
    if with_profile:
        made["profile"] = attempt(
            lambda: pd.DataFrame.from_dict(
                {name: u.profile_interval(table, fit, name) for name in fit.parameters}, orient="index", columns=["low", "high"]
            )
        )
    return made


def predictions(table: pd.DataFrame, fit: Fit, new: pd.DataFrame) -> dict[str, pd.DataFrame | None]:
    """Intervals at new rows, of what the law says there and of a run."""
    made: dict[str, pd.DataFrame | None] = {}
    slopes = fit.law.jacobian(fit.values, fit.variables(new))
    own = u.Covariance(fit.covariance, len(table) - len(fit.values), len(table))
    for label, cluster in (("Wald t", None), ("CR3 by shape t", "name")):
        try:
            covariance = u.cluster_covariance(table, fit, cluster) if cluster else own
            of_run = u.prediction_interval(new, fit, table, covariance=covariance)
        except InputError:
            made |= {f"law at 1B, {label}": None, f"run at 1B, {label}": None}
            continue
        spread = np.sqrt(np.einsum("np,pq,nq->n", slopes, covariance.matrix, slopes))
        half = stdtrit(covariance.degrees_of_freedom, 0.975) * spread
        of_law = of_run.assign(low=of_run["loss"] - half, high=of_run["loss"] + half)
        made |= {f"law at 1B, {label}": of_law, f"run at 1B, {label}": of_run}
    return made


def simulate(paper: pd.DataFrame, setting: tuple[int, str, str], datasets: int, resamples: int, seed: int) -> None:
    """Print the table of one setting."""
    n_rows, exponents, noise = setting
    law = laws.get("inference-aware", exponents)
    truth = fitting.fit(paper, law, None if n_rows == len(paper) else "fit_main")
    size = diagnostics.metrics_by_use(paper, truth)["fitted"].rmse
    rows = paper[truth.fitted].reset_index(drop=True)
    new = paper[paper["name"].isin(SHAPES_1B)]
    true_values = truth.values
    law_at_rows, law_at_new = truth.predict(rows), truth.predict(new)
    held, widths = defaultdict(list), defaultdict(list)
    tried: defaultdict[str, int] = defaultdict(int)
    start = time.monotonic()
    for i in range(datasets):
        rng = np.random.default_rng([seed, SETTINGS.index(setting), i])
        table = rows.assign(loss=law_at_rows + noise_of(rows["name"], noise, size, rng))
        run_at_new = law_at_new + noise_of(new["name"], noise, size, rng)
        fit = fitting.fit(table, law, n_starts=8)
        made = parameter_intervals(table, fit, resamples, i % PROFILE_EVERY == 0)
        reference = made["Wald t, no logarithm"]
        made |= predictions(table, fit, new)
        for label, interval in made.items():
            tried[label] += 1
            if interval is None:
                continue
            low, high = interval["low"].to_numpy(), interval["high"].to_numpy()
            wanted = {"law": law_at_new, "run": run_at_new}.get(label[:3], true_values)
            held[label].append((low <= wanted) & (wanted <= high))
            if wanted is true_values and reference is not None:
                widths[label].append((high - low) / (reference["high"] - reference["low"]).to_numpy())
        if sys.stderr.isatty() or (i + 1) % max(1, datasets // 5) == 0:
            end = time.localtime(time.time() + (time.monotonic() - start) * (datasets - i - 1) / (i + 1))
            print(f"{setting}: {i + 1} of {datasets} data sets, done at {time.strftime('%H:%M:%S', end)}", file=sys.stderr)
    print(f"\n{n_rows} rows, {exponents} exponents ({len(law.parameters)}), noise {noise}, {datasets} data sets")
    print(f"{'95 % interval':<36}{'mean %':>8}{'worst %':>9}  {'worst of':<9}{'width':>7}{'sets':>6}{'none':>6}")
    for label, n_tried in tried.items():
        given = len(held[label])
        if not given:
            print(f"{label:<36}{'no interval in any data set':>30}{n_tried:>15}")
            continue
        share = 100 * np.mean(held[label], axis=0)
        names = SHAPES_1B if " at 1B" in label else law.parameters
        width = f"{np.median(widths[label]):.2f}" if widths[label] else ""
        worst = f"{share.min():>9.1f}  {names[share.argmin()]:<9}"
        print(f"{label:<36}{share.mean():>8.1f}{worst}{width:>7}{n_tried:>6}{n_tried - given:>6}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=1000, help="simulated tables for each setting")
    parser.add_argument("--resamples", type=int, default=200, help="of each bootstrap")
    parser.add_argument("--rows", type=int, choices=(76, 27), help="only this design")
    parser.add_argument("--exponents", choices=("tied", "free"), help="only these exponents")
    parser.add_argument("--quick", action="store_true", help="50 data sets")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("mean and worst coverage over parameters (or the 1B models); width: median, relative to Wald t without logarithm")
    print(f"{arguments.resamples} resamples; profile on every {PROFILE_EVERY}th data set; none: data sets without an interval")
    paper = runs.load("paper")
    for setting in SETTINGS:
        if arguments.rows in (None, setting[0]) and arguments.exponents in (None, setting[1]):
            simulate(paper, setting, 50 if arguments.quick else arguments.datasets, arguments.resamples, arguments.seed)


if __name__ == "__main__":
    main()
