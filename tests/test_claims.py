"""The ledger: a verdict follows from its number, and a claim that rests on nothing is an error."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from morphlib import claims, pipeline
from morphlib.errors import InputError

STATED = claims.read(ROOT / "book/claims.csv")
BLANK = dict.fromkeys(STATED.columns, "") | {"claim": "c", "source": "s", "paper": "p", "section": "03_x#y", "shown": ".3f"}


def verdict(numbers, **row):
    return claims.judge(pd.DataFrame([BLANK | row]), numbers)["verdict"].iloc[0]


def number_names():
    """The numbers that the claims rest on, by notebook prefix."""
    columns = ("number", "value", "caveat_number", "caveat_value")
    return {text for column in columns for text in STATED[column] if ":" in text}


def test_there_are_claims_of_every_kind_and_each_says_where_it_comes_from():
    assert len(STATED) >= 25
    assert STATED["claim"].is_unique
    assert {"number", "needs"} <= set(STATED.columns)
    assert (STATED["number"] == "").any() and (STATED["number"] != "").sum() >= 25
    for section in STATED["section"]:
        assert (ROOT / "notebooks" / f"{section.partition('#')[0]}.ipynb").exists()


def test_a_number_of_the_paper_is_met_to_half_of_its_last_digit():
    """No tolerance is wider, but for the row that says so."""
    for row in STATED[STATED["relation"] == "equals"].to_dict("records"):
        if ":" in row["value"] or not row["tolerance"]:
            continue
        half = 0.5 * 10.0 ** -len(row["paper"].partition("%")[0].strip().partition(".")[2].partition(" ")[0])
        wide = "One unit of the last digit is allowed" in row["caveat"]
        assert float(row["tolerance"]) <= (2 if wide else 1) * half * (1 + 1e-9), row["claim"]


def test_no_claim_rests_on_a_live_number():
    """What is handed over live is in no ledger: the source of every number is a call without live=True."""
    for text in number_names():
        prefix, _, name = text.partition(":")
        source = pipeline.notebook_named(prefix).read_text(encoding="utf-8")
        live = "".join(part.split(")\\n")[0] for part in source.split("report.glue(live=True")[1:])
        assert f"{name}=" not in live, text


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(0, 1))
def test_a_verdict_follows_from_its_number(number, value, tolerance):
    row = {"number": "03:x", "value": repr(value), "tolerance": repr(tolerance)}
    for relation, holds in {
        "equals": abs(number - value) <= tolerance,
        "at least": number >= value - tolerance,
        "at most": number <= value + tolerance,
        "more than": number > value,
        "less than": number < value,
    }.items():
        found = verdict({"03_law": {"x": number}}, relation=relation, **row)
        assert found == ("reproduced" if holds else "not supported")


def test_a_caveat_counts_only_where_its_own_relation_holds():
    row = {"number": "03:x", "relation": "equals", "value": "1", "caveat": "but", "caveat_number": "04:y",
           "caveat_relation": "more than", "caveat_value": "03:x"}  # fmt: skip
    assert verdict({"03_a": {"x": 1}, "04_b": {"y": 2}}, **row) == "reproduced with a caveat"
    assert verdict({"03_a": {"x": 1}, "04_b": {"y": 0}}, **row) == "reproduced"
    assert verdict({"03_a": {"x": 3}, "04_b": {"y": 4}}, **row) == "not supported"
    assert verdict({"03_a": {"x": 1}}, **row | {"caveat_number": "", "caveat_relation": ""}) == "reproduced with a caveat"


def test_numbers_in_texts_are_read():
    row = {"number": "02:depth", "relation": "equals", "value": "0.85"}
    assert verdict({"02_a": {"depth": "0.85 ± 0.06"}}, **row) == "reproduced"
    assert verdict({"02_a": {"depth": "−0.85"}}, **row | {"value": "-0.85"}) == "reproduced"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [({"04_b": {"x": 1.0}}, "no notebook hands over"), ({"03_a": {"y": 1.0}}, "no notebook hands over"),
     ({"03_a": {"x": "none"}}, "which is no number"), ({"03_a": {"x": None}}, "which has no value")],
)  # fmt: skip
def test_a_missing_number_stops_the_build(numbers, message):
    with pytest.raises(InputError, match=message):
        verdict(numbers, number="03:x", relation="equals", value="1")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"relation": "is"}, "relation is 'is'"), ({"number": "", "relation": ""}, "neither a number nor what a check would need"),
     ({"tolerance": "half"}, "tolerance is 'half'"), ({"source": ""}, "lacks its claim, source"),
     ({"caveat_number": "03:y"}, "the caveat lacks its words"), ({"shown": "three"}, "shown is 'three'")],
)  # fmt: skip
def test_a_claim_that_cannot_be_checked_as_it_is_written_is_named(tmp_path, change, message):
    path = tmp_path / "claims.csv"
    pd.DataFrame([BLANK | {"number": "03:x", "relation": "equals", "value": "1"} | change]).to_csv(path, index=False)
    with pytest.raises(InputError, match=rf"row 2 \(c\): .*{message}"):
        claims.read(path)


def test_the_page_has_every_claim_with_its_verdict_and_escapes_text():
    numbers = {"03_a": {"x": 1.0}}
    rows = [
        BLANK | {"claim": "a < b", "number": "03:x", "relation": "equals", "value": "1"},
        BLANK | {"claim": "n", "needs": "GPU"},
    ]
    page = claims.page(claims.judge(pd.DataFrame(rows), numbers))
    assert "a &lt; b" in page and "GPU" in page and ">reproduced<" in page and ">cannot be checked here<" in page
    assert "href='../notebooks/03_x.html#y'" in page


def judged(numbers, **row):
    return claims.judge(pd.DataFrame([BLANK | row]), numbers).iloc[0]


def test_a_caveat_without_a_relation_is_named(tmp_path):
    path = tmp_path / "claims.csv"
    row = {
        "number": "03:x",
        "relation": "equals",
        "value": "1",
        "caveat": "but",
        "caveat_number": "03:y",
        "caveat_relation": "is",
    }
    pd.DataFrame([BLANK | row]).to_csv(path, index=False)
    with pytest.raises(InputError, match=r"row 2 \(c\): the caveat lacks its words or its relation"):
        claims.read(path)


def test_a_table_without_a_column_is_named(tmp_path):
    pd.DataFrame([BLANK]).drop(columns="needs").to_csv(tmp_path / "claims.csv", index=False)
    with pytest.raises(InputError, match="lacks the column 'needs'"):
        claims.read(tmp_path / "claims.csv")


def test_the_ledger_says_what_was_found_and_held_against():
    numbers = {"030_b": {"x": 9.0}, "03_a": {"x": 1.23456, "y": 2.0}}
    row = {"number": "03:x", "relation": "less than", "caveat": "but", "caveat_number": "03:y", "caveat_relation": "at least",
           "caveat_value": "2.1", "tolerance": "0.2"}  # fmt: skip
    held = judged(numbers, **row, value="03:y")
    assert (held["ours"], held["against"], held["verdict"], held["caveat"]) == ("1.235", "2.000", "reproduced", "")
    assert judged(numbers, **row, value="1.5")["against"] == "1.5"
    page = claims.page(claims.judge(pd.DataFrame([BLANK | row | {"value": "03:y"}]), numbers))
    assert "<td>1.235</td>" in page and "less than 2.000 ± 0.2" in page and "verdict-0" in page
    page = claims.page(claims.judge(pd.DataFrame([BLANK | row | {"value": "1", "paper": "<b>"}]), numbers))
    assert "verdict-2" in page and "&lt;b&gt;" in page


def test_numbers_with_exponents_are_read():
    for text, value in (("1.5e-3 nats", "0.0015"), ("2e+2", "200"), ("-3E", "-3")):
        assert verdict({"03_a": {"x": text}}, number="03:x", relation="equals", value=value) == "reproduced"
