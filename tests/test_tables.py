"""The descriptions of the recorded tables agree with the tables."""

import shutil

import pandas as pd
import pytest

from morphlib import tables

DESCRIBED = pd.read_csv(tables.DATA / "columns.csv", keep_default_na=False)
COLUMNS = {name: list(tables.read(path).columns) for name, path in tables.files().items()}


def test_every_table_is_described_and_each_once():
    told = pd.read_csv(tables.DATA / "tables.csv")
    assert sorted(told["table"]) == sorted(COLUMNS)
    assert told.notna().all(axis=None)


@pytest.mark.parametrize("table", COLUMNS)
def test_every_column_is_described(table):
    """Of columns.csv itself too."""
    assert [name for name in COLUMNS[table] if name not in tables.columns(table).index] == []


def test_no_description_is_of_a_column_that_does_not_exist():
    assert not DESCRIBED.duplicated(["table", "column"]).any()
    taken = set()
    for table, names in COLUMNS.items():
        about = tables.columns(table)
        taken |= {(about.loc[name, "table"], name) for name in names}
    left = [pair for pair in zip(DESCRIBED["table"], DESCRIBED["column"], strict=True) if pair not in taken]
    assert left == []


def test_units_are_from_the_list_and_fit_their_columns():
    assert set(DESCRIBED["unit"]) == set(tables.UNITS)
    assert DESCRIBED["meaning"].str.len().min() > 0
    for name, path in tables.files().items():
        table, about = tables.read(path), tables.columns(name)
        for column in table:
            unit, values = about.loc[column, "unit"], table[column].dropna()
            if unit == "flag":
                assert values.isin([0, 1]).all(), (name, column)
            elif unit == "share":
                assert values.between(0, 1).all(), (name, column)
            elif column.endswith("_s") and pd.api.types.is_numeric_dtype(values) and column != "tokens_per_s":
                assert unit == "s", (name, column)


def test_the_dictionary_has_each_column_once_and_what_the_file_holds(tmp_path):
    """Its rows and ranges follow a table that has changed."""
    text = tables.dictionary()
    assert sum(map(len, COLUMNS.values())) == sum(line.startswith("| `") for line in text.splitlines())
    assert all(line.count("|") == 6 for line in text.splitlines() if line.startswith("| `"))
    shutil.copytree(tables.DATA, tmp_path / "data", ignore=shutil.ignore_patterns("checkpoints", "tasks"))
    path = tmp_path / "data/paper_runs.csv"
    runs = pd.read_csv(path)
    runs.loc[0, "loss"] = 9.875
    runs.head(5).to_csv(path, index=False)
    changed = tables.dictionary(tmp_path / "data")
    assert "to 9.875 |" in changed
    assert "to 9.875 |" not in text
    assert "one of the paper's public runs; there are 5." in changed
