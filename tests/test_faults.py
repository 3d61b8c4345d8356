"""What a fault does to a build, on a book of two pages. The campaign on the real one is benchmarks/faults.py."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from conftest import ROOT
from morphlib import claims, pipeline
from morphlib.errors import InputError

pytestmark = pytest.mark.executes
BUILD = [sys.executable, "-m", "morphlib.pipeline", "snakemake", "--cores", "1", "--quiet", "--config", "preset=smoke", "--"]
SOURCES = {
    "pyproject.toml": "[project]\n",
    "_config.yml": "only_build_toc_files: true\nexecute: {execute_notebooks: 'off'}\n",
    "_toc.yml": "{format: jb-book, root: book/introduction, chapters: [{file: notebooks/01_tiny}]}\n",
    "book/introduction.md": "# Tiny\n",
    "notebooks/presets.yml": "smoke:\n  01_tiny: {factor: 3}\n",
    "book/claims.csv": f"{','.join(claims._COLUMNS)}\n",
    "book/displays.csv": "display,shows,here,section,how\n",
    "morphlib/claims.py": "",
    "morphlib/data/table.csv": "x\n14\n",
    ".gitignore": "/_build/\n/.snakemake/\n",
}
# what report.provenance leaves, without its imports
RESULTS = """import IPython

found = {"notebook": "01_tiny", "preset": "smoke", "parameters": {}, "numbers": {"factor": factor}, "figures": {}, "live": {}}
IPython.display.display(IPython.display.HTML(""), metadata={"text/html": {"results": found}})"""
# where it is asked to wait, a cell says which process it runs in
WAIT = """import os
import pathlib
import time

if (asked := pathlib.Path("_build/wait")).exists():
    asked.write_text(str(os.getpid()))
    time.sleep(60)"""
EXECUTED = Path("_build/smoke/tree/notebooks/01_tiny.ipynb")
PAGE = Path("notebooks/01_tiny.html")


def start(folder, *before, target="publish"):
    return subprocess.Popen(
        [*before, *BUILD, target], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def build(folder, *before, target="publish"):
    process = start(folder, *before, target=target)
    _, errors = process.communicate()
    return process.returncode, errors


def shown(folder, page=Path("_build/html") / PAGE):
    return re.findall(r"the value is (\d+)", (folder / page).read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tiny checkout with its book built."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copy(ROOT / "Snakefile", folder)
    for name, text in SOURCES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    read = "print('the value is', factor * int(pathlib.Path('morphlib/data/table.csv').read_text().split()[1]))"
    book.cells = [
        nbformat.v4.new_markdown_cell("# Chapter"),
        nbformat.v4.new_code_cell("factor: int = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(f"{WAIT}\n{read}"),
        nbformat.v4.new_code_cell(RESULTS),
    ]
    nbformat.write(book, folder / "notebooks/01_tiny.ipynb")
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "tiny"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    code, errors = build(folder)
    assert code == 0, errors[-3000:]
    assert shown(folder) == ["42"]
    return folder


@pytest.fixture
def copy(built, tmp_path, monkeypatch):
    """A copy of it, to damage; the times of its files are kept."""
    shutil.copytree(built, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "a number changed": (lambda: change(EXECUTED, "value is 42", "value is 43"), {str(EXECUTED)}),
    "cut at half": (lambda: half(EXECUTED), {str(EXECUTED)}),
    "a notebook that plain papermill wrote": (lambda: change(EXECUTED, '"sha256"', '"other"'), {str(EXECUTED)}),
    "no JSON object": (lambda: EXECUTED.write_text("[]"), {str(EXECUTED)}),
    "the notebook gone": (EXECUTED.unlink, set()),
    "a built page edited": (lambda: change(Path("_build/smoke/html") / PAGE, "value is 42", "value is 43"), set()),
    "a result file corrupted": (lambda: change(Path("_build/smoke/html/results/01_tiny.json"), "3", "4"), set()),
    "a page of no chapter": (lambda: Path("_build/smoke/html/old.html").touch(), set()),
    "Snakemake's records cut off": (
        lambda: [half(path) for path in Path(".snakemake/metadata").iterdir()], {str(EXECUTED)}),
    "Snakemake's records gone": (lambda: shutil.rmtree(".snakemake"), {str(EXECUTED)}),
}  # fmt: skip


def test_what_is_whole_stays(copy, capsys):
    before = sorted(copy.rglob("*"))
    pipeline.discard_damaged(Path("_build"))
    assert sorted(copy.rglob("*")) == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_named_and_goes_and_the_pages_with_it(copy, capsys, damage):
    """The book that is published stays, until there is a new one."""
    inflict, executed_again = DAMAGE[damage]
    inflict()
    pipeline.discard_damaged(Path("_build"))
    named = capsys.readouterr().err
    assert set(re.findall(r"^(\S+): .*executed again$", named, flags=re.MULTILINE)) == executed_again
    assert named.count("\n") == 1
    assert not Path("_build/smoke/html").exists()
    assert EXECUTED.exists() == (damage in ("a built page edited", "a result file corrupted", "a page of no chapter"))
    assert shown(copy) == ["42"]


def test_no_book_of_a_damaged_notebook_is_built_nor_published(copy):
    change(EXECUTED, "value is 42", "value is 43")
    with pytest.raises(InputError, match=r"01_tiny\.ipynb: is not what its execution wrote"):
        pipeline.build_book(Path("_build/smoke/tree"), Path("_build/smoke/html"))
    with pytest.raises(InputError, match="not as it was built from the notebooks"):
        pipeline.publish(Path("_build/smoke/html"), Path("_build/html"))
    assert shown(copy) == ["42"]


def test_a_published_page_that_was_edited_is_published_again(copy):
    change(Path("_build/html") / PAGE, "value is 42", "value is 43")
    pipeline.publish(Path("_build/smoke/html"), Path("_build/html"))
    assert shown(copy) == ["42"]
    assert not [path for path in Path("_build").iterdir() if "partial" in path.name or "old" in path.name]


def test_other_pages_of_the_same_notebooks_are_published(copy):
    tree, pages = Path("_build/smoke/tree"), Path("_build/smoke/html")
    (pages / "new.html").touch()
    (pages / pipeline.MADE_OF).write_text(json.dumps(pipeline._made_of(pages, tree)))
    pipeline.publish(pages, Path("_build/html"))
    assert Path("_build/html/new.html").exists()


def test_a_changed_number_is_found_and_the_source_rules_whatever_its_time(copy):
    """The table's new number comes with an old time, as from a backup; an executed notebook holds a wrong one."""
    change(EXECUTED, "value is 42", "value is 43")
    change(copy / "morphlib/data/table.csv", "14", "15")
    os.utime("morphlib/data/table.csv", (0, 0))
    code, errors = build(copy)
    assert code == 0
    assert "is not what its execution wrote; it is executed again" in errors
    assert shown(copy) == ["45"]


