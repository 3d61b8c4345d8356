"""What a model's answers say: accuracy with its error, against chance, per byte, and paired with another model's answers.

A record holds the answers to one task, column by column, and no text:

    task, paper    lm-eval's name of the task, and the paper's name for it where it is one of the eleven
    metric         the one of ``scores`` that counts
    ids            one for each item: its number and the hash of its text
    category       of each item; a task's value is the plain mean of those of its categories
    scores         by metric one number for each item, mostly 0 or 1
    chance         of each item, the probability of a right guess
    right          of each item, the number of the right answer; none where not all items have the same answers to choose from
    nats, bytes    of each right answer: minus its log-probability, and its length in UTF-8
    truncated      items whose beginning the model could not read
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from morphlib.errors import InputError

Record = Mapping[str, Any]
TOKEN_METRIC = "acc_token"  # llm-foundry's: the answer of the largest log-probability per token
SUBJECTS = 57  # of MMLU
DRAWS = 10_000  # of a bootstrap
SURE = 0.05  # the greatest p with which one model is called better
_OF_CATEGORY = ("value", "standard_error", "low", "high", "n", "chance", "verdict")
_Z = float(norm.ppf(0.975))


def _table(name: str) -> list[dict[str, str]]:
    with resources.files("morphlib").joinpath("data", name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def paper_tasks() -> Mapping[str, Mapping[str, str]]:
    """The paper's eleven tasks by name, as ``data/eval_tasks.csv`` has them; ``data/columns.csv`` explains the columns."""
    return {row["name"]: row for row in _table("eval_tasks.csv")}


def baselines() -> list[dict[str, str]]:
    """The rows of ``data/eval_baselines.csv``: accuracy of public models by task, and the average as printed."""
    return _table("eval_baselines.csv")


def average(values: Mapping[str, float]) -> float:
    """The paper's number: the plain mean over its eleven tasks. Raises ``InputError`` unless each of them has a value."""
    if missing := [name for name in paper_tasks() if name not in values]:
        raise InputError(f"an average of eleven tasks lacks {', '.join(missing)}; evaluate them too, or average none")
    return math.fsum(values[name] for name in paper_tasks()) / len(paper_tasks())


def macro_mean(values: Sequence[float] | np.ndarray, category: Sequence[str]) -> tuple[float, float]:
    """The plain mean of the categories' means, and its standard error; with one category lm-eval's own two numbers."""
    found, labels = np.asarray(values, dtype=float), np.asarray(category)
    cells = [found[labels == name] for name in dict.fromkeys(category)]
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = [cell.var(ddof=1) / len(cell) if len(cell) > 1 else math.nan for cell in cells]
    return float(np.mean([cell.mean() for cell in cells])), math.sqrt(sum(squares)) / len(cells)


def merge(records: Sequence[Record]) -> list[Record]:
    """The records, those of the 57 subjects that lm-eval has in place of one MMLU put together; fewer subjects stay apart."""
    subjects = [record for record in records if record["task"].startswith("mmlu_") and record["paper"] is None]
    if len(subjects) != SUBJECTS:
        return list(records)
    whole: dict[str, Any] = {**subjects[0], "task": "mmlu", "paper": "mmlu", "ids": [], "category": [], "scores": {}}
    whole |= {name: [value for record in subjects for value in record[name]] for name in ("chance", "right", "nats", "bytes")}
    for record in subjects:
        whole["ids"] += [f"{record['task']} {name}" for name in record["ids"]]
        whole["category"] += [record["task"].removeprefix("mmlu_")] * len(record["ids"])
        for metric, values in record["scores"].items():
            whole["scores"].setdefault(metric, []).extend(values)
    whole["truncated"] = sum(record["truncated"] for record in subjects)
    whole["task_hash"] = hashlib.sha256("".join(record["task_hash"] for record in subjects).encode()).hexdigest()
    return [whole, *(record for record in records if record not in subjects)]


