"""The harness: definitions of the times, when it stops, what it compares, and rows that outlive a kill."""

import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from morphlib.errors import InputError
from morphlib.latency import models, timing
from morphlib.latency.engines import Configuration, Worker
from morphlib.latency.timing import Measurement, Stopping
from morphlib.shapes import Shape

TINY = "2x64/1h/1kv/128ff/256v"
times = arrays(float, st.integers(2, 30), elements=st.floats(1e-4, 1e3))


def measurement(token_times: np.ndarray, after_last: float = 0.0) -> Measurement:
    """Generations whose tokens came at the given times, shape (runs, tokens)."""
    c = Configuration(model=TINY, out_tokens=token_times.shape[1], batch=2)
    return Measurement(c, e2e_s=list(token_times[:, -1] + after_last), token_times_s=list(token_times))


def test_the_times_are_what_the_definitions_say():
    # first token after 0.5 s, then gaps of 0.1, 0.2 and 0.3 s, and 0.04 s until the call returns
    m = measurement(np.array([[0.5, 0.6, 0.8, 1.1]]), after_last=0.04)
    assert m.samples("ttft_s") == pytest.approx([0.5])
    assert m.samples("itl_s") == pytest.approx([0.1, 0.2, 0.3])
    assert m.samples("tpot_s") == pytest.approx([(1.14 - 0.5) / 3])
    assert m.samples("e2e_s") == pytest.approx([1.14])


@given(arrays(float, (3, 5), elements=st.floats(1e-3, 10)))
def test_ttft_and_tpot_add_up_to_e2e(gaps):
    m = measurement(np.cumsum(gaps, axis=1))
    assert m.samples("ttft_s") + 4 * m.samples("tpot_s") == pytest.approx(m.samples("e2e_s"))


def test_one_token_has_no_time_per_further_token():
    m = measurement(np.array([[0.5], [0.6]]))
    assert m.samples("tpot_s").size == m.samples("itl_s").size == 0


@given(times, st.floats(1e-3, 1e3))
def test_noise_has_no_unit(values, unit):
    assert timing.relative_noise(values * unit) == pytest.approx(timing.relative_noise(values), rel=1e-9, abs=1e-12)


def test_noise_is_the_standard_error_of_the_median():
    rng = np.random.default_rng(0)
    samples = rng.normal(10.0, 0.3, (4000, 25))
    seen = np.median(samples, axis=1).std() / 10
    said = np.median([timing.relative_noise(sample) for sample in samples])
    # 4,000 medians give their deviation to 1.1 %; the quartiles of 25 values are biased by a few percent
    assert said == pytest.approx(seen, rel=0.1)
    assert timing.relative_noise(np.ones(1)) == np.inf


def test_the_interval_of_a_ratio_of_medians_holds_the_truth():
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        a, b = rng.lognormal(np.log(1.8), 0.05, 20), rng.lognormal(0.0, 0.05, 20)
        interval = timing.ratio_of_medians(a, b, 400, seed)
        held += interval.low <= 1.8 <= interval.high
    # a percentile interval of medians of 20 holds 95 % a little too rarely; three standard errors of 200 trials are 4.6 %
    assert held / 200 > 0.87


@given(times, times)
def test_a_ratio_turned_over_is_its_inverse(a, b):
    one, other = timing.ratio_of_medians(a, b, 50), timing.ratio_of_medians(b, a, 50)
    assert one.value * other.value == pytest.approx(1)
    assert one.low <= one.value <= one.high


def test_it_stops_when_all_three_conditions_hold_and_not_before():
    stopping = Stopping(min_runs=10, min_s=10.0, noise=0.005, cap_s=90.0)
    assert stopping.enough([1.0] * 10)
    assert not stopping.enough([1.0] * 9)
    assert not stopping.enough([0.9] * 10)
    assert not stopping.enough([1.0, 1.2] * 10)
    assert stopping.over([30.0] * 3)
    assert not stopping.over([60.0] * 2)  # three runs even of the slowest model


