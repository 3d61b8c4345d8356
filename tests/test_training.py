import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from transformers import AutoModelForCausalLM  # noqa: E402

from conftest import ROOT  # noqa: E402
from morphlib import files, runs, training  # noqa: E402
from morphlib.errors import InputError  # noqa: E402
from morphlib.model import OpenLMConfig, OpenLMForCausalLM  # noqa: E402
from morphlib.recipes import Recipe  # noqa: E402
from morphlib.shapes import Shape  # noqa: E402
from morphlib.training import (  # noqa: E402
    COOLDOWN_SHARE,
    Phase,
    _checkpoints,
    _LossWithZ,
    _optimizer,
    _State,
    _step,
    held_out_loss,
    learning_rate,
    phases,
    train,
)

SHAPE = Shape.of(16, 2, n_heads=2, vocab=32, d_ff=48)
SMALL = Recipe(batch=4, sequence=16, warmup_steps=3, learning_rate=1e-2, schedule="trunk")
MARKS = (20 * 64, 40 * 64)  # 20 and 40 steps


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text():
    """Ids that can be learned: each is mostly a function of the one before."""
    rng = np.random.default_rng(0)
    ids = np.zeros(4000, dtype=np.uint16)
    for i in range(1, len(ids)):
        ids[i] = (3 * ids[i - 1] + 1) % 32 if rng.random() < 0.9 else rng.integers(32)
    return ids


def run(folder, text, **options):
    settings = {"marks": MARKS, "recipe": SMALL, **options}
    return train(SHAPE, text[:3000], {"a": text[3000:3600], "b": text[3600:]}, folder=folder, **settings)


def weights(folder, mark):
    return AutoModelForCausalLM.from_pretrained(folder / f"model-{mark}").state_dict()


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_it_learns_and_tells_each_mark(tmp_path, text):
    lines = []
    rows = run(tmp_path, text, progress=lines.append)
    assert [row["tokens"] for row in rows] == list(MARKS)
    first, second = rows
    torch.manual_seed(0)
    untrained = OpenLMForCausalLM(OpenLMConfig.of(SHAPE))
    before = held_out_loss(untrained, text[3000:3600], 16)
    assert second["loss"] < first["loss"] < before
    # whole sequences of 16 tokens and the token after each: 37 of the 600, 24 of the 400
    assert first["loss"] == pytest.approx((37 * first["loss_a"] + 24 * first["loss_b"]) / 61)
    assert lines[-1].startswith("step 44 of 44, loss ") and "tokens/s, done at about" in lines[-1]
    for row in rows:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"model-{row['budget_tokens']}")
        assert held_out_loss(loaded, text[3000:3600], 16) == pytest.approx(row["loss_a"], abs=1e-6)
    table = pd.DataFrame(rows).assign(name=["a", "b"])
    table.to_csv(tmp_path / "rows.csv", index=False)
    assert runs.load(tmp_path / "rows.csv")["n_params"].tolist() == [SHAPE.n_params("non_embedding")] * 2


def test_a_run_is_adamw_on_these_batches(tmp_path, text):
    """Against a loop written out with torch's own parts: the same steps to the bit, whichever schedule."""
    for schedule in ("cosine", "trunk"):
        recipe = replace(SMALL, schedule=schedule, z_loss=0.0)
        row = run(tmp_path / schedule, text, marks=MARKS[:1], recipe=recipe)[0]
        torch.manual_seed(0)
        model = OpenLMForCausalLM(OpenLMConfig.of(SHAPE, max_tokens=16)).train()
        settings = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.033}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, **settings)
        order, losses = np.random.default_rng(0).permutation((len(text[:3000]) - 1) // 16), []
        for step in range(20):
            phase = phases(recipe, MARKS[:1])[-1]
            leaves = schedule == "trunk" and step < phase.start
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, Phase(0, phase.start, None) if leaves else phase, step)
            batch = np.stack([text[16 * i : 16 * i + 17] for i in order[4 * step : 4 * step + 4]]).astype(np.int64)
            logits = model(torch.from_numpy(batch[:, :-1]), use_cache=False).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch[:, 1:]).flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        # a cross-entropy sums in another order: some units in the last place of fp32, which the steps carry on
        assert pd.read_csv(tmp_path / schedule / f"losses-{MARKS[0]}.csv")["loss"].tolist() == pytest.approx(losses, rel=1e-5)
        assert row["loss_a"] == pytest.approx(held_out_loss(model, text[3000:3600], 16), rel=1e-5)


