"""The fitter against what people write by hand, side by side in one process, on the paper's own rows.

python benchmarks/fitting.py             the table
python benchmarks/fitting.py --plot F    also time and memory against rows and starts, drawn into F (svg or png)

lmfit and the PyPI package chinchilla take part where they are installed; neither is a dependency.
"""

from __future__ import annotations

import os

# one thread for everyone: the arrays are small, and threads that wait for each other would be timed instead
os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import argparse
import contextlib
import importlib.util
import io
import itertools
import platform
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import scipy
from scipy.optimize import least_squares

from morphlib import fitting, laws, runs
from morphlib.laws import Array, Law

SAME = 1e-6  # relative difference of sums of squares that counts as the same optimum


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def show(what: str, times: list[float], note: str = "") -> None:
    ms = 1e3 * np.array(times)
    print(f"{what:<52}{np.median(ms):>11.2f}{np.quantile(ms, 0.95):>11.2f}   {note}", flush=True)


class ByHand:
    """What a careful person writes with scipy: scaled variables, the same starts, a loop over them."""

    def __init__(self, law: Law, rows: pd.DataFrame) -> None:
        self.law = law
        variables = runs.variables(rows)
        self.units = {name: float(np.exp(np.log(variables[name]).mean())) for name in law.variables}
        self.variables = {name: variables[name] / self.units[name] for name in law.variables}
        self.loss = rows["loss"].to_numpy()

    def starts(self, n: int, seed: int) -> Array:
        rng = np.random.default_rng(seed)
        columns = []
        for name in self.law.parameters:
            if name in self.law.linear:
                columns.append(np.full(n, 2.0 if name == "E" else 1.0))
            elif name == "epsilon":
                columns.append(np.exp(rng.uniform(np.log(1e-3), np.log(0.3), n)))
            else:
                columns.append(np.exp(rng.uniform(np.log(0.1), np.log(2.0), n)))
        return np.stack(columns, axis=1)

    def search(self, start: Array, weights: Array | None, method: str, analytic: bool) -> tuple[Array, float]:
        root = 1.0 if weights is None else np.sqrt(weights)

        def residual(values: Array) -> Array:
            return root * (self.law.predict(values, self.variables) - self.loss)

        def jacobian(values: Array) -> Array:
            return np.reshape(root, (-1, 1)) * self.law.jacobian(values, self.variables)

        with np.errstate(all="ignore"):
            try:
                found = least_squares(residual, start, jac=jacobian if analytic else "2-point", method=method, max_nfev=1000)
            except ValueError:
                return start, np.inf
        return found.x, 2 * found.cost

    def best(self, n: int, seed: int, method: str, analytic: bool) -> float:
        return min(self.search(start, None, method, analytic)[1] for start in self.starts(n, seed))


def global_fits(paper: pd.DataFrame, n_seeds: int) -> None:
    rows = paper[paper["fit_main"] == 1].reset_index(drop=True)
    law = laws.get("inference-aware", "free")
    by_hand = ByHand(law, rows)
    ones = np.ones((1, len(rows)))
    best = fitting.solve(rows, law, ones, n_starts=200).sse[0]

    def ours(seed: int) -> float:
        return float(fitting.solve(rows, law, ones, seed=seed).sse[0])

    ours(0)
    times: dict[str, list[float]] = {"ours": [], "lm": [], "trf": []}
    hits = dict.fromkeys(times, 0)
    rivals = {"lm": ("lm", True), "trf": ("trf", False)}
    for seed in range(n_seeds):
        start = time.perf_counter()
        hits["ours"] += ours(seed) <= best * (1 + SAME)
        times["ours"].append(time.perf_counter() - start)
        for name, (method, analytic) in rivals.items():
            if seed % 10 == 0:  # they take as long each time; a tenth of the seeds is enough
                start = time.perf_counter()
                hits[name] += by_hand.best(24, seed, method, analytic) <= best * (1 + SAME)
                times[name].append(time.perf_counter() - start)
    print("\n7 parameters, 27 rows, global search" + " " * 16 + f"{'median ms':>11}{'p95 ms':>11}   at the optimum")
    show("morphlib, 12 starts", times["ours"], f"{hits['ours']} of {len(times['ours'])} seeds")
    for name, label in (("lm", "scipy lm, analytic Jacobian, 24 starts"), ("trf", "scipy trf, numeric Jacobian, 24 starts")):
        ratio = np.median(times[name]) / np.median(times["ours"])
        show(label, times[name], f"{hits[name]} of {len(times[name])} seeds; {ratio:.0f}x our time")
    others(rows, law, by_hand, best)


