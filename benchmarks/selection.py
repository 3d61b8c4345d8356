"""The choice of a shape: time and memory against the number of candidates, beside the same by one shape at a time.

python benchmarks/selection.py
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy; one thread, stated with the result

import platform
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from morphlib import fitting, laws, runs, selection, uncertainty
from morphlib.latency import analytic
from morphlib.latency.analytic import Machine
from morphlib.selection import Caps, Predicted
from morphlib.shapes import Shapes, candidates

CAPS = Caps(params=1.66e9, tokens=29e9, latency_s=2.5)
REPEATS = 5


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """The median of the seconds of a few runs after one that is not counted, and the peak of memory in MB of one more."""
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return float(np.median(seconds)), peak


def spread(n: int) -> Shapes:
    """n shapes within the parameters and the ranges of the paper's runs, so that every one of them is weighed."""
    every = candidates(1.66e9, width_multiple=1, head_sizes=(1,), depths=range(4, 65))
    ratio, n_params = every.aspect_ratio, every.n_params("total")
    inside = np.flatnonzero((ratio > 16) & (ratio < 240) & (n_params > 8e7))
    return every.where(np.sort(np.random.default_rng(0).choice(inside, n, replace=n > len(inside))))


def main() -> None:
    table = runs.load("paper")
    fit = fitting.fit(table, laws.get("inference-aware"))
    refits = uncertainty.bootstrap(table, fit, 1000, cluster="name").values
    machine = Machine.of("A100-40GB")
    print(f"{platform.machine()}, one thread, numpy {np.__version__}, median of {REPEATS} runs\n")

    print(f"{'loss, latency and memory of each shape':<44}{'shapes':>8}{'seconds':>10}{'peak MB':>10}")
    for n in (1_000, 10_000, 100_000):
        latencies = Predicted(spread(n), machine)
        seconds, peak = timed(lambda latencies=latencies: selection.scored(fit, latencies, CAPS.tokens))  # type: ignore[misc]
        print(f"{'all at once':<44}{n:>8}{seconds:>10.3f}{peak:>10.1f}")
    some = spread(500)
    one_by_one = [some[i] for i in range(len(some))]

    def loop() -> None:
        for shape in one_by_one:
            planned = {
                "n_params": shape.n_params("total"),
                "tokens": CAPS.tokens,
                "d_model": shape.d_model,
                "n_layers": shape.n_layers,
            }
            fit.law.predict(fit.values, runs.variables({name: np.array([number]) for name, number in planned.items()}))
            analytic.predict(shape, "A100-40GB")  # which also sums up the memory

    seconds, peak = timed(loop)
    print(f"{'one after the other':<44}{len(some):>8}{seconds:>10.3f}{peak:>10.1f}")

    print(f"\n{'selection with draws of law and latency':<36}{'draws':>8}{'shapes':>8}{'seconds':>10}{'peak MB':>10}")
    for n, draws in ((1_000, 1000), (5_000, 1000), (25_000, 1000), (5_000, 250)):
        latencies, drawn = Predicted(spread(n), machine), refits[:draws]
        seconds, peak = timed(
            lambda latencies=latencies, drawn=drawn: selection.select(table, fit, latencies, CAPS, parameters=drawn)  # type: ignore[misc]
        )
        print(f"{'morphlib.selection.select':<36}{draws:>8}{n:>8}{seconds:>10.3f}{peak:>10.1f}")


if __name__ == "__main__":
    main()
