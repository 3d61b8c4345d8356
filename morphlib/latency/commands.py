"""The commands ``morph latency measure``, ``predict`` and ``calibrate``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from morphlib.errors import InputError
from morphlib.latency import hardware
from morphlib.latency.engines import Configuration

if TYPE_CHECKING:
    from morphlib.latency.timing import Measurement

TIMES = ("ttft_s", "tpot_s", "e2e_s")


def microseconds(text: str) -> hardware.Estimate:
    """A cost as an option gives it, VALUE or VALUE,LOW,HIGH; in seconds."""
    try:
        numbers = [float(part) * 1e-6 for part in text.split(",")]
        value, low, high = numbers * 3 if len(numbers) == 1 else numbers
        return hardware.Estimate(value, low, high, "given")
    except ValueError:
        how = "write VALUE or VALUE,LOW,HIGH with low <= value <= high"
        raise argparse.ArgumentTypeError(f"{text!r} is not a cost; {how}") from None


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time generation on this machine, each shape in a process of its own, in turn."""
    from tqdm import tqdm

    from morphlib.latency import timing

    settings: dict[str, Any] = {}
    stopping, warm_up = timing.QUICK if arguments.quick else timing.Stopping(), None
    if arguments.protocol:
        settings, stopping, warm_up = timing.protocol(arguments.protocol)
    if arguments.cap_seconds is not None:
        stopping = replace(stopping, cap_s=arguments.cap_seconds)
    planned = _planned(arguments, settings)
    held = timing.recorded(arguments.record) if arguments.record else set()
    wanted = [c for c in planned if timing.key(c) not in held]
    together = arguments.together or (1 if arguments.grid else max(1, len(wanted)))
    groups = [wanted[i : i + together] for i in range(0, len(wanted), together)]
    measured: list[Measurement] = []
    with tqdm(groups, disable=None, leave=False, bar_format="{n} of {total} done, {remaining} left; {desc}") as bar:
        for group in bar:
            found = timing.measure(group, stopping, warm_up=warm_up, progress=bar.set_description_str)
            measured += found
            for m in found:
                if m.error:
                    bar.write(f"morph latency: {m.error}", file=sys.stderr)
                elif arguments.record:
                    timing.append(arguments.record, m.row())
    good = [m for m in measured if not m.error]
    if measured and not good:
        raise InputError(f"none of {len(measured)} configurations could be timed; the lines above say why")
    result: dict[str, Any] = {"results": [_result(m) for m in good], "errors": [m.error for m in measured if m.error]}
    if len(groups) == 1 and wanted[0] == planned[0] and not measured[0].error:
        for m, entry in zip(good[1:], result["results"][1:], strict=True):
            entry["ratio_to_first"] = _numbers(timing.ratio_of_medians(m.samples("e2e_s"), good[0].samples("e2e_s")))
    return result | {"skipped": len(planned) - len(wanted)}


def _planned(arguments: argparse.Namespace, settings: dict[str, Any]) -> list[Configuration]:
    """The configurations that are asked for; what the command line names goes before a protocol and a grid."""
    named = {f.name: value for f in fields(Configuration) if (value := getattr(arguments, f.name, None)) is not None}
    if (arguments.grid is None) == (not arguments.shape):
        raise InputError("say what to time: --shape, which may be repeated, or --grid with a file")
    if not arguments.grid:
        return [Configuration(**settings | {"model": shape} | named) for shape in arguments.shape]
    import pandas as pd

    try:
        table = pd.read_csv(arguments.grid).convert_dtypes().to_dict("records")
        if not table:
            raise ValueError("it has no rows")
        rows = [{str(name): value for name, value in row.items() if not pd.isna(value)} for row in table]
        return [Configuration(**settings | row | named) for row in rows]
    except (OSError, ValueError, TypeError) as error:
        columns = ", ".join(f.name for f in fields(Configuration))
        raise InputError(f"{arguments.grid}: cannot be read as settings ({error}); give a CSV file of {columns}") from None


