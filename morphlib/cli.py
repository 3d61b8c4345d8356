"""The command ``morph``: exit 0, 2 for what the user can mend (one line on stderr), 1 for our own fault."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from morphlib import __version__, evaluation_commands, files, laws, training_commands
from morphlib.errors import InputError
from morphlib.latency import commands as latency
from morphlib.latency.hardware import GPUS
from morphlib.shapes import Convention

if TYPE_CHECKING:
    import pandas as pd

    from morphlib.fitting import Fit


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.splitlines())}; see {self.prog} --help\n")


def _mapping(text: str) -> dict[str, str]:
    pairs = [pair.split("=") for pair in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mapping; write n_params=N,tokens=D")
    return {pair[0]: pair[1] for pair in pairs}


def _number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above zero; write 1.7e9 or 0.5")
    return number


def _range(text: str) -> range:
    parts = text.split("-")
    if not (len(parts) in (2, 3) and all(part.isdigit() and int(part) for part in parts) and int(parts[0]) <= int(parts[1])):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range; write FROM-TO, such as 8-32, or FROM-TO-STEP")
    return range(int(parts[0]), int(parts[1]) + 1, *map(int, parts[2:]))


def _given(arguments: argparse.Namespace, *names: str, prefix: str = "") -> dict[str, Any]:
    """The arguments of these names that were given or have a default, as keywords."""
    return {name: value for name in names if (value := getattr(arguments, prefix + name)) is not None}


def _load(arguments: argparse.Namespace, source: str | None = None, count: Convention | None = None) -> pd.DataFrame:
    """The run table, or with ``source`` another one beside it: planned runs, counted as the first."""
    from morphlib import runs

    if source is None:
        return runs.load(arguments.runs, arguments.count, columns=arguments.map, average_logs=arguments.average_logs)
    return runs.load(source, count, measured=False)


def _fit(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit a scaling law to a table of runs and report how well the runs determine it."""
    from morphlib import diagnostics, fitting, uncertainty  # scipy and pandas: only when a fit is asked for

    table = _load(arguments)
    law = laws.get(arguments.law, arguments.exponents)
    weights = None
    if arguments.weights is not None:
        if arguments.weights not in table:
            raise InputError(f"{arguments.runs}: column {arguments.weights}, given as --weights, is missing")
        weights = table[arguments.weights]
    if arguments.published:
        if arguments.loss != "squared" or weights is not None:
            raise InputError("the authors fitted squared residuals without weights; leave out --loss, --weights or --published")
        fit = fitting.fit_published(table, law, arguments.fit_on)
    else:
        options = {"loss": arguments.loss, "positive": not arguments.allow_negative, "weights": weights}
        fit = fitting.fit(table, law, arguments.fit_on, **options)
    left_out = None  # where the fit is not one of squares, or the table leaves too little
    with suppress(InputError):
        if fit.loss == "squared":
            errors = diagnostics.held_out_losses(table, law, "shape", arguments.fit_on, weights=weights).metrics
            left_out = {"n": errors.n, "rmse": errors.rmse, "mape": errors.mape}
    metrics = {use: asdict(value) for use, value in diagnostics.metrics_by_use(table, fit).items()}
    predictions = table[["name", "tokens", "loss"]].assign(loss_predicted=fit.loss_predicted)
    parameters: dict[str, dict[str, Any]] = {
        name: {"value": value, "standard_error": fit.standard_errors[name]} for name, value in fit.parameters.items()
    }
    result = {
        "law": law.name,
        "exponents": law.exponents,
        "count": fit.count,
        "parameters": parameters,
        "metrics": metrics,
        "predictions": predictions.to_dict(orient="records"),
        **_ending(table, fit),
        # residuals say which rows stand out only where the fit is that of their squares
        "audit": diagnostics.audit(table, fit if arguments.loss == "squared" else None),
        "shapes_left_out": left_out,
        "information_criteria": diagnostics.information_criteria(fit, table, assume_independent=True)._asdict(),
    }
    intervals = _intervals(arguments, table, fit)
    if intervals is not None:
        for name, row in intervals.pop("interval").iterrows():
            parameters[str(name)] |= {"low": row["low"], "high": row["high"]}
        result["intervals"] = intervals
    if arguments.predict:
        new = _load(arguments, arguments.predict, fit.count)
        covariance = uncertainty.cluster_covariance(table, fit, arguments.cluster) if arguments.cluster else None
        predicted = uncertainty.prediction_interval(new, fit, table, covariance=covariance)
        columns = {"loss_predicted": predicted["loss"], "low": predicted["low"], "high": predicted["high"]}
        result["predicted"] = new[["name", "tokens"]].assign(**columns).to_dict(orient="records")
    return result


