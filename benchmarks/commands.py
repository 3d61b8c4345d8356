"""Whole commands, timed from outside: what a reader and a re-runner wait for.

python benchmarks/commands.py           imports and morph fit
python benchmarks/commands.py --book    also make book: bare, unchanged, one notebook changed (minutes, in a clone of HEAD)
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def seconds(command: list[str], runs: int = 1, cwd: Path = ROOT) -> tuple[float, float, float]:
    """Least, median and greatest wall time of the command; it must succeed. One more run first if there are several."""
    times = []
    for run in range(runs + (runs > 1)):
        start = time.perf_counter()
        subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if run or runs == 1:
            times.append(time.perf_counter() - start)
    return min(times), statistics.median(times), max(times)


def show(what: str, goal_s: float, times: tuple[float, float, float]) -> None:
    print(f"{what:<44}{goal_s:>8.1f}{times[0]:>9.2f}{times[1]:>9.2f}{times[2]:>9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--book", action="store_true", help="also make book and make test, in a clone of HEAD")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}")
    print(f"{'command':<44}{'goal s':>8}{'least':>9}{'median':>9}{'most':>9}")
    python, morph = sys.executable, str(Path(sys.executable).with_name("morph"))
    show("python -c pass", 0, seconds([python, "-c", "pass"], 7))
    show("python -c 'import morphlib'", 0.5, seconds([python, "-c", "import morphlib"], 7))
    show("morph fit paper --json", 2.0, seconds([morph, "fit", "paper", "--json"], 7))
    free = [morph, "fit", "paper", "--exponents", "free", "--fit-on", "fit_main", "--json"]
    show("morph fit paper --exponents free --json", 2.0, seconds(free, 7))
    if not arguments.book:
        return
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        show("make book, bare", 720, seconds(["make", "book"], cwd=clone))
        show("make book, nothing changed", 10, seconds(["make", "book"], 3, cwd=clone))
        notebook = clone / "notebooks/03_fitting_the_law.ipynb"
        notebook.write_text(notebook.read_text().replace("# Fitting the law", "# Fitting the laws", 1))
        show("make book, one notebook changed", 60, seconds(["make", "book"], cwd=clone))
        show("make test, installed", 300, seconds(["make", "test"], cwd=clone))


if __name__ == "__main__":
    main()
