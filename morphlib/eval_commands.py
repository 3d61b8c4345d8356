"""The command ``morph eval``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from morphlib.errors import InputError

_DTYPES = ("auto", "bf16", "fp16", "fp32")


def add_commands(commands: Any, count: Callable[[str], int]) -> None:
    """Add ``eval`` to the commands of ``morph``; ``count`` reads a whole number of at least 1."""
    about = "Accuracy of a checkpoint by lm-eval, with its uncertainty; or two results compared item by item."
    command = commands.add_parser("eval", help="evaluate a checkpoint, or compare two results", description=about)
    what = "folder of a model, Open-LM .pt file, .gguf file, smollm2, or a name on the Hugging Face hub"
    command.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help=what)
    names = "paper (its eleven, online), offline (ten of them), agreement (minimal pairs), or names of lm-eval and paths of "
    command.add_argument(
        "--tasks", default="offline", metavar="NAMES", help=f"{names}task files, with commas (default: offline)"
    )
    command.add_argument("--limit", type=count, metavar="N", help="only the first N items of each task")
    command.add_argument("--batch", type=count, default=8, metavar="N", help="sequences at once (default: %(default)s)")
    command.add_argument("--dtype", choices=_DTYPES, default="auto", help="(default: as the checkpoint says)")
    command.add_argument("--device", metavar="DEVICE", help="(default: cuda where there is one, else cpu)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    command.add_argument("--config", type=Path, metavar="JSON", help="model configuration of an Open-LM .pt file")
    command.add_argument("--tokenizer", type=Path, metavar="PATH", help="tokenizer.json, or a folder with one such as a corpus")
    command.add_argument("--corpus", type=Path, metavar="FOLDER", help="leave out minimal pairs that this training text has")
    command.add_argument("--allow-code", action="store_true", help="run code that comes with the checkpoint")
    command.add_argument("--out", type=Path, metavar="JSON", help="also write the result with its items, for --compare")
    command.add_argument("--compare", type=Path, nargs=2, metavar="JSON", help="two files that --out wrote")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_run, show=_show)


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    if (arguments.checkpoint is None) == (arguments.compare is None):
        raise InputError("name a checkpoint, or two results by --compare")
    if arguments.compare:
        from morphlib import scores

        first, second = map(_records, arguments.compare)
        return {"compared": scores.compare(first, second, arguments.seed), "files": [str(path) for path in arguments.compare]}
    return _evaluated(arguments)


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["records"]
        return [{**record, "ids": record["ids"], "scores": record["scores"], "task": record["task"]} for record in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no result of morph eval ({error}); write one by --out") from None


def _evaluated(arguments: argparse.Namespace) -> dict[str, Any]:
    from morphlib import evaluation, scores
    from morphlib.corpus import Corpus

    def progress(line: str) -> None:
        print(f"morph eval: {line}", file=sys.stderr)

    names = evaluation.task_names(arguments.tasks)
    folders = [evaluation.offline_tasks(progress)] if any(name.endswith("_offline") for name in names) else []
    if "agreement" in names:
        corpus = Corpus.open(arguments.corpus) if arguments.corpus else None
        texts = corpus.tokenizer.decode(corpus.train) if corpus else ()
        folders.append(evaluation.agreement_task(texts, seed=arguments.seed, progress=progress))
    options = {name: getattr(arguments, name) for name in ("config", "tokenizer", "device", "dtype", "batch", "allow_code")}
    tasks = evaluation.load_tasks(names, folders)
    lm = evaluation.open_model(arguments.checkpoint, **options, progress=progress)
    records = evaluation.run(lm, tasks, limit=arguments.limit, seed=arguments.seed, progress=progress)
    rows = [scores.summary(record) for record in records]
    result = {
        "tasks": rows,
        "average": scores.of_the_eleven(rows),
        "limit": arguments.limit,
        "seed": arguments.seed,
        **evaluation.about(lm, arguments.checkpoint),
    }
    if arguments.out:
        evaluation.write_json(arguments.out, {**result, "records": records})
    return result


def _show(result: dict[str, Any]) -> None:
    if "compared" in result:
        _show_compared(result)
        return
    width = max(len(row["task"]) for row in result["tasks"]) + 2
    print(f"{'task':<{width}}{'metric':<10}{'value':>16}{'chance':>8}  {'':<13}{'per token':>10}{'bits/byte':>17}{'items':>7}")
    for row in result["tasks"]:
        value = f"{row['value']:.4f} ± {row['standard_error']:.4f}"
        per_byte = f"{row['bits_per_byte']:.3f} ± {row['bits_per_byte_error']:.3f}" if "bits_per_byte" in row else ""
        chance = f"{row['chance']:.3f}" if "chance" in row else ""
        per_token = f"{row['as_llm_foundry']:.4f}" if "as_llm_foundry" in row else ""
        print(
            f"{row['task']:<{width}}{row['metric']:<10}{value:>16}{chance:>8}  {row.get('verdict', ''):<13}{per_token:>10}"
            f"{per_byte:>17}{row['n']:>7}"
        )
        for name, mean in row.get("categories", {}).items() if len(row.get("categories", {})) <= 10 else ():
            print(f"  {name:<{width + 8}}{mean:.4f}")
        if row.get("truncated"):
            print(f"  the beginning is cut off {row['truncated']} items, longer than {result['max_tokens']} tokens")
    if mean := result["average"]:
        what = (
            "the paper's average of eleven"
            if mean["of"] == 11
            else f"mean of {mean['of']} of the paper's eleven, not its average"
        )
        lacks = f" (without {', '.join(mean['missing'])})" if mean["missing"] else ""
        print(f"{what}{lacks}: {mean['value']:.4f} ± {mean['standard_error']:.4f}, chance {mean['chance']:.3f}, ", end="")
        print(f"by llm-foundry's rule {mean['as_llm_foundry']:.4f}")
    if result["limit"]:
        print(f"on the first {result['limit']} items of each task only")
    print(f"± is a standard error; {result['checkpoint']} on {result['device']} in {result['dtype']}, seed {result['seed']}")


def _show_compared(result: dict[str, Any]) -> None:
    width = max(len(row["task"]) for row in result["compared"]) + 2
    print(f"first {result['files'][0]}, second {result['files'][1]}")
    print(f"{'task':<{width}}{'first':>8}{'second':>8}{'difference, 95 %':>28}{'p':>10}  {'':<17}{'bits/byte':>18}{'items':>7}")
    for row in result["compared"]:
        difference = f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
        p = f"{row['p']:.2g}" if "p" in row else ""
        per_byte = ""
        if "bits_per_byte_difference" in row:
            per_byte = f"{row['bits_per_byte_difference']:+.3f} ± {row['bits_per_byte_difference_error']:.3f}"
        print(
            f"{row['task']:<{width}}{row['first']:>8.4f}{row['second']:>8.4f}{difference:>28}{p:>10}  {row['verdict']:<17}"
            f"{per_byte:>18}{row['n']:>7}"
        )
    print("difference by paired bootstrap; p by McNemar's exact test; bits/byte: second minus first ± standard error")
