"""Latency: measured by a timing harness, and predicted from shapes and hardware by an analytic model."""

from pathlib import Path

DATA = Path(__file__).parents[1] / "data"  # the bundled tables, whose columns data/columns.csv explains