def test_the_two_measures_of_ttft_must_agree():
    m = measurement(np.tile([0.5, 0.6], (10, 1)))
    m.ttft_alone_s = [0.505] * 5
    assert m.ttft_agrees
    m.ttft_alone_s = [0.6] * 5
    assert not m.ttft_agrees


@pytest.fixture
def row() -> dict:
    m = measurement(np.array([[0.5, 0.6, 0.8], [0.5, 0.7, 0.9], [0.4, 0.6, 0.8]]))
    m.other_load = 0.01
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 1, "n_kv_heads": 1, "head_size": 64, "d_ff": 128, "vocab": 256}
    m.facts = sizes | {"tied": False, "built_as": "llama", "hardware": "x, y", "not a column": 1}
    return m.row()


def test_a_row_tells_the_samples(row):
    assert row["n_runs"] == 3
    assert row["e2e_s"] == pytest.approx(0.8)
    assert (row["e2e_s_p5"], row["e2e_s_p95"]) == pytest.approx(tuple(np.percentile([0.8, 0.9, 0.8], (5, 95))))
    assert row["tokens_per_s"] == pytest.approx(2 * 3 / 0.8)
    assert set(row) == set(timing.COLUMNS)


def test_rows_are_appended_and_read_back(tmp_path, row):
    path = tmp_path / "rows.csv"
    for seed in range(3):
        timing.append(path, row | {"seed": seed})
    table = timing.load(path)
    assert list(table["seed"]) == [0, 1, 2]
    assert set(table["hardware"]) == {"x, y"}
    c = Configuration(model=TINY, out_tokens=3, batch=2)
    assert timing.key(c) in timing.recorded(path)
    assert timing.recorded(tmp_path / "none.csv") == set()


@given(cut=st.integers(1, 400))
def test_what_a_kill_left_of_a_row_is_removed(tmp_path_factory, row_text, cut):
    path = tmp_path_factory.mktemp("cut") / "rows.csv"
    header, line, row = row_text
    path.write_text(header + line + line[: min(cut, len(line) - 2)], encoding="utf-8")
    timing.append(path, row)
    assert path.read_text(encoding="utf-8") == header + line + line


def test_what_a_kill_left_of_the_first_line_is_removed_and_a_row_without_its_end_kept(tmp_path, row_text):
    path = tmp_path / "rows.csv"
    header, line, row = row_text
    for left, kept in (("", ""), (header[:9], ""), (header[:-1], ""), (header + line[:-1], line)):
        path.write_text(left, encoding="utf-8")
        timing.append(path, row)
        assert path.read_text(encoding="utf-8") == header + kept + line


@pytest.fixture(scope="module")
def row_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("row") / "rows.csv"
    row = dict.fromkeys(timing.COLUMNS, "x") | {"hardware": "a, b", "date": "2026-11-22"}
    timing.append(path, row)
    header, line = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return header, line, row


def _append_many(path: Path, mark: str) -> None:
    for _ in range(20):
        timing.append(path, dict.fromkeys(timing.COLUMNS, mark))


def test_two_processes_may_append_at_once(tmp_path):
    path = tmp_path / "rows.csv"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_append_many, [(path, "a"), (path, "b")])
    table = pd.read_csv(path)
    assert len(table) == 40
    assert (table["model"].to_numpy() == table["date"].to_numpy()).all()  # no two rows are mixed


def test_a_recorded_model_is_found_again_and_no_other_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, record = models.config_of(Shape.parse(TINY)), tmp_path / "rows.csv"
    for folder in ("a/model", "b/model"):
        config.save_pretrained(folder)
    Path("a/model.json").write_text('{"hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 300}', encoding="utf-8")
    timed = [Configuration(model=text) for text in ("GPT-Neo-1.3B", TINY, "a/model", "a/model.json")]
    for c in timed:
        m = Measurement(c, e2e_s=[0.9] * 3, token_times_s=[np.arange(1, 257) / 300] * 3)
        m.facts, m.other_load = models.resolve(c.model).facts(c.dtype), 0.0
        timing.append(record, m.row())
    held = timing.recorded(record)
    assert {timing.key(c) for c in timed} == held and len(timing.load(record)) == 4
    assert {timing.key(Configuration(model=text)) for text in ("EleutherAI/gpt-neo-1.3B", str(tmp_path / "a/model"))} < held
    assert timing.key(Configuration(model="b/model")) not in held


