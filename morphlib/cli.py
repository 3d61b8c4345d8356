"""The command ``morph``: exit 0, 2 for what the user can mend (one line on stderr), 1 for our own fault."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from morphlib import __version__, evaluation_commands, files, laws, training_commands
from morphlib.errors import InputError
from morphlib.latency import commands as latency
from morphlib.shapes import BITS, CONVENTIONS, GPT_NEOX_VOCABULARY, Convention

if TYPE_CHECKING:
    import pandas as pd

    from morphlib.fitting import Fit


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.splitlines())}; see {self.prog} --help\n")


def _law(name: str) -> str:
    try:
        laws.get(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


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


_LOSSES = ("squared", "huber", "log-huber")
_HOLDOUTS = ("shape", "size", "largest-n", "widest-r")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="morph", description="Scaling laws for inference-efficient language models.")
    parser.add_argument("--version", action="version", version=f"morph {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_commands_of_laws(commands)
    latency.add_commands(commands, _Parser, _number(1))
    training_commands.add_commands(commands, _Parser, _number, _above_zero)
    evaluation_commands.add_commands(commands, _number(1), _show_table)
    return parser


def _add_commands_of_laws(commands: Any) -> None:
    of_table = _Parser(add_help=False)
    of_table.add_argument("--count", choices=CONVENTIONS, help="how N is counted; converts a table that counts otherwise")
    mapped = "columns of the file that have other names, n_params=N,tokens=D"
    of_table.add_argument("--map", type=_mapping, metavar="NAME=COLUMN,...", help=mapped)
    averaged = "average the log that column 'log' names, as the paper does"
    of_table.add_argument("--average-logs", action="store_true", help=averaged)
    of_table.add_argument("--fit-on", metavar="COLUMN", help="fit only the rows with 1 in this 0/1 column")
    of_table.add_argument("--json", action="store_true", help="print one JSON object")
    which = "'paper' for the paper's 76 runs, or the path of a CSV file"
    table = _Parser(add_help=False, parents=[of_table])
    table.add_argument("runs", metavar="RUNS", help=which)
    law = _Parser(add_help=False)
    named = f"{', '.join(laws.NAMES)}, or BASE+SHAPE with SHAPE one of {', '.join(laws.SHAPE_TERMS)} (default: %(default)s)"
    law.add_argument("--law", type=_law, default="inference-aware", metavar="LAW", help=named)
    freed = "tied: alpha = beta = gamma; gamma: only gamma freed; free: each free (default: %(default)s)"
    law.add_argument("--exponents", choices=laws.EXPONENTS, default="tied", help=freed)

    columns = "A run table is a CSV file with the columns name, n_params, d_model, n_layers, tokens and loss (nats per token), "
    columns += "and n_count to say how n_params is counted."

    def add(name: str, run: Callable[..., Any], show: Callable[..., None], parents: Any, about: str, more: str = "") -> Any:
        # the docstring of what a command runs is its description
        command = commands.add_parser(name, parents=parents, help=about, description=run.__doc__, epilog=f"{columns}{more}")
        command.set_defaults(run=run, show=show)
        return command

    errors = " Errors called mape are mean absolute errors in percent."
    fit = add("fit", _fit, _show_fit, [table, law], "fit a scaling law to a table of runs", errors)
    fit.add_argument("--published", action="store_true", help="fit exactly as the authors' code does")
    fit.add_argument("--allow-negative", action="store_true", help="let coefficients fall below zero")
    fit.add_argument("--loss", choices=_LOSSES, default="squared", help="log-huber is of ln L (default: %(default)s)")
    weights = "weights of the squared residuals: a row has noise of a variance of 1 / weight"
    fit.add_argument("--weights", metavar="COLUMN", help=weights)
    fit.add_argument("--profile", action="store_true", help="report 95 %% intervals by the profile of the sum of squares")
    fit.add_argument("--bootstrap", type=_number(2), metavar="N", help="refit N resamples and report 95 %% intervals")
    fit.add_argument("--cluster", metavar="COLUMN", help="rows with one value of this column, such as name, share errors")
    fit.add_argument("--predict", metavar="CSV", help="also predict the loss of these runs; the file needs no loss")
    compare = add("compare", _compare, _show_rows("laws"), [table], "compare laws by their error on held-out runs")
    compare.add_argument("--holdout", choices=_HOLDOUTS, default="shape", help="what is held out (default: %(default)s)")
    compare.add_argument("--law", type=_law, action="append", metavar="LAW", help="may be repeated (default: all)")
    compare.add_argument("--exponents", choices=laws.EXPONENTS, help="(default: tied and free)")
    unmeasured = " Candidates need no loss."
    design = add("design", _design, _show_rows("candidates"), [table, law], "rank the runs to train next", unmeasured)
    design.add_argument("--candidates", required=True, metavar="CSV", help="the runs that could be trained")
    aim = design.add_mutually_exclusive_group()
    aim.add_argument("--target", metavar="CSV", help="runs whose predicted loss shall become surer")
    aim.add_argument("--parameter", metavar="NAME", help="the parameter that shall become surer")
    about = "choose the shape to train under caps on parameters, tokens and latency"
    of_latency = " Latency is end to end, predicted for a GPU unless --latencies gives it."
    _add_options_of_select(add("select", _select, _show_select, [of_table, law], about, of_latency))


def _add_options_of_select(select: argparse.ArgumentParser) -> None:
    add = select.add_argument
    add("--runs", default="paper", metavar="RUNS", help="'paper' or the path of a CSV file (default: %(default)s)")
    for name, unit in (
        ("params", "parameters, as the table counts them"),
        ("tokens", "training tokens"),
        ("latency-s", "seconds"),
    ):
        add(f"--max-{name}", type=_above_zero, required=True, metavar="X", help=unit)
    for name, unit in (("kv-bytes", "of the cache of keys and values at the end"), ("weight-bytes", "of the weights")):
        add(f"--max-{name}", type=_above_zero, default=math.inf, metavar="X", help=f"bytes {unit}")
    add("--gpu", default="A100-40GB", metavar="GPU", help="as in morph latency predict (default: %(default)s)")
    add("--mode", default="eager", metavar="MODE", help="eager, compiled or graph (default: %(default)s)")
    listed = "choose among the shapes of this file, with columns shape and latency_s, or rows of morph latency measure; "
    add("--latencies", metavar="CSV", help=f"{listed}GPU, mode and candidates are then not asked for")
    for name in ("batch", "in-tokens", "out-tokens"):
        add(f"--{name}", type=_number(1), metavar="N", help="of the workload (default: 1, 128, 256)")
    for name in ("weight-bits", "kv-bits"):
        add(f"--{name}", type=int, choices=BITS, help="(default: 16)")
    add = select.add_argument_group("candidates").add_argument
    add("--tolerance", type=float, default=1.0, metavar="X", help="only shapes of (1 - X) times --max-params or more")
    add("--depths", type=_range, metavar="FROM-TO[-STEP]", help="layers (default: 1-128)")
    add("--width-multiple", type=_number(1), default=128, metavar="N", help="of the width (default: %(default)s)")
    same = "as many heads in every shape (default: heads of 128, or 64)"
    add("--heads", dest="n_heads", type=_number(1), metavar="N", help=same)
    add("--queries-per-kv-head", type=_number(1), action="append", metavar="N", help="1 is MHA (default), more GQA")
    ratio = "d_ff over width (default: Open-LM's rule)"
    add("--d-ff-ratio", dest="d_ff_ratios", type=_above_zero, action="append", metavar="X", help=ratio)
    add("--vocab", type=_number(1), default=GPT_NEOX_VOCABULARY, metavar="N", help="(default: %(default)s)")
    add("--tied", action="store_true", help="share the embedding with the output head")
    add("--extrapolate", action="store_true", help="allow N, D and R outside the fitted rows, flagged")
    add = select.add_argument_group("uncertainty").add_argument
    add("--draws", type=_number(0), default=1000, metavar="N", help="refits of resampled runs (default: %(default)s)")
    add("--cluster", default="name", metavar="COLUMN", help="rows that are resampled together (default: %(default)s)")
    add("--run-noise", action="store_true", help="let each candidate deviate from the law as a single run does")
    add("--contain", type=float, default=0.9, metavar="P", help="probability that those to train contain the best")
    select.add_argument("--inference-tokens", type=_above_zero, metavar="X", help="also choose by training and inference FLOPs")
    select.add_argument("--top", type=_number(1), default=20, metavar="N", help="candidates to list (default: %(default)s)")


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
        latencies: selection.Latencies = selection.Tabled.read(arguments.latencies, work if asked else None)
    else:
        names = ("tolerance", "depths", "width_multiple", "n_heads", "queries_per_kv_head", "d_ff_ratios", "vocab", "tied")
        try:
            shapes = candidates(arguments.max_params, count=table["n_count"].iloc[0], **_given(arguments, *names))
        except ValueError as error:
            raise InputError(str(error)) from None
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


def _show_rows(key: str) -> Callable[[dict[str, Any]], None]:
    def show(result: dict[str, Any]) -> None:
        _show_table(result[key])
        if "verdict" in result:
            _show_verdict(result)

    return show


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
        print(f"not told apart from the chosen one: {len(odds['not_told_apart'])}")
        print(
            "a shape beyond the latency cap is within it and better with probability {beyond_latency_cap:.2f}; "
            "none is within it with {none_within:.2f}".format(**odds)
        )
    if cheapest := result.get("lifetime"):
        least = "least FLOPs of training and inference for that loss: {shape}, {tokens:.3g} tokens, {flops:.3g} FLOPs"
        print(least.format(**cheapest))
    _show_verdict(result)


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
    try:
        if parsed.json:
            print(files.to_json(result))
        else:
            parsed.show(result)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    return 2 if result.get("errors") else 0
