import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from conftest import ROOT
from morphlib import cli, diagnostics, fitting, laws, runs, study, uncertainty
from morphlib.errors import InputError
from morphlib.latency import models
from morphlib.shapes import Shape

PLAN = study.plan()
TINY = "1x16/2h/2kv/40ff/257v"
HEADER = "run_id,part,shape,seed,learning_rate,base_width,tokens_per_parameter,cpu_minutes,source\n"


def written(path, text):
    path.write_text(HEADER + text, encoding="utf-8")
    return path


# the bundled plan and table


def test_the_plan_keeps_what_the_study_promises():
    proper = [run for run in PLAN if run.part != "tuning"]
    assert len(proper) >= 63
    assert max(run.marks[-1] for run in PLAN) < 43.8e6  # a single epoch
    sizes = runs.size_families(pd.Series([float(run.shape.n_params("non_embedding")) for run in proper]))
    shapes = pd.DataFrame({"size": sizes, "shape": [run.shape for run in proper]}).drop_duplicates()
    assert shapes.groupby("size").size().min() >= 5 and shapes["size"].nunique() == 5
    ratios = shapes["shape"].map(lambda shape: shape.d_model / shape.n_layers)
    counts = shapes["shape"].map(lambda shape: shape.n_params("non_embedding"))
    by_size = ratios.groupby(shapes["size"])
    assert (by_size.max() / by_size.min()).min() >= 10 and ratios.max() / ratios.min() >= 30
    assert (counts.groupby(shapes["size"]).max() / counts.groupby(shapes["size"]).min()).max() < 1.08
    for run in PLAN:
        assert run.shape.head_size in (8, 16) and run.shape.d_ff == 8 * round(run.shape.d_model / 3)
        assert run.recipe.seed == 0 or run.part == "fit"
    assert len([run for run in proper if run.part == "largest"]) >= 6


def test_the_bundled_rows_belong_to_the_plan_and_no_model_is_fitted_twice():
    table = study.load()
    fitted = table[table["fit_study"] == 1]
    assert not fitted.duplicated(["shape", "tokens", "seed"]).any()
    assert set(fitted["part"]) <= {"fit", "tuning"}
    assert (fitted["learning_rate"] == 0.012).all() and (fitted["base_width"] == 64).all()
    one = table[table["part"] != "tuning"].iloc[-1]
    losses = study.losses(one["name"], one["budget_tokens"])
    assert len(losses) == one["steps"]
    assert runs.run_averaged_loss(losses) == pytest.approx(one["run_averaged_loss"], abs=1e-4)


def test_each_run_has_a_hash_of_its_own_and_it_tells_what_decides():
    assert len({run.config for run in PLAN}) == len(PLAN)
    run = PLAN[0]
    for changed in (
        replace(run, shape=Shape.parse("2x72/ff=8d/3", 257)),
        replace(run, recipe=replace(run.recipe, seed=9)),
        replace(run, tokens_per_parameter=(21.0,)),
    ):
        assert changed.config != run.config
    assert replace(run, run_id="x", part="fit", cpu_minutes=0.0).config == run.config


# wrong plans and wrong rows


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"a,fit,{TINY},0,0.01,16,20,1,s\nb,fit,{TINY},0,0.01,16,20,1,s\n", "rows 2 and 3 both train the same"),
        (f"a,fit,{TINY},0,0.01,16,20,1,s\na,fit,{TINY},1,0.01,16,20,1,s\n", "rows 2 and 3 both write the row 'a'"),
        (f"a,rest,{TINY},0,0.01,16,20,1,s\n", "row 2: part 'rest'"),
        (f"a,fit,{TINY},0,0.01,16,40 20,1,s\n", "rising numbers"),
        (f"a,fit,{TINY},0,-1,16,20,1,s\n", "row 2: learning_rate is -1"),
        ("a,fit,4by4,0,0.01,16,20,1,s\n", "row 2: "),
        (f"a,fit,{TINY},x,0.01,16,20,1,s\n", "row 2: "),
    ],
)
def test_a_plan_that_cannot_be_is_told_by_its_row(tmp_path, text, told):
    with pytest.raises(InputError, match=told):
        study.plan(written(tmp_path / "plan.csv", text))