def _ending(table: pd.DataFrame, fit: Fit) -> dict[str, Any]:
    from morphlib import diagnostics

    verdict = diagnostics.identifiability(table, fit)
    return {
        "status": {"code": fit.status.name.lower(), "message": fit.status.value},
        "verdict": {"identified": verdict.identified, "sentences": list(verdict.sentences)},
    }


def _intervals(arguments: argparse.Namespace, table: pd.DataFrame, fit: Fit) -> dict[str, Any] | None:
    """95 % intervals of the parameters where they are asked for, by resampling, by CR3 or by the profile."""
    import pandas as pd

    from morphlib import uncertainty

    if arguments.profile:
        if arguments.bootstrap or arguments.cluster:
            raise InputError("a profile takes rows for independent; leave out --bootstrap and --cluster, or --profile")
        ends = {name: uncertainty.profile_interval(table, fit, name) for name in fit.parameters}
        interval = pd.DataFrame.from_dict(ends, orient="index", columns=["low", "high"])
        of, n_clusters = "profile", int(fit.fitted.sum())
    elif arguments.bootstrap:
        resampled = uncertainty.bootstrap(table, fit, arguments.bootstrap, cluster=arguments.cluster)
        of = f"{len(resampled.values)} resamples, {resampled.n_left_out} left out"
        interval, n_clusters = resampled.interval(), resampled.n_clusters
    elif arguments.cluster:
        covariance = uncertainty.cluster_covariance(table, fit, arguments.cluster)
        of, interval, n_clusters = "CR3", uncertainty.parameter_interval(fit, covariance=covariance), covariance.n_clusters
    else:
        return None
    few = len(fit.rows(table)) < 5 * len(fit.parameters)
    note = "with fewer than five rows per parameter no kind of interval was seen to hold its level" if few else None
    return {"of": of, "cluster": arguments.cluster, "n_clusters": n_clusters, "note": note, "interval": interval}


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare laws by their error on runs that the fit has not seen, best first."""
    from morphlib import diagnostics

    table = _load(arguments)
    names = arguments.law or [*laws.BASES, *(f"chinchilla+{shape}" for shape in laws.SHAPE_TERMS)]
    modes: list[laws.Exponents] = [arguments.exponents] if arguments.exponents else ["tied", "free"]
    chosen = {(law.name, law.parameters): law for mode in modes for law in (laws.get(name, mode) for name in names)}
    readable = [law for law in chosen.values() if arguments.law or "M" not in law.variables or "d_ff" in table]
    compared = diagnostics.compare(table, readable, arguments.holdout, arguments.fit_on)
    return {"laws": compared.to_dict(orient="records")}


def _design(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rank candidate runs by how much training one more of them would teach per FLOP (6 N D), best first."""
    from morphlib import design, fitting

    table = _load(arguments)
    fit = fitting.fit(table, laws.get(arguments.law, arguments.exponents), arguments.fit_on)
    candidates = _load(arguments, arguments.candidates, fit.count)
    target = _load(arguments, arguments.target, fit.count) if arguments.target else None
    ranked = design.rank_next_runs(table, fit, candidates, target, arguments.parameter)
    return {"candidates": ranked.to_dict(orient="records"), **_ending(table, fit)}


