"""The commands that make a corpus and train on it: ``morph corpus build`` and ``morph train``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphlib import files, recipes
from morphlib.errors import InputError
from morphlib.recipes import Recipe
from morphlib.shapes import Shape

if TYPE_CHECKING:
    from morphlib.corpus import Corpus

DOCSTRINGS = "docstrings"


def _folder(name: str) -> Path:
    return files.home() / name


def _say(line: str) -> None:
    print(f"morph corpus: {line}", file=sys.stderr)


def build(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build a corpus; texts of the evaluations are left out of it."""
    from morphlib import corpus

    out = arguments.out or _folder("corpus")
    # whoever trains on docstrings alone needs no download, and they are no text of an evaluation
    evaluations = [] if arguments.source == [DOCSTRINGS] else corpus.evaluation_texts(_say)
    settings = {"seed": arguments.seed, "limit_bytes": arguments.limit_bytes, "progress": _say}
    return corpus.build(out, arguments.source or (), arguments.tokenizer, evaluations, **settings) | {"folder": str(out)}


def show_corpus(result: dict[str, Any]) -> None:
    """Print the text by source and fate."""
    import pandas as pd

    table = pd.DataFrame(result["documents"]).assign(mb=lambda t: t["bytes"] / 1e6)
    print(table.pivot_table("mb", "source", "fate", "sum").to_string(float_format="{:.2f}".format, na_rep=""))
    print(f"megabytes of text; {result['sizes']['train']['tokens']:,} tokens to train on, in {result['folder']}")


def _corpus(name: str | None) -> Corpus:
    from morphlib import corpus

    if name != DOCSTRINGS:
        return corpus.Corpus.open(Path(name) if name else _folder("corpus"))
    folder = _folder(DOCSTRINGS)
    # of several processes each comes by in turn, and the first builds
    with files.locked(folder.with_suffix(".lock")):
        if not (folder / corpus.MANIFEST).exists():
            corpus.build(folder, [DOCSTRINGS], progress=_say)
    return corpus.Corpus.open(folder)


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train from a recipe, or write what open_lm needs for it."""
    given = recipes.quantities(arguments.recipe)
    asked = (*(field.name for field in fields(Recipe)), "shape", "tokens", "chunks", "gpus")
    given |= {name: value for name in asked if (value := getattr(arguments, name, None)) is not None}
    if "shape" not in given or "tokens" not in given:
        raise InputError(f"the recipe {arguments.recipe} leaves open what to train; give --shape and --tokens")
    marks = [int(tokens) for tokens in (given["tokens"] if isinstance(given["tokens"], list) else [given["tokens"]])]
    recipe = Recipe.of(given)
    if arguments.launch:
        if len(marks) > 1:
            raise InputError("open_lm trains to one budget; give --tokens once")
        if "shard_sequences" not in given:
            raise InputError(f"the recipe {arguments.recipe} does not say how open_lm reads text; take paper or morph-1b")
        return recipes.write_open_lm_launch(arguments.out, _shape(given), marks[0], given)
    with _processes(arguments) as device, _line() as progress:
        from morphlib import training

        corpus = _corpus(arguments.corpus)
        corpus.require(marks[-1])
        shape = _shape(given, corpus.vocab)
        if shape.vocab < corpus.vocab:
            raise InputError(f"{shape}: its vocabulary is smaller than the tokenizer's, {corpus.vocab}; leave it out")
        held_out = corpus.held_out
        rows = training.train(shape, corpus.train, held_out, marks, recipe, arguments.out, device=device, progress=progress)
    if not _tells():
        sys.exit(0)  # what there is to tell, the first process tells
    return {"rows": rows, "folder": str(arguments.out)}


def plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """List the runs of the plan, and which of them are in the table."""
    from morphlib import study

    planned, table = study.plan(arguments.plan or study.PLAN), arguments.table or study.TABLE
    done = set(study.load(table, arguments.plan or study.PLAN)["name"]) if table.is_file() else set()
    rows = [
        {"run": run.run_id, "part": run.part, "shape": str(run.shape), "tokens": run.marks[-1], "cpu_minutes": run.cpu_minutes}
        for run in planned
    ]
    return {"runs": [row | {"done": row["run"] in done} for row in rows], "table": str(table)}


def show_plan(result: dict[str, Any]) -> None:
    """Print the plan, and how much of each part is left."""
    import pandas as pd

    table = pd.DataFrame(result["runs"])
    print(table.to_string(index=False))
    for part, rows in table.groupby("part", sort=False):
        all_h, left_h = rows["cpu_minutes"].sum() / 60, rows.loc[~rows["done"], "cpu_minutes"].sum() / 60
        done = f"{rows['done'].sum()} are in {result['table']}, about {left_h:.1f} h are left"
        print(f"{part}: {len(rows)} runs, about {all_h:.1f} h of one thread; {done}")


def study_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate one run of the plan."""
    from morphlib import study

    run = study.named(arguments.run_id, arguments.plan or study.PLAN)
    with _processes(arguments) as device, _line() as progress:
        table = study.train(run, _corpus(arguments.corpus), arguments.out, device=device, progress=progress)
    return {"rows": table.to_dict("records"), "folder": str(arguments.out)}


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """Put the rows of finished runs into the table."""
    from morphlib import study

    table = arguments.table or study.TABLE
    of = {"plan_path": arguments.plan or study.PLAN, "latencies": arguments.latencies or study.LATENCIES}
    return study.collect(arguments.folders, table, **of) | {"table": str(table)}