def test_a_failed_run_leaves_the_old_book_and_nothing_that_the_next_takes_for_new(copy):
    """The kernel is killed in the middle of a cell; the cause is gone in the next run, and no file is newer."""
    change(copy / "notebooks/presets.yml", "factor: 3", "factor: 4")
    (copy / "_build/wait").touch()
    process = start(copy)
    kernel().kill()
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "01_tiny.ipynb: its kernel died" in errors.splitlines()[-1]
    assert shown(copy) == ["42"]
    (copy / "_build/wait").unlink()
    assert build(copy, target=EXECUTED)[0] == 0
    assert shown(copy, EXECUTED) == ["56"]


def kernel():
    """The kernel that executes the notebook, once it is in the cell that waits."""
    end = time.monotonic() + 60
    while not (waiting := Path("_build/wait").read_text()):
        assert time.monotonic() < end, "no kernel came up"
        time.sleep(0.1)
    return psutil.Process(int(waiting))


def test_a_build_that_is_killed_is_taken_up_again(copy):
    EXECUTED.unlink()
    (copy / "_build/wait").touch()
    process = start(copy)
    orphan = kernel()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert shown(copy) == ["42"]
    orphan.wait(timeout=30)  # it looks for its parent every second
    (copy / "_build/wait").unlink()
    change(copy / "morphlib/data/table.csv", "14", "15")
    assert build(copy, target=EXECUTED)[0] == 0
    assert shown(copy, EXECUTED) == ["45"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("morphlib/data/table.csv", None, r"morphlib/data/table\.csv: deleted; bring it back"),
     ("book/introduction.md", None, r"book/introduction\.md: deleted; bring it back"),
     ("notebooks/presets.yml", "smoke: {a: [", r"notebooks/presets\.yml: cannot be read as YAML")],
)  # fmt: skip
def test_a_source_that_is_gone_or_broken_is_refused_before_anything_runs(copy, capsys, name, text, message):
    Path(name).write_text(text) if text else Path(name).unlink()
    assert pipeline.main([*BUILD[3:], "publish"]) == 2
    refusal = capsys.readouterr().err
    assert refusal.count("\n") == 1
    assert re.search(message, refusal)


def mounting(line):
    """A command's beginning that runs it in mounts of its own, after ``line``; skips where that is not allowed."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("it takes root and mounts of one's own")
    return "unshare", "-m", "sh", "-c", f'{line} && exec "$@"', "sh"


def test_a_read_only_build_folder_is_refused_in_one_line(copy):
    code, errors = build(copy, *mounting("mount --bind _build _build && mount -o remount,ro,bind _build"))
    assert code == 2
    assert re.fullmatch(r"python -m morphlib\.pipeline snakemake: _build/lock: cannot be written \(Read-only.*\n", errors)


def test_a_full_disk_is_named_and_the_book_stays(copy):
    EXECUTED.unlink()
    code, errors = build(copy, *mounting("mount -t tmpfs -o size=4k tmpfs _build/smoke/tree"))
    assert code == 2
    assert "No space left on device" in errors.splitlines()[-1]
    assert shown(copy) == ["42"]


def test_a_book_is_not_begun_without_room_for_it(copy, monkeypatch):
    monkeypatch.setattr(pipeline, "BUILD_BYTES", 2.0 * shutil.disk_usage(copy).total)
    with pytest.raises(InputError, match="are left on its disk; make room"):
        pipeline.build_book(Path("_build/smoke/tree"), Path("_build/smoke/html"))
    assert shown(copy) == ["42"]
