"""No number in the prose is typed: it is glued from what computed it, or from a table that names its source.

The finder takes out what is no prose, then what stands in the list of names below, and reports every digit that is left.
"""

import ast
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from morphlib import selection
from morphlib.latency import timing

PAGES = sorted([*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "book").glob("*.md")])

# Digits that are no results, by a pattern each. A match is a whole word, never a part of a longer number.
ALLOWED = {
    r"[A-Z][A-Za-z]+[\d.]*(?:-[A-Z][A-Za-z]*)?-\d+(?:\.\d+)?[MB](?:-v\d|@[\d.]+[BT])?": "a model, by a name with its size",
    r"SmolLM2": "a model, by its name",
    r"[AHLV]\d{2,3}S?(?:-\d+GB)?s?": "a GPU, by its name",
    r"\d+x\d+(?:/\d+(?:h|kv|ff|v))*": "a shape, by its name: layers x width",
    r"\d+[MB]_v\d+|v\d+": "a model of the paper, by its name in the authors' files",
    r"(?:80|86|116|126|164|178|237|313|339)M|[137]B": "a size of the paper's models, by the name of the group",
    r"50M": "a size of this book's own small shapes, by the name of the group",
    r"(?:20|40|160)N": "a budget of tokens, by its name",
    r"trial [124](?=[,) ])": "a draw of six runs, by its name in the authors' code",
    r"(?:bf|fp)(?:16|32)|(?:4|8|16|32)[- ]bits?": "a format of numbers, by its name",
    r"10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+": "a power of ten, the unit of the number before it",
    r"95 %(?=\s(?:bootstrap\s)?intervals?)": "the level of an interval",
    r"(?:5th|95th)(?= and| percentile)": "the ends of a bar",
    r"0/1": "the two values of a column that marks rows",
    r"E2E": "a word for a latency, end to end",
    r"CR3|HC3|SHA-256": "a method, by its name",
    r"arXiv \d{4}\.\d{5}": "a paper, by its number",
    r"(?:CC BY(?:-SA)?|AFL) [34]\.0|Apache-2\.0|BSD-[23]-Clause|GPL-3\.0-or-later": "a licence, by its name",
    r"[Ww]eeks? \d(?:(?:,|\sand)\s\d)*": "a week of the course, by its number",
    r"Python 3\.\d+|Jupyter Book [12](?:\.x)?|Sphinx below 8|\d+\.\d+\.\d+": "a program, by its version",
}

# Tables of book/ that another test holds to a file, or that are a plan of their own, by their head.
HELD = {
    "| task | items | chance | metric | unlike llm-foundry |": "tests/test_scores.py, to eval_tasks.csv",
    "| task | data | licence |": "tests/test_scores.py, to eval_tasks.csv",
    "| model | mean of the eleven | as printed |": "tests/test_scores.py, to eval_baselines.csv",
    "| name | package | MB | documents | SHA-256 of the wheel |": "tests/test_corpus.py, to text_sources.csv",
    "| week | topic | pages to read | notebook | exercises | to measure at home |": "the plan of the course",
    "| points | for |": "the plan of the course",
    "| week | reading | exercises | commands at home, mostly waiting |": "the plan of the course",
}

# Directives of which the title and the content are prose.
PROSE_DIRECTIVES = ("admonition", "note", "tip", "warning", "important", "hint", "seealso", "dropdown", "exercise", "solution")

# What is no prose. A group that a pattern has is kept: the words of a link.
NO_PROSE = {
    r"\{\{.*?\}\}|\{%.*?%\}": "what Jinja puts in",
    r"<!--.*?-->": "a comment",
    r"\$\$.*?\$\$(?: \([\w-]+\))?": "a formula",
    r"\{(?:doc|ref|numref|download)\}`([^`<]+)<[^`]*>`": "a link",
    r"\{[\w:-]+\}`[^`]*`": "what is glued, cited or referred to",
    r"(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)": "code",
    r"(?<!\\)\$(?=\S).*?(?<=[^\s\\])\$": "a formula",
    r"\[([^\]\n]*)\]\([^)\s]*\)": "a link",
    r"</?[A-Za-z][^>]*>|<?https?://[^\s>)]+>?": "HTML, or an address",
    r"^\([\w-]+\)=$": "the name of a place",
    r"^ *\d+\.(?= )": "the number of an item",
    r"\b[Ee]xercise \d+\.\d+\b": "the number of an exercise",
    r"\((?:[\w-]+, )?\d+ minutes\)": "the time set for an exercise",
}


TASK = "¶"  # before each line of an exercise
SCALES = {" million": 1e6, " billion": 1e9, " ms": 1e-3, " %": 1e-2}


