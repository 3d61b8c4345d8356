"""The engines: exact lengths, honest times, and one line where something cannot run."""

import os
import shutil
import signal
import time
from contextlib import closing

import numpy as np
import pytest
import torch

from morphlib.errors import InputError
from morphlib.latency import engines
from morphlib.latency.engines import Configuration, Worker

TINY = "2x64/1h/1kv/128ff/256v"


def configuration(**changes) -> Configuration:
    common = {"model": TINY, "dtype": "fp32", "device": "cpu", "in_tokens": 8, "out_tokens": 6, "threads": 1}
    return Configuration(**common | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "tensorrt"}, "choose one of hf-eager"),
        ({"dtype": "int3"}, "choose one of bf16"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": "many"}, "batch is 'many'; give a whole number"),
        ({"threads": 4096}, "more threads than cores"),
        ({"temperature": -1.0}, "no sampling"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        configuration(**changes)


@pytest.mark.parametrize(("in_tokens", "out_tokens", "batch"), [(1, 1, 1), (5, 7, 3)])
def test_lengths_are_exact(in_tokens, out_tokens, batch):
    session = engines._HuggingFace(configuration(in_tokens=in_tokens, out_tokens=out_tokens, batch=batch))
    seen = []
    session.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    e2e_s, token_times_s, _ = session.generate(in_tokens, out_tokens)
    assert len(token_times_s) == out_tokens and e2e_s >= token_times_s[-1]
    # the prompt at once, then one token at a time with the cache
    assert seen == [(batch, in_tokens)] + [(batch, 1)] * (out_tokens - 1)


def test_delays_show_where_they_were_put():
    session = engines._HuggingFace(configuration(out_tokens=8))
    steps = []

    def delay(*_):
        steps.append(len(steps))
        time.sleep(0.2 if steps[-1] in (0, 5) else 0.02)

    session.generate(8, 8)
    session.model.register_forward_pre_hook(delay)
    _, token_times_s, _ = session.generate(8, 8)
    gaps = np.diff([0.0, *token_times_s])
    late = np.isin(np.arange(8), (0, 5))
    # a sleep is never short; what it is longer than asked for, and the step itself, stay far below 0.1 s
    assert (gaps[late] >= 0.2).all() and (gaps[~late] >= 0.02).all() and (gaps[~late] < 0.12).all()


def test_sampling_is_drawn_anew_from_the_same_seed():
    session = engines._HuggingFace(configuration(temperature=0.8, top_p=0.95))
    chosen = []
    generate = session.model.generate
    session.model.generate = lambda *a, **k: chosen.append(generate(*a, **k)) or chosen[-1]
    session.generate(8, 6)
    session.generate(8, 6)
    assert torch.equal(*chosen)


def test_a_worker_answers_and_ends():
    with closing(Worker(configuration())) as worker:
        generation = worker.generate()
        assert generation.token_times_s.shape == (6,)
        assert worker.generate(out_tokens=1).token_times_s.shape == (1,)
        assert worker.facts["peak_memory_bytes"] > 1e6
        if hasattr(os, "sched_getaffinity"):
            assert len(os.sched_getaffinity(worker.process.pid)) == 1
    assert worker.process.poll() is not None


def test_a_worker_runs_no_code_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit('run')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with closing(Worker(configuration())) as worker:
        assert worker.generate().token_times_s.shape == (6,)


def test_a_worker_that_is_killed_is_told_in_one_line():
    with closing(Worker(configuration())) as worker:
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(InputError, match="killed, as for want of memory"):
            worker.generate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "8x500/16h"}, "do not divide"),
        ({"model": "nothing-of-the-kind"}, "is not a shape"),
        ({"in_tokens": 4096, "out_tokens": 1}, "give fewer"),
    ],
)
def test_a_model_that_cannot_run_is_told_in_one_line(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        Worker(configuration(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("changes", [{"device": "cuda"}, {"engine": "cuda-graph"}])
def test_a_missing_cuda_device_is_told(changes):
    with pytest.raises(InputError, match="no CUDA device"):
        engines._HuggingFace(configuration(**changes))


@pytest.mark.parametrize("python", ["", "no-such-file", "/", "/etc/passwd"])
def test_vllm_without_an_environment_is_told(monkeypatch, python):
    monkeypatch.setenv("MORPH_VLLM_PYTHON", python)
    with pytest.raises(InputError, match="set MORPH_VLLM_PYTHON"):
        Worker(configuration(engine="vllm"))


def test_last_words_that_are_no_text_are_told(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf 'in Latin-1: caf\\351' >&2; exit 3\n", encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setenv("MORPH_VLLM_PYTHON", str(python))
    with pytest.raises(InputError, match=r"exit code 3\): in Latin-1: caf"):
        Worker(configuration(engine="vllm"))


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler for torch.compile")
def test_compiled_code_writes_the_same_tokens():
    written = {}
    for engine in ("hf-eager", "hf-compiled"):
        session = engines._HuggingFace(configuration(engine=engine))
        generate = session.model.generate
        session.model.generate = lambda *a, g=generate, e=engine, **k: written.setdefault(e, g(*a, **k))
        _, token_times_s, _ = session.generate(8, 6)
        assert len(token_times_s) == 6
    assert torch.equal(written["hf-eager"], written["hf-compiled"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("engine", ["hf-eager", "hf-compiled", "cuda-graph"])
def test_cuda_events_and_the_hosts_clock_agree(engine):
    session = engines._HuggingFace(configuration(engine=engine, dtype="bf16", device="cuda", out_tokens=64))
    session.generate(8, 64)
    e2e_s, token_times_s, _ = session.generate(8, 64)
    assert len(token_times_s) == 64
    assert token_times_s[-1] <= e2e_s * 1.02 and (np.diff(token_times_s) > 0).all()