def test_the_same_call_gives_the_same_bits_and_another_seed_others(tmp_path, text):
    rows = [run(tmp_path / name, text, recipe=recipe) for name, recipe in
            (("a", SMALL), ("b", SMALL), ("c", replace(SMALL, seed=1)))]  # fmt: skip
    assert without_times(rows[0]) == without_times(rows[1]) != without_times(rows[2])
    for name, weight in weights(tmp_path / "a", MARKS[1]).items():
        assert torch.equal(weight, weights(tmp_path / "b", MARKS[1])[name])


class Stop(Exception):
    pass


@pytest.mark.parametrize("stops", [[1], [17], [18, 19, 20], [5, 21, 30], [41]])
def test_a_run_that_is_broken_off_ends_with_the_same_bits(tmp_path, text, stops):
    """Broken off after these steps, with a checkpoint after every step; 16 to 20 are the first branch."""
    whole = run(tmp_path / "whole", text)
    for stop in stops:

        def break_off(line, at=f"step {stop} "):
            if line.startswith(at):
                raise Stop

        with pytest.raises(Stop):
            run(tmp_path / "broken", text, progress=break_off, save_every_s=0.0)
    assert without_times(run(tmp_path / "broken", text, save_every_s=0.0)) == without_times(whole)
    for mark in MARKS:
        for name, weight in weights(tmp_path / "whole", mark).items():
            assert torch.equal(weight, weights(tmp_path / "broken", mark)[name])


def test_a_run_that_goes_on_foretells_its_end_from_its_own_speed(tmp_path, text, monkeypatch):
    """The first part takes 1,000 s a step by a clock that runs ahead, 0.064 tokens per second; the second does not."""
    clock, ahead_s, told = time.monotonic, [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead_s[0])

    def slowly(line):
        ahead_s[0] += 1000.0
        if line.startswith("step 5 "):
            assert ", 0 tokens/s" in line
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path, text, progress=slowly, save_every_s=0.0)
    rows = run(tmp_path, text, progress=told.append)
    assert rows[-1]["seconds"] > 3000
    assert all(float(line.split(", ")[2].removesuffix(" tokens/s").replace(",", "")) > 10 for line in told)


def test_a_killed_process_goes_on(tmp_path, text):
    np.save(tmp_path / "text.npy", text)
    code = f"""
import sys, numpy as np, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
torch.set_num_threads(1)
from test_training import run
text = np.load({str(tmp_path / "text.npy")!r})
run(__import__("pathlib").Path({str(tmp_path / "killed")!r}), text, save_every_s=0.0,
    progress=lambda line: print(line, flush=True))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 25 "):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL
    rows = run(tmp_path / "killed", text)
    assert without_times(rows) == without_times(run(tmp_path / "whole", text))


def test_a_run_that_goes_on_on_another_machine_names_both(tmp_path, text, monkeypatch):
    def stop(line):
        if line.startswith("step 25 "):
            raise Stop

    monkeypatch.setattr(training, "cpu_name", lambda: "one CPU")
    with pytest.raises(Stop):
        run(tmp_path, text, progress=stop, save_every_s=0.0)
    monkeypatch.setattr(training, "cpu_name", lambda: "another")
    rows = run(tmp_path, text)
    assert [row["hardware"] for row in rows] == ["one CPU", "one CPU, then another"]
    assert list(pd.read_csv(tmp_path / "rows.csv")["hardware"]) == ["one CPU", "one CPU, then another"]
    monkeypatch.setattr(training, "_device_name", lambda device: "a GPU")
    with pytest.raises(InputError, match="a run of another device"):
        run(tmp_path, text)


def test_two_processes_train_as_one(tmp_path, text):
    """Sharded by FSDP over gloo on the CPU."""
    np.save(tmp_path / "text.npy", text)
    (tmp_path / "both.py").write_text(f"""
import json, sys
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_training import run
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rows = run(Path({str(tmp_path / "both")!r}), np.load({str(tmp_path / "text.npy")!r}), save_every_s=0.2)
if torch.distributed.get_rank() == 0:
    Path({str(tmp_path / "rows.json")!r}).write_text(json.dumps(rows))
torch.distributed.destroy_process_group()
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(tmp_path / "both.py")], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    one = run(tmp_path / "one", text)
    for ours, theirs in zip(json.loads((tmp_path / "rows.json").read_text()), one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["run_averaged_loss"] == pytest.approx(theirs["run_averaged_loss"], abs=1e-5)
    for name, weight in weights(tmp_path / "both", MARKS[1]).items():
        assert torch.allclose(weight, weights(tmp_path / "one", MARKS[1])[name], atol=1e-5)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, text, caplog):
    whole = run(tmp_path / "whole", text)
    with pytest.raises(Stop):
        run(tmp_path / "broken", text, save_every_s=0.0, progress=lambda line: _stop_at(line, 30))
    (tmp_path / "broken/checkpoint-31 (copy).safetensors").write_text("somebody's own")
    newest = _checkpoints(tmp_path / "broken")[-1][1]
    newest.write_bytes(newest.read_bytes()[:-7] + b"damaged")
    assert without_times(run(tmp_path / "broken", text)) == without_times(whole)
    assert "is damaged (its checksum differs); going back to the checkpoint before it" in caplog.text
    assert len(_checkpoints(tmp_path / "broken")) == 2 and not newest.exists()
    assert not list(tmp_path.glob("broken/.*"))
    for _, path in _checkpoints(tmp_path / "broken"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="as is every checkpoint here"):
        run(tmp_path / "broken", text)


