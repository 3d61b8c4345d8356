r"""Latency from a shape: what a step of a decoder-only transformer takes, by a few constants with their origin.

A step reads every matrix once, whatever the batch, and the cache of keys and values. Products either wait for
memory or for arithmetic, and near the ridge between the two for both; elementwise kernels stream activations;
every kernel costs some cycles to start and to drain:

.. math::
    t_\mathrm{device} = \sqrt{(b / \beta)^2 + (f / \phi)^2} + b_\mathrm{vectors} / \beta + k \, c / \mathrm{clock},

with bytes b over the effective bandwidth, FLOPs f over the effective peak and k kernels of c cycles. Meanwhile
the host dispatches o operations of :math:`\tau` seconds each. It runs ahead of a GPU, so that a step takes the
longer of the two, and what shows is only the time by which the host is late:

.. math::
    t = t_\mathrm{device} + \max(0,\; o\,\tau - t_\mathrm{device}) + t_\mathrm{constant} .

On a CPU both share the processor and add up. A step of decoding is one of ``batch`` new tokens, a prefill one of
``batch`` times ``in_tokens``. ``eager`` dispatches every operation of the model, ``compiled`` one per fused kernel,
``graph`` none (a CUDA graph is one launch); their prefills are eager, as transformers runs them.

Why the maximum and not the sum: it is how a queue works, and the sum leaves nothing for the constant, though sampling
is in it. The seven A100 rows alone do not decide: leaving one model out, bytes added to the launches miss by 8.5 %
and the maximum by 9.3 %; within the fit the residuals are 7.5 % and 6.1 %. Why cycles and not microseconds: a kernel's
fixed time on an A100 is 1.3 times that on an H100, and so are their clocks.

Sources: S. Williams, A. Waterman and D. Patterson, Roofline, CACM 52 (2009) 65; R. Pope et al., Efficiently
scaling transformer inference, arXiv 2211.05102, section 2; constants: ``data/latency_constants.csv``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import least_squares, nnls

from morphlib.errors import InputError
from morphlib.latency import DATA, hardware
from morphlib.latency.hardware import Estimate, Hardware
from morphlib.laws import Array
from morphlib.shapes import BITS, Bits, Shape, Shapes

Mode = Literal["eager", "compiled", "graph"]
MODES: tuple[Mode, ...] = get_args(Mode)
Time = Literal["ttft_s", "tpot_s", "e2e_s"]
End = Literal["low", "value", "high"]
ENDS: tuple[End, ...] = get_args(End)

# constants that shorten a time where they are large; the others lengthen it
RATES = ("memory_bandwidth_bytes_per_s", "peak_flops_per_s", "bandwidth_share", "compute_share", "low_bit_bandwidth")
# constants that move together when all combinations of their ends are tried, those of the datasheet first
GROUPS = (
    RATES[:2],
    ("bandwidth_share", "low_bit_bandwidth"),
    ("compute_share",),
    ("kernel_cycles",),
    ("host_launch_s",),
    ("step_s", "step_graph_s"),
    ("fused_kernels",),
)

# transformers appends to the cache by concatenation: read, written, and read again by the attention
EAGER_CACHE_PASSES = 3
KERNEL_ROWS = tuple(f"r{number:03}" for number in range(55, 67))
END_TO_END_ROWS = tuple(f"r{number:03}" for number in range(1, 8))
ONE_MODEL = ["architecture", "shape"]  # rows that agree in these are of one model to this module
CPU_TIMES = ("ttft_s", "tpot_s")
CPU_COLUMNS = ("shape", "engine", "dtype", "batch", "in_tokens", "out_tokens", *CPU_TIMES)


class DoesNotFit(InputError):
    """Weights and cache are larger than the memory of the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is generated, and in which numbers: ``out_tokens`` for each of ``batch`` prompts of ``in_tokens`` tokens.

    ``architecture`` names the code that runs the shape, a row of `operations`; ``latent_width`` is the numbers cached
    per token and layer with multi-head latent attention; ``kv_bits`` is 16 unless given, or 32 with 32-bit weights.
    Raises ``InputError`` for numbers below 1, bits that are not counted and an architecture whose operations nobody counted.
    """

    batch: int = 1
    in_tokens: int = 128
    out_tokens: int = 256
    weight_bits: Bits = 16
    kv_bits: Bits | None = None
    architecture: str = "open_lm"
    latent_width: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "in_tokens", "out_tokens", "latent_width"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise InputError(f"{name} is {number}; give a whole number of at least 1")
        for bits in (self.weight_bits, self.kv_bits or self.number_bits):
            if bits not in BITS:
                raise InputError(f"{bits} bits are not counted; choose one of {', '.join(map(str, BITS))}")
        if self.architecture not in _table("operations").index:
            known = ", ".join(_table("operations").index)
            raise InputError(f"the operations of {self.architecture!r} are not counted; choose one of {known}")

    @property
    def number_bits(self) -> Bits:
        """Bits of an activation, whatever the weights are stored in."""
        return 32 if self.weight_bits == 32 else 16

    def cache_bytes_per_token(self, shape: Shape | Shapes) -> Any:
        """Of all sequences."""
        return self.batch * shape.kv_bytes_per_token(self.kv_bits or self.number_bits, self.latent_width)

    def memory_bytes(self, shape: Shape | Shapes) -> Any:
        """Of the weights, and of the cache when the last token is written; of one shape, or of each of n."""
        return shape.weight_bytes(self.weight_bits) + self.cache_bytes_per_token(shape) * (self.in_tokens + self.out_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """The seconds of a step, which add up: ``bytes_s`` for products and streaming, ``kernels_s`` for the fixed cost
    of kernels, ``launch_s`` for the host where it is late, and ``constant_s``. Numbers, or arrays that broadcast."""

    bytes_s: Any
    kernels_s: Any
    launch_s: Any
    constant_s: Any

    @property
    def total_s(self) -> Any:
        return self.bytes_s + self.kernels_s + self.launch_s + self.constant_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predicted times: to the first token, per further token (mean over the answer), and to the last token.

    ``decode_step`` says where the time per token goes, at the values.
    """

    shape: Shape
    gpu: str
    mode: Mode
    ttft_s: Estimate
    tpot_s: Estimate
    e2e_s: Estimate
    decode_step: Breakdown


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well predictions meet measurements that they were not fitted on.

    ``mape`` is the mean absolute error as a fraction; ``rows`` has the columns row, measured_s, predicted_s, error.
    """

    name: str
    n: int
    mape: float
    rows: pd.DataFrame


class _Work(NamedTuple):
    """What a step does: bytes of matrices and cache, bytes of elementwise traffic, FLOPs, kernels, dispatches."""

    matrix_bytes: Any
    vector_bytes: Any
    flops: Any
    kernels: Any = 0
    operations: Any = 0

    def seconds(
        self, bytes_per_s: Any, flops_per_s: Any, kernel_s: Any, launch_s: Any, constant_s: Any, overlaps: bool = True
    ) -> Breakdown:
        products_s = np.hypot(self.matrix_bytes / bytes_per_s, self.flops / flops_per_s)
        bytes_s, kernels_s = products_s + self.vector_bytes / bytes_per_s, self.kernels * kernel_s
        host_s = self.operations * launch_s
        late_s = np.maximum(0.0, host_s - bytes_s - kernels_s) if overlaps else host_s
        return Breakdown(bytes_s=bytes_s, kernels_s=kernels_s, launch_s=late_s, constant_s=constant_s)


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine and a mode with all that a prediction needs, each number an `Estimate`; ``of`` makes one.

    The constants belong to the machine, not to a shape. So each method takes one set of them for all shapes, and what
    is said of two shapes with the same sets can be compared without the uncertainty that they share.
    """

    device: Hardware
    mode: Mode
    known: Mapping[str, Estimate]

    @classmethod
    def of(
        cls,
        gpu: str | Hardware = "A100-40GB",
        mode: Mode = "eager",
        *,
        weight_bits: Bits = 16,
        host_launch_s: Estimate | None = None,
        constants: Mapping[str, Estimate] | None = None,
    ) -> Machine:
        """The machine of that name; arguments and errors as `predict`."""
        if mode not in MODES:
            raise InputError(f"{mode!r} is not a mode; choose one of {', '.join(MODES)}")
        device = gpu if isinstance(gpu, Hardware) else hardware.get(gpu, weight_bits)
        if weight_bits == 32 and not device.measured:
            raise InputError(f"the peak of {device.name} is that of 16 bits; take 16, 8 or 4 bits, or calibrate a machine")
        known = {**(constants or fitted_constants())}
        known["host_launch_s"] = host_launch_s or device.launch_s or known["host_launch_s"]
        known |= {name: getattr(device, name) for name in ("memory_bandwidth_bytes_per_s", "peak_flops_per_s")}
        return cls(device, mode, known)

    def at(self, end: End) -> dict[str, float]:
        """One set of constants: all at their values, all at their best (``low``, the times are shortest) or worst."""
        other: dict[End, End] = {"low": "high", "value": "value", "high": "low"}
        return {name: getattr(known, other[end] if name in RATES else end) for name, known in self.known.items()}

    def combinations(self) -> dict[str, Array]:
        """Sets of constants, each of shape (k, 1): the values, and every combination of the ends of seven groups.

        The datasheet's numbers are one group and stand at their value as well.
        """
        corners = [("value",) * len(GROUPS), *product(("value", "low", "high"), *[("low", "high")] * (len(GROUPS) - 1))]
        return {
            name: np.array([[getattr(self.known[name], ends[place])] for ends in corners])
            for place, names in enumerate(GROUPS)
            for name in names
        }

    def drawn(self, n_draws: int, rng: np.random.Generator) -> dict[str, Array]:
        """Random sets of constants, each of shape (n_draws, 1), independent of each other.

        An interval is taken as 95 % of a normal distribution with a scale of its own on either side of the value.
        """
        drawn = {}
        for name, known in self.known.items():
            z = rng.standard_normal((n_draws, 1)) / 1.96
            number = known.value + np.where(z > 0, z * (known.high - known.value), z * (known.value - known.low))
            drawn[name] = np.maximum(number, 1e-3 * known.value)
        return drawn

    def steps(self, shape: Shape | Shapes, work: Workload, at: Mapping[str, Any]) -> tuple[Breakdown, Breakdown]:
        """The prefill and a mean step of decoding with the constants ``at``; broadcast over their sets and the shapes."""
        bytes_per_s, flops_per_s = at["memory_bandwidth_bytes_per_s"], at["peak_flops_per_s"]
        if not self.device.measured:
            bytes_per_s, flops_per_s = bytes_per_s * at["bandwidth_share"], flops_per_s * at["compute_share"]
        machine = {
            "bytes_per_s": bytes_per_s * (at["low_bit_bandwidth"] if work.weight_bits < 16 else 1.0),
            "flops_per_s": flops_per_s,
            "kernel_s": at["kernel_cycles"] / self.device.clock_hz if self.device.clock_hz else 0.0,
            "launch_s": at["host_launch_s"],
            "overlaps": self.device.clock_hz is not None,
        }
        prefill, decode = _phases(shape, work, EAGER_CACHE_PASSES if self.mode == "eager" else 1)
        dispatched, views, fused = _counts(work.architecture, shape.n_layers)
        prefill = prefill._replace(kernels=dispatched, operations=dispatched + views)
        decode = decode._replace(kernels=dispatched, operations=dispatched + views)
        if self.mode != "eager":
            kernels = fused * at["fused_kernels"]
            decode = decode._replace(kernels=kernels, operations=kernels * (self.mode == "compiled"))
        constant_s = at["step_graph_s" if self.mode == "graph" else "step_s"]
        return prefill.seconds(**machine, constant_s=at["step_s"]), decode.seconds(**machine, constant_s=constant_s)

    def times(self, shape: Shape | Shapes, work: Workload, at: Mapping[str, Any]) -> dict[Time, Any]:
        """TTFT, TPOT and E2E in seconds; broadcast as ``steps``: shape (k, n) for k sets of constants and n shapes."""
        prefill, decode = (step.total_s for step in self.steps(shape, work, at))
        return {"ttft_s": prefill, "tpot_s": decode, "e2e_s": prefill + (work.out_tokens - 1) * decode}

    def e2e_pieces_s(self, shape: Shape | Shapes, work: Workload, at: Mapping[str, Any]) -> list[Any]:
        """Times whose greatest is the E2E, each smooth in the sizes: in either phase the device or the host counts."""
        if self.device.clock_hz is None:
            return [self.times(shape, work, at)["e2e_s"]]
        device_alone = {**at, "host_launch_s": 0.0}
        host_alone = {**at, "kernel_cycles": 0.0, **dict.fromkeys(GROUPS[0], np.inf)}
        phases = [self.steps(shape, work, alone) for alone in (device_alone, host_alone)]
        return [first.total_s + (work.out_tokens - 1) * later.total_s for first, later in product(*zip(*phases, strict=True))]

    def check_room(self, shape: Shape, work: Workload) -> None:
        """Raise ``DoesNotFit`` where weights and cache do not fit the device."""
        needed, memory = work.memory_bytes(shape), self.device.memory_bytes
        if needed > memory:
            room = f"{needed / 1e9:.1f} GB of weights and cache do not fit the {memory / 1e9:.0f} GB of {self.device.name}"
            raise DoesNotFit(f"{shape}: {room}; take fewer bits, a smaller batch or shorter texts")


