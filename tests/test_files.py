import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from morphlib import __version__, files
from morphlib.errors import InputError

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


def test_of_two_writers_at_once_none_disturbs_the_other(tmp_path):
    path = tmp_path / "table.csv"
    with files.replacing(path) as slow:
        slow.write_text("half of ")
        with files.replacing(path) as quick:
            quick.write_text("a short text")
        assert path.read_text() == "a short text"
        with slow.open("a") as file:
            file.write("a long text")
    assert path.read_text() == "half of a long text"
    assert list(tmp_path.iterdir()) == [path]


def killed(line, cwd):
    """A Python that is killed in the middle of ``line``."""
    kill = f"import os; kill = lambda *_: os.kill(os.getpid(), {int(signal.SIGKILL)})"
    lines = f"{kill}\nfrom pathlib import Path\nfrom morphlib import files\n{line}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", lines], cwd=cwd, env=environment, check=False).returncode == -signal.SIGKILL


def test_what_a_killed_writer_left_goes_with_the_next_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "table[1].csv"  # as a pattern it would not mean itself
    with files.replacing(path) as alive:
        alive.write_text("alive")
        killed(f"with files.replacing(Path({path.name!r})) as partial: partial.mkdir(), kill()", tmp_path)
        assert len(list(tmp_path.glob(".*.partial"))) == 2
        with files.replacing(path) as partial:
            partial.write_text("new")
        assert alive.read_text() == "alive" and len(list(tmp_path.glob(".*.partial"))) == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_text() == "alive"


@pytest.fixture
def old(tmp_path):
    """A folder that is to be replaced."""
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/old.html").touch()
    return tmp_path / "pages"


def test_a_folder_whose_replacement_was_killed_is_put_back_and_a_failed_retry_keeps_it(tmp_path, old):
    replacing = "with files.replacing(Path('pages')) as partial:\n    partial.mkdir()\n    "
    move = "replace = Path.replace\nPath.replace = lambda path, to: (replace(path, to), kill())\n"  # killed after the first
    killed(f"{move}{replacing}(partial / 'new.html').touch()", tmp_path)
    assert not old.exists()
    with pytest.raises(InputError, match="No space left"), files.replacing(old):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [path.relative_to(old).name for path in old.iterdir()] == ["old.html"]
    with files.replacing(old) as partial:
        partial.mkdir()
    assert list(tmp_path.iterdir()) == [old] and not list(old.iterdir())


def test_a_folder_stays_where_nothing_can_take_its_place(tmp_path, old):
    with pytest.raises(FileNotFoundError):
        files.replace_folder(tmp_path / "nowhere", old)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old.html", "pages"]


@pytest.mark.parametrize("name", [".", "..", "/", "pages"])
def test_a_file_does_not_take_the_place_of_a_folder(tmp_path, old, monkeypatch, name):
    monkeypatch.chdir(old.parent)
    with pytest.raises(InputError, match=f"^{re.escape(name)}: cannot be") as refused, files.replacing(Path(name)) as partial:
        partial.touch()
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old.html", "pages"]


def test_a_folder_does_not_take_the_place_of_a_file(tmp_path):
    path = tmp_path / "notes"
    path.write_text("mine")
    with pytest.raises(InputError, match="notes: cannot be written"), files.replacing(path) as partial:
        partial.mkdir()
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "mine"
