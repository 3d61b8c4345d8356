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
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from morphlib import files
from morphlib.errors import InputError
from morphlib.latency import DATA, models
from morphlib.latency.engines import Configuration, Worker
from morphlib.latency.hardware import Estimate
from morphlib.shapes import Shape

Array = np.ndarray

TIMES = ("e2e_s", "ttft_s", "tpot_s", "itl_s")
PERCENTILES = {"": 50, "_p5": 5, "_p95": 95}  # by the end of the column's name
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


def ratio_of_rows(
    rows: pd.DataFrame, first: str, second: str, engine: str = "hf-eager", dtype: str = "bf16"
) -> Estimate | None:
    """E2E of one shape over that of another, from the recorded runs of both.

    Of two rows that differ in nothing else: batch, lengths, threads and all that is asked for, architecture, hardware. Of
    several such pairs it is the first; None without one.
    """
    timed = rows[(rows["engine"] == engine) & (rows["dtype"] == dtype)]
    found = [timed[timed["shape"] == str(Shape.parse(shape))] for shape in (first, second)]
    pairs = found[0].merge(found[1], on=[*_KEY[1:], "built_as", "hardware"], suffixes=("", "_of_second"))
    if pairs.empty:
        return None
    a_s, b_s = (np.array(pairs[name].iloc[0].split(), dtype=float) for name in ("e2e_samples_s", "e2e_samples_s_of_second"))
    return ratio_of_medians(a_s, b_s)


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
        ttft_s, further_tokens = token_times_s[:, 0], self.configuration.out_tokens - 1
        tpot_s = (e2e_s - ttft_s) / further_tokens if further_tokens else np.empty(0)
        return {"e2e_s": e2e_s, "ttft_s": ttft_s, "tpot_s": tpot_s, "itl_s": np.diff(token_times_s, axis=1).ravel()}[name]

    @property
    def ttft_agrees(self) -> bool:
        """Whether the two measures of TTFT differ by less than their noise allows."""
        if not self.ttft_alone_s:
            return True
        within, alone = self.samples("ttft_s"), np.array(self.ttft_alone_s)
        allowed = TTFT_TOLERANCE + 3 * (relative_noise(within) + relative_noise(alone))
        return bool(abs(np.median(within) / np.median(alone) - 1) <= allowed)

    def row(self) -> dict[str, Any]:
        """The measurement as one row of a table; percentiles are of all samples."""
        c = self.configuration
        row: dict[str, Any] = dict.fromkeys(COLUMNS) | _settings(c)
        row |= {name: value for name, value in self.facts.items() if name in COLUMNS}
        for name in TIMES:
            samples = self.samples(name)
            for end, percentile in PERCENTILES.items():
                row[name + end] = float(np.percentile(samples, percentile)) if samples.size else np.nan
        return row | {
            "n_runs": len(self.e2e_s),
            "converged": int(self.converged),
            "noise": relative_noise(np.array(self.e2e_s)),
            "ttft_alone_s": float(np.median(self.ttft_alone_s)) if self.ttft_alone_s else np.nan,
            "ttft_agrees": int(self.ttft_agrees),
            "tokens_per_s": c.batch * c.out_tokens / row["e2e_s"],
            "e2e_samples_s": " ".join(f"{value:.6g}" for value in self.e2e_s),
            "other_load": self.other_load,
            "load_elsewhere": self.load_elsewhere,
            "disturbed": int(self.other_load > DISTURBED or self.load_elsewhere > DISTURBED_ELSEWHERE),
            "python": platform.python_version(),
            "commit": files.commit(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }


_KEY = [f.name for f in fields(Configuration)]
COLUMNS = (
    *_KEY,
    *("shape", "built_as", "weights"),
    *("d_model", "n_layers", "n_heads", "n_kv_heads", "head_size", "d_ff", "vocab", "tied", "n_params"),
    *("kv_bytes_per_token", "peak_memory_bytes", "n_runs", "converged", "noise"),
    *(name + end for name in TIMES for end in PERCENTILES),
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
    ready: list[tuple[Measurement, Worker]] = []
    with contextlib.ExitStack() as stack:
        for m in measurements:
            progress(f"{m.configuration.model} with {m.configuration.engine}: building and warming up")
            try:
                worker = stack.enter_context(contextlib.closing(Worker(m.configuration)))
                m.facts = worker.facts
                worker.generate(*(warm_up or ()))
                ready.append((m, worker))
            except InputError as error:
                m.error = str(error)
        others = _watch([worker for _, worker in ready])
        start_s = time.monotonic()
        while running := [
            (m, worker) for m, worker in ready if not (m.error or stopping.enough(m.e2e_s) or stopping.over(m.e2e_s))
        ]:
            for m, worker in running:
                try:
                    generation = worker.generate()
                    if m.configuration.out_tokens > 1 and len(m.ttft_alone_s) < FIRST_TOKEN_RUNS:
                        # the generation of one token stands beside the whole one, so that both see the same machine
                        m.ttft_alone_s.append(worker.generate(out_tokens=1).e2e_s)
                    m.e2e_s.append(generation.e2e_s)
                    m.token_times_s.append(generation.token_times_s)
                except InputError as error:
                    m.error = str(error)
            done, spent_s = min(len(m.e2e_s) for m, _ in running), time.monotonic() - start_s
            limit = f", at most about {stopping.cap_s * len(running):.0f} s" if np.isfinite(stopping.cap_s) else ""
            progress(f"{len(running)} running, {done} runs each in {spent_s:.0f} s{limit}")
        of_ours, elsewhere = others()
        for m, worker in ready:
            m.facts |= _clock(worker)
    for m in measurements:
        m.other_load, m.load_elsewhere = of_ours, elsewhere
        m.converged = stopping.enough(m.e2e_s)
    return measurements


def _watch(workers: Iterable[Worker]) -> Callable[[], tuple[float, float]]:
    """What to ask for the share of the machine that others used since now.

    Of the cores that ours are pinned to, and of the rest; NaN where there are none.
    """
    import psutil

    pinned: set[int] = set()
    ours: list[Any] = []
    for worker in workers:
        pinned |= set(worker.configuration.cores)
        process = psutil.Process(worker.process.pid)
        ours += [process, *process.children(recursive=True)]

    def others() -> tuple[float, float]:
        used = 0.0
        for process in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                used += process.cpu_percent() / 100
        busy = np.array(psutil.cpu_percent(percpu=True)) / 100
        here = np.isin(np.arange(len(busy)), list(pinned))
        of_ours = max(0.0, busy[here].sum() - used) / here.sum() if here.any() else np.nan
        return float(of_ours), float(busy[~here].mean()) if not here.all() else np.nan

    others()  # psutil counts from one call to the next
    return others


def _clock(worker: Worker) -> dict[str, float]:
    """The clock in MHz, and whether it is held down, as far as the machine tells; a GPU is asked while it works."""
    import psutil

    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, NotImplementedError, AttributeError):
        if worker.facts["ran_on"] != "cuda":
            return {"clock_mhz": float(psutil.cpu_freq().current)}
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks_event_reasons.active", "--format=csv,noheader,nounits"]
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(subprocess.run, query, capture_output=True, text=True, check=True, timeout=10)
            while not asked.done():  # neither power nor heat holds down an idle GPU
                worker.generate()
        clock, reasons = asked.result().stdout.splitlines()[0].split(", ")
        idle_or_set = 0x1 | 0x2  # bit 0: idle, bit 1: clocks set by the user
        return {"clock_mhz": float(clock), "throttled": int(bool(int(reasons, 16) & ~idle_or_set))}
    return {}


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV table with the columns ``COLUMNS``; the file is made where there is none.

    The row is written at once and flushed to the disk. What a process that was killed left of a line is removed.
    Raises ``InputError`` for a file that is no such table, and where it cannot be written.
    """
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole = _whole_rows(path, file.read())
            file.truncate(len(whole))
            added = pd.DataFrame([row], columns=COLUMNS).to_csv(index=False, header=not whole, float_format="%.6g")
            end_of_last = b"" if whole.endswith(b"\n") or not whole else b"\n"  # an editor may have left it out
            file.write(end_of_last + added.encode())
            file.flush()
            os.fsync(file.fileno())


def _whole_rows(path: Path, text: bytes) -> bytes:
    """The text of a table less what a kill left of its last line; ``InputError`` where it is another."""
    header = ",".join(COLUMNS).encode()
    first, ended, _ = text.partition(b"\n")
    if first.rstrip(b"\r") != header and (ended or not header.startswith(first)):
        raise InputError(f"{path}: is not a table of measurements of this version; record into another file")
    last_is_whole = re.search(rb",\d{4}-\d\d-\d\d\r?$", text)  # a row ends in its date
    return text if last_is_whole else text[: text.rfind(b"\n") + 1]


def load(source: Path | Literal["cpu"]) -> pd.DataFrame:
    """A table of measurements, ``cpu`` for the bundled one; of each configuration the row that was the least disturbed.

    Raises ``InputError`` for a file that is no such table.
    """
    path = DATA / "latency_cpu.csv" if source == "cpu" else Path(source)
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values=["", "nan"])  # older rows spell out nan
        table = table.sort_values(["disturbed", "load_elsewhere"], kind="stable").drop_duplicates(_KEY).sort_index()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: is not a table of measurements ({error}); give one that was recorded") from None
    return table.reset_index(drop=True)


def recorded(path: Path) -> set[tuple[str, ...]]:
    """The configurations, as ``key`` names them, of which a table holds a row that nothing disturbed; none without a file.

    Raises ``InputError`` where `append` would, so that it is known before anything is measured.
    """
    with files.writing(path, UnicodeDecodeError):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                return set()
        with path.open("rb+") as file:
            rows = csv.DictReader(_whole_rows(path, file.read()).decode().split("\n"))
    return {tuple(row.get(name) or "" for name in _KEY) for row in rows if row.get("disturbed") == "0"}


def key(c: Configuration) -> tuple[str, ...]:
    """A configuration as its row in a table tells it."""
    return tuple(f"{v:.6g}" if isinstance(v, float) else "" if v is None else str(v) for v in _settings(c).values())


def _settings(c: Configuration) -> dict[str, Any]:
    return asdict(c) | {"model": models.full_name(c.model)}


def protocols() -> dict[str, dict[Any, Any]]:
    """The protocols of the authors' scripts, by name: tokens in and out, batch sizes, sampling (``latency_protocols.csv``)."""
    table = pd.read_csv(DATA / "latency_protocols.csv", keep_default_na=False)
    return {row["protocol"]: row for row in table.to_dict("records")}


def protocol(name: str) -> tuple[dict[str, Any], Stopping, tuple[int, int]]:
    """A protocol of the authors' as settings of a ``Configuration``, when to stop, and the lengths of the warm-up.

    Its first batch size. The scripts keep five runs, whatever their noise and however long they take, and warm up by five
    tokens on a short sentence. Raises ``InputError`` for another name.
    """
    known = protocols()
    if name not in known:
        raise InputError(f"{name!r} is not a protocol; choose one of {', '.join(known)}")
    row = known[name]
    settings = {setting: row[setting] for setting in ("in_tokens", "out_tokens", "temperature", "top_p")}
    settings |= {"engine": "vllm" if row["framework"] == "vllm" else "hf-eager", "synchronize": False}
    settings["batch"] = int(row["batch_sizes"].split()[0])
    return settings, Stopping(min_runs=row["repeats"], min_s=0.0, noise=np.inf, cap_s=np.inf), (SHORT_SENTENCE_TOKENS, 5)