def _numbers(estimate: hardware.Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _result(m: Measurement) -> dict[str, Any]:
    from morphlib.latency.timing import median_interval

    row = m.row()
    names = {"shape": row["shape"] or row["model"], "device": row["hardware"], "engine": row["engine"], "kind": "measured"}
    times = {name: _numbers(median_interval(m.samples(name))) for name in TIMES if m.samples(name).size}
    return names | times | {name: value for name, value in row.items() if name not in names and name not in TIMES}


def predict(arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict latency from a shape and a GPU's specifications."""
    from morphlib.latency import analytic, models

    names = ("batch", "in_tokens", "out_tokens", "weight_bits", "kv_bits", "host_launch_s")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    results = []
    for text in arguments.shape:
        shape, own = models.shape_of(text)
        architecture = arguments.architecture or own
        for gpu in arguments.gpu or ["A100-40GB"]:
            predicted = analytic.predict(shape, gpu, arguments.mode, architecture=architecture, **given)
            times = {name: _numbers(getattr(predicted, name)) for name in TIMES}
            of = {"shape": str(shape), "gpu": predicted.gpu, "mode": predicted.mode, "kind": "predicted"}
            more = {"model": text, "architecture": architecture, "decode_step": asdict(predicted.decode_step)}
            results.append(of | times | more)
    return {"results": results}


def calibrate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure bandwidth, matrix throughput and launch cost of this machine, for --gpu this. Takes less than a minute."""
    if sys.stderr.isatty():
        print("measuring bandwidth, throughput and launch cost, about half a minute", file=sys.stderr)
    return hardware.calibrate(arguments.device) | {"path": str(hardware.calibration_path())}


def show(result: dict[str, Any]) -> None:
    """Print what was measured or predicted."""
    rows = result["results"]
    if not rows:
        print(f"nothing to time: all {result['skipped']} configurations are in the file already")
        return
    width = max(len(row["shape"]) for row in rows) + 2
    print(f"{'shape':<{width}}{'on':<20}{'by':<13}{'TTFT ms':>18}{'TPOT ms':>18}{'E2E s':>18}")
    for row in rows:
        times = "".join(_cell(row.get(name), 1 if name == "e2e_s" else 1e3) for name in TIMES)
        print(f"{row['shape']:<{width}}{row.get('gpu') or row['device']:<20.19}{row.get('mode') or row['engine']:<13}{times}")
    if kinds := {row["architecture"] for row in rows if "architecture" in row}:
        print(f"predicted with the operations of {', '.join(sorted(kinds))} in transformers; ± has all constants at their ends")
    for row in rows:
        if row["kind"] == "measured":
            _show_remarks(row)


def _cell(numbers: dict[str, float] | None, scale: float) -> str:
    if numbers is None:
        return f"{'–':>18}"
    half = max(numbers["high"] - numbers["value"], numbers["value"] - numbers["low"])
    return f"{scale * numbers['value']:>9.4g} ±{scale * half:<7.2g}"


def _show_remarks(row: dict[str, Any]) -> None:
    """What a reader of a measured row must know."""
    if not row["converged"]:
        print(f"{row['shape']}: not converged after {row['n_runs']} runs, the median is known to {row['noise']:.1%}")
    if row["disturbed"]:
        busy = f"took {row['other_load']:.0%} of its cores and {row['load_elsewhere']:.0%} of the others"
        print(f"{row['shape']}: other programs {busy}; time it again when the machine is quiet")
    if not row["ttft_agrees"]:
        print(f"{row['shape']}: two measures of TTFT differ, {row['ttft_s']['value']:.4g} s and {row['ttft_alone_s']:.4g} s")
    if "ratio_to_first" in row:
        ratio = row["ratio_to_first"]
        print(f"{row['shape']}: {ratio['value']:.3f} times the first ({ratio['low']:.3f} to {ratio['high']:.3f})")


def show_calibration(result: dict[str, Any]) -> None:
    """Print what was measured of this machine."""
    print(f"{result['hardware']}, stored in {result['path']}")
    for bits in (16, 32):
        for name, number in result[f"{bits}_bits"].items():
            if isinstance(number, dict):
                print(f"{bits} bits {name:<30}{number['value']:>12.4g}   ({number['low']:.4g} to {number['high']:.4g})")