def _stop_at(line, step):
    if line.startswith(f"step {step} "):
        raise Stop


def test_a_branch_leaves_the_trunk_as_it_was(tmp_path, text):
    """The second mark is the same whether or not a branch was trained before it."""
    both = run(tmp_path / "both", text)
    alone = run(tmp_path / "alone", text, marks=MARKS[1:])
    assert both[1]["loss"] == alone[0]["loss"]
    assert both[1]["run_averaged_loss"] == alone[0]["run_averaged_loss"]


def test_a_branch_that_leaves_before_the_first_step_changes_nothing(tmp_path, text):
    recipe = replace(SMALL, warmup_steps=0)
    both = run(tmp_path / "both", text, marks=(64, MARKS[0]), recipe=recipe)
    assert both[1]["loss"] == run(tmp_path / "alone", text, marks=MARKS[:1], recipe=recipe)[0]["loss"]


def test_a_folder_belongs_to_one_text_and_to_one_process(tmp_path, text):
    run(tmp_path, text)
    with pytest.raises(InputError, match="a run of another text"):
        run(tmp_path, np.roll(text, 1))
    with files.locked(tmp_path / "lock", ""), pytest.raises(InputError, match="another run is at work"):
        run(tmp_path, text)


@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=4, unique=True).map(sorted),
    st.sampled_from([1, 8, 64]),
)
def test_the_phases_of_a_trunk_cover_each_budget_once(budgets, step_tokens):
    recipe = Recipe(schedule="trunk", warmup_steps=0, batch=1, sequence=step_tokens)
    plan = phases(recipe, budgets)
    at = 0
    for phase in plan:
        assert phase.start == at and phase.end > phase.start
        at = phase.end if phase.mark is None else phase.start
    branches = {phase.mark: phase for phase in plan if phase.mark is not None}
    for mark in budgets:
        steps = math.ceil(mark / step_tokens)
        assert branches[mark].end == steps
        assert branches[mark].end - branches[mark].start <= max(1, math.ceil(COOLDOWN_SHARE * steps))
    assert plan[-1].mark == budgets[-1]