@pytest.mark.parametrize("text", [b"name,loss\na,1\n", b"my precious notes", b"n\xe9e,1\n"])
def test_another_file_is_not_written_into(tmp_path, row, text):
    path = tmp_path / "runs.csv"
    path.write_bytes(text)
    for use in (timing.recorded, timing.load, lambda path: timing.append(path, row)):
        with pytest.raises(InputError, match="not a table of measurements"):
            use(path)
    assert path.read_bytes() == text


def test_where_nothing_can_be_written_is_told_before_and_nothing_is_left(tmp_path, row):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file/rows.csv", Path("/proc/rows.csv")):
        for use in (timing.recorded, lambda path: timing.append(path, row)):
            with pytest.raises(InputError, match=r"cannot be written .*; name a place"):
                use(path)
    assert timing.recorded(tmp_path / "new/rows.csv") == set()
    assert not (tmp_path / "new/rows.csv").exists()


def test_a_disturbed_row_is_measured_again_and_the_quieter_one_read(tmp_path, row):
    path = tmp_path / "rows.csv"
    timing.append(path, row | {"disturbed": 1, "other_load": 0.5, "e2e_s": 9.0})
    assert timing.recorded(path) == set()
    timing.append(path, row | {"disturbed": 0, "other_load": 0.01, "e2e_s": 1.0})
    assert len(timing.recorded(path)) == 1
    assert list(timing.load(path)["e2e_s"]) == [1.0]


@pytest.mark.parametrize("spelt", ["", "nan"])
def test_what_a_single_token_has_not_is_missing_and_the_rest_stay_numbers(tmp_path, row, spelt):
    path = tmp_path / "rows.csv"
    timing.append(path, row)
    timing.append(path, row | {"out_tokens": 1, "tpot_s": spelt, "itl_s": np.nan})
    table = timing.load(path)
    for name in ("tpot_s", "itl_s"):
        assert table[name].dtype == float and list(table[name].isna()) == [False, True]


@pytest.mark.parametrize("name", timing.protocols())
def test_every_protocol_of_the_authors_is_a_preset(name):
    settings, stopping, warm_up = timing.protocol(name)
    c = Configuration(model=TINY, **settings)
    assert c.temperature == 0.8 and c.top_p == 0.95 and stopping.min_runs == 5
    assert warm_up[1] == 5


def test_an_unknown_protocol_lists_the_known():
    with pytest.raises(InputError, match="choose one of"):
        timing.protocol("mine")


def test_configurations_run_in_turn_and_a_failing_one_does_not_stop_the_other():
    common = {"dtype": "fp32", "device": "cpu", "in_tokens": 8, "out_tokens": 4, "threads": 1}
    planned = [Configuration(model=TINY, **common), Configuration(model="400x20480", **common)]
    good, bad = timing.measure(planned, Stopping(min_runs=3, min_s=0.0, noise=np.inf))
    assert bad.error is not None and "GB of memory" in bad.error and not bad.e2e_s
    assert good.error is None and len(good.e2e_s) == 3 and good.converged
    assert np.shape(good.token_times_s) == (3, 4)
    assert (np.diff(good.token_times_s, axis=1) > 0).all()
    assert (np.array(good.e2e_s) >= np.array(good.token_times_s)[:, -1]).all()
    row = good.row()
    assert row["n_params"] == 2 * 256 * 64 + 2 * (4 * 64**2 + 3 * 64 * 128 + 2 * 64) + 64
    assert row["ran_on"] == "cpu" and row["shape"] == TINY


