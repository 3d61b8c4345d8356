"""Recipes: the table is complete, what open_lm is given trains the published run, and runs queue for GPUs as they should."""

import csv
import json
import shlex
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from morphlib import recipes
from morphlib.errors import InputError
from morphlib.recipes import Recipe, quantities, start_times, write_open_lm_launch
from morphlib.shapes import Shape, paper_shapes

MORPH_1B = quantities("morph-1b")


def launch(folder, shape=None, tokens=MORPH_1B["tokens"], **changes):
    shape = shape or replace(Shape.parse(MORPH_1B["shape"]), norm=MORPH_1B["norm"])
    return write_open_lm_launch(folder, shape, tokens, MORPH_1B | changes)


def options(folder):
    words = shlex.split((folder / "train.sh").read_text().partition("open_lm.main")[2].replace("\\\n", " "))
    return {name.removeprefix("--"): value for name, value in zip(words, [*words[1:], ""], strict=True) if name[:2] == "--"}


def test_the_table_has_every_hyper_parameter_of_the_paper_with_its_source():
    with (ROOT / "morphlib/data/recipes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["source"] and row["value"] for row in rows)
    keys = [(row["recipe"], row["quantity"]) for row in rows]
    assert len(set(keys)) == len(keys)
    ours = {"accumulate", "base_width", "compile", "seed"}  # which the paper's scripts do not set
    beside = {"norm", "shape", "tokens", "chunks", "gpus", "text", "tokenizer", "shard_sequences", "data_seed"}
    for name in ("paper", "morph-1b"):
        assert {field.name for field in fields(Recipe)} - ours <= set(quantities(name))
    assert {quantity for _, quantity in keys} <= {field.name for field in fields(Recipe)} | beside


def test_the_defaults_of_a_recipe_are_the_papers():
    assert Recipe.of(quantities("paper")) == Recipe(dtype="bf16", gradient_checkpointing=True)


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(InputError, match="'paper2' is not a recipe; choose one of laptop, paper, morph-1b"):
        quantities("paper2")


def test_morph_1b_comes_out_as_published(tmp_path):
    """Shape, N, tokens and steps: paper, section 4 and its model card, and the names of the authors' checkpoints."""
    written = launch(tmp_path / "morph-1b")
    assert written["shape"] == "12x3072/16h/16kv/8192ff/50432v"
    assert written["n_params"] == 1_668_885_504
    assert (written["tokens"], written["steps"], written["step_tokens"]) == (28_991_029_248, 55_296, 524_288)
    told = options(tmp_path / "morph-1b")
    assert int(told["train-num-samples"]) * int(told["epochs"]) == 28_991_029_248
    assert float(told["lr-cooldown-end"]) == 3e-5
    assert (tmp_path / "morph-1b/train.sh").read_text().count("torchrun --nproc-per-node 4 ") == 1


def test_open_lm_reads_what_is_written(tmp_path):
    """With open_lm's own parser and model, where open_lm is installed."""
    params = pytest.importorskip("open_lm.params")
    model = pytest.importorskip("open_lm.model")
    torch = pytest.importorskip("torch")
    launch(tmp_path)
    words = (tmp_path / "train.sh").read_text().partition("open_lm.main")[2].replace("\\\n", " ")
    told = params.parse_args(shlex.split(words.replace("model.json", str(tmp_path / "model.json"))))
    recipe = Recipe.of(MORPH_1B)
    assert (told.lr, told.warmup, told.wd, told.beta1, told.beta2, told.eps, told.grad_clip_norm, told.z_loss_coefficient) == (
        recipe.learning_rate, recipe.warmup_steps, recipe.weight_decay, recipe.beta1, recipe.beta2, recipe.epsilon,
        recipe.clip, recipe.z_loss)  # fmt: skip
    assert (told.train_num_samples // 2048 * told.epochs) // told.global_batch_size == 55_296
    with torch.device("meta"):
        built = model.create_model(told)
    with_biases = replace(Shape.parse("1b_v8"), norm="layer_norm")
    assert sum(weight.numel() for weight in built.parameters()) == with_biases.n_params("total")


def test_open_lm_reads_the_published_tokens_in_the_published_steps(tmp_path):
    """With open_lm's own choice of shards, where it is installed: 16 chunks of a text that is just long enough."""
    file_utils = pytest.importorskip("open_lm.file_utils")
    launch(tmp_path)
    told = {name: int(options(tmp_path)[name]) for name in ("train-num-samples", "epochs", "workers", "global-batch-size")}
    shards = [{"shard": f"{i:08d}", "num_sequences": 8192} for i in range(28_991_029_248 // (8192 * 2048))]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(shard) + "\n" for shard in shards))
    next_shard, steps, manifest = [0], 0, [str(tmp_path / "manifest.jsonl")]
    for _ in range(told["epochs"]):
        _, sequences, next_shard = file_utils.get_string_for_epoch(
            told["train-num-samples"] // 2048, next_shard, manifest, None, told["workers"], 4, multi_epoch=False)  # fmt: skip
        # open_lm.data.get_wds_dataset: each worker drops what is no whole batch
        steps += sequences[0] // (told["global-batch-size"] * told["workers"]) * told["workers"]
    assert steps == 55_296


def test_a_number_that_cannot_be_is_refused():
    changes = {"seed": -1, "beta1": 1.0, "weight_decay": float("nan"), "dtype": "fp8", "warmup_steps": -5, "final_share": -1,
               "base_width": 0, "learning_rate": 0, "clip": float("inf") * 0, "batch": 0, "schedule": "step"}  # fmt: skip
    for name, value in changes.items():
        with pytest.raises(InputError, match=f"{name} is "):
            Recipe(**{name: value})
    with pytest.raises(InputError, match="cannot be taken in 3 equal parts"):
        Recipe(batch=4, accumulate=3)


def test_a_name_with_a_space_stays_one_word(tmp_path):
    launch(tmp_path / "a b")
    assert options(tmp_path / "a b")["name"] == "a b"


@pytest.mark.parametrize("name", paper_shapes())
def test_every_shape_of_the_paper_can_be_launched_and_read_back(tmp_path, name):
    model = pytest.importorskip("morphlib.model")
    shape = replace(paper_shapes()[name], norm="layer_norm")
    write_open_lm_launch(tmp_path, shape, 2**20 * 1536, quantities("paper"))
    assert model.config_of_open_lm(tmp_path / "model.json").shape == shape
    assert json.loads((tmp_path / "model.json").read_text())["model_norm"] == "default_layer_norm"


def test_what_open_lm_cannot_do_is_refused_and_nothing_written(tmp_path):
    faults = [
        ({"shape": Shape.parse("4x64/ff=8d/3")}, "its own width of the feed-forward layer; give 4x64/1h/1kv/256ff"),
        ({"shape": Shape.parse("4x256/4h/2kv")}, "no key-value heads"),
        ({"tokens": 10**9}, "give 1073741824"),
        ({"tokens": 5, "chunks": 1, "gpus": 1}, "give 16777216"),
        ({"gpus": 3}, "a batch of 256 in 1 parts cannot be shared equally by 3 GPUs"),
        ({"schedule": "trunk"}, "along a cosine"),
        ({"base_width": 64}, "for all widths alike"),
    ]
    for changes, message in faults:
        with pytest.raises(InputError, match=message):
            launch(tmp_path / "none", **changes)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        launch(tmp_path / "file")
    assert recipes.quantities("morph-1b") == MORPH_1B


HOURS = st.integers(0, 100).map(float)  # whole hours add up without rounding


@st.composite
def queues(draw, most_each=8):
    n_gpus = draw(st.integers(1, 8))
    one = st.tuples(HOURS, st.integers(1, min(n_gpus, most_each)))
    runs = draw(st.lists(one, min_size=1, max_size=20))
    return [hours for hours, _ in runs], [gpus for _, gpus in runs], n_gpus


def makespan(hours, gpus_each, n_gpus):
    return max(start + each for start, each in zip(start_times(hours, gpus_each, n_gpus), hours, strict=True))


@given(queues())
def test_no_more_gpus_are_held_than_there_are_and_none_waits_in_vain(queue):
    """Each run starts in its turn, at the first moment at which the runs before it leave enough GPUs."""
    hours, gpus_each, n_gpus = queue
    starts = start_times(*queue)
    assert starts == sorted(starts)

    def held(moment, runs):
        return sum(gpus_each[i] for i in range(runs) if starts[i] <= moment < starts[i] + hours[i])

    for i, start in enumerate(starts):
        turn = starts[i - 1] if i else 0.0
        moments = sorted({turn, *(starts[k] + hours[k] for k in range(i) if starts[k] + hours[k] > turn)})
        assert start == next(moment for moment in moments if held(moment, i) + gpus_each[i] <= n_gpus)


@given(queues())
def test_a_makespan_lies_between_its_bounds(queue):
    """While a run waits, fewer GPUs are free than it needs; so with g the most that any needs, n - g + 1 or more are held."""
    hours, gpus_each, n_gpus = queue
    total = sum(a * b for a, b in zip(hours, gpus_each, strict=True))
    found = makespan(*queue)
    assert found >= max(total / n_gpus, *hours) - 1e-9
    assert found <= total / (n_gpus - max(gpus_each) + 1) + max(hours) + 1e-9


@given(queues(most_each=1))
def test_runs_of_one_gpu_keep_grahams_bound(queue):
    hours, _, n_gpus = queue
    assert makespan(*queue) <= sum(hours) / n_gpus + (1 - 1 / n_gpus) * max(hours) + 1e-9


@given(st.lists(HOURS, min_size=1, max_size=20))
def test_one_gpu_takes_the_sum_and_enough_take_the_longest(hours):
    ones = [1] * len(hours)
    assert makespan(hours, ones, 1) == sum(hours)
    assert makespan(hours, ones, len(hours)) == max(hours)


def test_runs_queue_as_they_do_by_hand():
    """Four GPUs: the third run needs both halves, and the fourth does not pass it."""
    assert start_times([2, 5, 1, 3], [2, 2, 4, 1], 4) == [0, 0, 5, 6]
    assert start_times([], [], 4) == []
    for needed in (0, 5):
        with pytest.raises(InputError, match=f"takes {needed} GPUs, and there are 4"):
            start_times([1.0], [needed], 4)
