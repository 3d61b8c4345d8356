import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml
from IPython.core.interactiveshell import InteractiveShell
from packaging.requirements import Requirement

from conftest import ROOT
from morphlib import files, pipeline
from morphlib.errors import InputError


def notebook(
    path, *cells, parameters="x: int = 1\nrate: float = 1e9\nnames: list[str] = []\nrows: str | None = None\non: bool = True"
):
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    if parameters is not None:
        book.cells.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    book.cells += [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(book, path)
    return path


@pytest.fixture(autouse=True)
def no_kernel_for_wrong_input(request, monkeypatch):
    """Unless a test executes, starting a kernel is a failure: wrong input must be found before."""
    if "executes" not in request.keywords:
        import papermill

        def started(*_, **__):
            raise AssertionError("a kernel was started")

        monkeypatch.setattr(papermill, "execute_notebook", started)


GOOD = {"x": 2, "rate": 3, "names": ["a"], "rows": None, "on": False}
BAD = {
    "unknown": ({"y": 1}, "has no parameter 'y'"),
    "text for a number": ({"x": "two"}, "parameter x is 'two', of type str; its type is int"),
    "YAML's text for 1e9": ({"rate": yaml.safe_load("1e9")}, r"write 1\.0e\+9"),
    "number for a text": ({"rows": 1}, "its type is str | None"),
    "float for an int": ({"x": 1.5}, "its type is int"),
    "bool for an int": ({"x": True}, "its type is int"),
    "bool for a float": ({"rate": True}, "its type is float"),
    "int for a bool": ({"on": 1}, "its type is bool"),
    "number in a list of texts": ({"names": ["a", 1]}, r"its type is list\[str\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_parameter_is_an_error_before_a_kernel_starts(tmp_path, case):
    given, message = BAD[case]
    path = notebook(tmp_path / "n.ipynb", "x")
    with pytest.raises(InputError, match=message):
        pipeline.execute(path, tmp_path / "out.ipynb", given)
    assert list(tmp_path.iterdir()) == [path]


def test_right_parameters_pass(tmp_path):
    pipeline.check_parameters(notebook(tmp_path / "n.ipynb"), GOOD)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [(None, "0 cells tagged 'parameters'"), ("x = 1", "write each line as name: type = default"),
     ("x: int", "name: type = default"), ("x: set[int] = {1}", "cannot check the annotation")],
)  # fmt: skip
def test_a_parameters_cell_that_cannot_be_checked_is_an_error(tmp_path, parameters, message):
    with pytest.raises(InputError, match=message):
        pipeline.execute(notebook(tmp_path / "n.ipynb", parameters=parameters), tmp_path / "out.ipynb", {"x": 1})


@pytest.mark.executes
def test_an_execution_uses_its_parameters_and_leaves_only_the_whole_notebook(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "print(x * 21, rate, names, rows, on)")
    pipeline.execute(path, tmp_path / "out" / "n.ipynb", GOOD)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["n.ipynb"]
    executed = nbformat.read(tmp_path / "out" / "n.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "42 3 ['a'] None False\n"


@pytest.mark.executes
def test_a_failed_execution_keeps_its_partial_notebook_aside_and_the_good_one(tmp_path):
    out = tmp_path / "out.ipynb"
    pipeline.execute(notebook(tmp_path / "n.ipynb", "1 + 1"), out, {})
    good = out.read_bytes()
    with pytest.raises(InputError, match=r"ZeroDivisionError: division by zero; what ran is in .*out\.partial\.ipynb"):
        pipeline.execute(notebook(tmp_path / "n.ipynb", "print('ran')", "1 / 0", "2"), out, {})
    assert out.read_bytes() == good
    partial = nbformat.read(tmp_path / "out.partial.ipynb", as_version=4)
    assert any(cell.get("outputs") and cell.outputs[0].get("text") == "ran\n" for cell in partial.cells)
    with pytest.raises(InputError, match=r"AssertionError: assert value == 2  # as printed; what ran is in"):
        pipeline.execute(notebook(tmp_path / "n.ipynb", "value = 1\nassert value == 2  # as printed"), out, {})


def test_presets_name_notebooks_and_parameters_that_exist():
    presets = pipeline.read_presets(ROOT / "notebooks/presets.yml")
    assert set(presets) == {"smoke", "laptop", "paper"}
    for notebooks in presets.values():
        for name, parameters in notebooks.items():
            pipeline.check_parameters(ROOT / "notebooks" / f"{name}.ipynb", parameters)


@pytest.mark.parametrize("text", [b"smoke: {a: [}", b"- smoke", b"just text", b"smoke: {a: {x: 1}, a: {x: 2}}", b"a: \xff"])
def test_presets_that_are_none_say_so(tmp_path, text):
    path = tmp_path / "presets.yml"
    path.write_bytes(text)
    with pytest.raises(InputError, match=r"presets\.yml") as refused:
        pipeline.read_presets(path)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["execute", "notebooks/03_fitting_the_law.ipynb", "out.ipynb", "--preset", "none"],
        ["execute", "notebooks/03_fitting_the_law.ipynb", "out.ipynb", "-p", "exponent", "free"],
        ["execute", "notebooks/99_nowhere.ipynb", "out.ipynb"],
        ["execute", "README.md", "out.ipynb"],
        ["zip", "notebooks", "out.zip"],
    ],
)
def test_wrong_use_of_the_command_is_exit_code_2_and_one_line(monkeypatch, capsys, arguments):
    monkeypatch.chdir(ROOT)
    assert pipeline.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff\xfe"])
def test_a_file_that_is_no_notebook_is_named_in_one_line(tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(ROOT)
    (tmp_path / "week3.ipynb").write_bytes(content)
    assert pipeline.main(["execute", str(tmp_path / "week3.ipynb"), str(tmp_path / "out.ipynb")]) == 2
    assert re.fullmatch(r".*week3\.ipynb: cannot be read as a notebook .*\n", capsys.readouterr().err)


def test_the_repository_address_comes_from_one_place(monkeypatch, tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text("[project]\n")
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert pipeline.repository_url(project) is None
    assert pipeline.book_configuration({"html": {"use_issues_button": False}}, None) == {"html": {"use_issues_button": False}}
    project.write_text('[project]\n[project.urls]\nRepository = "https://example.org/book"\n')
    assert pipeline.repository_url(project) == "https://example.org/book"
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/book")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    url = pipeline.repository_url(project)
    assert url == "https://github.com/someone/book"
    configuration = pipeline.book_configuration({"html": {"use_issues_button": False}}, url)
    assert configuration["repository"]["url"] == url
    assert configuration["html"]["use_issues_button"] is True
    assert "colab_url" in configuration["launch_buttons"]


def test_on_colab_a_notebook_installs_the_package_at_the_commit_of_its_page(monkeypatch, tmp_path):
    """The cell runs elsewhere too, and installs nothing there; what follows it is the source."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/book")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    monkeypatch.setattr(files, "commit", lambda: "0123456789ab")
    assert pipeline.main(["colab", str(tmp_path / "colab")]) == 0
    sources = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert [path.name for path in sorted((tmp_path / "colab/notebooks").iterdir())] == [path.name for path in sources]
    shell, called = InteractiveShell(), []
    monkeypatch.setattr(shell, "run_line_magic", lambda *call, **_: called.append(call))
    shell.user_ns["get_ipython"] = lambda: shell
    for source in sources:
        first, *others = nbformat.read(tmp_path / "colab/notebooks" / source.name, as_version=4).cells
        assert others == nbformat.read(source, as_version=4).cells
        assert first.metadata.tags == ["colab"]
        shell.run_cell(first.source).raise_error()
        assert called == []
    monkeypatch.setattr(InteractiveShell, "__module__", "google.colab._shell")
    shell.run_cell(first.source).raise_error()
    [(magic, line)] = called
    requirement = Requirement(shlex.split(line)[-1])
    assert (magic, requirement.name, requirement.extras) == ("pip", "morphlib", {"models", "notebooks"})
    assert requirement.url == "git+https://github.com/someone/book@0123456789ab"


@pytest.mark.parametrize(
    ("commit", "repository", "why"),
    [("0123456789ab", "", "names no Repository"), ("0123456789ab-dirty", "someone/book", "commit them first")],
)
def test_nothing_is_made_for_colab_that_could_not_be_installed_there(commit, repository, why, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GITHUB_REPOSITORY", repository)
    monkeypatch.setattr(files, "commit", lambda: commit)
    assert pipeline.main(["colab", str(tmp_path / "colab")]) == 2
    assert why in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_whole(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / name).touch()
        files.replace_folder(tmp_path / "new", tmp_path / "at" / "place")
        assert [path.name for path in (tmp_path / "at").rglob("*")] == ["place", name]
    assert not (tmp_path / "new").exists()


def test_the_same_pages_give_the_same_archive(tmp_path):
    archives = []
    for number, names in enumerate((("index.html", "b/c.html"), ("b/c.html", "index.html"))):  # another order, another time
        html = tmp_path / str(number) / "html"
        (html / "b").mkdir(parents=True)
        for name in names:
            (html / name).write_text(f"<p>{name}</p>")
            os.utime(html / name, (1e9 + number, 1e9 + number))
        (html / ".buildinfo").touch()
        assert pipeline.main(["zip", str(html), str(tmp_path / str(number) / "book-1.zip")]) == 0
        archives.append(tmp_path / str(number) / "book-1.zip")
    assert archives[0].read_bytes() == archives[1].read_bytes()
    subprocess.run([sys.executable, "-m", "zipfile", "-e", archives[0], tmp_path / "out"], check=True)
    assert sorted(path.name for path in (tmp_path / "out/book-1").rglob("*")) == ["b", "c.html", "index.html"]
    assert (tmp_path / "out/book-1/b/c.html").read_text() == "<p>b/c.html</p>"
    with zipfile.ZipFile(archives[0]) as archive:
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o644}  # else unzip makes files nobody may read


def test_a_second_run_of_a_notebook_with_parameters_of_ones_own_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = (Path("notebooks/03_law.ipynb"), Path("presets.yml"), "smoke", "x=1")
    with files.locked(Path("_build/own/03_law/lock")), pytest.raises(InputError, match="another run makes this page; wait"):
        pipeline.own_page(*page)
    with pytest.raises(InputError, match=r"presets\.yml: cannot be read"):  # it goes on, to where there is nothing
        pipeline.own_page(*page)


def test_a_second_build_in_the_same_folder_is_refused(monkeypatch, tmp_path):
    import fcntl

    monkeypatch.chdir(tmp_path)
    (tmp_path / "_build").mkdir()
    with (tmp_path / "_build/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another build"):
            pipeline.run_snakemake(["--version"])
    assert pipeline.run_snakemake(["--version"]) == 0
