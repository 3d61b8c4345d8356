"""Run tables: one row per trained model and token budget, validated when loaded.

A table is a CSV file. It must have the columns ``name``, ``n_params``, ``d_model``, ``n_layers``,
``tokens`` and ``loss`` (nats per token); it should say in ``n_count`` how ``n_params`` is counted.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pandera.pandas as pa
from numpy.typing import ArrayLike

from morphlib.errors import InputError
from morphlib.laws import Array
from morphlib.shapes import CONVENTIONS, SIZES, Convention, Shape

# Norms, biases and a rounded figure move a count by less than this; the wrong convention moves
# the paper's counts by 14 % or more.
COUNT_TOLERANCE = 0.01


POWER_OF = {"C/M": "N", "CM": "D"}  # variables that are another one raised to a power
LARGEST_WHOLE = 2**31  # of a width, a depth or a vocabulary; beyond it the number is a slip


def _positive(meaning: str) -> pa.Column:
    check = pa.Check(lambda values: np.isfinite(values) & (values > 0))
    return pa.Column(float, check, coerce=True, description=f"a positive number ({meaning})")


def _positive_whole(meaning: str, *, required: bool = False) -> pa.Column:
    # read as a float and cast after the check: casting first would cut 2.5 layers to 2
    check = pa.Check(lambda values: (values > 0) & (values < LARGEST_WHOLE) & (values % 1 == 0))
    return pa.Column(float, check, required=required, coerce=True, description=f"a positive whole number ({meaning})")


def _text(meaning: str, *, one_of: Sequence[str] = (), required: bool = False) -> pa.Column:
    checks = [pa.Check.isin(one_of)] if one_of else []
    kind = f"one of {', '.join(one_of)}" if one_of else "a text"
    return pa.Column(str, checks, required=required, coerce=True, description=f"{kind} ({meaning})")


def _flag(meaning: str, *, regex: bool = False) -> pa.Column:
    return pa.Column(float, pa.Check.isin([0, 1]), required=False, coerce=True, regex=regex, description=f"0 or 1 ({meaning})")


FIT_SET = r"^fit_"
WHOLE_NUMBERS = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "vocab", "tied")

SCHEMA = pa.DataFrameSchema(
    {
        "name": _text("the shape or run", required=True),
        "n_params": _positive("parameters, counted as n_count says"),
        "d_model": _positive_whole("width", required=True),
        "n_layers": _positive_whole("depth", required=True),
        "tokens": _positive("training tokens"),
        "loss": _positive("loss in nats per token"),
        "n_count": _text("how n_params is counted", one_of=CONVENTIONS),
        "n_heads": _positive_whole("attention heads"),
        "n_kv_heads": _positive_whole("key-value heads"),
        "d_ff": _positive_whole("width of the SwiGLU layer"),
        "vocab": _positive_whole("vocabulary size"),
        "tied": _flag("whether the embedding and the output head share a table"),
        "run": _text("the training run that the row is a checkpoint of"),
        "family": _text("the nominal size that the row belongs to"),
        FIT_SET: _flag("whether the row belongs to this fit set", regex=True),
    }
)


def load(
    source: str | Path,
    count: Convention | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    measured: bool = True,
    average_logs: bool = False,
) -> pd.DataFrame:
    """A validated run table: ``paper`` for the paper's 76 runs, or the path of a CSV file.

    ``count`` names the convention of a table without the column ``n_count`` and converts one that
    has it. ``columns`` maps a column named here to its name in the file. ``measured=False`` reads
    runs that are planned: ``loss`` may be missing. ``average_logs`` takes each loss from the log
    that the column ``log`` names, averaged as the paper averages (``loss_from_log``).

    The result always has the columns ``n_count`` and ``family`` (filled in by ``size_families``
    where the file has none). Raises ``InputError`` naming the file, the row (the header is
    row 1, empty lines are not counted) and the column.
    """
    if count is not None and count not in CONVENTIONS:
        raise InputError(f"{count!r} is not a counting convention; choose one of {', '.join(CONVENTIONS)}")
    where = str(source)
    table = read(source)
    for name, given in (columns or {}).items():
        if given not in table:
            raise InputError(f"{where}: column {given}, mapped to {name}, is missing; it has {', '.join(table.columns)}")
    mapped = columns or {}
    if len(set(mapped.values())) < len(mapped):
        raise InputError(f"{where}: a column is mapped to two names; map each to one")
    # a column that already has the name of a mapped one gives way to it, unless it is mapped to another name itself
    table = table.drop(columns=[name for name in mapped if name in table and name not in mapped.values()])
    table = table.rename(columns={given: name for name, given in mapped.items()})
    if average_logs:
        table["loss"] = _losses_from_logs(table, where)
    table = check(table, where, measured=measured)
    if "n_count" not in table:
        if count is None:
            raise InputError(
                f"{where}: no n_count says how n_params is counted; add the column, or --count, one of {', '.join(CONVENTIONS)}"
            )
        table["n_count"] = count
    repeated = table.duplicated(["name", "tokens"])
    if repeated.any():
        row = int(repeated.to_numpy().argmax())
        shape, tokens = table.loc[row, ["name", "tokens"]]
        raise InputError(f"{where}: row {row + 2} repeats name {shape!r} with {tokens:.0f} tokens; keep one, or rename one")
    converted = count is not None and (table["n_count"] != count).any()
    table = _recounted(table, count, where)
    if table["n_count"].nunique() > 1:
        raise InputError(f"{where}: column n_count mixes conventions; pass one (--count) to convert the rows to it")
    if "family" not in table:
        table["family"] = size_families(table["n_params"])
    table.attrs |= {"source": where, "converted": bool(converted)}
    return table


def variables(table: pd.DataFrame | Mapping[str, ArrayLike]) -> dict[str, Array]:
    """The variables that laws read of runs (``morphlib.laws``), each of shape (n,).

    ``M``, the parameters of the feed-forward layers over those of the attention, is there where the
    table has ``d_ff``.
    """
    n, d, width, depth = (np.asarray(table[name], dtype=float) for name in ("n_params", "tokens", "d_model", "n_layers"))
    values = {
        "N": n,
        "D": d,
        "R": width / depth,
        "d": width,
        "L": depth,
        "W": width / np.sqrt(n),
        "C/M": 6 * n**2,
        "CM": 6 * d**2,
    }
    if "d_ff" in table:
        heads = np.asarray(table.get("n_heads", 1.0), dtype=float)
        kv_share = np.asarray(table.get("n_kv_heads", heads), dtype=float) / heads
        values["M"] = 3 * np.asarray(table["d_ff"], dtype=float) / (2 * width * (1 + kv_share))
    return values


def fit_mask(table: pd.DataFrame, column: str | None) -> np.ndarray:
    """The rows that a 0/1 column marks, as a boolean array; all rows for ``None``."""
    if column is None:
        return np.ones(len(table), dtype=bool)
    if column not in table:
        known = ", ".join(name for name in table.columns if name.startswith("fit_")) or "none here"
        raise InputError(f"the table has no column {column!r} to fit on; columns that mark fit sets: {known}")
    if not table[column].isin([0, 1]).all():
        raise InputError(f"column {column!r} cannot mark the rows to fit on; it must hold only 0 and 1")
    return table[column].to_numpy() == 1


def size_families(n_params: pd.Series) -> pd.Series:
    """A label for each row: rows within a tenth of the next smaller count are of one size."""
    ordered = n_params.sort_values()
    group = (ordered > 1.1 * ordered.shift()).cumsum()
    smallest = ordered.groupby(group).transform("min")
    return smallest.map(lambda n: f"{n:.3g}").reindex(n_params.index)


def read(source: str | Path) -> pd.DataFrame:
    """A CSV table as it is, or the paper's (``paper``); no two columns share a name. Raises ``InputError`` where it is none."""
    path = str(resources.files("morphlib") / "data/paper_runs.csv") if source == "paper" else source
    try:
        with warnings.catch_warnings():
            # of a row with more fields than the header, whose columns pandas would shift or cut
            warnings.simplefilter("error", pd.errors.ParserWarning)
            table = pd.read_csv(path, index_col=False, skipinitialspace=True, compression=None)
            header = pd.read_csv(path, header=None, nrows=1, dtype=str, skipinitialspace=True, compression=None).iloc[0]
    except (OSError, pd.errors.ParserWarning, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(
            f"{source}: cannot be read as a CSV table ({error}); give 'paper', or a CSV file whose header names every column"
        ) from None
    if len(header) == 1 and any(mark in str(header[0]) for mark in ";\t"):
        raise InputError(f"{source}: the columns are not separated by commas; save the file with commas")
    names = header.astype(str).str.strip()
    if names.duplicated().any():
        raise InputError(f"{source}: column {names[names.duplicated()].iloc[0]} is there twice; rename or remove one")
    return table.rename(columns=str.strip)


def _losses_from_logs(table: pd.DataFrame, where: str) -> list[float]:
    need(table, ["log", "tokens"], where, "averaging logs needs it")
    tokens = pd.to_numeric(table["tokens"], errors="coerce").fillna(0.0)
    folder = Path(where).parent
    return [loss_from_log(folder / str(log), mark) for log, mark in zip(table["log"], tokens, strict=True)]


def loss_from_log(log: Path, tokens: float) -> float:
    """The paper's loss of a run at ``tokens``, from a CSV file with the columns ``tokens`` and ``loss`` per step.

    It is `run_averaged_loss` of the steps up to ``tokens``, rounded to four decimals as the authors do.
    """
    steps = read(log)
    need(steps, ["tokens", "loss"], log, "a log has tokens and loss, one row per step")
    values = steps[["tokens", "loss"]].apply(pd.to_numeric, errors="coerce")
    if not np.isfinite(values.to_numpy()).all():
        row = int((~np.isfinite(values.to_numpy()).all(axis=1)).argmax())
        raise InputError(f"{log}: row {row + 2} is not two numbers; mend or remove the row")
    until = values.loc[values["tokens"] <= tokens, "loss"]
    if until.empty:
        raise InputError(f"{log}: has no step up to {tokens:.4g} tokens; give the whole log of the run")
    return round(run_averaged_loss(until), 4)


def run_averaged_loss(losses: ArrayLike) -> float:
    """The paper's loss of a run whose steps had ``losses``, shape (steps,), in nats per token.

    Each new step weighs 0.9 in a moving average that starts at the first loss; the result is the plain mean of that
    average over the steps (``EMA_epoch_loss.py`` of the authors' code).
    """
    return float(pd.Series(losses).ewm(alpha=0.9, adjust=False).mean().mean())


def need(table: pd.DataFrame, names: Sequence[str], where: str | Path, why: str) -> None:
    """Raise ``InputError`` where columns are missing, saying ``why`` they must be there."""
    if missing := [name for name in names if name not in table]:
        raise InputError(f"{where}: column {', '.join(missing)} is missing; {why}")


def check(table: pd.DataFrame, where: str, *, measured: bool = True) -> pd.DataFrame:
    """The table with its columns checked and cast, its rows numbered; ``loss`` may be missing unless ``measured``.

    Raises ``InputError`` for the fault highest up in the table, ``where``, whose rows are counted as lines of a file.
    """
    table = table.reset_index(drop=True)
    schema = SCHEMA if measured or "loss" in table else SCHEMA.remove_columns(["loss"])
    required = [name for name, column in schema.columns.items() if column.required]
    shown = ", ".join(map(str, table.columns))
    need(table, required, where, f"a run table has {', '.join(required)}, this one has {shown}")
    if "n_kv_heads" in table:
        need(table, ["n_heads"], where, "n_kv_heads says nothing without it")
    if table.empty:
        raise InputError(f"{where}: there are no rows; give at least one")
    try:
        valid = schema.validate(table, lazy=True)
    except pa.errors.SchemaErrors as errors:
        faults = errors.failure_cases.dropna(subset="index").sort_values("index", kind="stable")
        # where a column could not be cast, its checks ran on text and say nothing
        not_cast = faults[faults["check"].str.startswith("dtype")]
        fault = (not_cast if len(not_cast) else faults).iloc[0]
    else:
        whole = [name for name in valid.columns if name in WHOLE_NUMBERS or name.startswith("fit_")]
        return valid.astype(dict.fromkeys(whole, "int64"))
    name = fault["column"]
    expected = (SCHEMA.columns.get(name) or SCHEMA.columns[FIT_SET]).description
    row = int(fault["index"])
    value = table[name].iloc[row]
    found = "the value is missing; it must be" if pd.isna(value) else f"{value} is not"
    raise InputError(f"{where}: row {row + 2}, column {name}: {found} {expected}; mend or remove the row")


def _recounted(table: pd.DataFrame, count: Convention | None, where: str) -> pd.DataFrame:
    """The table with ``n_params`` counted as ``count`` says, and checked if the table says enough about its shapes."""
    if count is not None and (table["n_count"] != count).any():
        need(table, ["d_ff", "vocab"], where, f"n_params cannot be converted to {count} without it")
    if not {"d_ff", "vocab"} <= set(table.columns):
        return table
    numbers = []
    for index, row in enumerate(table.to_dict("records")):
        sizes = {name: row[name] for name in SIZES if name in row}
        try:
            shape = Shape.of(**{"n_heads": 1} | sizes, tied=bool(row.get("tied", 0)))
        except ValueError as error:
            raise InputError(f"{where}: row {index + 2}: {error}") from None
        counted = shape.n_params(row["n_count"])
        if abs(row["n_params"] - counted) > COUNT_TOLERANCE * counted:
            raise InputError(
                f"{where}: row {index + 2}, column n_params: {row['n_params']:.0f} does not agree with the shape, which "
                f"has {counted} parameters ({row['n_count']}); mend n_params, n_count or the shape"
            )
        numbers.append(row["n_params"] + (shape.n_params(count or row["n_count"]) - counted))
    return table.assign(n_params=numbers, n_count=count or table["n_count"])