def test_a_plan_without_a_column_and_a_run_without_a_plan_are_told(tmp_path):
    (tmp_path / "plan.csv").write_text("run_id,part\na,fit\n")
    with pytest.raises(InputError, match="column shape, seed"):
        study.plan(tmp_path / "plan.csv")
    with pytest.raises(InputError, match="has no run 'nowhere'"):
        study.named("nowhere")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda t: t.assign(config="sha256:0"), "row 2, run .*: was made with the configuration sha256:0, and the plan says"),
        (lambda t: pd.concat([t, t.tail(1)]), "each must be there once"),
        (lambda t: t.drop(t[t["name"] == "16x32-seed0"].index[1]), "run 16x32-seed0: has the budgets"),
        (lambda t: t.assign(run_id="other"), "is not in the plan"),
        (lambda t: t.assign(seed=[*t["seed"][:-1], 7]), r"has the seed 7, and the plan says 0"),
        (lambda t: t.assign(shape=[*t["shape"][:-1], "1x16"]), "has the shape 1x16, and the plan says"),
        (lambda t: t.assign(corpus=["a", *t["corpus"][1:]]), "trained on different texts"),
        (lambda t: t.drop(columns="config"), "column config is missing"),
    ],
)
def test_a_row_that_does_not_belong_to_the_plan_is_told(tmp_path, spoil, told):
    spoil(pd.read_csv(study.TABLE)).to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(InputError, match=told):
        study.load(tmp_path / "table.csv")


