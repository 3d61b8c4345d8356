"""The command ``morph eval``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from morphlib.errors import InputError


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Evaluate a checkpoint, or compare two results."""
    if (arguments.checkpoint is None) == (arguments.compare is None):
        raise InputError("name a checkpoint, or two results by --compare")
    if arguments.compare:
        from morphlib import scores

        first, second = map(_records, arguments.compare)
        return {"compared": scores.compare(first, second, arguments.seed), "files": [str(path) for path in arguments.compare]}
    return _evaluated(arguments)


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        found = list(json.loads(path.read_text(encoding="utf-8"))["records"])
        for record in found:
            if lacking := {"task", "metric", "ids", "category", "scores"} - {*record}:
                raise KeyError(min(lacking))
            if len(record["scores"][record["metric"]]) != len(record["ids"]):
                raise ValueError(f"{record['task']}: as many scores as items are needed")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no result of morph eval ({error}); write one by --out") from None


def _evaluated(arguments: argparse.Namespace) -> dict[str, Any]:
    from morphlib import evaluation, scores
    from morphlib.corpus import Corpus

    def progress(line: str) -> None:
        print(f"morph eval: {line}", file=sys.stderr)

    names = evaluation.task_names(arguments.tasks)
    folders = [evaluation.offline_tasks(progress)] if any(name.endswith("_offline") for name in names) else []
    corpus = Corpus.open(arguments.corpus) if arguments.corpus else None
    if "spelling" in names:
        if corpus is None:
            raise InputError("spelling: its pairs are made of the held-out text of a corpus; name one by --corpus")
        folders.append(evaluation.spelling_task(corpus.held_out_texts(), seed=arguments.seed))
    if "agreement" in names:
        texts = corpus.tokenizer.decode(corpus.train) if corpus else ()
        folders.append(evaluation.agreement_task(texts, seed=arguments.seed, progress=progress))
    options = {name: getattr(arguments, name) for name in ("config", "tokenizer", "device", "dtype", "batch", "allow_code")}
    tasks = evaluation.load_tasks(names, folders)
    lm = evaluation.open_model(arguments.checkpoint, **options, progress=progress)
    records = scores.merge(evaluation.run(lm, tasks, limit=arguments.limit, seed=arguments.seed, progress=progress))
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


_SHOWN = {"as_llm_foundry": "per token", "bits_per_byte": "bits/byte", "bits_per_byte_error": "its error", "n": "items"}
_COLUMNS = ("task", "metric", "value", "standard_error", "chance", "verdict", *_SHOWN)
_COMPARED = {"gained": "second only", "lost": "first only", "bits_per_byte_difference": "bits/byte"}
_COMPARED |= {"bits_per_byte_difference_error": "its error", "n": "items"}


def show(show_table: Callable[[list[dict[str, Any]]], None], result: dict[str, Any]) -> None:
    """Print accuracies, or how two models differ; ``show_table`` prints rows."""
    if "compared" in result:
        print(f"first {result['files'][0]}, second {result['files'][1]}\n")
        show_table([{_COMPARED.get(name, name): value for name, value in row.items()} for row in result["compared"]])
        print("\nsecond minus first; 95 % intervals by a paired bootstrap, p by McNemar's exact test")
        return
    shown = []
    for row in result["tasks"]:
        parts = row.get("categories", [])
        shown += [row, *({**part, "task": f"{row['task']}: {part['category']}"} for part in parts if len(parts) <= 10)]
    show_table([{_SHOWN.get(name, name): row[name] for name in _COLUMNS if name in row} for row in shown])
    for row in result["tasks"]:
        if row.get("truncated"):
            print(f"{row['task']}: {row['truncated']} items, longer than {result['max_tokens']} tokens, lost their beginning")
    if mean := result["average"]:
        lacks = ", ".join(mean["missing"])
        what = f"without {lacks}, so this is not the paper's average" if lacks else "the paper's average"
        print(f"\nmean of {mean['of']} tasks {mean['value']:.4f}, std. error {mean['standard_error']:.4f}: {what}; ", end="")
        print(f"chance {mean['chance']:.4f}, per token {mean['as_llm_foundry']:.4f}")
    if result["limit"]:
        print(f"only the first {result['limit']} items of each task")
    print(f"{result['checkpoint']} on {result['device']} in {result['dtype']}, seed {result['seed']}")
