"""The numbers of executed notebooks: where they are found, which are published, and what changed between two executions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from morphlib.errors import InputError

KEY = "results"
"""Where `morphlib.report.provenance` leaves them in the metadata of its output."""
RELATIVE = 1e-6
"""Two numbers that differ by less than this share are the same: other processors round sums in another order."""

Numbers = Mapping[str, float | int | str | None]


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The results by notebook: of one executed notebook, of a folder of them, or of recorded numbers.

    The last are a JSON file, of all notebooks or of the one whose page it lies beside. Raises ``InputError`` where there is
    none.
    """
    if path.suffix == ".json":
        found = _recorded(path)
    else:
        found = {notebook.stem: _of_notebook(notebook) for notebook in (executed(path) if path.is_dir() else [path])}
    if not found:
        raise InputError(f"{path}: holds no executed notebooks; name a folder of them, or execute them with make book")
    return found


def _recorded(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found = {found["notebook"]: found} if "notebook" in found else found
        kinds = ("numbers", "figures")
        return {name: {**result, **{kind: dict(result[kind]) for kind in kinds}} for name, result in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: cannot be read ({why}); give published numbers or executed notebooks") from None


def executed(folder: Path) -> list[Path]:
    """The notebooks of a folder that were executed to their end."""
    return sorted(path for path in folder.glob("*.ipynb") if not path.name.endswith(".partial.ipynb"))


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook, executed or not. Raises ``InputError`` for a file that is none."""
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, TypeError, AttributeError, nbformat.ValidationError) as error:  # nbformat's for [] or null
        why = type(error).__name__
        raise InputError(f"{path}: cannot be read as a notebook ({why}); give an .ipynb file, or execute it again") from None


def _outputs(path: Path, key: str) -> list[tuple[Any, str]]:
    """What the HTML outputs of an executed notebook carry under a key of their metadata, and the HTML."""
    outputs = [output for cell in read_notebook(path).cells for output in cell.get("outputs", ())]
    carried = [(output.get("metadata", {}).get("text/html", {}).get(key), output) for output in outputs]
    return [(value, output["data"]["text/html"]) for value, output in carried if value is not None]


def _of_notebook(path: Path) -> dict[str, Any]:
    found = _outputs(path, KEY)
    if len(found) != 1:
        raise InputError(f"{path}: holds {len(found)} results; execute it, and let its last cell be report.provenance(...)")
    return json.loads(json.dumps(found[0][0]))  # plain dictionaries in place of nbformat's


def figures(path: Path) -> dict[str, str]:
    """The named figures of an executed notebook, as HTML."""
    return dict(_outputs(path, "figure"))


def published() -> dict[str, dict[str, Any]]:
    """The results behind the published book, as ``morphlib.pipeline record`` wrote them; empty where there are none yet."""
    file = resources.files("morphlib") / "data/published.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def differences(before: Numbers, after: Numbers) -> pd.DataFrame:
    """What differs by more than ``RELATIVE`` between two sets of numbers: number, before, after, relative change.

    A number that only one of them has, one that was zero, and a text that differs have no relative change.
    """
    rows = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        relative = (new - old) / abs(old) if isinstance(old, int | float) and isinstance(new, int | float) and old else math.nan
        if old != new and not abs(relative) <= RELATIVE:
            shown = ["–" if one is None else f"{one:.6g}" if isinstance(one, float) else str(one) for one in (old, new)]
            rows.append((name, *shown, relative))
    return pd.DataFrame(rows, columns=["number", "before", "after", "relative"])
