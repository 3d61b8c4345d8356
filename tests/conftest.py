import csv
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import settings

from morphlib import files, runs

# The same examples on every run, so that a failure can be repeated; HYPOTHESIS_PROFILE=fuzz looks further.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def paper() -> pd.DataFrame:
    return runs.load("paper")


@pytest.fixture(scope="session")
def book() -> Path:
    """The book at the smoke preset, brought up to date; two processes of pytest do so in turn."""
    command = [sys.executable, "-m", "morphlib.pipeline", "snakemake", "--cores", "all", "--quiet", "--config", "preset=smoke"]
    with files.locked(ROOT / "_build/test-lock"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return ROOT / "_build/smoke/html"


def entries() -> list[dict]:
    """The chapters of the contents, each followed by the sections under it."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    chapters = [chapter for part in contents["parts"] for chapter in part["chapters"]]
    return [{"file": contents["root"]}, *(entry for chapter in chapters for entry in (chapter, *chapter.get("sections", [])))]


def chapters() -> list[str]:
    """The pages that the contents name, as paths without a suffix."""
    return [entry["file"] for entry in entries()]


def published_fits() -> list[dict[str, str]]:
    """The authors' fits, re-run with their public code's formulas, start and method by scipy 1.17.

    Parameters to 8 significant digits, the rest as printed. Settings of the paper's main text and
    ablations (github.com/Waterpine/open-lm-morph@1872be3, folders law and law_nonequal).
    """
    with (Path(__file__).parent / "data" / "published_fits.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