def _ratio(nats: Sequence[float], n_bytes: Sequence[int]) -> tuple[float, float]:
    """The sum of one over the sum of the other in bits, and its standard error (of a ratio estimator)."""
    bits, sizes = np.asarray(nats, dtype=float) / math.log(2), np.asarray(n_bytes, dtype=float)
    value, n = bits.sum() / sizes.sum(), len(bits)
    error = math.sqrt(((bits - value * sizes) ** 2).sum() * n / (n - 1)) / sizes.sum() if n > 1 else math.nan
    return float(value), float(error)


def _of(record: Record, category: str) -> Record:
    """The items of one category."""
    kept = [i for i, name in enumerate(record["category"]) if name == category]
    columns = {name: record[name] for name in ("ids", "category", "chance", "right", "nats", "bytes") if record.get(name)}
    parts = {name: [values[i] for i in kept] for name, values in columns.items()}
    return {**record, **parts, "scores": {metric: [values[i] for i in kept] for metric, values in record["scores"].items()}}


def summary(record: Record) -> dict[str, Any]:
    """One row of a table of results.

    ``value`` and its ``standard_error``; a 95 % interval from ``low`` to ``high``, Wilson's where there is one category;
    ``chance``, what a guess or the most frequent answer scores, and ``verdict``, where the interval lies to it,
    or that there are too few items for one;
    ``as_llm_foundry``, the value by llm-foundry's rule; ``bits_per_byte`` of the right answers, which does not depend on the
    tokenizer. ``categories``, where there are several, has the first of these for each.
    """
    scores, category = record["scores"][record["metric"]], record["category"]
    value, error = macro_mean(scores, category)
    low, high = value - _Z * error, value + _Z * error
    is_right_or_wrong = set(scores) <= {0, 1}
    if is_right_or_wrong and len(set(category)) == 1:
        interval = binomtest(round(sum(scores)), len(scores)).proportion_ci(method="wilson")
        low, high = float(interval.low), float(interval.high)
    row = {name: record[name] for name in ("task", "paper", "metric", "task_hash", "truncated") if name in record}
    row |= {"value": value, "standard_error": error, "low": low, "high": high, "n": len(scores)}
    if is_right_or_wrong and "chance" in record:
        most_frequent = max(Counter(record["right"]).values(), default=0) / len(scores)
        chance = max(macro_mean(record["chance"], category)[0], most_frequent)
        where = "below chance" if high < chance else "above chance" if low > chance else "at chance"
        row |= {"chance": chance, "verdict": "too few items" if math.isnan(error) else where}
    if TOKEN_METRIC in record["scores"]:
        row["as_llm_foundry"] = macro_mean(record["scores"][TOKEN_METRIC], category)[0]
    if "nats" in record:
        row["bits_per_byte"], row["bits_per_byte_error"] = _ratio(record["nats"], record["bytes"])
    if len(set(category)) > 1:
        row["categories"] = [
            {"category": name, **{key: value for key, value in summary(_of(record, name)).items() if key in _OF_CATEGORY}}
            for name in dict.fromkeys(category)
        ]
    return row