def _select(arguments: argparse.Namespace) -> dict[str, Any]:
    """Choose the shape of least predicted loss under caps on parameters, training tokens and latency."""
    from morphlib import fitting, selection, uncertainty
    from morphlib.latency.analytic import Machine, Workload
    from morphlib.shapes import candidates

    table = _load(arguments)
    caps = selection.Caps(**_given(arguments, "params", "tokens", "latency_s", "kv_bytes", "weight_bytes", prefix="max_"))
    asked = _given(arguments, "batch", "in_tokens", "out_tokens", "weight_bits", "kv_bits")
    work = Workload(**asked)
    if arguments.latencies:
        latencies: selection.Latencies = selection.Tabled.read(arguments.latencies, **asked)
    else:
        names = ("tolerance", "depths", "width_multiple", "n_heads", "queries_per_kv_head", "d_ff_ratios", "vocab", "tied")
        shapes = candidates(arguments.max_params, count=table["n_count"].iloc[0], **_given(arguments, *names))
        machine = Machine.of(arguments.gpu, arguments.mode, weight_bits=work.weight_bits)
        latencies = selection.Predicted(shapes, machine, work)
    print(f"morph select: {len(latencies.shapes)} candidate shapes", file=sys.stderr)
    fit = fitting.fit(table, laws.get(arguments.law, arguments.exponents), arguments.fit_on)
    draws = uncertainty.bootstrap(table, fit, arguments.draws, cluster=arguments.cluster).values if arguments.draws else None
    options = _given(arguments, "run_noise", "contain", "extrapolate")
    found = selection.select(table, fit, latencies, caps, parameters=draws, **options)
    listed = found.candidates
    result = {
        "law": fit.law.name,
        "exponents": fit.law.exponents,
        "count": fit.count,
        "chosen": listed.iloc[0].to_dict(),
        "candidates": listed.head(arguments.top).to_dict(orient="records"),
        "n_candidates": len(listed),
        "binding_caps": list(found.binding_caps),
        "shadow_prices": found.shadow_prices,
        "left_out": found.left_out,
        "continuous": asdict(found.optimum) if found.optimum else None,
        "front": found.front.to_dict(orient="records"),
        "caps": asdict(caps),
        "workload": asdict(latencies.work),
        **_ending(table, fit),
    }
    if draws is not None:
        result["probabilities"] = {
            "beyond_latency_cap": found.probability_beyond,
            "none_within": found.probability_none,
            "to_train": listed["shape"][listed["train"]].tolist(),
            "not_told_apart": listed["shape"][~listed["told_apart"]].tolist(),
        }
    if arguments.inference_tokens:
        ranges = None if arguments.extrapolate else selection.fitted_ranges(table, fit)
        cost = selection.lifetime(fit, latencies.shapes, float(listed["loss"][0]), arguments.inference_tokens, ranges)
        cheapest = int(cost["flops"].argmin())
        result["lifetime"] = {"shape": str(latencies.shapes[cheapest]), **cost.iloc[cheapest].to_dict()}
    return result


def _show_fit(result: dict[str, Any]) -> None:
    print(f"{result['law']}, {result['exponents']} exponents, N counted as {result['count']}\n")
    _show_table([{"parameter": name, **entry} for name, entry in result["parameters"].items()])
    if intervals := result.get("intervals"):
        of = "rows" if intervals["cluster"] is None else f"clusters by {intervals['cluster']}"
        note = f"; {intervals['note']}" if intervals["note"] else ""
        print(f"intervals: {intervals['of']}, {intervals['n_clusters']} {of}{note}")
    seen = {"all": "includes rows the fit has seen", "fitted": "rows the fit has seen", "each shape": "left out"}
    errors = result["metrics"] | {"each shape": result["shapes_left_out"] or {"n": 0}}
    print()
    _show_table([{"rows": use, **m, "": seen.get(use, "")} for use, m in errors.items() if m["n"]])
    criteria = result["information_criteria"]
    if math.isfinite(criteria["bic"]):
        print("\nAIC {aic:.2f}, AICc {aicc:.2f}, BIC {bic:.2f} (they assume independent rows)".format(**criteria))
    if "predicted" in result:
        print()
        _show_table(result["predicted"])
    _show_verdict(result)


def _show_table(rows: list[dict[str, Any]]) -> None:
    import pandas as pd

    table = pd.DataFrame(rows).rename(columns={"low": "95 % low", "high": "95 % high", "standard_error": "std. error"})
    print(table.to_string(index=False, na_rep="", float_format="{:.5g}".format))


def _show_verdict(result: dict[str, Any]) -> None:
    print(f"\n{result['status']['code']}: {result['status']['message']}")
    for sentence in (*result["verdict"]["sentences"], *result.get("audit", [])):
        print(f"- {sentence}")


def _show_rows(key: str, result: dict[str, Any]) -> None:
    _show_table(result[key])
    if "verdict" in result:
        _show_verdict(result)


_SHOWN = {"shape": "shape", "n_params": "N", "loss": "loss", "loss_low": "95 % low", "loss_high": "95 % high"}
_SHOWN |= {"latency_s": "latency s", "latency_low_s": "from", "latency_high_s": "to", "latency_kind": "kind"}
_SHOWN |= {"probability_best": "P(best)", "expected_regret": "regret"}


