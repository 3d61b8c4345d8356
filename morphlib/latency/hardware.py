"""What is known of the hardware: specifications of GPUs with their sources, and this machine by calibration.

Every number is an `Estimate`: a value, an interval and where it comes from. What belongs to the host's CPU,
the cost of launching an operation, is measured for this machine only; a GPU's datasheet cannot know it.
"""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from morphlib.errors import InputError

GPUS = ("A30", "A40", "A100-40GB", "A100-80GB", "H100", "H200", "L40S")
THIS = "this"

CALIBRATION_SECONDS = 8.0  # for each of five measurements; at least three repeats each, however long they take
_STREAMED = (16384, 8192)  # of a matrix of 268 MB at 16 bits: far beyond the last-level cache of any processor
_TOKENS, _GEMM = 256, (2048, 4096)  # a prefill's product: many rows times a matrix
_CHAINS = 50  # of six operations, four of them views (indexing is two), which a GPU queues up without waiting
_HOW = "run `morph latency calibrate`"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its interval, ``low <= value <= high``, and its ``origin``. Raises ``InputError`` otherwise."""

    value: float
    low: float
    high: float
    origin: str = ""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.high) and 0 <= self.low <= self.value <= self.high):
            numbers = f"{self.value!r} in [{self.low!r}, {self.high!r}]"
            raise InputError(f"{self.origin or 'an estimate'}: {numbers} is no estimate; give 0 <= low <= value <= high")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A device that runs a model.

    ``memory_bandwidth_bytes_per_s`` and ``peak_flops_per_s`` (dense, 16 bits) are a GPU's datasheet, which no
    program reaches, or, where ``measured``, what this machine was seen to reach. ``clock_hz`` is None where no
    kernels are launched (a CPU), ``launch_s`` None where the host is not known. ``verified`` is False where a
    specification rests on memory or third parties alone; its interval is then wider.
    """

    name: str
    memory_bandwidth_bytes_per_s: Estimate
    peak_flops_per_s: Estimate
    memory_bytes: int
    clock_hz: float | None
    verified: bool
    measured: bool = False
    launch_s: Estimate | None = None


def get(name: str, bits: int = 16) -> Hardware:
    """The hardware of that name: one of ``GPUS``, or ``this`` for this machine as last calibrated.

    ``bits`` picks the calibrated numbers of 16- or 32-bit weights; a GPU's are those of 16 bits.
    Raises ``InputError`` for another name, and for ``this`` without a usable calibration.
    """
    if name == THIS:
        return _this(32 if bits == 32 else 16)
    if name not in GPUS:
        raise InputError(f"{name!r} is not a GPU that is known here; choose one of {', '.join((*GPUS, THIS))}")
    return _gpu(name)


