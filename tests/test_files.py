import json
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from morphlib import __version__

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INSTALLED = {
    "from a repository": ({"url": "https://example.org/book", "vcs_info": {"vcs": "git", "commit_id": COMMIT}}, COMMIT[:12]),
    "from a folder": ({"url": "file:///book", "dir_info": {"editable": True}}, f"morphlib {__version__}"),
    "from an index": (None, f"morphlib {__version__}"),
}


@pytest.mark.parametrize("case", INSTALLED)
def test_an_installed_package_knows_its_commit_and_not_that_of_a_checkout_around_it(case, tmp_path):
    """As pip leaves it (PEP 610), in an environment that lies, ignored, in a checkout of something else."""
    origin, expected = INSTALLED[case]
    site = tmp_path / ".venv/site-packages"
    shutil.copytree(ROOT / "morphlib", site / "morphlib", ignore=shutil.ignore_patterns("data", "__pycache__"))
    info = site / f"morphlib-{__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: morphlib\nVersion: {__version__}\n")
    if origin:
        (info / "direct_url.json").write_text(json.dumps(origin))
    (tmp_path / ".gitignore").write_text(".venv\n")
    identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.org"]
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "-m", "something else"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    command = [sys.executable, "-c", "from morphlib import files; print(files.commit())"]
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