def predict(
    shape: Shape,
    gpu: str | Hardware = "A100-40GB",
    mode: Mode = "eager",
    *,
    host_launch_s: Estimate | None = None,
    constants: Mapping[str, Estimate] | None = None,
    **workload: Any,
) -> Prediction:
    """The latency of a workload, whose fields are those of `Workload`.

    ``host_launch_s`` is the host's time per operation: unless given, that of this machine where it was calibrated,
    else the one of ``constants``, which are `fitted_constants` unless given. At the ends of an interval every constant
    and every specification is at its best or worst. Raises ``InputError`` for unknown names, numbers below 1, 32-bit
    weights on a GPU whose datasheet is of 16, and where weights and cache do not fit the device.
    """
    work = Workload(**workload)
    machine = Machine.of(gpu, mode, weight_bits=work.weight_bits, host_launch_s=host_launch_s, constants=constants)
    machine.check_room(shape, work)
    times = [machine.times(shape, work, machine.at(end)) for end in ENDS]
    origin = f"predicted for {machine.device.name}, {mode}"
    estimates = {}
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        low, value, high = (float(at[name]) for at in times)
        # two ends can be the same sum, added in another order
        estimates[name] = Estimate(value, min(low, value, high), max(low, value, high), origin)
    decode = machine.steps(shape, work, machine.at("value"))[1]
    return Prediction(shape=shape, gpu=machine.device.name, mode=mode, decode_step=decode, **estimates)


