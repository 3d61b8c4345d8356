import json
import subprocess
import sys

import pytest

from conftest import ROOT
from morphlib import cli
from test_runs import FAULTS, REQUIRED, written


def morph(capsys, *arguments):
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refuse_constant(name):
    raise AssertionError(f"{name} in JSON")


def fit_json(capsys, *arguments):
    code, out, err = morph(capsys, "fit", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out, parse_constant=refuse_constant)


def test_fit_json_keeps_the_contract(capsys):
    result = fit_json(capsys, "paper", "--fit-on", "fit_main", "--published")
    assert list(result) == ["law", "exponents", "count", "parameters", "metrics", "predictions", "status"]
    assert (result["law"], result["exponents"], result["count"]) == ("inference-aware", "tied", "total")
    assert list(result["parameters"]) == ["A", "B", "E", "alpha", "epsilon"]
    assert all(set(entry) == {"value", "standard_error"} for entry in result["parameters"].values())
    assert result["parameters"]["A"]["value"] == pytest.approx(54754.43, rel=1e-4)
    assert {use: m["n"] for use, m in result["metrics"].items()} == {"all": 76, "fitted": 27, "held_out": 49}
    assert all(set(m) == {"n", "mse", "rmse", "r2", "mape"} for m in result["metrics"].values())
    assert result["metrics"]["all"]["mse"] == pytest.approx(0.000554, abs=5e-7)
    assert len(result["predictions"]) == 76
    assert set(result["predictions"][0]) == {"name", "tokens", "loss", "loss_predicted"}
    assert set(result["status"]) == {"code", "message"}


def test_what_cannot_be_said_is_null(capsys):
    result = fit_json(capsys, "paper")
    assert result["metrics"]["held_out"] == {"n": 0, "mse": None, "rmse": None, "r2": None, "mape": None}


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        (["--law", "chinchilla"], "A B E alpha"),
        (["--law", "chinchilla", "--exponents", "free"], "A B E alpha beta"),
        (["--law", "chinchilla+power", "--exponents", "gamma"], "A B E alpha epsilon gamma"),
        (["--exponents", "free", "--count", "non_embedding"], "A B E alpha beta epsilon gamma"),
    ],
)
def test_options(capsys, options, parameters):
    result = fit_json(capsys, "paper", *options)
    assert list(result["parameters"]) == parameters.split()


def test_a_table_of_ones_own(capsys, tmp_path, paper):
    path = written(paper[REQUIRED], tmp_path / "runs.csv")
    assert fit_json(capsys, path, "--count", "total")["parameters"] == fit_json(capsys, "paper")["parameters"]
    code, out, _ = morph(capsys, "fit", path, "--count", "total")
    assert code == 0
    assert "epsilon" in out and "converged" in out


def one_line(code, out, err):
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_table_is_exit_code_2_and_one_line(capsys, tmp_path, paper, fault):
    path = written(FAULTS[fault][0](paper), tmp_path / "runs.csv")
    before = sorted(tmp_path.iterdir())
    one_line(*morph(capsys, "fit", path, "--json"))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fti"],
        ["fit"],
        ["fit", "nowhere.csv"],
        ["fit", "."],
        ["fit", "paper", "--law", "kaplan"],
        ["fit", "paper", "--exponents", "loose"],
        ["fit", "paper", "--count", "active"],
        ["fit", "paper", "--fit-on", "fit_nothing"],
        ["fit", "paper", "--published", "--exponents", "free"],
        ["fit", "paper", "--no-such-option"],
    ],
)
def test_wrong_arguments_are_exit_code_2_and_one_line(capsys, arguments):
    one_line(*morph(capsys, *arguments))


@pytest.mark.parametrize("rows", ["few", "one size"])
def test_rows_that_cannot_be_fitted(capsys, tmp_path, paper, rows):
    table = paper.head(3) if rows == "few" else paper[paper["family"] == "1B"].head(3)
    if rows == "one size":
        table = paper[REQUIRED].assign(n_params=1e8, n_count="total")
    one_line(*morph(capsys, "fit", written(table, tmp_path / "runs.csv")))


def test_importing_and_fitting_load_nothing_heavy():
    """`import morphlib` brings in nothing heavier than numpy; `morph fit` no torch, transformers or statsmodels."""
    heavy = ["torch", "transformers", "statsmodels", "matplotlib", "papermill"]
    script = (
        "import sys, contextlib, io\n"
        "import morphlib\n"
        "light = [m for m in ('numpy', 'pandas', 'scipy', 'pandera') if m in sys.modules]\n"
        "from morphlib import cli\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    assert cli.main(['fit', 'paper', '--json']) == 0\n"
        f"print(light, [m for m in {heavy} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split("\n")[0] == "[] []"
