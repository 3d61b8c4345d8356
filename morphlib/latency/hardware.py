"""What is known of the hardware: specifications of GPUs with their sources, and this machine by calibration.

Every number is an `Estimate`: a value, an interval and where it comes from. What belongs to the host's CPU,
the cost of launching an operation, is measured for this machine only; a GPU's datasheet cannot know it.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from morphlib import files
from morphlib.errors import InputError
from morphlib.latency import DATA

GPUS = ("A30", "A40", "A100-40GB", "A100-80GB", "H100", "H200", "L40S")
THIS = "this"

CALIBRATION_SECONDS = 6.0  # for each of five measurements: half a minute, and another for what comes before and after them
_STREAMED = (16384, 8192)  # of a matrix of 268 MB at 16 bits: far beyond the last-level cache of any processor
_TOKENS, _GEMM = 256, (2048, 4096)  # a prefill's product: many rows times a matrix
# six operations, four of them views (indexing is two): a GPU is done with them before the host has dispatched the next
_LAUNCHES, _CHAIN = 6, "small.view(8, 8).transpose(0, 1).mul(small[0, 0]).add(1.0)"
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
    specification rests on memory or third parties alone; its interval is then wider. Raises ``InputError`` where
    memory, clock, bandwidth or peak can be zero.
    """

    name: str
    memory_bandwidth_bytes_per_s: Estimate
    peak_flops_per_s: Estimate
    memory_bytes: int
    clock_hz: float | None
    verified: bool
    measured: bool = False
    launch_s: Estimate | None = None

    def __post_init__(self) -> None:
        rates = (self.memory_bandwidth_bytes_per_s.low, self.peak_flops_per_s.low)
        if min(self.memory_bytes, self.clock_hz or 1, *rates) <= 0:
            raise InputError(f"{self.name}: memory, clock, bandwidth and peak must be above zero; give a device's own")


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
    with (DATA / "hardware.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == name]
    numbers: dict[str, Any] = {
        row["quantity"]: Estimate(float(row["value"]), float(row["low"]), float(row["high"]), f"{name}: {row['source']}")
        for row in rows
    }
    numbers |= {"memory_bytes": int(numbers["memory_bytes"].value), "clock_hz": numbers["clock_hz"].value}
    return Hardware(name=name, verified=all(row["verified"] == "1" for row in rows), **numbers)


def calibration_path() -> Path:
    """Where the calibration of this machine is kept: ``calibration.json`` in `morphlib.files.home`."""
    return files.home() / "calibration.json"


def _this(bits: int) -> Hardware:
    path = calibration_path()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))[f"{bits}_bits"]
        known: dict[str, Any] = {name: Estimate(**part) if isinstance(part, dict) else part for name, part in stored.items()}
        return Hardware(**known)
    except OSError as error:
        raise InputError(f"{path}: this machine is not calibrated ({error.strerror}); {_HOW}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: is not a calibration of this version; {_HOW} anew") from None


def calibrate(device: Literal["auto", "cpu", "cuda"] = "auto", seconds: float = CALIBRATION_SECONDS) -> dict[str, Any]:
    """Measure this machine, write the calibration to `calibration_path`, and return what was written.

    Five measurements that end with the first repeat after ``seconds`` each: streaming bandwidth, as decoding
    streams, by one vector times a matrix of 16 and of 32 bits far larger than the caches; matrix throughput, as
    prefill multiplies, at 16 and 32 bits; and the host's cost of dispatching one small operation. The value is
    the median of the repeats, the interval runs from the fastest to the slowest tenth. Uses as many threads as
    torch is set to. Raises ``InputError`` where CUDA is asked for and missing, and where the file cannot be written.
    """
    import psutil
    import torch
    from torch.utils.benchmark import Timer

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("torch finds no CUDA device here; leave out the device, or give cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda" if on_gpu else "cpu")
    properties = torch.cuda.get_device_properties(where) if on_gpu else None

    def seconds_of(statement: str, **names: Any) -> np.ndarray:
        timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
        return np.array(timer.blocked_autorange(min_run_time=seconds).times)

    def product_seconds(rows: int, size: tuple[int, int], dtype: torch.dtype) -> np.ndarray:
        x, matrix = (torch.randn(*lengths, dtype=dtype, device=where) for lengths in ((rows, size[1]), size))
        return seconds_of("linear(x, matrix)", linear=torch.nn.functional.linear, x=x, matrix=matrix)

    found: dict[str, Any] = {
        "device": where.type,
        "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with torch.inference_mode():
        launch_s = _spread(seconds_of(_CHAIN, small=torch.zeros(1, 64, device=where)) / _LAUNCHES)
        for bits, dtype in ((16, torch.bfloat16), (32, torch.float32)):
            this = Hardware(
                name=THIS,
                memory_bandwidth_bytes_per_s=_spread(math.prod(_STREAMED) * bits / 8 / product_seconds(1, _STREAMED, dtype)),
                peak_flops_per_s=_spread(2 * _TOKENS * math.prod(_GEMM) / product_seconds(_TOKENS, _GEMM, dtype)),
                memory_bytes=properties.total_memory if properties else psutil.virtual_memory().total,
                clock_hz=getattr(properties, "clock_rate", 1_500_000) * 1e3 if properties else None,
                verified=True,
                measured=True,
                launch_s=launch_s,
            )
            found[f"{bits}_bits"] = asdict(this)
    with files.replacing(calibration_path()) as partial:
        partial.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def _spread(values: np.ndarray) -> Estimate:
    low, median, high = np.percentile(values, (10, 50, 90)).tolist()
    return Estimate(median, low, high, "measured by morph latency calibrate")