def ratio(
    first: Shape,
    second: Shape,
    gpu: str | Hardware = "A100-40GB",
    mode: Mode = "eager",
    time: Time = "e2e_s",
    *,
    second_architecture: str | None = None,
    **workload: Any,
) -> Estimate:
    """A predicted time of the first shape over that of the second on one machine: every constant is the same for both.

    The interval runs over all combinations of the ends of the constants (``Machine.combinations``), so it is narrower
    than what the two intervals would allow. Errors as `predict`.
    """
    work = Workload(**workload)
    works = (work, replace(work, architecture=second_architecture or work.architecture))
    machine = Machine.of(gpu, mode, weight_bits=work.weight_bits)
    times = []
    for shape, work in zip((first, second), works, strict=True):
        machine.check_room(shape, work)
        times.append(machine.times(shape, work, machine.combinations())[time])
    ratios = (times[0] / times[1]).ravel()
    return Estimate(float(ratios[0]), float(ratios.min()), float(ratios.max()), f"predicted for {machine.device.name}, {mode}")


def ratio_if_both_fit(first: Shape, second: Shape, *where: Any, **workload: Any) -> Estimate | None:
    """As `ratio`; None where one of the two does not fit the memory."""
    try:
        return ratio(first, second, *where, **workload)
    except DoesNotFit:
        return None