def without_fences(text: str) -> str:
    """The text less code and directives; of a directive that holds prose, the title and the content stay.

    A line of an exercise or of its solution is marked.
    """
    kept: list[str] = []
    fences: list[tuple[str, bool]] = []
    exercise = solution = False
    for line in text.splitlines():
        fence = re.match(r"\s*(`{3,}|~{3,}|:{3,})(?:\{([\w:-]+)\})?(.*)", line)
        in_prose = all(is_prose for _, is_prose in fences)
        solution = solution or line.startswith("## Exercise ")
        if fences and re.fullmatch(rf"\s*{fences[-1][0]}\s*", line):
            fences.pop()
            exercise = exercise and bool(fences)
        elif fence and in_prose:
            fences.append((fence[1], (fence[2] or "").startswith(PROSE_DIRECTIVES)))
            exercise = exercise or fence[3].startswith(" Exercise ")
            kept.append(f"{TASK if exercise else ''}{fence[3]}" if fences[-1][1] else "")
        elif in_prose and not (fences and re.match(r"\s*:[\w-]+:", line)):
            kept.append(f"{TASK}{line}" if exercise or solution else line)
    return "\n".join(kept)


def without_tables(text: str) -> str:
    """The text less the tables held elsewhere, and the column of defaults, which tests/test_book.py holds to the code."""
    kept, head = [], ""
    for line in text.splitlines():
        head = "" if not line.startswith("|") else head or line
        if head.startswith("| parameter | type | default |"):
            line = re.sub(r"^(\| `\w+` \|[^|]*\|)[^|]*\|", r"\1 |", line)  # noqa: PLW2901
        if head not in HELD:
            kept.append(line)
    return "\n".join(kept)


def prose(text: str) -> str:
    """The words of a page."""
    text = without_tables(without_fences(text))
    for pattern in NO_PROSE:
        found = re.compile(pattern, flags=re.DOTALL | re.MULTILINE)
        keeps = found.groups > len(found.groupindex)
        text = found.sub(lambda match, keeps=keeps: match[1] if keeps else "·", text)
    return text


@cache
def names(patterns: tuple[str, ...] = tuple(ALLOWED)) -> re.Pattern[str]:
    return re.compile("|".join(rf"(?<![\w.,/-])(?:{pattern})(?!\w|[.,/]\d)" for pattern in patterns))


def typed_numbers(text: str, allowed: tuple[str, ...] = tuple(ALLOWED), givens: Collection[float] = ()) -> list[str]:
    """Every number that nothing allows, with the words around it. In an exercise, a number of ``givens`` may stand."""
    words = names(allowed).sub(lambda match: re.sub(r"\d", "·", match[0]), prose(text))
    found = []
    for match in re.finditer(r"(\d+(?:[.,]\d+)*)( million| billion| ms| %)?", words):
        value = float(match[1].replace(",", ""))
        in_exercise = words.rfind(TASK, words.rfind("\n", 0, match.start()) + 1, match.start()) >= 0
        if not (in_exercise and {value, value * SCALES.get(match[2], 1.0)} & set(givens)):
            found.append(" ".join(words[max(0, match.start() - 40) : match.end() + 30].split()))
    return found