@cache
def _gpu(name: str) -> Hardware:
    with resources.files("morphlib").joinpath("data/hardware.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == name]
    numbers = {
        row["quantity"]: Estimate(float(row["value"]), float(row["low"]), float(row["high"]), f"{name}: {row['source']}")
        for row in rows
    }
    return Hardware(
        name=name,
        memory_bandwidth_bytes_per_s=numbers["memory_bandwidth"],
        peak_flops_per_s=numbers["peak_flops"],
        memory_bytes=int(numbers["memory"].value),
        clock_hz=numbers["clock"].value,
        verified=all(row["verified"] == "1" for row in rows),
    )


def calibration_path() -> Path:
    """Where the calibration of this machine is kept: ``calibration.json`` in ``$MORPH_HOME``, or ``~/.cache/morph``."""
    return Path(os.environ.get("MORPH_HOME") or Path.home() / ".cache/morph") / "calibration.json"


def _this(bits: int) -> Hardware:
    path = calibration_path()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        numbers = {
            key: Estimate(**stored["estimates"][key]) for key in (f"bytes_per_s_{bits}", f"flops_per_s_{bits}", "launch_s")
        }
        memory_bytes, clock_hz = int(stored["memory_bytes"]), stored["clock_hz"] and float(stored["clock_hz"])
        if min(memory_bytes, clock_hz or 1, *(number.low for number in numbers.values())) <= 0:
            raise ValueError("a number is not positive")
    except OSError as error:
        raise InputError(f"{path}: this machine is not calibrated ({error.strerror}); {_HOW}") from None
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{path}: is not a calibration of this version; {_HOW} anew") from None
    return Hardware(
        name=THIS,
        memory_bandwidth_bytes_per_s=numbers[f"bytes_per_s_{bits}"],
        peak_flops_per_s=numbers[f"flops_per_s_{bits}"],
        memory_bytes=memory_bytes,
        clock_hz=clock_hz,
        verified=True,
        measured=True,
        launch_s=numbers["launch_s"],
    )


def calibrate(device: Literal["auto", "cpu", "cuda"] = "auto", seconds: float = CALIBRATION_SECONDS) -> dict[str, Any]:
    """Measure this machine, write the calibration to `calibration_path`, and return what was written.

    Five measurements of at most ``seconds`` each (three repeats at least): streaming bandwidth, as decoding
    streams, by one vector times a matrix of 16 and of 32 bits far larger than the caches; matrix throughput, as
    prefill multiplies, at 16 and 32 bits; and the host's cost of dispatching one small operation. The value is
    the median of the repeats, the interval runs from the fastest to the slowest tenth. Uses as many threads as
    torch is set to. Raises ``InputError`` where CUDA is asked for and missing, and where the file cannot be written.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA device here; leave out the device, or give cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda" if on_gpu else "cpu")
    wait: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    properties = torch.cuda.get_device_properties(where) if on_gpu else None

    def product(rows: int, size: tuple[int, int], dtype: torch.dtype) -> Callable[[], Any]:
        x, matrix = torch.randn(rows, size[1], device=where).to(dtype), torch.randn(size, device=where).to(dtype)

        def run() -> None:
            torch.nn.functional.linear(x, matrix)
            wait()

        return run

    small = torch.zeros(1, 64, device=where)

    def launches() -> None:
        for _ in range(_CHAINS):
            small.view(8, 8).transpose(0, 1).mul(small[0, 0]).add(1.0)

    estimates: dict[str, Estimate] = {}
    with torch.inference_mode():
        for bits, dtype in ((16, torch.bfloat16), (32, torch.float32)):
            n_bytes, flops = math.prod(_STREAMED) * bits // 8, 2 * _TOKENS * math.prod(_GEMM)
            estimates[f"bytes_per_s_{bits}"] = _spread(
                [n_bytes / t for t in _times(product(1, _STREAMED, dtype), wait, seconds)]
            )
            estimates[f"flops_per_s_{bits}"] = _spread(
                [flops / t for t in _times(product(_TOKENS, _GEMM, dtype), wait, seconds)]
            )
        estimates["launch_s"] = _spread([t / _CHAINS / 6 for t in _times(launches, wait, seconds)])
    found = {
        "device": where.type,
        "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "memory_bytes": properties.total_memory if properties else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "clock_hz": getattr(properties, "clock_rate", 1_500_000) * 1e3 if properties else None,
        "estimates": {key: asdict(estimate) for key, estimate in estimates.items()},
    }
    _write(calibration_path(), json.dumps(found, indent=2))
    return found


def _times(run: Callable[[], None], wait: Callable[[], None], seconds: float) -> list[float]:
    """Seconds of each run after one that is not counted, until the time is up; 3 to 200 runs."""
    end = time.perf_counter() + seconds
    run()
    times: list[float] = []
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        wait()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def _spread(values: list[float]) -> Estimate:
    ordered, tenth = sorted(values), len(values) // 10
    return Estimate(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], "measured by morph latency calibrate")


def _write(path: Path, text: str) -> None:
    """All or nothing: a reader never sees half a calibration."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        Path(file.name).replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); set MORPH_HOME to a folder of yours") from None