def _phases(shape: Shape | Shapes, work: Workload, cache_passes: int) -> tuple[_Work, _Work]:
    """The bytes and FLOPs of the prefill and of a mean step of decoding, which reads the cache ``cache_passes`` times."""
    weight_bytes = shape.weight_bytes(work.weight_bits, "without_input_embedding")
    context = work.in_tokens + work.out_tokens / 2  # the cache grows by one token per step: the mean over the answer
    prompt, bits = work.batch * work.in_tokens, work.number_bits
    prefill_flops = prompt * shape.prefill_flops_per_token(work.in_tokens)
    decode_bytes = weight_bytes + work.cache_bytes_per_token(shape) * context * cache_passes
    decode_flops = work.batch * shape.decode_flops_per_token(context)
    return (
        _Work(weight_bytes, _vector_bytes(shape, prompt, bits), prefill_flops),
        _Work(decode_bytes, _vector_bytes(shape, work.batch, bits), decode_flops),
    )


def _vector_bytes(shape: Shape | Shapes, tokens: float, bits: int) -> Any:
    """Bytes that the layers move besides matrices and cache: what goes into and out of their kernels.

    Per layer, of the width: two norms 4, queries, keys and values 4, rotation 4, output 2, up 1, down 1, two sums 6;
    of the feed-forward's: up 2, gate 3, down 1.
    """
    return shape.n_layers * tokens * (22 * shape.d_model + 6 * shape.d_ff) * bits / 8