def others(rows: pd.DataFrame, law: Law, by_hand: ByHand, best: float) -> None:
    """lmfit from the same starts; chinchilla on its own law (no shape term) with its default objective."""
    if importlib.util.find_spec("lmfit"):
        import lmfit

        def residual(parameters: lmfit.Parameters) -> Array:
            values = [parameters[name].value for name in law.parameters]
            return law.predict(values, by_hand.variables) - by_hand.loss

        def search() -> float:
            found = []
            for start in by_hand.starts(24, 0):
                parameters = lmfit.create_params(**dict(zip(law.parameters, start.tolist(), strict=True)))
                with np.errstate(all="ignore"), contextlib.suppress(ValueError):
                    found.append(lmfit.minimize(residual, parameters, method="leastsq", max_nfev=5000).chisqr)
            return min(found)

        start = time.perf_counter()
        at_best = search() <= best * (1 + SAME)
        show(f"lmfit {lmfit.__version__}, leastsq, 24 starts", [time.perf_counter() - start], f"{int(at_best)} of 1 seed")
    else:
        print("lmfit is not installed")
    if importlib.util.find_spec("chinchilla") and importlib.util.find_spec("attrdictx"):
        from chinchilla import Chinchilla

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            grid = {"E": [0.5, 1.0], "A": [5.0, 10.0], "B": [5.0, 10.0], "alpha": [0.3, 0.6], "beta": [0.3, 0.6]}
            model = Chinchilla(folder, param_grid=grid, log_level=50)
            for row in rows.itertuples():
                model.database.append(C=6 * row.n_params * row.tokens, N=row.n_params, D=row.tokens, loss=row.loss)
            elapsed = seconds(lambda: model.fit(parallel=False))
        show("chinchilla, 5-parameter law, 32 starts", [elapsed], "its own law and objective")
    else:
        print("chinchilla is not installed")


def bootstraps(paper: pd.DataFrame, n_resamples: int, n_by_hand: int) -> None:
    law = laws.get("inference-aware", "free")
    fit = fitting.fit(paper, law)
    near = fit.values[len(law.linear) :]
    rng = np.random.default_rng(0)
    _, cluster = np.unique(paper["name"], return_inverse=True)
    n_clusters = cluster.max() + 1
    drawn = rng.integers(0, n_clusters, (n_resamples, n_clusters))
    weights = np.stack([np.bincount(row, minlength=n_clusters)[cluster] for row in drawn]).astype(float)

    def ours() -> fitting.Solutions:
        return fitting.solve(paper, law, weights, n_starts=0, near=near)

    ours()
    times = [seconds(ours) for _ in range(5)]
    best = np.minimum(ours().sse, fitting.solve(paper, law, weights, n_starts=16, near=near).sse)
    at_best = (ours().sse <= best * (1 + SAME)).mean()
    print(f"\n{n_resamples} cluster-bootstrap refits, 76 rows, 7 parameters" + f"{'median ms':>16}{'p95 ms':>11}")
    show("morphlib, all at once, warm", times, f"{at_best:.1%} at the optimum")
    by_hand = ByHand(law, paper)
    back = {name: 1 / unit for name, unit in by_hand.units.items()}
    warm = law.to_raw(fit.values, back)
    for label, method, analytic in (("lm, analytic", "lm", True), ("trf, numeric", "trf", False)):

        def loop(method: str = method, analytic: bool = analytic) -> None:
            for row in weights[:n_by_hand]:
                by_hand.search(warm, row, method, analytic)

        scaled = seconds(loop) * n_resamples / n_by_hand
        note = f"{scaled / np.median(times):.0f}x our time; {n_by_hand} refits measured, scaled to {n_resamples}"
        show(f"scipy {label} Jacobian, warm loop", [scaled], note)