def test_a_protocol_keeps_its_runs_and_a_cap_that_is_given_goes_before_it():
    said: list[str] = []
    c = Configuration(model=TINY, dtype="fp32", device="cpu", in_tokens=8, out_tokens=1, threads=1)
    stopping = timing.protocol("paper-exp-1b-hf-a100")[1]
    assert len(timing.measure([c], stopping, progress=said.append)[0].e2e_s) == 5
    assert said[-1].startswith("1 running, 5 runs each in") and "at most" not in said[-1]
    assert len(timing.measure([c], replace(stopping, cap_s=1e-6))[0].e2e_s) == 3


def test_a_gpu_is_asked_for_its_clock_while_the_model_writes(tmp_path, monkeypatch):
    """There need be none: the process is said to run on one, and what answers for it knows whether the process is there."""
    smi, processes = tmp_path / "nvidia-smi", []
    smi.write_text("#!/bin/sh\nread pid < pid && kill -0 $pid && sleep 0.5 && echo '1200, 0x4'\n", encoding="utf-8")
    smi.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    generate = Worker.generate

    def on_a_gpu(worker, *lengths):
        if not processes:  # once, for the other process may read it at any moment
            Path("pid").write_text(f"{worker.process.pid}\n", encoding="utf-8")
        processes.append(worker.process.pid)
        worker.facts["ran_on"] = "cuda"
        return generate(worker, *lengths)

    monkeypatch.setattr(Worker, "generate", on_a_gpu)
    c = Configuration(model=TINY, dtype="fp32", device="cpu", in_tokens=8, out_tokens=1, threads=1)
    row = timing.measure([c], Stopping(min_runs=1, min_s=0.0, noise=np.inf))[0].row()
    assert (row["n_runs"], row["clock_mhz"], row["throttled"]) == (1, 1200, 1)
    assert len(processes) > 2  # the warm-up, the run, and what it wrote meanwhile


def test_load_by_others_on_the_same_cores_is_seen():
    class Idle:
        configuration = Configuration(model=TINY, threads=1)
        process = type("P", (), {"pid": os.getpid()})

    others = timing._watch([Idle()])
    busy = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {Idle.configuration.cores})\nwhile True: pass"]
    )
    time.sleep(1.5)
    busy.kill()
    busy.wait()
    here, _ = others()
    assert here > 0.25  # it had at least half of the core for most of the time