def test_learning_rates():
    cosine, end = Recipe(warmup_steps=10, learning_rate=1.0), Phase(0, 110, 1)
    rates = [learning_rate(cosine, end, step) for step in range(110)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[9] == max(rates) == pytest.approx(1.0)
    # open_lm's cosine_lr: from step 10 on, which has the peak as well, to what would be step 110
    assert rates[10:] == pytest.approx(0.01 + 0.99 * (1 + np.cos(np.pi * np.arange(100) / 100)) / 2)
    trunk = Recipe(schedule="trunk", warmup_steps=10, learning_rate=1.0)
    assert learning_rate(trunk, Phase(0, 80, None), 79) == 1.0
    assert [learning_rate(trunk, Phase(80, 100, 1), step) for step in (80, 90, 99)] == pytest.approx([1.0, 0.5, 0.05])


@given(st.integers(1, 9), st.integers(2, 40), st.floats(0, 0.1), st.integers(0, 2**31))
def test_the_loss_and_its_slope_are_those_of_its_formula(n, vocab, weight, seed):
    draw = torch.Generator().manual_seed(seed)
    logits = (10 * torch.randn(n, vocab, generator=draw, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, vocab, (n, 1), generator=draw)
    z = torch.logsumexp(logits, -1)
    expected = (z - logits.gather(1, targets)[:, 0] + weight * z**2).mean()
    (slope,) = torch.autograd.grad(expected, logits)
    ours = _LossWithZ.apply(logits, targets, weight)
    (our_slope,) = torch.autograd.grad(ours, logits)
    # logits of tens, of which z is the difference of two: some tens of roundings of 2^-53, times tens
    assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(our_slope, slope, rtol=1e-12, atol=1e-12)


def test_parts_of_a_batch_make_the_same_step(tmp_path, text):
    rows = [run(tmp_path / str(parts), text, marks=MARKS[:1], recipe=replace(SMALL, accumulate=parts))[0] for parts in (1, 4)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-5)


def test_with_a_base_width_three_steps_move_the_hidden_states_of_wide_models_as_far():
    """The coordinate check of muP (arXiv 2203.03466, appendix D.1): the move of the hidden states, as a power of the width.

    In theory the power is 0 with the rate scaled and 1/2 or more without it; 1/4 lies between.
    """

    def move(width, base_width):
        recipe = replace(SMALL, sequence=32, warmup_steps=0, learning_rate=3e-3, base_width=base_width)
        torch.manual_seed(0)
        model = OpenLMForCausalLM(OpenLMConfig.of(Shape.of(width, 2, n_heads=width // 16, vocab=64, d_ff=2 * width)))
        state, batch = _State(model, _optimizer(model, recipe)), torch.arange(4 * 33).reshape(4, 33) * 37 % 64
        seen = []
        model.layers[-1].register_forward_hook(lambda _, __, output: seen.append(output.detach()))
        model(batch[:, :-1])
        for _ in range(3):
            _step(model, state, recipe, Phase(0, 100, None), batch, "cpu")
        model(batch[:, :-1])
        return ((seen[-1] - seen[0]).norm() / seen[0].norm()).item()

    powers = [math.log(move(256, base) / move(64, base)) / math.log(256 / 64) for base in (None, 64)]
    assert powers[1] < 1 / 4 < powers[0]


def test_the_rate_of_matrices_follows_the_width():
    model = OpenLMForCausalLM(OpenLMConfig.of(Shape.of(64, 2, n_heads=4, vocab=50)))
    groups = _optimizer(model, Recipe(base_width=16)).param_groups
    assert [group["share"] for group in groups] == [0.25, 1.0]
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert {names[id(w)].rpartition(".")[0].rpartition(".")[2] for w in groups[0]["params"]} == {
        "in_proj", "out_proj", "w12", "w3", "output"
    }  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == len(names)
    tied = OpenLMForCausalLM(OpenLMConfig.of(Shape.of(64, 2, n_heads=4, vocab=50, tied=True)))
    assert sum(len(group["params"]) for group in _optimizer(tied, Recipe()).param_groups) == len(list(tied.parameters()))


def test_what_cannot_be_trained_says_so(tmp_path, text, monkeypatch):
    with pytest.raises(InputError, match="need 628 sequences of 16, and the text has 187; no text is read twice"):
        run(tmp_path, text, marks=(10_000,))
    with pytest.raises(InputError, match="a cosine ends at one budget"):
        run(tmp_path, text, recipe=Recipe(batch=4, sequence=16))
    with pytest.raises(InputError, match="each larger than the one before"):
        run(tmp_path, text, marks=(100, 100))
    with pytest.raises(InputError, match="less than a sequence"):
        held_out_loss(OpenLMForCausalLM(OpenLMConfig.of(SHAPE)), text[:10], 16)
    with pytest.raises(InputError, match="lower the learning rate"):
        run(tmp_path / "nan", text, recipe=replace(SMALL, learning_rate=1e30, clip=1e30))
    last_step = replace(SMALL, learning_rate=1e30, clip=1e30, warmup_steps=0)
    with pytest.raises(InputError, match="held-out loss at 64 tokens is nan"):
        run(tmp_path / "nan at the end", text, marks=(64,), recipe=last_step)
    assert not list((tmp_path / "nan at the end").glob("*.csv"))
    run(tmp_path / "held", text, marks=MARKS[:1])
    with pytest.raises(InputError, match="holds a run of another recipe"):
        run(tmp_path / "held", text, marks=MARKS[:1], recipe=replace(SMALL, seed=5))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run(tmp_path / "file" / "folder", text)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, text, monkeypatch):
    from morphlib import training

    with pytest.raises(Stop):
        run(tmp_path, text, save_every_s=0.0, progress=lambda line: _stop_at(line, 12))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(training, "save_file", full)
        with pytest.raises(InputError, match="No space left on device"):
            run(tmp_path, text, save_every_s=0.0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def half(self, folder, **_):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(OpenLMForCausalLM, "save_pretrained", half)
        with pytest.raises(InputError, match="No space left on device"):
            run(tmp_path, text)
    assert not list(tmp_path.glob("*model*"))
    assert len(run(tmp_path, text)) == 2


def test_checkpoints_hold_no_code(tmp_path, text):
    run(tmp_path, text, marks=MARKS[:1])
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".csv", ""}, "the last is the lock"
    assert all(json.loads(path.read_text()) for path in tmp_path.rglob("*.json"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_steps_replayed_as_a_cuda_graph_are_those_of_an_eager_run(tmp_path, text):
    recorded, eager = (
        run(tmp_path / str(again), text, device="cuda", recipe=replace(SMALL, gradient_checkpointing=again))
        for again in (False, True)
    )
    for one, other in zip(recorded, eager, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["run_averaged_loss"] == pytest.approx(other["run_averaged_loss"], abs=1e-4)
