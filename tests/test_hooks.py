"""The hooks that run before a commit: what they leave of a notebook, and what they run."""

import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from conftest import ROOT
from test_project import EXTRAS

HOOKS = {
    hook["id"]: hook
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repo["hooks"]
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(hook: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    program, *options = shlex.split(HOOKS[hook]["entry"])
    command = [Path(sys.executable).with_name(program), *options, *paths]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_hooks_run_what_the_project_installs():
    assert set(HOOKS) == {"nbstripout", "ruff", "ruff-format"}
    for hook in HOOKS.values():
        assert hook["language"] == "system"
        assert hook["entry"].split()[0] in EXTRAS["dev"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_executed_notebook_becomes_its_source_again(tmp_path, path):
    """Byte by byte: ids, tags and other metadata stay; outputs, counts and what papermill adds go."""
    executed = nbformat.read(path, as_version=4)
    for cell in executed.cells:
        cell.metadata["papermill"] = {"duration": 1.0}
        if cell.cell_type == "code":
            cell.execution_count = 1
            cell.outputs = [nbformat.v4.new_output("stream", text="said")]
    executed.cells.insert(2, nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["injected-parameters"]}))
    executed.metadata["papermill"] = {"version": "2"}
    copy, source = tmp_path / path.name, tmp_path / "source.ipynb"
    nbformat.write(executed, copy)
    source.write_bytes(path.read_bytes())
    assert run("nbstripout", copy, source).returncode == 0
    assert copy.read_bytes() == source.read_bytes() == path.read_bytes()


def test_a_notebook_with_a_fault_is_refused(tmp_path):
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    nbformat.write(notebook, tmp_path / "sound.ipynb")
    notebook.cells.append(nbformat.v4.new_code_cell("import os"))
    nbformat.write(notebook, tmp_path / "faulty.ipynb")
    assert "F401" in run("ruff", tmp_path / "faulty.ipynb").stdout
    assert "F401" not in run("ruff", tmp_path / "sound.ipynb").stdout