@cache
def given_in(path: Path) -> frozenset[float]:
    """The numbers in the code of the solutions to a chapter: what its exercises may give."""
    solutions = path.with_name(f"{path.stem[:2]}_solutions.ipynb")
    if not solutions.exists():
        return frozenset()
    code = [cell.source for cell in nbformat.read(solutions, as_version=4).cells if cell.cell_type == "code"]
    constants = [node.value for text in code for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    return frozenset(float(value) for value in constants if isinstance(value, int | float))


@cache
def source(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_number_is_typed(path):
    assert typed_numbers(source(path), givens=given_in(path)) == []


@pytest.mark.parametrize("pattern", ALLOWED)
def test_nothing_is_allowed_that_no_page_needs(pattern):
    others = tuple(other for other in ALLOWED if other != pattern)
    assert any(typed_numbers(source(path), others) for path in PAGES)


@pytest.mark.parametrize("head", HELD)
def test_a_table_that_is_held_elsewhere_is_there(head):
    assert any(head in source(path) for path in PAGES)


TYPED = [
    "The error is 0.69 %.",
    "It is 1.8 times faster.",
    "The law is fitted to 27 rows.",
    "At 1B the error is 2.7 %, in trial 1 it is 0.01.",
    "It errs by 1e-5.",
    "In 95 % of the draws it wins.",
    "The share is 0/1.5 or 12x3072.5 or 20N.5.",
    "Both took 40 GB.",
    "A model of 1.5B and one of 25M parameters",
    "## The 457 configurations",
    "| loss | 2.95 |",
    "- from 3 runs",
    "1. First of 3",
    "A rate of 3 × 10⁻³",
    ":::{admonition} Exercise 3.1: Four (warm-up, 5 minutes)\nIn 5 minutes\n:::",
    "**4** of them, `code` 5 `code`, $R$ 6 $N$",
    "[7 pages](page.md)",
    "{doc}`the 8 runs <page>`",
    ":::{admonition} 9 things\n:class: tip\nnone\n:::",
    "```{note}\nnot less than 10\n```",
    "````{exercise} One\n```python\nx = 1\n```\nfind 11\n````",
    "{glue:text}`a:.2f` of 12",
    "| parameter | type | default | meaning |\n|---|---|---|---|\n| `n` | number | 1 | at most 13 |\n\nmore",
    "| task | data | licence |\n|---|---|---|\n| a | 1 | MIT |\n\n14",
]

UNTYPED = [
    "The error is {glue:text}`error:.2f` %, {{ numbers['03'].error }} or {cite}`bian2025`.",
    "Morph-1B-v1, OPT-IML-1.3B, GPT-NeoX-20B, Qwen2.5-14B and OpenLM-1B@1.25T on an A100-40GB, an H100 or two A100s",
    "12x3072, 24x384/8192v and 1B_v3 at 20N, of the 313M and 1B families; bf16, 32-bit",
    "{glue:text}`flops:.1f` × 10²⁰, a 95 %\nbootstrap interval, a 0/1 column, the 5th and the 95th percentile",
    "CC BY-SA 4.0, Apache-2.0 and arXiv 2501.18107, with a SHA-256",
    "$x = 1.5$ and $$ y = 2 $$ (eq-2)",
    "`--seed 3`, ``a `4` b``",
    "[words](page5.html), <https://host/6>, <img src='7.png' width=8>",
    "```python\nx = 9\n```",
    "```{code-block} text\n:lines: 10\n11\n```",
    ":::{admonition} Title\n:width: 12\nwords\n:::",
    "(place-13)=\n1. an item",
    ":::{admonition} Exercise 3.1: Four (warm-up, 5 minutes)\nAs in exercise 2.4\n:::",
    "| parameter | type | default | meaning |\n|---|---|---|---|\n| `n` | number | 14 | the most |",
    "| task | data | licence |\n|---|---|---|\n| a | 15 | MIT |",
    "<!-- 16 -->",
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_line_of_a_paragraph_is_taken_for_something_else(path):
    """MyST leaves out a line that begins with a percent sign, and makes a list of one that begins with plus and a space."""
    lines = without_fences(re.sub(r"\$\$.*?\$\$", "", source(path), flags=re.DOTALL)).splitlines()
    assert [line for line in lines if re.match(r"%|\+ ", line.removeprefix(TASK))] == []


@pytest.mark.parametrize("text", TYPED)
def test_a_typed_number_is_found(text):
    assert typed_numbers(text)


@pytest.mark.parametrize("text", UNTYPED)
def test_what_is_not_typed_is_not_found(text):
    assert typed_numbers(text) == []


def test_a_given_of_an_exercise_may_stand_there_and_nowhere_else():
    exercise = ":::{admonition} Exercise 3.1: Two loops (30 minutes)\nYou have 1.2 billion parameters and 7 %.\n:::\n"
    assert len(typed_numbers(exercise)) == 2
    assert typed_numbers(exercise, givens={1.2e9, 0.07}) == []
    assert len(typed_numbers(f"{exercise}\nThere are 1.2 billion.\n", givens={1.2e9, 0.07})) == 1


@cache
def sentences(path: Path) -> list[int]:
    """Where in a page an ordinary line has a word: before it, a number could be put."""
    text, places, in_code, start = source(path), [], False, 0
    for line in text.splitlines(keepends=True):
        in_code ^= line.lstrip().startswith("```")
        if not in_code and re.fullmatch(r"(?:- )?[A-Za-z ,.;:'()-]{30,}\n?", line):
            places += [start + match.start() + 1 for match in re.finditer(r" [a-z]", line)]
        start += len(line)
    return places


DECIMALS = st.from_regex(r"[0-9]{1,4}\.[0-9]{1,4}", fullmatch=True)


@given(st.sampled_from([path for path in PAGES if sentences(path)]), DECIMALS, st.data())
def test_a_decimal_number_in_any_sentence_of_any_page_is_found(path, number, data):
    place = data.draw(st.sampled_from(sentences(path)))
    text = source(path)
    found = typed_numbers(f"{text[:place]}{number} {text[place:]}", givens=given_in(path) - {float(number)})
    assert len(found) == 1 and number in found[0]


@pytest.mark.parametrize(
    ("page", "values"),
    [
        ("bring_your_own_hardware", [timing.Stopping(), timing.QUICK, timing.DISTURBED, timing.DISTURBED_ELSEWHERE]),
        ("which_shape", [selection.CONTAIN]),
    ],
)
def test_defaults_on_a_page_are_those_of_the_code(page, values):
    words = " ".join(source(ROOT / f"book/{page}.md").split())
    for value in values:
        assert f"`{value!r}`" in words
