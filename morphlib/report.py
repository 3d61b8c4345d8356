"""What notebooks hand to the book: figures with words, tables, numbers for the prose, the paper's own numbers."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping
from html import escape
from importlib import resources
from typing import Any

import myst_nb
import pandas as pd
from IPython.display import HTML
from matplotlib import pyplot
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

pyplot.style.use(str(resources.files("morphlib") / "book.mplstyle"))
COLOURS: tuple[str, ...] = tuple(pyplot.rcParams["axes.prop_cycle"].by_key()["color"])
MARKERS = ("o", "s", "^", "D", "v", "P")


def figure(drawing: Figure, alt: str, caption: str) -> HTML:
    """A figure for the page, in the page's own text colour, with ``alt`` saying in words what is seen."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(drawing)
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :].replace(pyplot.rcParams["text.color"], "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening = f'<svg role="img" aria-label="{escape(alt)}" style="max-width: 100%; height: auto"'
    return HTML(f"<figure>{svg.replace('<svg', opening, 1)}<figcaption>{escape(caption)}</figcaption></figure>")


def log_ticks(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 times the powers of ten on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def short_count(number: float) -> str:
    """A count of parameters or tokens in three digits: 78.9M, 1.44B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def table(data: pd.DataFrame, caption: str, formats: Mapping[str, str | Callable[[float], str]] | None = None) -> HTML:
    """A table for the page, without the index. A missing value shows as a dash; more than 8 rows can be sorted.

    ``formats`` gives a format (``"{:.2f}"`` or a function) by column; of columns with two levels, by the lower one.
    """
    lower = {column: column[-1] if isinstance(column, tuple) else column for column in data.columns}
    chosen: dict[Any, Any] = {column: formats[name] for column, name in lower.items() if formats and name in formats}
    texts = [column for column in data.columns if not pd.api.types.is_numeric_dtype(data[column])]
    left: Any = [{"selector": "th, td", "props": "text-align: left"}]
    style = (
        data.style.format(chosen, na_rep="–", escape="html")
        .hide(axis="index")
        .set_caption(escape(caption))
        .set_table_attributes(f'class="table{" sortable" if len(data) > 8 else ""}"')
        .set_table_styles(dict.fromkeys(texts, left))
        .set_uuid(hashlib.sha256(caption.encode()).hexdigest()[:8])
    )
    return HTML(f'<div class="wide-table">{style.to_html()}</div>')


def glue(**numbers: float | int | str) -> None:
    """Hand numbers to the prose, which shows them with ``{glue:text}`name:.4f```."""
    for name, value in numbers.items():
        myst_nb.glue(name, value if isinstance(value, str | int) else float(value), display=False)


def paper_reported(law: str, exponents: str, fit_on: str | None) -> dict[str, float]:
    """What the paper or its code reports for one fit to its own runs, by quantity; empty where nothing is."""
    reported = pd.read_csv(str(resources.files("morphlib") / "data/paper_reported.csv"))
    rows = reported[(reported["law"] == law) & (reported["exponents"] == exponents) & (reported["fit_on"] == fit_on)]
    return dict(zip(rows["quantity"], rows["value"], strict=True))