def draws(paper: pd.DataFrame) -> None:
    rows = paper[paper["fit_main"] == 1].reset_index(drop=True)
    groups = [np.flatnonzero((rows["family"] == f) & (rows["budget"] == "20N")) for f in rows["family"].unique()]
    groups.append(np.flatnonzero(rows["budget"] == "160N"))
    chosen = np.array(list(itertools.product(*groups)))
    weights = np.zeros((len(chosen), len(rows)))
    weights[np.arange(len(chosen))[:, None], chosen] = 1.0

    def both() -> None:
        for name in ("chinchilla", "inference-aware"):
            fitting.solve(rows, laws.get(name), weights, n_starts=2, positive=False)

    both()
    print(f"\n{len(chosen)} random draws of six rows, both laws" + " " * 11 + f"{'median ms':>11}{'p95 ms':>11}")
    show("morphlib, all at once, 2 starts", [seconds(both) for _ in range(5)])


def growth(paper: pd.DataFrame, target: Path) -> None:
    """Time and memory against rows, to 10^5, and against starts."""
    from matplotlib import pyplot

    from morphlib import report

    law = laws.get("inference-aware", "free")
    fit = fitting.fit(paper, law)
    rng = np.random.default_rng(0)
    figure, axes = pyplot.subplots(1, 2, figsize=(7.2, 3.2))
    print(f"\n{'rows':>10}{'starts':>10}{'seconds':>12}{'peak MB':>12}")
    for axis, cases in zip(axes, ([(10**k, 4) for k in (2, 3, 4, 5)], [(76, s) for s in (10, 100, 1000, 10000)]), strict=True):
        points = []
        for n_rows, n_starts in cases:
            rows = paper.sample(n_rows, replace=True, random_state=0).reset_index(drop=True)
            rows["loss"] = fit.predict(rows) + rng.normal(0, 0.01, n_rows)
            ones = np.ones((1, n_rows))
            elapsed = seconds(lambda rows=rows, ones=ones, s=n_starts: fitting.solve(rows, law, ones, n_starts=s))
            tracemalloc.start()
            fitting.solve(rows, law, ones, n_starts=n_starts)
            peak = tracemalloc.get_traced_memory()[1] / 1e6
            tracemalloc.stop()
            points.append((n_rows if axis is axes[0] else n_starts, elapsed, peak))
            print(f"{n_rows:>10}{n_starts:>10}{elapsed:>12.3f}{peak:>12.1f}", flush=True)
        x, elapsed, peak = zip(*points, strict=True)
        axis.loglog(x, elapsed, marker=report.MARKERS[0], label="seconds")
        axis.loglog(x, peak, marker=report.MARKERS[1], label="peak memory, MB")
        axis.set_xlabel("rows (4 starts)" if axis is axes[0] else "starts (76 rows)")
    axes[0].legend()
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100, help="seeds of the global search (default: %(default)s)")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory against rows and starts")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, one thread, numpy {np.__version__}, scipy {scipy.__version__}")
    paper = runs.load("paper")
    global_fits(paper, arguments.seeds)
    bootstraps(paper, arguments.resamples, n_by_hand=50)
    draws(paper)
    if arguments.plot:
        growth(paper, arguments.plot)


if __name__ == "__main__":
    main()