def _show_select(result: dict[str, Any]) -> None:
    print(f"{result['chosen']['shape']} has the least loss that {result['law']} predicts within the caps\n")
    _show_table([{name: row[key] for key, name in _SHOWN.items() if key in row} for row in result["candidates"]])
    more = result["n_candidates"] - len(result["candidates"])
    print(f"and {more} more; left out by: " + (", ".join(f"{why} {n}" for why, n in result["left_out"].items()) or "nothing"))
    print(f"binding: {', '.join(result['binding_caps']) or 'none'}")
    if prices := result["shadow_prices"]:
        print("one more unit of a cap saves: " + ", ".join(f"{price:.3g} {unit}" for unit, price in prices.items()))
    if best := result["continuous"]:
        print("with any width and depth: {n_layers:.2f} x {d_model:.0f}, loss {loss:.4f}".format(**best))
    if odds := result.get("probabilities"):
        print(f"train {len(odds['to_train'])} to have the best among them: {', '.join(odds['to_train'])}")
        print(f"not told apart from the chosen one, itself included: {len(odds['not_told_apart'])}")
        print(
            "a shape beyond the latency cap is within it and better with probability {beyond_latency_cap:.2f}; "
            "none is within it with {none_within:.2f}".format(**odds)
        )
    if cheapest := result.get("lifetime"):
        least = "least FLOPs of training and inference for that loss: {shape}, {tokens:.3g} tokens, {flops:.3g} FLOPs"
        print(least.format(**cheapest))
    _show_verdict(result)


# the kinds of values that data/commands.toml names
_TYPES: dict[str, Callable[[str], Any]] = {
    "path": Path,
    "int": int,
    "float": float,
    "from 0": _number(0),
    "count": _number(1),
    "from 2": _number(2),
    "above zero": _above_zero,
    "microseconds": latency.microseconds,
    "mapping": _mapping,
    "range": _range,
}
# what each command runs, and what shows its result
_COMMANDS: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {
    "fit": (_fit, _show_fit),
    "compare": (_compare, partial(_show_rows, "laws")),
    "design": (_design, partial(_show_rows, "candidates")),
    "select": (_select, _show_select),
    "latency measure": (latency.measure, latency.show),
    "latency predict": (latency.predict, latency.show),
    "latency calibrate": (latency.calibrate, latency.show_calibration),
    "corpus build": (training_commands.build, training_commands.show_corpus),
    "train": (training_commands.train, training_commands.show_rows),
    "study plan": (training_commands.plan, training_commands.show_plan),
    "study run": (training_commands.study_run, training_commands.show_rows),
    "study collect": (training_commands.collect, training_commands.show_collected),
    "study rank": (training_commands.rank, training_commands.show_ranked),
    "eval": (evaluation_commands.run, partial(evaluation_commands.show, _show_table)),
}


def _parser() -> argparse.ArgumentParser:
    """The parser of the commands and options in ``data/commands.toml``."""
    told = tomllib.loads(resources.files("morphlib").joinpath("data/commands.toml").read_text(encoding="utf-8"))
    shared, texts = told.pop("shared"), told.pop("texts")
    texts |= {"laws": ", ".join(laws.NAMES), "shapes": ", ".join(laws.SHAPE_TERMS)}
    texts |= {"gpus": ", ".join(GPUS)}

    def add(options: dict[str, dict[str, Any]], to: Any) -> None:
        for name, option in options.items():
            filled = {key: value.format(**texts) if isinstance(value, str) else value for key, value in option.items()}
            to.add_argument(name, **filled | ({"type": _TYPES[filled["type"]]} if "type" in filled else {}))

    parser = _Parser(prog="morph", description="Scaling laws for inference-efficient language models.")
    parser.add_argument("--version", action="version", version=f"morph {__version__}")
    inside = {"": parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)}
    for name, one in told.items():
        above, _, last = name.rpartition(" ")
        run, show = _COMMANDS.get(name, (None, None))
        about, epilog = one.get("about", run and run.__doc__), one.get("epilog", "").format(**texts)
        command = inside[above].add_parser(last, help=one["help"], description=about, epilog=epilog)
        if run is None:
            inside[name] = command.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND", parser_class=_Parser)
            continue
        command.set_defaults(run=run, show=show)
        for part in one.get("shared", ()):
            add(shared[part], command)
        add(one.get("options", {}), command)
        if "either" in one:
            add(one["either"], command.add_mutually_exclusive_group())
        for title, options in one.get("groups", {}).items():
            add(options, command.add_argument_group(title))
        command.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        result = parsed.run(parsed)
    except InputError as error:
        print(f"morph {parsed.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        needed = f"it needs the package {error.name}; install morphlib with its extra, pip install 'morphlib[models]'"
        print(f"morph {parsed.command}: {needed}", file=sys.stderr)
        return 2
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a name or a sign that this output cannot hold shows as ?
    try:
        if parsed.json:
            print(files.to_json(result))
        else:
            parsed.show(result)
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        if not isinstance(error, BrokenPipeError):  # whose reader, such as head, has seen enough
            print(f"morph {parsed.command}: the result cannot be written ({error}); make room for it", file=sys.stderr)
            return 2
    return 2 if result.get("errors") else 0
