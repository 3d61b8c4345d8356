"""What notebooks hand to the book: figures with words, tables, numbers for the prose, the paper's own numbers, provenance."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from html import escape
from importlib import metadata, resources
from typing import Any

import myst_nb
import numpy as np
import pandas as pd
import yaml
from IPython.display import HTML
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from morphlib import files, results

pyplot.style.use(str(resources.files("morphlib") / "book.mplstyle"))
COLOURS: tuple[str, ...] = tuple(pyplot.rcParams["axes.prop_cycle"].by_key()["color"])
MARKERS = ("o", "s", "^", "D", "v", "P")

_LIVE_MARK = '<strong class="live">Live.</strong> '
_SHOWN_VERSIONS = ("numpy", "scipy", "pandas", "statsmodels", "torch", "transformers", "lm_eval", "matplotlib")

# what this notebook has handed over so far; a kernel runs one notebook
_NUMBERS: dict[str, float | int | str] = {}
_LIVE: dict[str, float | int | str] = {}
_FIGURES: dict[str, str] = {}


def figure(drawing: Figure, alt: str, caption: str, *, live: bool = False, name: str | None = None) -> HTML:
    """A figure for the page, in the page's own text colour, with ``alt`` saying in words what is seen.

    Its numbers can be downloaded from the page. ``live`` marks one that shows what was measured while the page was made; with
    a ``name`` it can be shown on other pages too.
    """
    numbers = numbers_of(drawing).to_csv(index=False, float_format="%.6g")
    if not live:
        _FIGURES[caption] = hashlib.sha256(numbers.encode()).hexdigest()
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(drawing)
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :].replace(pyplot.rcParams["text.color"], "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening = f'<svg role="img" aria-label="{escape(alt)}" style="max-width: 100%; height: auto"'
    coded = base64.b64encode(numbers.encode()).decode()
    words = f"{_LIVE_MARK if live else ''}{escape(caption)}"
    if numbers.count("\n") > 1:
        file = f"{name or re.sub(r'[^a-z0-9]+', '-', caption.lower())[:40].strip('-')}.csv"
        words += f' <a download="{file}" href="data:text/csv;base64,{coded}">Its numbers as CSV.</a>'
    page = f"<figure>{svg.replace('<svg', opening, 1)}<figcaption>{words}</figcaption></figure>"
    return HTML(page, metadata={"figure": name} if name else None)


def numbers_of(drawing: Figure) -> pd.DataFrame:
    """What a figure shows, in the units of its axes: a row for each point, interval or box.

    Columns: panel (from 1, in the order of drawing), x_axis, y_axis, series, mark, x, y, and for intervals and boxes their
    other end, x_end and y_end; colour is the value that a point's colour stands for. A column that would be empty is
    left out, and so are lines across a whole panel.
    """
    rows = []
    for panel, axis in enumerate(drawing.axes, 1):
        if axis.axison:
            where = (panel, *(f"{label}".replace("\n", " ") for label in (axis.get_xlabel(), axis.get_ylabel())))
            rows += [where + row for row in _marks(axis)]
    columns = ["panel", "x_axis", "y_axis", "series", "mark", "x", "y", "x_end", "y_end", "colour"]
    return pd.DataFrame(rows, columns=columns).dropna(axis="columns", how="all")


def _marks(axis: Axes) -> Iterator[tuple[Any, ...]]:
    """Series, mark, x, y, x_end, y_end and colour of what is drawn in the units of the axes."""
    named = {part: group.get_label() for group in axis.containers for part in group.get_children()}
    own = axis.transData
    for artist in axis.get_children():
        label = str(named.get(artist, artist.get_label()))
        series = "" if label.startswith("_") else label
        match artist:
            case Line2D() if artist.get_transform() == own:
                mark = "point" if artist.get_linestyle() == "None" else "line"
                for x, y in np.column_stack([np.asarray(artist.get_xdata()), np.asarray(artist.get_ydata())]):
                    yield series, mark, x, y, None, None, None
            case PathCollection():
                points = np.asarray(artist.get_offsets())
                values = artist.get_array()
                for (x, y), colour in zip(points, [None] * len(points) if values is None else np.asarray(values), strict=True):
                    yield series, "point", x, y, None, None, colour
            case LineCollection() if artist.get_transform() == own:
                for segment in filter(len, artist.get_segments()):  # that of a missing value is empty
                    yield series, "interval", *segment[0], *segment[-1], None
            case PolyCollection():
                for path in artist.get_paths():
                    for x, y in np.asarray(path.vertices):
                        yield series, "edge of a band", x, y, None, None, None
            case Rectangle() if artist is not axis.patch and artist.get_transform() == artist.get_patch_transform() + own:
                (x, y), (x_end, y_end) = artist.get_bbox().min, artist.get_bbox().max
                yield series, "box", x, y, x_end, y_end, None


def log_ticks(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 times the powers of ten on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def short_count(number: float) -> str:
    """A count of parameters or tokens in three digits: 78.9M, 1.44B."""
    number = float(f"{number:.3g}")  # 999,999 is 1M
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def table(data: pd.DataFrame, caption: str, formats: Mapping[str, str | Callable[[float], str]] | None = None) -> HTML:
    """A table for the page, without the index; more than 8 rows can be sorted. A missing value shows as a dash, a bool as yes
    or no.

    ``formats`` gives a format (``"{:.2f}"`` or a function) by column; of columns with two levels, by the lower one.
    """
    lower = {column: column[-1] if isinstance(column, tuple) else column for column in data.columns}
    chosen: dict[Any, Any] = dict.fromkeys(data.select_dtypes("bool"), lambda yes: "yes" if yes else "no")
    chosen |= {column: formats[name] for column, name in lower.items() if formats and name in formats}
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


def glue(*, live: bool = False, **numbers: float | int | str) -> None:
    """Hand numbers to the prose, which shows them with ``{glue:text}`name:.4f```.

    ``live`` keeps apart what was measured while the page was made: no verdict rests on it, and it may differ the next time.
    """
    for name, value in numbers.items():
        plain = value if isinstance(value, str) else int(value) if isinstance(value, int | np.integer) else float(value)
        (_LIVE if live else _NUMBERS)[name] = plain
        myst_nb.glue(name, plain, display=False)


def paper_reported(law: str | None = None, exponents: str | None = None, fit_on: str | None = None) -> dict[str, float]:
    """What the paper or its code reports for one fit to its own runs, by quantity; empty where nothing is.

    Without a law: what the paper says beside its fits. Ratios are plain numbers, times in the unit of their name.
    """
    reported = pd.read_csv(str(resources.files("morphlib") / "data/paper_reported.csv"), keep_default_na=False)
    asked = {"law": law, "exponents": exponents, "fit_on": fit_on}
    rows = reported[(reported[list(asked)] == [value or "" for value in asked.values()]).all(axis=1)]
    return dict(zip(rows["quantity"], rows["value"], strict=True))


def provenance(notebook: str, namespace: Mapping[str, Any]) -> HTML:
    """Where a page comes from, as its last cell shows it: ``report.provenance("03_fitting_the_law", globals())``.

    Preset, parameters, commit, hardware, versions, time and memory; the command that makes the page again; and where its
    numbers differ from the published ones. The output carries the numbers too, for `results.read`.
    """
    import psutil

    from morphlib.latency.models import cpu_name

    preset, command = (os.environ.get(f"MORPH_{name}") for name in ("PRESET", "COMMAND"))  # as the pipeline sets them
    # the parameters cell is the only one that annotates names
    parameters = {name: namespace[name] for name in namespace.get("__annotations__", {})}
    commit, dirty, _ = files.commit().partition("-dirty")
    versions = {name: metadata.version(name.replace("_", "-")) for name in _SHOWN_VERSIONS if name in sys.modules}
    seconds = time.time() - psutil.Process().create_time()
    told = {
        "preset": preset or "none, plain papermill",
        "commit": f"{commit}, {'with uncommitted changes' if dirty else 'nothing uncommitted'}",
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in {"Python": sys.version.split()[0], **versions}.items()),
        "time and memory": f"{seconds:.0f} s, and {_peak_mib():,.0f} MiB in the largest process",
        "parameters": ", ".join(f"{name} = {value!r}" for name, value in parameters.items()),
    }
    rows = "".join(f"<tr><th scope='row'>{key}</th><td>{escape(value)}</td></tr>" for key, value in told.items())
    # as YAML, for papermill takes JSON's 1e-05 for a text
    style: Any = {"default_flow_style": True, "sort_keys": False, "width": math.inf, "allow_unicode": True}
    given = yaml.safe_dump(json.loads(files.to_json(parameters)), **style).rstrip()
    plain = f"papermill notebooks/{notebook}.ipynb out.ipynb -y {shlex.quote(given)}"
    page = (
        f'<details class="provenance" open><summary>How this page was made</summary><table class="table">{rows}</table>'
        f"<p>To make it again:</p><pre>{escape(chr(10).join(filter(None, (command, plain))))}</pre>"
        f"{_against_published(notebook)}</details>"
    )
    found = {"notebook": notebook, "preset": preset, "parameters": parameters,
             "numbers": _NUMBERS, "figures": _FIGURES, "live": _LIVE}  # fmt: skip
    return HTML(page, metadata={results.KEY: json.loads(files.to_json(found))})


def _peak_mib() -> float:
    """The peak resident memory of the largest process, this one or a child of it."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB


def _against_published(notebook: str) -> str:
    published = results.published().get(notebook)
    if published is None:
        return "<p>No numbers of this page are published to compare with.</p>"
    changed = results.differences(published["numbers"], _NUMBERS)
    if changed.empty:
        return (
            f"<p>The {len(_NUMBERS)} numbers that this page computes for its text, live ones aside, are the published ones.</p>"
        )
    worst = changed["relative"].abs().max()
    by = "" if np.isnan(worst) else f", by up to {100 * worst:.3g} %"
    listed = table(changed, "Numbers of this page that are not the published ones", {"relative": "{:+.2%}"}).data
    return (
        f"<p><strong>{len(changed)} of the {len(_NUMBERS)} numbers that this page computes for its text differ from the "
        f"published ones{by}.</strong> Live numbers are not compared.</p>{listed}"
    )
