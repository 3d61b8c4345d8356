"""The trainer's tokens per second beside those of a bare loop over the same model, in the same run.

python benchmarks/training.py [--threads 2] [--steps 40]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from morphlib.latency.models import cpu_name
from morphlib.model import OpenLMConfig, OpenLMForCausalLM
from morphlib.recipes import Recipe
from morphlib.shapes import Shape
from morphlib.training import train

SHAPES = ("4x128/4h/ff=8d/3/257v", "4x256/4h/ff=8d/3/2048v")
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, compiled": {"compile": True},
    "bf16": {"dtype": "bf16"},
    "bf16, compiled": {"dtype": "bf16", "compile": True},
}
WARM = 3  # steps at the start of each block that are not counted: compilation, allocation
ROUNDS = 3


def trained(shape: Shape, tokens: np.ndarray, recipe: Recipe, steps: int) -> list[float]:
    """Seconds of the steps of one call of the trainer, as its progress tells them."""
    at = [time.perf_counter()]
    with tempfile.TemporaryDirectory() as folder:
        marks = [steps * recipe.step_tokens]
        progress = lambda _: at.append(time.perf_counter())  # noqa: E731
        train(shape, tokens, {"held out": tokens[: recipe.sequence + 1]}, marks, recipe, Path(folder), progress=progress)
    return np.diff(at)[WARM:].tolist()


def bare(shape: Shape, tokens: np.ndarray, recipe: Recipe, steps: int) -> list[float]:
    """Seconds of the steps of a loop that does nothing but train: cross-entropy, no z-loss, no clip, one learning rate."""
    torch.manual_seed(0)
    model = OpenLMForCausalLM(OpenLMConfig.of(shape, max_tokens=recipe.sequence)).train()
    forward: Any = torch.compile(model) if recipe.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
    batches = torch.from_numpy(tokens[: steps * recipe.step_tokens].astype(np.int64)).view(steps, recipe.batch, -1)
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.dtype == "bf16"):
            logits = forward(input_ids=batch, use_cache=False).logits
        nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.roll(-1, 1).flatten()).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds[WARM:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    disable_progress_bar()
    print(f"{cpu_name()}, {asked.threads} threads, Python {platform.python_version()}, torch {torch.__version__}; "
          f"median of {ROUNDS} rounds of {asked.steps - WARM} steps of 32 x 256 tokens, the two in turn\n")  # fmt: skip
    print(f"{'shape':<30}{'way':<18}{'trainer tokens/s':>18}{'bare loop':>12}{'ratio':>8}{'least':>8}{'most':>8}")
    for text in SHAPES:
        shape = Shape.parse(text)
        for way, changes in WAYS.items():
            recipe = Recipe(batch=32, sequence=256, warmup_steps=0, learning_rate=1e-3, **changes)
            tokens = np.random.default_rng(0).integers(0, shape.vocab, asked.steps * recipe.step_tokens + 1).astype(np.uint16)
            # the median step of each block: another program that wakes up for a moment does not move it
            rounds = [[np.median(run(shape, tokens, recipe, asked.steps)) for run in (trained, bare)] for _ in range(ROUNDS)]
            ours, theirs = recipe.step_tokens / np.median(rounds, axis=0)
            ratios = [theirs_s / ours_s for ours_s, theirs_s in rounds]
            print(f"{text:<30}{way:<18}{ours:>18,.0f}{theirs:>12,.0f}"
                  f"{np.median(ratios):>8.3f}{min(ratios):>8.3f}{max(ratios):>8.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
