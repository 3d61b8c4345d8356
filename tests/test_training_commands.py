"""``morph corpus build`` and ``morph train``, from the arguments to files, lines and exit codes."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from conftest import ROOT
from morphlib import cli, corpus, runs

torch = pytest.importorskip("torch")

SMALL = ["--shape", "2x16/2h", "--batch", "4", "--sequence", "32", "--warmup-steps", "2", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    corpus.build(folder, ["docstrings"], limit_bytes=2e5)
    return folder


def morph(capsys, *arguments):
    code = cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_corpus_is_built_where_it_is_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MORPH_HOME", str(tmp_path))
    build = ["corpus", "build", "--source", "docstrings", "--limit-bytes", "1e5"]
    code, out, _ = morph(capsys, *build)
    assert code == 0
    tokens = len(corpus.Corpus.open(tmp_path / "corpus").train)
    assert f"{tokens:,} tokens to train on, in {tmp_path / 'corpus'}" in out
    code, out, err = morph(capsys, "train", *SMALL, "--tokens", 1280, "--out", tmp_path / "run", "--json")
    assert (code, err.count("\n") <= 1) == (0, True)
    assert json.loads(out)["rows"][0]["tokens"] == 1280
    code, out, _ = morph(capsys, *build, "--out", tmp_path / "other", "--json")
    assert (code, json.loads(out)["sizes"]["train"]["tokens"]) == (0, tokens)


def test_rows_models_and_losses_of_a_run(tmp_path, text, capsys):
    train = ["train", *SMALL, "--corpus", text, "--schedule", "trunk", "--tokens", 2560, "--tokens", 5120, "--out", tmp_path]
    code, out, _ = morph(capsys, *train, "--json")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert [row["tokens"] for row in rows] == [2560, 5120]
    assert {row["shape"] for row in rows} == {"2x16/2h/2kv/256ff/257v"}, "the vocabulary is the tokenizer's"
    table = runs.load(tmp_path / "rows.csv", average_logs=True)
    assert table["loss"].tolist() == pytest.approx([row["run_averaged_loss"] for row in rows], abs=5e-5)
    assert [len(pd.read_csv(tmp_path / f"losses-{mark}.csv")) for mark in (2560, 5120)] == [20, 40]
    for mark in (2560, 5120):
        assert (tmp_path / f"model-{mark}/model.safetensors").is_file()
    again = morph(capsys, *train, "--json")[1]
    assert json.loads(again)["rows"] == rows, "what is done is not done again"
    shown = morph(capsys, *train)[1]
    assert "held-out loss" in shown and str(tmp_path) in shown


def test_a_recipe_that_names_its_shape_needs_no_more_to_be_launched(tmp_path, capsys):
    code, out, _ = morph(capsys, "train", "--recipe", "morph-1b", "--launch", "open_lm", "--out", tmp_path, "--json")
    written = json.loads(out)
    assert (code, written["steps"], written["gpus"]) == (0, 55_296, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"model.json", "train.sh", "prepare_data.sh"}
    code, out, _ = morph(capsys, "train", "--recipe", "paper", "--shape", "80m_v4", "--tokens", 1536 * 2**20,
                         "--launch", "open_lm", "--out", tmp_path / "small", "--gpus", 1)  # fmt: skip
    assert code == 0 and "1,536 steps of 1,048,576 tokens" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "none", "--shape", "2x16"], "is not a recipe"),
        ([], "give --shape and --tokens"),
        (["--shape", "2y16"], "'2y16' is not a shape"),
        (["--shape", "2x16/100v"], "smaller than the tokenizer's, 257"),
        ([*SMALL, "--corpus", "nowhere"], "nowhere: holds no corpus; run `morph corpus build`"),
        ([*SMALL, "--tokens", "1e12"], "one epoch is"),
        ([*SMALL, "--threads", "4096"], "more than the"),
        ([*SMALL, "--tokens", "2e3"], "the schedule trunk"),
        ([*SMALL, "--warmup-steps", "50"], "the warm-up alone has 50"),
        ([*SMALL, "--weight-decay", "-1"], "weight_decay is -1"),
        (["--recipe", "laptop", "--shape", "4x64", "--launch", "open_lm"], "take paper or morph-1b"),
        ([*SMALL, "--warmup-steps", "0", "--sequence", "10000"], "no source has 10000 held-out tokens"),
        (["--recipe", "morph-1b", "--launch", "open_lm", "--tokens", "2e3"], "give --tokens once"),
    ],
)  # fmt: skip
def test_wrong_arguments_end_in_one_line(tmp_path, text, capsys, arguments, message):
    given = [] if not arguments else ["--corpus", text, "--tokens", "1e3", *arguments]
    code, out, err = morph(capsys, "train", "--out", tmp_path / "run", *given)
    assert (code, out) == (2, "")
    assert message in err and err.startswith("morph train: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_rank_without_the_rest_of_torchrun_ends_in_one_line(tmp_path, text, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    code, out, err = morph(capsys, "train", *SMALL, "--corpus", text, "--tokens", "1e3", "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not; start with torchrun" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_two_processes_of_the_command_train_one_model(tmp_path, text):
    """Sharded over two processes by torchrun, the loss is that of one process up to the order of sums."""
    command = ["train", *SMALL, "--corpus", str(text), "--tokens", "2560"]
    code = "import sys; from morphlib.cli import main; sys.exit(main(sys.argv[1:]))"
    script = tmp_path / "morph.py"
    script.write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for starts, name in (([*torchrun], "two"), ([sys.executable], "one")):
        words = [*starts, str(script), *command, "--out", str(tmp_path / name)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("held-out loss") == 1, "of two processes one tells"
    one, two = (pd.read_csv(tmp_path / name / "rows.csv") for name in ("one", "two"))
    assert two["loss"].item() == pytest.approx(one["loss"].item(), abs=1e-5)