def test_the_interval_of_a_median_by_counting():
    """Of nine values a resample's median is at most the second with probability 0.030 and at most the first with 0.001: the
    2.5th percentile is the second and, turned over, the 97.5th the eighth."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 90.0])
    found = timing.median_interval(values, n_resamples=20_000)  # a share of 0.030 of so many is sure to 0.0012
    assert (found.low, found.value, found.high) == (2.0, 5.0, 8.0)
    ratio = timing.ratio_of_medians(values, np.array([2.0, 2.0, 80.0]), 20_000)
    assert ratio.value == 2.5


def test_a_ratio_of_rows_is_of_the_shapes_in_their_order_and_of_the_same_settings():
    columns = ["shape", "engine", "dtype", "batch", "out_tokens", "threads", "hardware", "e2e_samples_s"]
    rows = pd.DataFrame(
        [("2x128", "hf-eager", "fp32", 1, 64, 1, "a", "9 9 9"), ("2x128", "hf-eager", "bf16", 8, 64, 1, "a", "9 9 9"),
         ("2x128", "hf-eager", "bf16", 1, 64, 1, "b", "9 9 9"), ("2x128", "hf-eager", "bf16", 1, 64, 1, "a", "3 3 3"),
         ("4x128", "vllm", "bf16", 1, 64, 1, "a", "9 9 9"), ("4x128", "hf-eager", "bf16", 1, 1, 1, "a", "9 9 9"),
         ("4x128", "hf-eager", "bf16", 1, 64, 2, "a", "9 9 9"), ("4x128", "hf-eager", "bf16", 1, 64, 1, "a", "6 6 6")],
        columns=columns,
    )  # fmt: skip
    recorded = pd.DataFrame(columns=timing.COLUMNS).assign(**rows.assign(shape=rows["shape"] + "/2h/2kv/512ff/50432v"))
    assert timing.ratio_of_rows(recorded, "2x128", "4x128").value == 0.5
    assert timing.ratio_of_rows(recorded, "4x128", "2x128").value == 2
    assert timing.ratio_of_rows(recorded, "2x128", "8x128") is None
    assert timing.ratio_of_rows(recorded, "2x128", "4x128", dtype="fp32") is None


@pytest.mark.parametrize(
    ("here", "elsewhere", "disturbed"), [(0.04, 0.19, 0), (0.06, 0.0, 1), (0.0, 0.21, 1), (np.nan, np.nan, 0)]
)
def test_a_row_says_where_other_programs_disturbed_it(here, elsewhere, disturbed):
    m = measurement(np.array([[0.5, 0.6, 0.8]] * 3))
    m.other_load, m.load_elsewhere = here, elsewhere
    m.facts = {"ran_on": "cpu"}
    assert m.row()["disturbed"] == disturbed


def test_the_two_measures_of_ttft_may_differ_by_their_noise():
    m = measurement(np.tile([0.5, 0.6], (10, 1)))
    for alone, agrees in ((0.5 / 1.029, True), (0.5 / 1.031, False)):
        m.ttft_alone_s = [alone] * 5
        assert m.ttft_agrees is agrees
    spread = np.tile([[0.4, 0.6], [0.6, 0.7]], (5, 1))
    m = measurement(spread)  # quartiles 0.4 and 0.6: the median is known to 1.2533 x 0.2 / 1.349 / sqrt(10) / 0.5 = 12 %
    m.ttft_alone_s = [0.5 / 1.3] * 5
    assert m.ttft_agrees


def test_the_least_disturbed_row_is_read_and_rows_keep_their_order(tmp_path):
    m = measurement(np.array([[0.5, 0.6, 0.8]] * 3))
    m.facts, m.other_load = {"ran_on": "cpu"}, 0.0
    row = m.row()
    for seed, disturbed, elsewhere, e2e_s in ((1, 0, 0.1, 1.0), (0, 0, 0.15, 2.0), (0, 1, 0.0, 3.0), (0, 0, 0.05, 4.0)):
        timing.append(
            tmp_path / "rows.csv", row | {"seed": seed, "disturbed": disturbed, "load_elsewhere": elsewhere, "e2e_s": e2e_s}
        )
    assert list(timing.load(tmp_path / "rows.csv")["e2e_s"]) == [1.0, 4.0]


def test_a_row_tells_noise_and_the_median_of_lone_first_tokens():
    m = measurement(np.array([[0.5, 0.6], [0.7, 0.8], [0.9, 1.4]]))
    m.facts, m.ttft_alone_s = {"ran_on": "cpu"}, [0.1, 0.2, 0.9]
    row = m.row()
    assert row["ttft_alone_s"] == 0.2
    assert row["noise"] == timing.relative_noise(np.array([0.6, 0.8, 1.4]))


def test_samples_keep_six_digits_and_protocols_their_first_batch_and_any_noise():
    m = measurement(np.array([[0.5, 1.23456], [0.5, 12.3456]]))
    m.facts = {"ran_on": "cpu"}
    assert m.row()["e2e_samples_s"] == "1.23456 12.3456"
    for name, row in timing.protocols().items():
        settings, stopping, _ = timing.protocol(name)
        assert settings["batch"] == int(str(row["batch_sizes"]).split()[0])
        assert stopping.enough([1e-3, 1.0, 10.0, 1e-3, 5.0])
        assert not (stopping.enough([900.0] * 4) or stopping.over([900.0] * 4))  # five runs, however long they take