@cache
def _table(name: str) -> pd.DataFrame:
    return pd.read_csv(DATA / f"{name}.csv", index_col=0)


def reference(rows: Sequence[str] | None = None) -> pd.DataFrame:
    """The bundled published latencies, by id; all, or the named ``rows``. Columns: ``data/columns.csv``."""
    table = _table("latency_reference")
    return table.copy() if rows is None else table.loc[list(rows)]


def operations() -> pd.DataFrame:
    """The operations of one decode step of each architecture, per layer and outside the layers.

    ``operations_...`` launch work, ``views_...`` only name memory anew, ``fused_...`` are the kernels that fusing
    leaves, counted by hand. They are aten operations on a CPU; each that launches work is taken as one kernel, for
    no trace of a GPU was made.
    """
    return _table("operations").copy()


def _counts(architecture: str, n_layers: Any) -> list[Any]:
    """Operations, views and fused kernels of a step, for one depth or many."""
    row = _table("operations").loc[architecture].to_dict()
    return [n_layers * row[f"{kind}_per_layer"] + row[f"{kind}_outside"] for kind in ("operations", "views", "fused")]


# --- fits -------------------------------------------------------------------------------------------------------


def fit_kernels(rows: pd.DataFrame) -> tuple[float, float, float]:
    """Bandwidth share, compute share and cycles per kernel from the device times of single layers.

    Least squares of relative errors. ``rows`` as `reference`, with shape, kernels, hardware, in_tokens and value in
    microseconds. Raises ``InputError`` for fewer than three rows.
    """
    if len(rows) < 3:
        raise InputError(f"three constants need three rows of kernel times or more; {len(rows)} are given")

    measured = rows["value"].to_numpy() * 1e-6
    found = least_squares(
        lambda theta: _layer_seconds(rows, theta) / measured - 1,
        x0=(0.8, 0.7, 7e3),
        bounds=((0.1, 0.1, 0.0), (1.2, 1.5, 1e5)),
        x_scale=(1, 1, 1e4),
    )
    return float(found.x[0]), float(found.x[1]), float(found.x[2])


