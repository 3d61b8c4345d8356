"""The ledger: claims of the paper, what the notebooks find in their place, and the verdict that follows.

A row of ``book/claims.csv`` names a number that a notebook hands to its prose, and the relation to a value in which the claim
holds. So a verdict is computed, and changes with its number. Live measurements are not among the numbers it can name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from morphlib.errors import InputError

VERDICTS = ("reproduced", "reproduced with a caveat", "not supported", "cannot be checked here")
REPRODUCED, WITH_A_CAVEAT, NOT_SUPPORTED, UNCHECKED = VERDICTS
RELATIONS = {
    "equals": lambda number, value, tolerance: abs(number - value) <= tolerance,
    "at least": lambda number, value, tolerance: number >= value - tolerance,
    "at most": lambda number, value, tolerance: number <= value + tolerance,
    "more than": lambda number, value, _: number > value,
    "less than": lambda number, value, _: number < value,
}
_COLUMNS = ("claim", "source", "paper", "number", "relation", "value", "tolerance", "shown",
            "caveat", "caveat_number", "caveat_relation", "caveat_value", "needs", "section")  # fmt: skip

Numbers = Mapping[str, Mapping[str, Any]]


def read(path: Path) -> pd.DataFrame:
    """The stated claims, every cell a text. Raises ``InputError`` that names the row of a claim that says nothing checkable."""
    try:
        stated = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give the table of claims") from None
    if missing := [column for column in _COLUMNS if column not in stated]:
        raise InputError(f"{path}: lacks the column {missing[0]!r}; its columns are {', '.join(_COLUMNS)}")
    for index, row in stated.iterrows():
        where = f"{path}: row {int(str(index)) + 2} ({row['claim']})"
        if not (row["claim"] and row["source"] and row["paper"] and row["section"]):
            raise InputError(f"{where}: lacks its claim, source, paper or section; fill them in")
        if row["number"] and row["relation"] not in RELATIONS:
            raise InputError(f"{where}: relation is {row['relation']!r}; write one of {', '.join(RELATIONS)}")
        if row["tolerance"] and not re.fullmatch(r"\d+(\.\d+)?", row["tolerance"]):
            raise InputError(f"{where}: tolerance is {row['tolerance']!r}; write a number, or nothing")
        try:
            format(0.0, row["shown"])
        except ValueError:
            raise InputError(f"{where}: shown is {row['shown']!r}; write a number's format, such as .3f, or nothing") from None
        if not row["number"] and not row["needs"]:
            raise InputError(f"{where}: names neither a number nor what a check would need; write one of them")
        if row["caveat_number"] and (row["caveat_relation"] not in RELATIONS or not row["caveat"]):
            raise InputError(f"{where}: the caveat lacks its words or its relation; write both")
    return stated


def comparable(stated: pd.DataFrame, *executions: Numbers) -> pd.DataFrame:
    """The claims whose numbers each of these has."""
    texts = stated[["number", "value", "caveat_number", "caveat_value"]]
    known = texts.map(lambda text: ":" not in text or all(_named(text, numbers) for numbers in executions))
    return stated[known.all(axis=1)]


def judge(stated: pd.DataFrame, numbers: Numbers) -> pd.DataFrame:
    """The claims with ``ours``, the number found, ``against``, what it is held against, and ``verdict``.

    A claim whose relation holds is reproduced; with a caveat where it has one and the caveat's own relation, if any, holds too.
    One without a number cannot be checked here. ``numbers`` are by notebook and name; raises ``InputError`` where one is
    missing.
    """
    rows = []
    for row in stated.to_dict("records"):
        if not row["number"]:
            rows.append(row | {"ours": "", "against": "", "verdict": UNCHECKED})
            continue
        holds = _holds(row["number"], row["relation"], row["value"], row["tolerance"], numbers, row["claim"])
        held = row["caveat"] and (
            not row["caveat_number"]
            or _holds(row["caveat_number"], row["caveat_relation"], row["caveat_value"], "", numbers, row["claim"])
        )
        verdict = NOT_SUPPORTED if not holds else WITH_A_CAVEAT if held else REPRODUCED
        ours, against = (format(_number(row[key], numbers, row["claim"]), row["shown"]) for key in ("number", "value"))
        found = {"ours": ours, "against": against if ":" in row["value"] else row["value"], "verdict": verdict}
        rows.append(row | found | {"caveat": row["caveat"] if held else ""})
    return pd.DataFrame(rows, columns=[*stated.columns, "ours", "against", "verdict"])


def _holds(number: str, relation: str, value: str, tolerance: str, numbers: Numbers, claim: str) -> bool:
    found, against = _number(number, numbers, claim), _number(value, numbers, claim)
    return bool(RELATIONS[relation](found, against, float(tolerance or 0)))


def _named(text: str, numbers: Numbers) -> list[Any]:
    """What ``NOTEBOOK:NAME`` stands for, the notebook named in full or by its number; empty where no notebook has it."""
    notebook, _, name = text.partition(":")
    of = [values for stem, values in numbers.items() if stem == notebook or stem.startswith(f"{notebook}_")]
    return [values[name] for values in of if name in values]


def _number(text: str, numbers: Numbers, claim: str) -> float:
    """A number as written, or that which ``NOTEBOOK:NAME`` stands for; of a text such as ``0.85 ± 0.06`` the first number."""
    if ":" in text:
        found = _named(text, numbers)
        if not found:
            raise InputError(f"the claim {claim!r} rests on {text}, which no notebook hands over; mend book/claims.csv")
        if found[0] is None:
            raise InputError(f"the claim {claim!r} rests on {text}, which has no value; see what its notebook made it from")
        text = str(found[0])
    leading = re.match(r"[-+−]?\d+(\.\d+)?(e[-+]?\d+)?(?!,?\d)", text)  # 1,234 is neither 1 nor 1234
    if not leading:
        raise InputError(f"the claim {claim!r} rests on {text!r}, which is no number; mend book/claims.csv")
    return float(leading[0].replace("−", "-"))


def page(ledger: pd.DataFrame) -> str:
    """The ledger as a table for the page, its rows linked to the section that shows each."""
    rows = []
    for place, row in enumerate(ledger.to_dict("records"), 1):
        why = {UNCHECKED: row["needs"], REPRODUCED: ""}.get(row["verdict"], row["caveat"])
        file, _, anchor = row["section"].partition("#")
        tolerance = f" ± {row['tolerance']}" if row["tolerance"] else ""
        mark = f"<strong class='verdict verdict-{VERDICTS.index(row['verdict'])}'>{row['verdict']}</strong>"
        link = f"<a href='../notebooks/{file}.html#{anchor}'>{file.partition('_')[0]}</a>"
        holds = f"{row['relation']} {row['against']}{tolerance}" if row["number"] else "–"
        claim = f"{escape(row['claim'])}<br><small>{escape(row['source'])}</small>"
        verdict = f"{mark}<br>{escape(why)}" if why else mark
        rows.append((f"{place}", claim, escape(row["paper"]), row["ours"] or "–", verdict, holds, link))
    return _table("The ledger of claims", ("#", "claim", "the paper", "here", "verdict", "holds if", "shown in"), rows)


def _table(label: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th scope='col'>{name}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="wide-table words full-width" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="table sortable"><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def displays(path: Path) -> str:
    """The figures and tables of the paper, each with the page that has it here or the reason why none has."""
    rows = []
    for row in pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records"):
        places = [place.partition("#") for place in row["section"].split()]
        links = [f"<a href='../{file}.html#{anchor}'>{Path(file).name.partition('_')[0]}</a>" for file, _, anchor in places]
        texts = (escape(row[name]) for name in ("display", "shows", "here"))
        rows.append((*texts, ", ".join(links) or "–", escape(row["how"])))
    return _table("The displays of the paper", ("display", "what it shows", "here", "page", "how, or why not"), rows)
