"""The commands on the pages for one's own runs and shapes, copied and pasted in order, as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT


def commands(page: str) -> str:
    """All shell blocks of a page, one after the other."""
    return "\n".join(
        re.findall(r"^```bash\n(.*?)^```", (ROOT / "book" / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    )


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("bring_your_own_runs.md", ["determine every parameter", "rmse_difference", "gain_per_flop"]),
        ("which_shape.md", ["P(best)", "12x3072"]),
    ],
)
def test_the_commands_of_a_page_work_as_they_stand(tmp_path, page, said):
    (tmp_path / "morphlib").symlink_to(ROOT / "morphlib")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = f"set -e\n{commands(page)}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for text in said:
        assert text in done.stdout