def _layer_seconds(rows: pd.DataFrame, theta: Sequence[float] | Array) -> Array:
    """Seconds of one layer without attention, for each row, by the three constants that `fit_kernels` finds."""
    seconds = []
    for row in rows.to_dict("records"):
        shape, device, tokens = Shape.parse(row["shape"]), hardware.get(row["hardware"]), row["in_tokens"]
        groups = shape.parameters_by_group()
        weights = (groups["attention"] + groups["feed_forward"]) / shape.n_layers
        # the profile adds once per layer, where a whole layer adds twice
        vector_bytes = _vector_bytes(shape, tokens, 16) / shape.n_layers - tokens * 6 * shape.d_model
        work = _Work(2 * weights, vector_bytes, flops=2 * weights * tokens, kernels=row["kernels"])
        bytes_per_s = device.memory_bandwidth_bytes_per_s.value * theta[0]
        kernel_s = theta[2] / device.clock_hz if device.clock_hz else 0.0
        seconds.append(work.seconds(bytes_per_s, device.peak_flops_per_s.value * theta[1], kernel_s, 0.0, 0.0).total_s)
    return np.array(seconds)


def fit_end_to_end(rows: pd.DataFrame) -> tuple[float, float]:
    """Seconds per dispatched operation and per step from eager end-to-end times where the host is what takes long.

    E2E / out_tokens = operations x launch + constant, by least squares of relative errors, neither below zero.
    ``rows`` as `reference`, with shape, architecture, out_tokens and value in seconds. Raises ``InputError`` for
    fewer than two rows.
    """
    if len(rows) < 2:
        raise InputError(f"two constants need two rows of end-to-end times or more; {len(rows)} are given")
    design = np.stack([_dispatched(rows), np.ones(len(rows))], axis=1)
    launch, constant = _relative_nnls(design, _per_step(rows))
    return float(launch), float(constant)


def _per_step(rows: pd.DataFrame) -> Array:
    return (rows["value"] / rows["out_tokens"].astype(float)).to_numpy()


def _dispatched(rows: pd.DataFrame) -> Array:
    steps = zip(rows["architecture"], rows["shape"], strict=True)
    return np.array([sum(_counts(name, Shape.parse(shape).n_layers)[:2]) for name, shape in steps])


@cache
def fitted_constants() -> Mapping[str, Estimate]:
    """What the model needs besides shape and hardware, by name, fitted on the bundled rows or stated.

    ``bandwidth_share`` and ``compute_share`` are the fractions of the datasheet that products reach,
    ``kernel_cycles`` the fixed cost of a kernel in cycles of the device, ``host_launch_s`` the host's time per
    dispatched operation, ``step_s`` the time per step outside the model (sampling, the loop), ``step_graph_s`` the
    same where that is recorded too, ``fused_kernels`` and ``low_bit_bandwidth`` factors on the kernels of compiled
    code and on the bandwidth of 8- and 4-bit weights. The last three are stated, in ``data/latency_constants.csv``.

    Those of the device span the fits of each GPU alone, and beyond them two root-mean-square residuals; the time per
    step spans the fits that leave one model out; the launch cost spans two root-mean-square residuals below, and
    above reaches the slowest host seen.
    """
    stated = {
        str(name): Estimate(row["value"], row["low"], row["high"], f"{name}: {row['source']}")
        for name, row in _table("latency_constants").to_dict("index").items()
    }
    kernels, end_to_end = reference(KERNEL_ROWS), reference(END_TO_END_ROWS)
    fits = [fit_kernels(kernels), *(fit_kernels(part) for _, part in kernels.groupby("hardware"))]
    around = _two_rms(_layer_seconds(kernels, fits[0]), kernels["value"].to_numpy() * 1e-6)
    origin = f"fitted here on rows {KERNEL_ROWS[0]} to {KERNEL_ROWS[-1]} (A100 and H100, microsoft/vidur)"
    bandwidth, compute, cycles = (
        Estimate(each[0], min(each) * (1 - around), max(each) * (1 + around), origin) for each in zip(*fits, strict=True)
    )

    launch, loop = fit_end_to_end(end_to_end)
    loops = [loop, *(fit_end_to_end(end_to_end.drop(held.index))[1] for _, held in end_to_end.groupby(ONE_MODEL))]
    around = _two_rms(_dispatched(end_to_end) * launch + loop, _per_step(end_to_end))
    origin = f"fitted here on rows {END_TO_END_ROWS[0]} to {END_TO_END_ROWS[-1]} (an A100's host, transformers, eager)"
    slowest = stated.pop("slowest_host_launch_s")
    return stated | {
        "bandwidth_share": bandwidth,
        "compute_share": compute,
        "kernel_cycles": cycles,
        "host_launch_s": Estimate(launch, launch * (1 - around), slowest.value, f"{origin}; {slowest.origin}"),
        "step_s": Estimate(loop, min(loops), max(loops), origin),
    }


