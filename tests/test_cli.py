import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from morphlib import cli, diagnostics, fitting, laws, recipes, shapes
from morphlib.latency import engines, models
from test_runs import FAULTS, REQUIRED, written

COMMANDS = tomllib.loads((ROOT / "morphlib/data/commands.toml").read_text())


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
    assert list(result)[:7] == ["law", "exponents", "count", "parameters", "metrics", "predictions", "status"]
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


def test_fit_with_everything(capsys, tmp_path, paper):
    renamed = paper.rename(columns={"n_params": "N", "tokens": "D"})
    path = written(renamed, tmp_path / "runs.csv")
    planned = written(paper.drop(columns="loss").tail(3), tmp_path / "planned.csv")
    options = ["--map", "n_params=N,tokens=D", "--exponents", "free", "--loss", "log-huber", "--predict", planned]
    result = fit_json(capsys, path, *options[:4], "--bootstrap", "50", "--cluster", "name", "--predict", planned)
    for entry in result["parameters"].values():
        assert entry["low"] <= entry["value"] <= entry["high"]
    assert result["intervals"]["n_clusters"] == 35
    by_shape = fit_json(capsys, path, *options[:4], "--cluster", "name")
    assert by_shape["intervals"] == {"of": "CR3", "cluster": "name", "n_clusters": 35, "note": None}
    assert all(entry["low"] < entry["value"] < entry["high"] for entry in by_shape["parameters"].values())
    assert [row["name"] for row in result["predicted"]] == list(paper["name"].tail(3))
    for row in result["predicted"]:
        assert row["low"] < row["loss_predicted"] < row["high"]
    assert isinstance(result["verdict"]["identified"], bool) and result["verdict"]["sentences"]
    assert any("126M_v1" in sentence for sentence in result["audit"])
    robust = fit_json(capsys, path, *options[:6])
    assert robust["parameters"]["alpha"]["value"] != result["parameters"]["alpha"]["value"]
    code, out, _ = morph(capsys, "fit", path, *options[:4], "--bootstrap", "50", "--cluster", "name", "--predict", planned)
    assert code == 0 and "95 % low" in out and "339M_v1" in out


def test_weights(capsys, tmp_path, paper):
    half = paper.assign(w=np.where(paper["budget"] == "20N", 0.5, 1.0))
    result = fit_json(capsys, written(half, tmp_path / "half.csv"), "--weights", "w", "--cluster", "name")
    expected = fitting.fit(paper, laws.get("inference-aware"), weights=half["w"])
    assert result["parameters"]["alpha"]["value"] == pytest.approx(expected.parameters["alpha"], rel=1e-9)
    assert result["information_criteria"] == {"aic": None, "aicc": None, "bic": None}
    for wrong in (-1.0, np.inf, None, "heavy"):
        table = half.astype(object).assign(w=[wrong, *half["w"][1:]])
        one_line(*morph(capsys, "fit", written(table, tmp_path / "wrong.csv"), "--weights", "w"))
    one_line(*morph(capsys, "fit", written(half.assign(w=0.0), tmp_path / "zero.csv"), "--weights", "w"))


def test_profiles_and_criteria(capsys):
    result = fit_json(capsys, "paper", "--law", "chinchilla", "--profile")
    assert result["intervals"]["of"] == "profile"
    assert all(entry["low"] < entry["value"] < entry["high"] for entry in result["parameters"].values())
    criteria = result["information_criteria"]
    assert criteria["aic"] < criteria["aicc"] < criteria["bic"]  # of 76 rows and 5 parameters
    code, out, _ = morph(capsys, "fit", "paper", "--law", "chinchilla", "--profile")
    assert code == 0 and "assume independent rows" in out and "95 % low" in out
    robust = fit_json(capsys, "paper", "--loss", "huber")
    assert robust["shapes_left_out"] is None and set(robust["information_criteria"].values()) == {None}


def test_the_report_says_what_is_odd(capsys, tmp_path, paper):
    """One outlier, copied rows, losses below any plausible E: each is said, and none makes a confident interval."""
    table = paper[[*REQUIRED, "n_count"]]
    outlier = table.assign(loss=[*table["loss"][:-1], 30.0])
    result = fit_json(capsys, written(outlier, tmp_path / "outlier.csv"))
    assert any("339M_v1" in sentence and "standard deviations" in sentence for sentence in result["audit"])
    copies = pd.concat([table, table.assign(name=table["name"] + " again")])
    result = fit_json(capsys, written(copies, tmp_path / "copies.csv"))
    assert not result["verdict"]["identified"]
    assert sum("repeat" in sentence for sentence in result["audit"]) == 1
    tiny = table.assign(loss=table["loss"] * 1e-4)
    assert any("below 0.3 nats" in sentence for sentence in fit_json(capsys, written(tiny, tmp_path / "tiny.csv"))["audit"])


def test_negative_coefficients_only_when_asked_for(capsys):
    held = fit_json(capsys, "paper", "--fit-on", "fit_20N_only", "--law", "chinchilla")
    free = fit_json(capsys, "paper", "--fit-on", "fit_20N_only", "--law", "chinchilla", "--allow-negative")
    assert (held["parameters"]["A"]["value"], held["status"]["code"]) == (0, "at_bound")
    assert free["parameters"]["A"]["value"] < 0 and free["status"]["code"] == "negative"