def show_collected(result: dict[str, Any]) -> None:
    """Print what was added, and what is left."""
    trained = "; ".join(f"{runs} on {device}" for device, runs in result["trained_on"].items())
    print(f"{result['added']} runs added to {result['table']}, {len(result['left'])} of the plan are left; trained: {trained}")


def rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """Foretell the losses of the largest shapes by laws fitted to the others."""
    from morphlib import study

    plan = arguments.plan or study.PLAN
    wanted = [run for run in study.plan(plan) if run.part == "largest"]
    found = study.ranked(study.load(arguments.table or study.TABLE, plan), wanted)
    if arguments.out:
        source = f"morph study rank at {files.commit()}"
        with files.replacing(arguments.out) as partial:
            found.assign(source=source).to_csv(partial, index=False, float_format="%.6g")
    return {"ranked": found.to_dict("records")}


def show_ranked(result: dict[str, Any]) -> None:
    """Print what the chosen law says."""
    import pandas as pd

    table = pd.DataFrame(result["ranked"])
    best = table[table["chosen"] == 1]
    print(best[["rank", "shape", "tokens", "loss", "low", "high"]].to_string(index=False))
    law = "{law} with {exponents} exponents, error {error_by_size:.4f} with one size left out".format(**best.iloc[0])
    print(f"by {law}; of {table.groupby(['law', 'exponents']).ngroups} laws")


def _shape(given: dict[str, Any], vocab: int | None = None) -> Shape:
    return replace(Shape.parse(given["shape"], *([] if vocab is None else [vocab])), norm=given["norm"])


@contextmanager
def _processes(arguments: argparse.Namespace) -> Iterator[str]:
    """The device of this process; under torchrun, joined to the others as long as the context lasts."""
    import torch
    from torch import distributed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    on_gpu = arguments.device != "cpu" and torch.cuda.is_available()
    if arguments.device == "cuda" and not on_gpu:
        raise InputError("torch finds no CUDA device here; leave out --device, or give cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    of_environment = os.environ.get("OMP_NUM_THREADS", "")
    threads = arguments.threads or (int(of_environment) if of_environment.isdigit() else 0) or cores
    if threads > cores:
        raise InputError(f"{threads} threads are more than the {cores} cores; give fewer")
    torch.set_num_threads(threads)
    if "RANK" not in os.environ:
        yield "cuda" if on_gpu else "cpu"
        return
    if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise InputError(f"RANK is set and {', '.join(missing)} not; start with torchrun, or unset RANK")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield f"cuda:{local}" if on_gpu else "cpu"
    finally:
        distributed.destroy_process_group()


@contextmanager
def _line() -> Iterator[Callable[[str], None]]:
    """Shows what is told last: on a terminal in place, elsewhere as a line once a minute."""
    on_terminal, shown_s = sys.stderr.isatty(), time.monotonic()

    def show(line: str) -> None:
        nonlocal shown_s
        if _tells() and (on_terminal or time.monotonic() - shown_s > 60):
            print(f"\r\x1b[K{line}" if on_terminal else line, end="" if on_terminal else "\n", file=sys.stderr, flush=True)
            shown_s = time.monotonic()

    try:
        yield show
    finally:
        if on_terminal:
            print(file=sys.stderr)


def _tells() -> bool:
    """Whether this process is the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def show_rows(result: dict[str, Any]) -> None:
    """Print the models that were trained, or the files that were written."""
    import pandas as pd

    if "files" in result:
        print("{shape}, {n_params:,} parameters: {steps:,} steps of {step_tokens:,} tokens, {tokens:,} in all".format(**result))
        print("written: " + ", ".join(result["files"]))
        return
    columns = ["shape", "n_params", "tokens", "loss", "run_averaged_loss", "seconds"]
    table = pd.DataFrame(result["rows"])[columns].rename(columns={"n_params": "non-embedding N", "loss": "held-out loss"})
    print(table.to_string(index=False))
    print(f"losses in nats per token; models, rows.csv and the losses of every step are in {result['folder']}")