def _two_rms(fitted: Array, measured: Array) -> float:
    return 2 * float(np.sqrt(np.mean((fitted / measured - 1) ** 2)))


# --- scores -----------------------------------------------------------------------------------------------------


def _score(name: str, labels: Iterable[str], measured: ArrayLike, predicted: ArrayLike) -> Score:
    table = pd.DataFrame({"row": list(labels), "measured_s": np.asarray(measured), "predicted_s": np.asarray(predicted)})
    table["error"] = table["predicted_s"] / table["measured_s"] - 1
    return Score(name=name, n=len(table), mape=float(table["error"].abs().mean()), rows=table)


def score_kernels() -> list[Score]:
    """Kernel times of one GPU by the constants fitted on the other: H100 to A100, and back."""
    rows = reference(KERNEL_ROWS)
    scores = []
    for source, target in (("H100", "A100-80GB"), ("A100-80GB", "H100")):
        held = rows[rows["hardware"] == target]
        predicted = _layer_seconds(held, fit_kernels(rows[rows["hardware"] == source]))
        scores.append(_score(f"{source} to {target}", held.index, held["value"] * 1e-6, predicted))
    return scores


def score_end_to_end() -> Score:
    """The A100 end-to-end rows, each predicted by constants fitted without its model.

    OPT and OPT-IML are one architecture and one shape, and are left out together.
    """
    rows = reference(END_TO_END_ROWS)
    predicted: dict[Any, float] = {}
    for _, held in rows.groupby(ONE_MODEL):
        launch, loop = (Estimate(number, number, number) for number in fit_end_to_end(rows.drop(held.index)))
        known = {**fitted_constants(), "host_launch_s": launch, "step_s": loop}
        for label, row in held.iterrows():
            asked: dict[str, Any] = {name: int(row[name]) for name in ("batch", "in_tokens", "out_tokens")}
            asked |= {"architecture": row["architecture"], "constants": known}
            predicted[label] = predict(Shape.parse(row["shape"]), row["hardware"], **asked).e2e_s.value
    return _score("end to end, one model left out", rows.index, rows["value"], rows.index.map(predicted))


CpuFit = dict[tuple[str, str], dict[str, Array]]

_parsed = cache(Shape.parse)  # leaving shapes out reads each of them a thousand times


def _cpu_design(row: Mapping[Any, Any], time: str) -> list[float]:
    """What a CPU takes time for: bytes, FLOPs, layers and one."""
    shape, lengths = _parsed(row["shape"]), {name: row[name] for name in ("batch", "in_tokens", "out_tokens")}
    steps = _phases(shape, Workload(**lengths, weight_bits=32 if row["dtype"] == "fp32" else 16), EAGER_CACHE_PASSES)
    step = steps[CPU_TIMES.index(time)]
    return [step.matrix_bytes + step.vector_bytes, step.flops, shape.n_layers, 1]