# a study of two runs, done


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A plan of two runs of half a million tokens each, the corpus, and the folders of both when they are done."""
    torch = pytest.importorskip("torch")
    from morphlib import corpus

    folder = tmp_path_factory.mktemp("study")
    corpus.build(folder / "corpus", ["docstrings"], limit_bytes=2e6)
    plan = written(folder / "plan.csv", f"a,fit,{TINY},0,0.01,16,145 150,1,s\nb,fit,{TINY},1,0.01,,145,1,s\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    text = corpus.Corpus.open(folder / "corpus")
    tables = {run.run_id: study.train(run, text, folder / run.run_id) for run in study.plan(plan)}
    torch.set_num_threads(threads)
    return folder, plan, tables


def test_a_job_leaves_a_row_for_each_budget(small):
    _, plan, tables = small
    run = study.named("a", plan)
    rows = tables["a"]
    assert list(rows["budget_tokens"]) == run.marks and (rows["config"] == run.config).all()
    for task in study.TASKS:
        assert rows[task].between(0, 1).all() and (rows[f"{task}_error"] > 0).all()
    assert {"commit", "hardware", "torch", "transformers", "python", "corpus", "seconds", "threads"} <= set(rows)


def test_a_finished_job_is_not_done_again(small):
    folder, plan, tables = small
    before = {path: path.stat().st_mtime_ns for path in (folder / "a").iterdir()}
    again = study.train(study.named("a", plan), None, folder / "a")
    pd.testing.assert_frame_equal(again, tables["a"], check_dtype=False)
    assert {path: path.stat().st_mtime_ns for path in (folder / "a").iterdir()} == before


def test_rows_are_collected_once(small, tmp_path):
    folder, plan, _ = small
    table = tmp_path / "runs.csv"
    assert study.collect([folder / "b"], table, plan)["left"] == ["a"]
    first = table.read_text().splitlines()
    told = study.collect([folder / "a", folder / "b"], table, plan)
    assert told == {"added": 1, "left": [], "trained_on": {models.cpu_name(): 2}}
    rows = table.read_text().splitlines()
    assert len(rows) == 4 and rows[3] == first[1] and rows[1].startswith("a,")  # in the order of the plan
    assert study.collect([folder / "a"], table, plan)["added"] == 0
    assert table.read_text().splitlines() == rows
    losses = study.losses("a", study.named("a", plan).marks[1], table)
    assert len(losses) == study.load(table, plan)["steps"].iloc[1]


def test_a_run_that_is_not_finished_is_not_collected(small, tmp_path, capsys):
    _, plan, _ = small
    (tmp_path / "b").mkdir()
    asked = ["--plan", str(plan), "--table", str(tmp_path / "runs.csv")]
    assert cli.main(["study", "collect", str(tmp_path / "b"), *asked]) == 2
    assert f"{tmp_path / 'b'}: holds no finished run" in capsys.readouterr().err
    assert not (tmp_path / "runs.csv").exists()


def test_losses_that_a_kill_left_without_their_row_are_not_doubled(small, tmp_path):
    folder, plan, _ = small
    table = tmp_path / "runs.csv"
    study.collect([folder / "b"], table, plan)
    before = table.read_bytes()
    study.collect([folder / "a"], table, plan)
    table.write_bytes(before)  # as if it had ended between the two files
    study.collect([folder / "a"], table, plan)
    assert len(study.losses("a", study.named("a", plan).marks[1], table)) == study.load(table, plan)["steps"].iloc[1]


def test_a_job_of_another_plan_is_not_collected(small, tmp_path):
    folder, plan, _ = small
    table = tmp_path / "runs.csv"
    study.collect([folder / "a"], table, plan)
    before = table.read_bytes()
    rows = plan.read_text().split("\n", 1)[1]
    changed = written(tmp_path / "plan.csv", rows.replace(",1,0.01,,145", ",1,0.02,,145"))
    with pytest.raises(InputError, match=r"study\.csv: row 2, run b: was made with the configuration"):
        study.collect([folder / "b"], table, changed)
    assert table.read_bytes() == before and not list(tmp_path.glob(".*.partial"))


def test_latencies_of_two_machines_are_refused(small, tmp_path):
    folder, plan, _ = small
    from morphlib.latency import timing

    measured = timing.load("cpu").head(2).assign(hardware=["one", "another"])
    measured.to_csv(tmp_path / "latency.csv", index=False)
    with pytest.raises(InputError, match="measured on one, another"):
        study.collect([folder / "a"], tmp_path / "runs.csv", plan, tmp_path / "latency.csv")
    assert not (tmp_path / "runs.csv").exists()


def test_a_killed_job_goes_on_and_its_rows_are_those_of_an_unbroken_one(small, tmp_path):
    folder, plan, tables = small
    # a checkpoint comes at the end of each phase, of which there are four
    main = "import sys; from morphlib import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", main, "study", "run", "a", "--plan", str(plan), "--out", str(tmp_path / "a")]
    command += ["--corpus", str(folder / "corpus"), "--threads", "1", "--device", "cpu", "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "a").glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "a" / study.DONE).exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = pd.DataFrame(json.loads(done.stdout)["rows"])
    for name in ("loss", "run_averaged_loss", *study.TASKS):
        np.testing.assert_array_equal(rows[name], tables["a"][name])


def test_the_commands_tell_what_is_wrong_in_one_line(small, tmp_path, capsys):
    folder, plan, _ = small
    table = tmp_path / "runs.csv"
    assert cli.main(["study", "collect", str(folder / "a"), "--plan", str(plan), "--table", str(table)]) == 0
    assert "1 runs added" in capsys.readouterr().out
    assert cli.main(["study", "plan", "--plan", str(plan), "--table", str(table)]) == 0
    assert "fit: 2 runs, about 0.0 h of one thread; 1 are in" in capsys.readouterr().out
    for arguments in (
        ["run", "nowhere", "--out", str(tmp_path / "x")],
        ["collect", str(tmp_path)],
        ["plan", "--plan", str(tmp_path / "none.csv")],
        ["rank", "--plan", str(plan), "--table", str(table)],
    ):
        assert cli.main(["study", *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


# foretelling


def table_of(planned):
    rows = [
        {"name": run.run_id, "shape": str(run.shape), "n_params": float(run.shape.n_params("non_embedding"))}
        | {"d_model": run.shape.d_model, "n_layers": run.shape.n_layers, "n_count": "non_embedding", "tokens": float(mark)}
        for run in planned
        for mark in run.marks
    ]
    return pd.DataFrame(rows)


def made(law, noise=0.0, **values):
    """Rows of the part to be fitted, and the losses of the largest shapes, by a law."""
    values = np.array([values[name] for name in law.parameters])
    fitted, largest = (table_of([run for run in PLAN if run.part == part]) for part in ("fit", "largest"))
    losses = law.predict(values, runs.variables(fitted)) + noise * np.random.default_rng(0).standard_normal(len(fitted))
    fitted = fitted.assign(loss=losses, family=runs.size_families(fitted["n_params"]), fit_study=1)
    return fitted, dict(zip(largest["shape"], law.predict(values, runs.variables(largest)), strict=True))


def test_a_law_that_the_rows_follow_ranks_what_it_has_not_seen():
    law = laws.get("chinchilla+log-quadratic")
    fitted, truth = made(law, 1e-4, A=60.0, B=90.0, E=0.5, alpha=0.35, epsilon=0.01, log_R0=1.5)
    found = study.ranked(fitted, [run for run in PLAN if run.part == "largest"])
    best = found[found["chosen"] == 1]
    measured = best["shape"].map(truth)
    assert best["error_by_size"].iloc[0] < 1e-3 and len(best) == len(truth)
    assert list(measured) == sorted(measured)
    # ten times the noise of a row
    assert (abs(measured - best["loss"]) < 1e-3).all()


def test_rows_that_determine_no_law_are_refused():
    fitted, _ = made(laws.get("chinchilla"), A=60.0, B=90.0, E=0.5, alpha=0.35)
    few = fitted.groupby("family").head(1)
    with pytest.raises(InputError, match="determine no law"):
        study.ranked(few, PLAN[-1:])


def test_the_kept_models_are_those_of_the_table():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from morphlib import files, model  # noqa: F401 - transformers reads an Open-LM once the model is known

    table = study.load().set_index("name")
    checkpoints = pd.read_csv(study.DATA / "checkpoints.csv")
    assert table.loc[table["part"] == "largest", "loss"].idxmin() in set(checkpoints["run_id"])
    for kept in checkpoints.itertuples():
        folder = study.DATA / "checkpoints" / kept.folder
        assert files.sha256(folder / "model.safetensors") == kept.sha256
        found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        row, weights = table.loc[kept.run_id], found.num_parameters()
        assert {weight.dtype for weight in found.parameters()} == {torch.bfloat16}
        assert row["part"] == "largest" and weights == row["n_params"] + 2 * row["vocab"] * row["d_model"]


def test_the_ranking_is_what_fits_to_all_rows_foretell():
    law = laws.get("chinchilla+log-quadratic")
    fitted, _ = made(law, 1e-3, A=60.0, B=90.0, E=0.5, alpha=0.35, epsilon=0.01, log_R0=1.5)
    largest = [run for run in PLAN if run.part == "largest"]
    unused = fitted.head(9).assign(loss=9.0, fit_study=0)
    found = study.ranked(pd.concat([fitted, unused], ignore_index=True), largest)
    assert (found["rows"] == len(fitted)).all()
    groups = list(found.groupby(["law", "exponents"], sort=False))
    assert len(groups) == len(study.forms()) and (groups[0][1]["chosen"] == 1).all()
    sound = [rows for _, rows in groups if rows["weak_folds"].iloc[0] == 0]
    assert [rows["weak_folds"].iloc[0] == 0 for _, rows in groups] == [True] * len(sound) + [False] * (len(groups) - len(sound))
    errors = [rows["error_by_size"].iloc[0] for rows in sound]
    assert errors == sorted(errors)
    for _, rows in groups:
        assert list(rows["rank"]) == list(range(1, len(largest) + 1)) and list(rows["loss"]) == sorted(rows["loss"])
    (name, exponents), best = groups[0]
    alone = diagnostics.held_out_losses(fitted, laws.get(name, exponents), "size")
    assert best["error_by_size"].iloc[0] == pytest.approx(alone.metrics.rmse, rel=1e-9)
    fit = fitting.fit(fitted, laws.get(name, exponents))
    sizes = [(str(run.shape), run.shape.n_params("non_embedding"), run.marks[0], run.shape.d_model, run.shape.n_layers)
             for run in largest]  # fmt: skip
    new = pd.DataFrame(sizes, columns=["shape", "n_params", "tokens", "d_model", "n_layers"]).set_index("shape")
    covariance = uncertainty.cluster_covariance(fitted, fit, "shape")
    expected = uncertainty.prediction_interval(new, fit, fitted, covariance=covariance).loc[best["shape"]]
    # the same search
    assert best[["loss", "low", "high"]].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-9)


def test_nothing_to_rank_is_refused():
    fitted, _ = made(laws.get("chinchilla"), A=60.0, B=90.0, E=0.5, alpha=0.35)
    for table, wanted in ((fitted.assign(fit_study=0), PLAN[-1:]), (fitted, [])):
        with pytest.raises(InputError, match="both are needed"):
            study.ranked(table, wanted)


def test_the_rows_to_fit_are_those_at_the_recipes_rate_once_for_each_seed():
    table = study.load()
    assert (table["R"] == table["d_model"] / table["n_layers"]).all()
    ours = table[(table["learning_rate"] == 0.012) & (table["base_width"] == 64) & (table["part"] != "largest")]
    keys = ["shape", "tokens", "seed"]
    fitted = table[table["fit_study"] == 1]
    assert set(map(tuple, fitted[keys].to_numpy())) == set(map(tuple, ours[keys].to_numpy()))
    assert len(fitted) == len(ours[keys].drop_duplicates())
    assert fitted["seed"].nunique() > 1
    both = ours[ours.duplicated(keys, keep=False)]
    assert (both.loc[both["fit_study"] == 1, "part"] == "fit").all()
