"""The recorded tables, described: what a row is, how it was made, and every column with its type, unit and meaning.

The words are rows of ``data/tables.csv`` and ``data/columns.csv``; types, counts and ranges come from the files themselves.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

DATA = Path(__file__).parent / "data"

UNITS = {  # with the meaning of those that do not say it themselves
    "": "a text, or a number whose unit the row itself gives",
    "flag": "1 or true for yes, 0 or false for no",
    "number": "a number without unit",
    "count": "how many there are",
    "share": "a part of one",
    "tokens": "",
    "parameters": "",
    "tokens/parameter": "",
    "sequences": "",
    "bytes": "",
    "bytes/token": "",
    "nats/token": "natural logarithms: cross-entropy by token",
    "1e-4 nats/token": "ten-thousandths of it, as whole numbers",
    "s": "seconds",
    "min": "minutes",
    "tokens/s": "",
    "MHz": "",
}
LISTED = 60  # characters that the different values of a text column may have together to be listed


def files(folder: Path = DATA) -> dict[str, Path]:
    """The CSV and parquet files of a folder by name, without the ending."""
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in (".csv", ".parquet")}


def read(path: Path) -> pd.DataFrame:
    """A recorded table as it is, each column in the narrowest type that holds it."""
    return (pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)).convert_dtypes()


def columns(table: str, folder: Path = DATA) -> pd.DataFrame:
    """The descriptions that hold for a table, by column: its own, then those of every table (``*``)."""
    every = pd.read_csv(folder / "columns.csv", keep_default_na=False)
    own = every[every["table"].isin([table, "*"])].sort_values("table", key=lambda names: names == "*", kind="stable")
    return own.drop_duplicates("column").set_index("column")


def dictionary(folder: Path = DATA) -> str:
    """Markdown that describes every table of a folder, under a heading for each part and each table."""
    units = {unit or "none": meaning for unit, meaning in UNITS.items() if meaning}
    text = ["| unit | meaning |", "|---|---|", *(f"| {unit} | {meaning} |" for unit, meaning in units.items())]
    known = files(folder)
    for part, tables in pd.read_csv(folder / "tables.csv").groupby("part", sort=False):
        text += ["", f"## {part}"]
        for _, told in tables.iterrows():
            table = read(known[told["table"]])
            text += ["", f"### `{known[told['table']].name}`", "", f"A row is {told['row']}; there are {len(table):,}. "]
            text += [f"How made: {told['made']}. Licence: {told['licence']}.", ""]
            text += ["| column | type | unit | values | meaning |", "|---|---|---|---|---|"]
            about = columns(told["table"], folder).to_dict("index")
            for name, values in table.items():
                said = about[name]
                text.append(f"| `{name}` | {_type(values)} | {said['unit']} | {_values(values)} | {said['meaning']} |")
    return "\n".join(text)


def _type(values: pd.Series) -> str:
    kinds = {"b": "true or false", "i": "integer", "u": "integer", "f": "number"}
    return "empty" if values.isna().all() else kinds.get(values.dtype.kind, "text")


def _values(values: pd.Series) -> str:
    """From the least to the largest number, or the different texts where they are few and short; and how many are missing."""
    there = values.dropna()
    different = sorted(there.unique(), key=str)
    if pd.api.types.is_numeric_dtype(there) and not pd.api.types.is_bool_dtype(there) and different:
        ends = [f"{end:,}" if isinstance(end, int) else f"{end:.6g}" for end in (there.min().item(), there.max().item())]
        shown = " to ".join(dict.fromkeys(ends))
    elif sum(len(str(one)) for one in different) <= LISTED:
        shown = ", ".join(f"`{one}`" for one in different)
    else:
        shown = f"{len(different):,} different" if len(different) > 1 else "one text"
    missing = len(values) - len(there)
    return f"{shown}; {missing:,} missing" if missing and different else shown
