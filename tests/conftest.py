import csv
import os
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import settings

from morphlib import runs

# The same examples on every run, so that a failure can be repeated; HYPOTHESIS_PROFILE=fuzz looks further.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def paper() -> pd.DataFrame:
    return runs.load("paper")


def published_fits() -> list[dict[str, str]]:
    """The authors' fits, re-run with their public code's formulas, start and method by scipy 1.17.

    Parameters to 8 significant digits, the rest as printed. Settings of the paper's main text and
    ablations (github.com/Waterpine/open-lm-morph@1872be3, folders law and law_nonequal).
    """
    with (Path(__file__).parent / "data" / "published_fits.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))
