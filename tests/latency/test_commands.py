"""The commands morph latency measure, predict and calibrate, as a user meets them."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from morphlib import cli
from morphlib.latency import DATA, analytic, hardware, timing
from morphlib.shapes import Shape

TINY = "2x64/1h/1kv/128ff/256v"
SMALL = ["--dtype", "fp32", "--device", "cpu", "--threads", "1", "--in-tokens", "8", "--out-tokens", "4", "--quick"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["latency", *arguments])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("gpu", hardware.GPUS)
@pytest.mark.parametrize("mode", ["eager", "compiled", "graph"])
def test_predict_keeps_its_contract(capsys, gpu, mode):
    code, out, _ = run(
        capsys, "predict", "--shape", "12x3072", "--shape", "Llama-3.2-1B", "--gpu", gpu, "--mode", mode, "--json"
    )
    assert code == 0
    for row in json.loads(out)["results"]:
        assert (row["gpu"], row["mode"], row["kind"]) == (gpu, mode, "predicted")
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            assert 0 < row[name]["low"] <= row[name]["value"] <= row[name]["high"]
        assert row["e2e_s"]["value"] == pytest.approx(row["ttft_s"]["value"] + 255 * row["tpot_s"]["value"])
    assert json.loads(out)["results"][0]["shape"] == "12x3072/16h/16kv/8192ff/50432v"


def test_a_shape_is_predicted_by_the_code_that_is_named(capsys):
    def e2e_s(*named: str) -> float:
        _, out, _ = run(capsys, "predict", "--shape", "12x3072", "--json", *named)
        return json.loads(out)["results"][0]["e2e_s"]["value"]

    assert e2e_s() == e2e_s("--architecture", "llama")
    assert e2e_s("--architecture", "open_lm") == analytic.predict(Shape.parse("12x3072")).e2e_s.value != e2e_s()


def test_predict_shows_a_table(capsys):
    code, out, _ = run(capsys, "predict", "--shape", "24x2048", "--gpu", "H100", "--gpu", "A30")
    assert code == 0 and out.count("24x2048/16h/16kv/5632ff/50432v") == 2 and "llama" in out


def test_a_given_launch_cost_moves_an_eager_prediction(capsys):
    def tpot(cost: str) -> float:
        _, out, _ = run(capsys, "predict", "--shape", "24x2048", "--host-launch-us", cost, "--json")
        return json.loads(out)["results"][0]["tpot_s"]["value"]

    assert tpot("20,15,30") > tpot("10,5,15")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--shape", "12x3072", "--gpu", "V100"], "A30, A40, A100-40GB"),
        (["predict", "--shape", "12x3070/16h"], "do not divide"),
        (["predict", "--shape", "12by3072"], "is not a shape"),
        (["predict", "--shape", "80x20480", "--gpu", "A30"], "do not fit the 24 GB"),
        (["predict", "--shape", "12x3072", "--batch", "0"], "at least 1"),
        (["predict", "--shape", "12x3072", "--host-launch-us", "5,6,7"], "is not a cost"),
        (["predict", "--shape", "12x3072", "--host-launch-us", "5,4"], "is not a cost"),
        (["predict", "--shape", "12x3072", "--mode", "jit"], "choose one of eager"),
        (["predict", "--shape", "12x3072", "--architecture", "mamba"], "choose one of"),
        (["measure", "--shape", TINY, "--cap-seconds", "0"], "at least 1"),
        (["measure", "--shape", TINY, "--quick", "--protocol", "paper-1b-hf-a100"], "not allowed with"),
        (["predict", "--shape", "12x3072", "--gpu", "this"], "morph latency calibrate"),
        (["measure"], "--shape"),
        (["measure", "--shape", TINY, "--protocol", "mine"], "choose one of"),
        (["measure", "--shape", TINY, "--engine", "tensorrt"], "invalid choice"),
        (["measure", "--shape", TINY, "--together", "0"], "at least 1"),
        (["measure", "--shape", TINY, "--threads", "9999"], "more threads than cores"),
        (["measure", "--grid", "no-such-file.csv"], "cannot be read"),
        (["measure", "--shape", TINY, "--record", "/"], "cannot be written"),
        (["measure", "--shape", TINY, "--record", str(DATA / "hardware.csv")], "not a table of measurements"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("MORPH_HOME", str(tmp_path))
    code, out, err = run(capsys, *arguments)
    assert code == 2 and not out
    assert message in err and err.count("\n") == 1


def test_a_grid_with_wrong_columns_is_told(capsys, tmp_path):
    grid = tmp_path / "grid.csv"
    grid.write_text("model,batches\n12x384,1\n", encoding="utf-8")
    said = run(capsys, "measure", "--grid", str(grid))[2]
    assert "grid.csv: cannot be read as settings" in said and "'batches'" in said and "give a CSV file of model, " in said
    for cells, wrong in (
        ("model,batch", "(it has no rows); give a CSV file"),
        ("batch\n1", "'model'"),
        ("model,batch\n12x384,many", "batch is 'many'; give a whole number"),
    ):
        grid.write_text(f"{cells}\n", encoding="utf-8")
        said = run(capsys, "measure", "--grid", str(grid))[2]
        assert wrong in said and said.count("\n") == 1


def test_measure_goes_on_after_a_failure_and_says_so(capsys, tmp_path):
    record = tmp_path / "rows.csv"
    shapes = ["--shape", TINY, "--shape", "400x20480", "--record", str(record), "--json"]
    code, out, err = run(capsys, "measure", *shapes, *SMALL)
    assert code == 2 and "GB of memory" in err
    result = json.loads(out)
    assert len(result["results"]) == len(result["errors"]) == 1
    row = result["results"][0]
    assert (row["shape"], row["engine"], row["kind"], row["weights"]) == (TINY, "hf-eager", "measured", "random")
    assert 0 < row["ttft_s"]["low"] <= row["ttft_s"]["value"] <= row["e2e_s"]["high"]
    assert len(pd.read_csv(record)) == 1


def test_ratios_are_to_the_shape_that_was_named_first_or_to_none(capsys):
    other = TINY.replace("2x", "3x")
    for first, compared in ((TINY, 1), ("400x20480", 0)):
        asked = [word for shape in (first, other, TINY) for word in ("--shape", shape)]
        results = json.loads(run(capsys, "measure", *asked[: 4 + 2 * (not compared)], "--json", *SMALL)[1])["results"]
        assert len(results) == 2 and sum("ratio_to_first" in row for row in results) == compared


def test_a_single_token_has_no_time_per_token(capsys, tmp_path):
    """As the protocols of the time to the first token ask for."""
    record = tmp_path / "rows.csv"
    code, out, _ = run(capsys, "measure", "--shape", TINY, *SMALL, "--out-tokens", "1", "--record", str(record))
    assert code == 0 and "–" in out
    assert timing.load(record)["tpot_s"].isna().all()


def test_a_killed_grid_is_taken_up_again(tmp_path):
    grid, record = tmp_path / "grid.csv", tmp_path / "rows.csv"
    grid.write_text(f"model,batch\n{TINY},1\n{TINY},2\n{TINY},3\n", encoding="utf-8")
    command = [sys.executable, "-c", "import sys; from morphlib import cli; sys.exit(cli.main())", "latency", "measure"]
    command += ["--grid", str(grid), "--record", str(record), *SMALL]
    first = subprocess.Popen(command, start_new_session=True)
    while not record.exists() or record.read_text(encoding="utf-8").count("\n") < 2:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    text = record.read_text(encoding="utf-8")
    subprocess.run(command, check=True)
    table = pd.read_csv(record)
    assert set(table["batch"]) == {1, 2, 3}
    assert record.read_text(encoding="utf-8").startswith(text[: text.rfind("\n") + 1])  # nothing recorded is lost
