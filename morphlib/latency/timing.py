"""The timing harness: what is measured, when it is enough, and one row for each measurement.

Times are in seconds. For a generation of n tokens from a prompt, with t_i the time at which token i was chosen:

    TTFT       = t_1                        time to first token: the prefill and one choice
    E2E        = the whole call             synchronized on both sides, by a monotonic clock
    TPOT       = (E2E - TTFT) / (n - 1)     time per output token after the first
    ITL_i      = t_(i+1) - t_i              inter-token latency, each gap by itself
    throughput = batch n / E2E              tokens per second, of all sequences together
    KV cache   = 2 layers kv_heads head_size (in + out) batch bytes_per_number

TTFT is measured twice, from the first token of whole generations and by generations of one token; the two must agree.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from morphlib import __version__
from morphlib.errors import InputError
from morphlib.latency.engines import Configuration, Worker
from morphlib.latency.hardware import Estimate
from morphlib.shapes import Shape

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray

PERCENTILES = (5, 50, 95)
FIRST_TOKEN_RUNS = 5  # generations of one token, for the second measure of TTFT
TTFT_TOLERANCE = 0.03  # beyond the noise of the two, within which the two measures of TTFT agree
SHORT_SENTENCE_TOKENS = 8
DISTURBED = 0.05  # share of the cores in use that other programs may take before a row says so
DISTURBED_ELSEWHERE = 0.2  # of the other cores, which share caches, memory, and on a virtual machine often a core


@dataclass(frozen=True, slots=True)
class Stopping:
    """When enough is measured: at least ``min_runs`` and ``min_s``, and the median known to ``noise``; at most ``cap_s``.

    Even at the cap each configuration has ``cap_runs`` runs.
    """

    min_runs: int = 10
    min_s: float = 10.0
    noise: float = 0.005
    cap_s: float = 90.0
    cap_runs: int = 3

    def enough(self, e2e_s: Sequence[float]) -> bool:
        return len(e2e_s) >= self.min_runs and sum(e2e_s) >= self.min_s and relative_noise(np.array(e2e_s)) <= self.noise

    def over(self, e2e_s: Sequence[float]) -> bool:
        return len(e2e_s) >= self.cap_runs and sum(e2e_s) >= self.cap_s


QUICK = Stopping(min_runs=3, min_s=0.5, noise=0.05, cap_s=5.0)


def relative_noise(values: Array) -> float:
    """The standard error of the median of ``values``, shape (n,), over the median.

    The normal approximation 1.2533 s / sqrt(n), with s = IQR / 1.349 so that one slow run in ten does not count.
    Infinite for fewer than two values.
    """
    if len(values) < 2:
        return np.inf
    quartile_1, median, quartile_3 = np.percentile(values, (25, 50, 75))
    return float(1.2533 * (quartile_3 - quartile_1) / 1.349 / np.sqrt(len(values)) / median)


def ratio_of_medians(a_s: Array, b_s: Array, n_resamples: int = 2000, seed: int = 0) -> Estimate:
    """median(a) / median(b) of samples of shapes (n,) and (m,), with a bootstrap 95 % percentile interval."""
    rng = np.random.default_rng(seed)
    medians = [np.median(rng.choice(values, (n_resamples, len(values))), axis=1) for values in (a_s, b_s)]
    value = np.median(a_s) / np.median(b_s)
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5))
    # of very few samples the percentiles can miss the ratio itself
    return Estimate(float(value), float(min(low, value)), float(max(high, value)), "bootstrap of the ratio of medians")


def median_interval(values: Array, n_resamples: int = 2000, seed: int = 0) -> Estimate:
    """The median of ``values``, shape (n,), with a bootstrap 95 % percentile interval."""
    return ratio_of_medians(values, np.ones(1), n_resamples, seed)


@dataclass(slots=True)
class Measurement:
    """All samples of one configuration, and what ran.

    ``e2e_s`` has one entry per generation and ``token_times_s`` one array of shape (out_tokens,); ``ttft_alone_s`` comes
    from generations of one token. ``other_load`` is the share that other programs had of the cores in use, and
    ``load_elsewhere`` of the other cores. ``error`` is the one line that says why there is nothing.
    """

    configuration: Configuration
    facts: dict[str, Any] = field(default_factory=dict)
    e2e_s: list[float] = field(default_factory=list)
    token_times_s: list[Array] = field(default_factory=list)
    ttft_alone_s: list[float] = field(default_factory=list)
    converged: bool = False
    other_load: float = np.nan
    load_elsewhere: float = np.nan
    error: str | None = None

    def samples(self, name: str) -> Array:
        """All samples of ``e2e_s``, ``ttft_s``, ``tpot_s`` or ``itl_s``, shape (n,); of one token none of the last two."""
        e2e_s, token_times_s = np.array(self.e2e_s), np.array(self.token_times_s).reshape(len(self.e2e_s), -1)
        if name == "e2e_s":
            return e2e_s
        if name == "ttft_s":
            return token_times_s[:, 0]
        if name == "itl_s":
            return np.diff(token_times_s, axis=1).ravel()
        n = self.configuration.out_tokens
        return (e2e_s - token_times_s[:, 0]) / (n - 1) if n > 1 else np.empty(0)

    @property
    def ttft_agrees(self) -> bool:
        """Whether the two measures of TTFT differ by less than their noise allows."""
        if not self.ttft_alone_s:
            return True
        both = [self.samples("ttft_s"), np.array(self.ttft_alone_s)]
        allowed = TTFT_TOLERANCE + 3 * sum(relative_noise(values) for values in both)
        medians = [np.median(values) for values in both]
        return bool(abs(medians[0] / medians[1] - 1) <= allowed)

    def row(self) -> dict[str, Any]:
        """The measurement as one row of a table; percentiles are of all samples."""
        c = self.configuration
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= asdict(c) | {name: value for name, value in self.facts.items() if name in COLUMNS}
        row |= {"n_runs": len(self.e2e_s), "converged": int(self.converged), "noise": relative_noise(np.array(self.e2e_s))}
        for name in ("e2e_s", "ttft_s", "tpot_s", "itl_s"):
            samples = self.samples(name)
            for percentile in PERCENTILES:
                column = name if percentile == 50 else f"{name}_p{percentile}"
                row[column] = float(np.percentile(samples, percentile)) if samples.size else np.nan
        row["kv_bytes_per_token"] = 2 * row["n_layers"] * row["n_kv_heads"] * row["head_size"] * (4 if c.dtype == "fp32" else 2)
        with contextlib.suppress(ValueError):  # a model that Shape does not describe has no shape, only sizes
            if row["built_as"] == "llama" and row["n_heads"] * row["head_size"] == row["d_model"]:
                row["shape"] = str(
                    Shape(
                        **{
                            name: row[name]
                            for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "vocab", "tied")
                        }
                    )
                )
        row["ttft_alone_s"] = float(np.median(self.ttft_alone_s)) if self.ttft_alone_s else np.nan
        row["ttft_agrees"] = int(self.ttft_agrees)
        row["tokens_per_s"] = c.batch * c.out_tokens / row["e2e_s"]
        row["e2e_samples_s"] = " ".join(f"{value:.6g}" for value in self.e2e_s)
        row |= {
            "other_load": self.other_load,
            "load_elsewhere": self.load_elsewhere,
            "disturbed": int(self.other_load > DISTURBED or self.load_elsewhere > DISTURBED_ELSEWHERE),
        }
        return row | _provenance(row["ran_on"] == "cuda")


_KEY = [f.name for f in fields(Configuration)]
COLUMNS = (
    *_KEY,
    *(
        "shape",
        "built_as",
        "weights",
        "d_model",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "head_size",
        "d_ff",
        "vocab",
        "tied",
        "n_params",
    ),
    *("kv_bytes_per_token", "peak_memory_bytes", "n_runs", "converged", "noise"),
    *(f"{name}{end}" for name in ("e2e_s", "ttft_s", "tpot_s", "itl_s") for end in ("", "_p5", "_p95")),
    *("ttft_alone_s", "ttft_agrees", "tokens_per_s", "e2e_samples_s", "other_load", "load_elsewhere", "disturbed"),
    *("ran_on", "hardware", "clock_mhz", "throttled", "python", "torch", "library", "commit", "date"),
)


def measure(
    configurations: Sequence[Configuration],
    stopping: Stopping = Stopping(),
    *,
    warm_up: tuple[int, int] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Measurement]:
    """Measure configurations in turn, A B A B, each in a process of its own, until each has enough.

    All are held in memory at once; call once for each where they need not be compared. Each is warmed up by one
    generation of its own lengths, or of the (in, out) tokens of ``warm_up``, which is how the authors' scripts do it.
    A configuration that fails has ``error`` and no samples after it; the others go on.
    """
    measurements = [Measurement(c) for c in configurations]
    workers: dict[int, Worker] = {}
    with contextlib.ExitStack() as stack:

        def attempt(i: int, action: Callable[[], Any]) -> Any:
            try:
                return action()
            except InputError as error:
                measurements[i].error = str(error)
                if i in workers:
                    workers.pop(i).close()
                return None

        for i, c in enumerate(configurations):
            progress(f"{c.model} with {c.engine}: building and warming up")
            worker = attempt(i, lambda c=c: stack.enter_context(Worker(c)))  # type: ignore[misc]
            if worker is not None:
                workers[i] = worker
                measurements[i].facts = worker.facts
                attempt(i, lambda w=worker: w.generate(*(warm_up or (None, None))))  # type: ignore[misc]
        load = _Load(workers.values())
        running = dict(workers)
        start_s = time.monotonic()
        while running := {i: w for i, w in running.items() if i in workers and not _finished(measurements[i], stopping)}:
            for i, worker in running.items():
                attempt(i, lambda m=measurements[i], w=worker: _one_run(m, w))  # type: ignore[misc]
            done = min((len(measurements[i].e2e_s) for i in running), default=0)
            spent_s = time.monotonic() - start_s
            limit_s = stopping.cap_s * len(running)
            progress(f"{len(workers)} running, {done} runs each in {spent_s:.0f} s, at most about {limit_s:.0f} s")
        for m in measurements:
            m.other_load, m.load_elsewhere = load.others()
            m.converged = stopping.enough(m.e2e_s)
    return measurements


def _one_run(m: Measurement, worker: Worker) -> None:
    generation = worker.generate()
    if m.configuration.out_tokens > 1 and len(m.ttft_alone_s) < FIRST_TOKEN_RUNS:
        # the generation of one token stands beside the whole one, so that both see the same machine
        m.ttft_alone_s.append(worker.generate(out_tokens=1).e2e_s)
    m.e2e_s.append(generation.e2e_s)
    m.token_times_s.append(generation.token_times_s)


def _finished(m: Measurement, stopping: Stopping) -> bool:
    return stopping.enough(m.e2e_s) or stopping.over(m.e2e_s)


class _Load:
    """The share of the machine that others used since the start: of the cores that ours are pinned to, and of the rest."""

    def __init__(self, workers: Iterable[Worker]) -> None:
        import psutil

        self.ours, self.cores = [], set()
        for worker in workers:
            self.cores |= set(worker.configuration.cores)
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(worker.process.pid)
                self.ours += [process, *process.children(recursive=True)]
        self.start = self._seconds()

    def _seconds(self) -> Array:
        """Seconds since the machine started: busy and total of our cores, of the other cores, and used by ours."""
        import psutil

        seconds = np.zeros((2, 2))
        for core, times in enumerate(psutil.cpu_times(percpu=True)):
            known = times._asdict()
            # Linux counts the time of guests in that of their host as well
            total = sum(value for name, value in known.items() if not name.startswith("guest"))
            idle = known["idle"] + known.get("iowait", 0.0)
            seconds[int(core not in self.cores)] += (total - idle, total)
        used = 0.0
        for process in self.ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used += times.user + times.system
        return np.append(seconds.ravel(), used)

    def others(self) -> tuple[float, float]:
        """Of our cores, of the others; NaN where there are none."""
        busy, total, busy_elsewhere, total_elsewhere, used = self._seconds() - self.start
        here = max(0.0, busy - used) / total if total > 0 else np.nan
        return float(here), float(busy_elsewhere / total_elsewhere) if total_elsewhere > 0 else np.nan


def _provenance(on_gpu: bool) -> dict[str, Any]:
    clock, throttled = _clock(on_gpu)
    return {
        "clock_mhz": clock,
        "throttled": throttled,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _clock(on_gpu: bool) -> tuple[float | None, int | None]:
    """The clock in MHz, and whether it was held down, where the machine tells."""
    if on_gpu:
        query = "--query-gpu=clocks.sm,clocks_event_reasons.active"
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
            line = subprocess.run(
                ["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True, timeout=10
            ).stdout.splitlines()[0]
            clock, reasons = line.split(", ")
            idle_or_set = 0x1 | 0x2  # bit 0: idle, bit 1: clocks set by the user
            return float(clock), int(bool(int(reasons, 16) & ~idle_or_set))
    import psutil

    with contextlib.suppress(OSError, NotImplementedError, AttributeError):
        return float(psutil.cpu_freq().current), None
    return None, None


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return f"morphlib {__version__}"
    return found.stdout.strip()


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV table with the columns ``COLUMNS``; the file is made where there is none.

    The row is written at once and flushed to the disk. What a process that was killed left of a line is removed.
    Raises ``InputError`` for a file that is another table.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind("\n") + 1]
        header = ",".join(COLUMNS)
        if whole and whole.splitlines()[0] != header:
            raise InputError(f"{path}: is not a table of measurements of this version; record into another file")
        if whole != text:
            file.truncate(len(whole.encode()))
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not whole:
            writer.writeheader()
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
        file.flush()
        os.fsync(file.fileno())


def load(source: Path | Literal["cpu"]) -> pd.DataFrame:
    """A table of measurements, ``cpu`` for the bundled one; of each configuration the row that was the least disturbed.

    Raises ``InputError`` for a file that is no such table.
    """
    import pandas as pd

    path = Path(str(resources.files("morphlib") / "data/latency_cpu.csv")) if source == "cpu" else Path(source)
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values=[""])
        table = table.sort_values(["disturbed", "load_elsewhere"], kind="stable").drop_duplicates(_KEY).sort_index()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: is not a table of measurements ({' '.join(str(error).split())}); give one that was recorded"
        ) from None
    return table.reset_index(drop=True)


def recorded(path: Path) -> set[tuple[str, ...]]:
    """The configurations, as ``key`` names them, of which a table holds a row that nothing disturbed; none without a file."""
    if not path.exists():
        return set()
    with path.open(encoding="utf-8", newline="") as file:
        return {tuple(row.get(name) or "" for name in _KEY) for row in csv.DictReader(file) if row.get("disturbed") == "0"}


def key(c: Configuration) -> tuple[str, ...]:
    """A configuration as its row in a table tells it."""
    return tuple(f"{v:.6g}" if isinstance(v, float) else "" if v is None else str(v) for v in asdict(c).values())


def protocols() -> dict[str, dict[str, str]]:
    """The protocols of the authors' scripts, by name: tokens in and out, batch sizes, sampling (``latency_protocols.csv``)."""
    with resources.files("morphlib").joinpath("data/latency_protocols.csv").open(encoding="utf-8") as file:
        return {row["protocol"]: row for row in csv.DictReader(file)}


def protocol(name: str) -> tuple[dict[str, Any], Stopping, tuple[int, int]]:
    """A protocol of the authors' as settings of a ``Configuration``, when to stop, and the lengths of the warm-up.

    Its first batch size. The scripts keep five runs whatever their noise, and warm up by five tokens on a short sentence.
    Raises ``InputError`` for another name.
    """
    known = protocols()
    if name not in known:
        raise InputError(f"{name!r} is not a protocol; choose one of {', '.join(known)}")
    row = known[name]
    settings = {
        "engine": "vllm" if row["framework"] == "vllm" else "hf-eager",
        "batch": int(row["batch_sizes"].split()[0]),
        "in_tokens": int(row["in_tokens"]),
        "out_tokens": int(row["out_tokens"]),
        "temperature": float(row["temperature"]),
        "top_p": float(row["top_p"]),
        "synchronize": False,
    }
    return settings, Stopping(min_runs=int(row["repeats"]), min_s=0.0, noise=np.inf), (SHORT_SENTENCE_TOKENS, 5)