@pytest.mark.parametrize("holdout", ["shape", "size", "largest-n", "widest-r"])
def test_compare_keeps_the_contract(capsys, holdout):
    chosen = ["--law", "chinchilla", "--law", "inference-aware", "--law", "width-depth"]
    code, out, err = morph(capsys, "compare", "paper", "--holdout", holdout, *chosen, "--json")
    assert (code, err) == (0, "")
    rows = json.loads(out, parse_constant=refuse_constant)["laws"]
    assert len(rows) == 6
    assert all({"law", "exponents", "count", "holdout", "n", "rmse", "mape"} <= set(row) for row in rows)
    errors = [row["rmse"] for row in rows]
    assert errors == sorted(errors)
    # a fifth of 76 rows, and those as wide as the last of them
    assert {row["n"] for row in rows} == {{"shape": 76, "size": 76, "largest-n": 4, "widest-r": 18}[holdout]}


def test_design_keeps_the_contract(capsys, tmp_path, paper):
    candidates = written(paper.drop(columns="loss").iloc[[0, 40, 75]], tmp_path / "candidates.csv")
    target = written(paper.drop(columns="loss")[paper["family"] == "1B"], tmp_path / "target.csv")
    for aim in ([], ["--target", target], ["--parameter", "epsilon"]):
        code, out, err = morph(capsys, "design", "paper", "--candidates", candidates, "--fit-on", "fit_main", *aim, "--json")
        assert (code, err) == (0, "")
        rows = json.loads(out, parse_constant=refuse_constant)["candidates"]
        assert all(list(row) == ["name", "gain", "flops", "gain_per_flop"] for row in rows)
        assert [row["gain_per_flop"] for row in rows] == sorted((row["gain_per_flop"] for row in rows), reverse=True)


def test_a_reader_that_has_seen_enough_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -c 'from morphlib.cli import main; raise SystemExit(main([\"fit\", \"paper\", \"--json\"]))' | true",
        shell=True, capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.stderr == ""


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
        ["fit", "paper", "--law", "chinchilla+"],
        ["fit", "paper", "--map", "n_params"],
        ["fit", "paper", "--map", "n_params=size"],
        ["fit", "paper", "--average-logs"],
        ["fit", "paper", "--bootstrap", "1"],
        ["fit", "paper", "--bootstrap", "50", "--cluster", "nothing"],
        ["fit", "paper", "--cluster", "nothing"],
        ["fit", "paper", "--predict", "nowhere.csv"],
        ["fit", "paper", "--published", "--loss", "huber"],
        ["fit", "paper", "--published", "--weights", "tokens"],
        ["fit", "paper", "--weights", "nothing"],
        ["fit", "paper", "--profile", "--cluster", "name"],
        ["fit", "paper", "--profile", "--bootstrap", "50"],
        ["fit", "paper", "--profile", "--loss", "huber"],
        ["fit", "paper", "--published", "--law", "width-depth"],
        ["compare", "paper", "--holdout", "nothing"],
        ["compare", "paper", "--law", "kaplan"],
        ["design", "paper"],
        ["design", "paper", "--candidates", "nowhere.csv"],
        ["design", "paper", "--candidates", "morphlib/data/paper_runs.csv", "--parameter", "gamma_2"],
    ],
)
def test_wrong_arguments_are_exit_code_2_and_one_line(capsys, monkeypatch, arguments):
    monkeypatch.chdir(ROOT)
    one_line(*morph(capsys, *arguments))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no full device")
def test_a_result_that_cannot_be_written_is_told_in_one_line():
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        command = [sys.executable, "-c", "import sys; from morphlib import cli; sys.exit(cli.main(['fit', 'paper', '--json']))"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "the result cannot be written" in done.stderr


def test_a_name_that_the_output_cannot_hold_is_shown_all_the_same(tmp_path, paper):
    planned = written(paper.head(1).assign(name="größer"), tmp_path / "planned.csv")
    command = "import sys; from morphlib import cli; sys.exit(cli.main(['fit', 'paper', '--predict', sys.argv[1]]))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", command, planned], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "") and "gr??er" in done.stdout


def test_only_what_needs_a_home_asks_for_one(capsys, monkeypatch, tmp_path):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MORPH_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert morph(capsys, "fit", "paper")[0] == 0
    code, out, err = morph(capsys, "train", "--shape", "4x64", "--tokens", "1e3", "--out", tmp_path / "run")
    one_line(code, out, err)
    assert "set MORPH_HOME" in err and not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("name", ["", *(name for name in COMMANDS if name not in ("texts", "shared"))])
def test_every_command_has_help(capsys, name):
    code, out, err = morph(capsys, *name.split(), "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: {' '.join(['morph', *name.split()])} ")
    assert not re.search(r"\{(laws|shapes|gpus|home|columns)\}", out)


def test_options_offer_the_choices_that_the_package_has():
    parts = [
        *COMMANDS["shared"].values(),
        *(part for one in COMMANDS.values() for part in (one.get("options", {}), *one.get("groups", {}).values())),
    ]
    offered = {}
    for part in parts:
        for name, option in part.items():
            if "choices" in option:
                offered.setdefault(name, set()).add(tuple(option["choices"]))
    dtypes = tuple(models.DTYPES)
    assert offered == {
        "--count": {shapes.CONVENTIONS},
        "--exponents": {laws.EXPONENTS},
        "--loss": {fitting.LOSSES},
        "--holdout": {diagnostics.HOLDOUTS},
        "--weight-bits": {shapes.BITS},
        "--kv-bits": {shapes.BITS},
        "--engine": {engines.ENGINES},
        "--device": {engines.DEVICES},
        "--dtype": {dtypes, ("auto", *dtypes), get_args(recipes.Precision)},
        "--schedule": {get_args(recipes.Schedule)},
        "--launch": {("open_lm",)},
    }