def of_the_eleven(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean over the paper's tasks among the rows of `summary`: of the eleven, or of the ten that there are offline.

    It says which, in ``of`` and ``missing``; ten never stand for eleven. None for any other tasks.
    """
    found = {row["paper"]: row for row in rows if row.get("paper")}
    if len(found) < sum(bool(row.get("paper")) for row in rows):  # one task twice, from two places
        return None
    missing = [name for name in paper_tasks() if name not in found]
    if missing not in ([], [name for name, task in paper_tasks().items() if not task["offline"]]):
        return None
    values = {name: row["value"] for name, row in found.items()}
    return {
        "of": len(found),
        "missing": missing,
        "value": math.fsum(values.values()) / len(found) if missing else average(values),
        "standard_error": math.sqrt(math.fsum(row["standard_error"] ** 2 for row in found.values())) / len(found),
        "chance": math.fsum(row["chance"] for row in found.values()) / len(found),
        "as_llm_foundry": math.fsum(row.get("as_llm_foundry", row["value"]) for row in found.values()) / len(found),
    }


def compare(first: Sequence[Record], second: Sequence[Record], seed: int = 0) -> list[dict[str, Any]]:
    """Two models on the items that both answered, task by task, and over all where they are the paper's tasks.

    ``difference`` is the second's value minus the first's, with a 95 % interval of a paired bootstrap within the categories,
    NaN where one has a single item; ``p`` is of McNemar's exact test: that of the items where only one is right, each is as
    often the right one. The ``verdict`` calls one better where the interval leaves zero out and p is at most 0.05.
    ``bits_per_byte_difference`` has a standard error. Raises ``InputError`` where no item is common to both.
    """
    rng, others = np.random.default_rng(seed), {record["task"]: record for record in second}
    rows, all_draws = [], []
    for a in first:
        b = others.get(a["task"])
        of_b = {name: i for i, name in enumerate(b["ids"])} if b else {}
        pairs = [(i, of_b[name]) for i, name in enumerate(a["ids"]) if name in of_b]
        if b is None or not pairs:
            continue
        mine, theirs = (list(indices) for indices in zip(*pairs, strict=True))
        category = np.asarray(a["category"])[mine]
        x, y = np.asarray(a["scores"][a["metric"]])[mine], np.asarray(b["scores"][a["metric"]])[theirs]
        draws = np.zeros(DRAWS)
        cells = [y[category == name] - x[category == name] for name in dict.fromkeys(category)]
        for change in cells:
            kinds, counts = np.unique(change, return_counts=True)
            draws += rng.multinomial(len(change), counts / len(change), size=DRAWS) @ kinds / len(change) / len(cells)
        row: dict[str, Any] = {"task": a["task"], "metric": a["metric"], "n": len(pairs)}
        row |= {"first": macro_mean(x, category.tolist())[0], "second": macro_mean(y, category.tolist())[0]}
        if set(x) | set(y) <= {0, 1}:
            gained, lost = int((y > x).sum()), int((y < x).sum())
            row |= {"gained": gained, "lost": lost, "p": binomtest(gained, gained + lost).pvalue if gained + lost else 1.0}
        if min(map(len, cells)) < 2:
            draws[:] = np.nan  # the spread within a category is unknown
        row |= _difference(row, draws)
        if "nats" in a and "nats" in b:
            nats = np.asarray(b["nats"])[theirs] - np.asarray(a["nats"])[mine]
            difference, error = _ratio(nats.tolist(), np.asarray(a["bytes"])[mine].tolist())
            row |= {"bits_per_byte_difference": difference, "bits_per_byte_difference_error": error}
        rows.append(row)
        all_draws.append(draws)
    if not rows:
        raise InputError("the two results have no item in common; evaluate both on the same tasks")
    if len(rows) > 1 and all(record.get("paper") for record in first):
        means = {which: float(np.mean([row[which] for row in rows])) for which in ("first", "second")}
        total = {"task": f"mean of {len(rows)} tasks", "metric": "", "n": sum(row["n"] for row in rows), **means}
        rows.append(total | _difference(means, np.mean(all_draws, axis=0)))
    return rows


def _difference(means: Mapping[str, float], draws: np.ndarray) -> dict[str, Any]:
    low, high = np.quantile(draws, [0.025, 0.975])
    better = "second is better" if low > 0 else "first is better"
    # a bootstrap of a few items that are all alike has no spread; McNemar's test knows how few they are
    sure = not low <= 0 <= high and means.get("p", 0.0) <= SURE
    verdict = "too few items" if math.isnan(low) else better if sure else "not told apart"
    return {"difference": means["second"] - means["first"], "low": float(low), "high": float(high), "verdict": verdict}