def fit_cpu(rows: pd.DataFrame) -> CpuFit:
    """Fit measured times of one CPU: for each engine and dtype four coefficients of ``ttft_s`` and of ``tpot_s``.

    A time is a sum over bytes, FLOPs, layers and one, with coefficients of zero or more, by least squares of relative
    errors. Each dtype has its own: a CPU's kernels differ by dtype in more than bytes. Columns: ``CPU_COLUMNS``, as
    `timing` records them; times in seconds, ``tpot_s`` empty where one token was asked for. Raises ``InputError``
    for a missing column and for no row.
    """
    missing = [column for column in CPU_COLUMNS if column not in rows]
    if missing or rows.empty:
        raise InputError(f"the measured latencies lack {', '.join(missing) or 'rows'}; give {', '.join(CPU_COLUMNS)}")
    fit: CpuFit = {}
    for (engine, dtype), part in rows.groupby(["engine", "dtype"]):
        fit[str(engine), str(dtype)] = {time: _fit_cpu_time(part[part[time].notna()], time) for time in CPU_TIMES}
    return fit


def _fit_cpu_time(rows: pd.DataFrame, time: str) -> Array:
    if rows.empty:
        return np.full(4, np.nan)
    design = np.array([_cpu_design(row, time) for row in rows.to_dict("records")], dtype=np.float64)
    return _relative_nnls(design, rows[time].to_numpy(dtype=np.float64))


def predict_cpu(fit: CpuFit, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with ``ttft_s``, ``tpot_s`` (empty for a single token) and ``e2e_s`` as fitted.

    Empty where no row of the fit had the time: rows of single tokens tell nothing of further ones. Raises
    ``InputError`` for an engine and dtype that were not measured.
    """
    if unknown := set(zip(rows["engine"], rows["dtype"], strict=True)) - set(fit):
        raise InputError(f"no measured latency is of {' in '.join(min(unknown))}; measure some, or choose another")
    records = rows.to_dict("records")
    for time in CPU_TIMES:
        said = [float(np.dot(_cpu_design(row, time), fit[row["engine"], row["dtype"]][time])) for row in records]
        rows = rows.assign(**{time: said})
    return _with_e2e(rows.assign(tpot_s=rows["tpot_s"].where(rows["out_tokens"] > 1)))


def _with_e2e(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(e2e_s=rows["ttft_s"] + (rows["out_tokens"] - 1) * rows["tpot_s"].where(rows["out_tokens"] > 1, 0.0))


def _relative_nnls(design: Array, target: Array) -> Array:
    rows = design / target[:, None]
    scale = rows.max(axis=0)  # columns from 1 to 1e12 in size
    return np.asarray(nnls(rows / scale, np.ones(len(rows)))[0] / scale)


def score_cpu(rows: pd.DataFrame) -> dict[str, Score]:
    """Measured CPU times, each shape predicted by a fit without it: a score for ``ttft_s``, ``tpot_s`` and ``e2e_s``.

    Columns as `fit_cpu`. Left out are rows without a shape (an architecture that `Shape` does not describe), and of each
    time those that have none or whose other shapes have none. Raises ``InputError`` for fewer than two shapes.
    """
    rows = rows.dropna(subset=[column for column in ("shape",) if column in rows])
    if rows.get("shape", pd.Series()).nunique() < 2:
        raise InputError("leaving a shape out takes two measured shapes or more; measure further ones")
    held = [rows["shape"] == shape for shape in rows["shape"].unique()]
    measured = _with_e2e(pd.concat([rows[one] for one in held]))
    predicted = pd.concat([predict_cpu(fit_cpu(rows[~one]), rows[one]) for one in held])
    there = {time: measured[time].notna() & predicted[time].notna() for time in (*CPU_TIMES, "e2e_s")}
    return {
        time: _score(f"{time}, one shape left out", measured["shape"][seen], measured[time][seen], predicted[time][seen])
        for time, seen in there.items()
    }
