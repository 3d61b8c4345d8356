"""The command ``morph``: exit 0, 2 for what the user can mend (one line on stderr), 1 for our own fault."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from morphlib import __version__, laws
from morphlib.errors import InputError
from morphlib.shapes import CONVENTIONS


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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="morph", description="Scaling laws for inference-efficient language models.")
    parser.add_argument("--version", action="version", version=f"morph {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    fit = commands.add_parser(
        "fit",
        help="fit a scaling law to a table of runs",
        description="Fit a scaling law to a table of runs by least squares.",
        epilog="A run table is a CSV file with the columns name, n_params, d_model, n_layers, tokens and loss (nats per "
        "token), and n_count to say how n_params is counted. Errors called mape are mean absolute errors in percent.",
    )
    fit.add_argument("runs", metavar="RUNS", help="'paper' for the paper's 76 runs, or the path of a CSV file")
    fit.add_argument(
        "--law", type=_law, default="inference-aware", metavar="LAW", help=f"{', '.join(laws.NAMES)} (default: %(default)s)"
    )
    fit.add_argument(
        "--exponents",
        choices=laws.EXPONENTS,
        default="tied",
        help="tied: alpha = beta = gamma; gamma: only gamma freed; free: each free (default: %(default)s)",
    )
    fit.add_argument("--count", choices=CONVENTIONS, help="how N is counted; converts a table that counts otherwise")
    fit.add_argument("--fit-on", metavar="COLUMN", help="fit only the rows with 1 in this 0/1 column")
    fit.add_argument("--published", action="store_true", help="fit exactly as the authors' code does")
    fit.add_argument("--json", action="store_true", help="print one JSON object")
    fit.set_defaults(run=_fit)
    return parser


def _fit(arguments: argparse.Namespace) -> dict[str, Any]:
    from morphlib import diagnostics, fitting, runs  # scipy and pandas: only when a fit is asked for

    table = runs.load(arguments.runs, arguments.count)
    law = laws.get(arguments.law, arguments.exponents)
    search = fitting.fit_published if arguments.published else fitting.fit
    fit = search(table, law, arguments.fit_on)
    metrics = {use: asdict(value) for use, value in diagnostics.metrics_by_use(table, fit).items()}
    for values in metrics.values():
        values["mape"] = values.pop("mape_pct")
    predictions = table[["name", "tokens", "loss"]].assign(loss_predicted=fit.loss_predicted)
    return {
        "law": law.name,
        "exponents": law.exponents,
        "count": fit.count,
        "parameters": {
            name: {"value": value, "standard_error": fit.standard_errors[name]} for name, value in fit.parameters.items()
        },
        "metrics": metrics,
        "predictions": predictions.to_dict(orient="records"),
        "status": {"code": fit.status.name.lower(), "message": fit.status.value},
    }


def _print_fit(result: dict[str, Any]) -> None:
    print(f"{result['law']}, {result['exponents']} exponents, N counted as {result['count']}\n")
    print(f"{'parameter':<12}{'value':>14}{'std. error':>14}")
    for name, entry in result["parameters"].items():
        print(f"{name:<12}{entry['value']:>14.6g}{entry['standard_error']:>14.3g}")
    print(f"\n{'rows':<12}{'n':>5}{'MSE':>12}{'RMSE':>10}{'R2':>10}{'MAPE %':>9}")
    for use, m in result["metrics"].items():
        print(f"{use:<12}{m['n']:>5}{m['mse']:>12.6f}{m['rmse']:>10.4f}{m['r2']:>10.5f}{m['mape']:>9.3f}")
    print(f"\n{result['status']['code']}: {result['status']['message']}")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN or infinity; what cannot be said is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        result = parsed.run(parsed)
    except InputError as error:
        print(f"morph {parsed.command}: {error}", file=sys.stderr)
        return 2
    if parsed.json:
        print(json.dumps(_without_nan(result), allow_nan=False))
    else:
        _print_fit(result)
    return 0
