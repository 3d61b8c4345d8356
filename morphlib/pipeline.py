"""From notebooks to a book: strict execution by papermill, and the tree that the book is built from.

Run by the Snakefile. By hand: ``python -m morphlib.pipeline execute NOTEBOOK OUTPUT --preset laptop``.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import yaml

from morphlib import files
from morphlib.errors import InputError

_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


def read_presets(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The presets file: preset -> notebook -> parameter -> value."""
    try:
        presets = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({error}); give a presets file") from None
    try:
        return {preset: {name: dict(v or {}) for name, v in (notebooks or {}).items()} for preset, notebooks in presets.items()}
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{path}: holds no presets; write preset, notebook, parameter and value as nested keys") from None


def declared_parameters(notebook: Path) -> dict[str, ast.expr]:
    """The parameters of a notebook and their annotations, from its cell tagged ``parameters``.

    The cell is read, not run. Every line of it is ``name: type = default``.
    """
    try:
        content = nbformat.read(notebook, as_version=4)
    except (OSError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise InputError(f"{notebook}: cannot be read as a notebook ({type(error).__name__}); give an .ipynb file") from None
    cells = [cell for cell in content.cells if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"{notebook}: has {len(cells)} cells tagged 'parameters'; tag exactly one")
    try:
        statements = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise InputError(f"{notebook}: the parameters cell is not Python (line {error.lineno}); mend it") from None
    parameters = {}
    for statement in statements:
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
            raise InputError(f"{notebook}: {ast.unparse(statement)!r} is no parameter; write each line as name: type = default")
        parameters[statement.target.id] = statement.annotation
    return parameters


def check_parameters(notebook: Path, given: Mapping[str, Any]) -> None:
    """Refuse what papermill lets pass: an unknown parameter, or a value of the wrong type."""
    declared = declared_parameters(notebook)
    for name, value in given.items():
        if name not in declared:
            raise InputError(f"{notebook}: has no parameter {name!r}; its parameters are {', '.join(declared)}")
        if not _matches(value, declared[name]):
            number_as_text = isinstance(value, str) and re.fullmatch(r"[-+]?[0-9.]+e[-+]?[0-9]+", value, re.IGNORECASE)
            hint = "; YAML reads 1e9 as text, write 1.0e+9" if number_as_text else ""
            raise InputError(
                f"{notebook}: parameter {name} is {value!r}, of type {type(value).__name__}; "
                f"its type is {ast.unparse(declared[name])}{hint}"
            )


def _matches(value: Any, annotation: ast.expr) -> bool:
    match annotation:
        case ast.Name(id="float"):
            return isinstance(value, int | float) and not isinstance(value, bool)
        case ast.Name(id=name) if name in _TYPES:
            return type(value) is _TYPES[name]
        case ast.Constant(value=None):
            return value is None
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return isinstance(value, list) and all(_matches(element, item) for element in value)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _matches(value, left) or _matches(value, right)
    raise InputError(f"cannot check the annotation {ast.unparse(annotation)!r}; use str, int, float, bool, list[...] or |")


def execute(notebook: Path, output: Path, parameters: Mapping[str, Any]) -> None:
    """Execute a notebook with papermill; ``output`` appears only when every cell has run.

    Until then the notebook grows in a file beside it, ``NAME.partial.ipynb``, which is kept when a
    cell fails. The parameters are checked before a kernel starts.
    """
    check_parameters(notebook, parameters)
    import papermill  # two seconds, and only needed here

    partial = output.with_name(f"{output.stem}.partial.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(notebook, partial, dict(parameters), progress_bar=True)
    except papermill.PapermillExecutionError as error:
        raise InputError(
            f"{notebook}: cell {error.exec_count} failed with {error.ename}: {error.evalue}; what ran is in {partial}"
        ) from None
    partial.replace(output)


def repository_url(pyproject: Path) -> str | None:
    """The repository's address: GITHUB_REPOSITORY in a workflow, else ``Repository`` in [project.urls]."""
    if name := os.environ.get("GITHUB_REPOSITORY"):
        return f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{name}"
    return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {}).get("Repository")


def book_configuration(config: Mapping[str, Any], url: str | None) -> dict[str, Any]:
    """The book's configuration, with the buttons that need the repository's address where there is one."""
    if url is None:
        return dict(config)
    buttons = {"use_repository_button": True, "use_edit_page_button": True, "use_issues_button": True}
    return {
        **config,
        "repository": {"url": url, "branch": "main"},
        "html": {**config.get("html", {}), **buttons},
        "launch_buttons": {"binderhub_url": "https://mybinder.org", "colab_url": "https://colab.research.google.com"},
    }


def build_book(tree: Path, output: Path) -> None:
    """Build the book in ``tree``, where the executed notebooks lie; ``output`` appears only when it is whole.

    Every page is built anew, nitpicking on, and a warning is an error.
    """
    shutil.rmtree(tree / "book", ignore_errors=True)
    shutil.copytree("book", tree / "book")
    shutil.copy("_toc.yml", tree / "_toc.yml")
    config = yaml.safe_load(Path("_config.yml").read_text(encoding="utf-8"))
    config = book_configuration(config, repository_url(Path("pyproject.toml")))
    (tree / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    work = tree.with_name(f"{tree.name}-build")
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))
    command = [jupyter_book, "build", str(tree), "--path-output", str(work), "--all", "-n", "-W", "--keep-going"]
    if subprocess.run(command, check=False).returncode:
        raise InputError(f"the book in {tree} has warnings or errors, shown above; mend the pages they name")
    html = work / "_build" / "html"
    _prune_mathjax(html / "_static" / "mathjax")
    for page in html.rglob("*.html"):
        page.write_text(for_readers(page.read_text(encoding="utf-8")), encoding="utf-8")
    files.replace_folder(html, output)
    shutil.rmtree(work)


def for_readers(page: str) -> str:
    """A page without what Sphinx, its theme and its extensions write into it to no reader's use.

    Fonts loaded ahead, which a browser refuses from disk (where they are used they load all the same); sphinx-thebe, which
    fails and names another host; roles of docutils that ARIA has withdrawn.
    """
    return re.sub(
        r'<link rel="preload" as="font"[^>]*>\s*'
        r'|<script>const THEBE_JS_URL.*?</script>\s*|<script async="async" src="[^"]*sphinx-thebe\.js[^"]*"></script>\s*'
        r'| role="doc-biblioentry"| role="list"(?= class="citation-list")',
        "",
        page,
        flags=re.DOTALL,
    )


def _prune_mathjax(folder: Path) -> None:
    """Leave what a page loads: the TeX-to-HTML bundle, its fonts and the TeX extensions it loads by name."""
    keep = (folder / "tex-chtml.js", folder / "output" / "chtml" / "fonts", folder / "input" / "tex" / "extensions")
    for path in list(folder.rglob("*")):
        if path.is_file() and not any(path.is_relative_to(kept) for kept in keep):
            path.unlink()


def zip_book(html: Path, output: Path) -> None:
    """The pages in ``html`` as one archive, in a folder named as the archive; the same pages give the same bytes."""
    with files.replacing(output) as partial, zipfile.ZipFile(partial, "w") as archive:
        for path in sorted(path for path in html.rglob("*") if path.is_file() and not path.name.startswith(".")):
            entry = zipfile.ZipInfo(f"{output.stem}/{path.relative_to(html).as_posix()}")  # dated 1980, whenever it is made
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)


def run_snakemake(arguments: Sequence[str]) -> int:
    """Run Snakemake, one at a time in this folder.

    Snakemake's own lock outlives a process that is killed; this one is held by the operating system
    and ends with it.
    """
    with files.locked(Path("_build/lock"), "another build runs in this folder; wait until it has ended"):
        command = [sys.executable, "-m", "snakemake", "--nolock", "--rerun-incomplete", *arguments]
        # the rules call python: this one, whether or not its environment is activated
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.run(command, check=False, env=environment).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m morphlib.pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("snakemake", help="run Snakemake, one at a time in this folder; its arguments follow")
    one = commands.add_parser("execute", help="execute one notebook with the parameters of a preset")
    one.add_argument("--presets", type=Path, default=Path("notebooks/presets.yml"))
    one.add_argument("--preset", default="laptop")
    one.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "YAML"))
    book = commands.add_parser("book", help="build the book from a tree of executed notebooks")
    publish = commands.add_parser("publish", help="copy built pages to where readers open them, whole or not at all")
    archive = commands.add_parser("zip", help="pack built pages into one file to hand on")
    for command, source in ((one, "notebook"), (book, "tree"), (publish, "pages"), (archive, "pages")):
        command.add_argument(source, type=Path)
        command.add_argument("output", type=Path)
    parsed, others = parser.parse_known_args(arguments)
    if others and parsed.command != "snakemake":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        if parsed.command == "snakemake":
            return run_snakemake(others)
        if parsed.command == "execute":
            presets = read_presets(parsed.presets)
            if parsed.preset not in presets:
                raise InputError(f"{parsed.presets}: has no preset {parsed.preset!r}; choose one of {', '.join(presets)}")
            given = presets[parsed.preset].get(parsed.notebook.stem, {})
            try:
                given |= {name: yaml.safe_load(value) for name, value in parsed.parameter}
            except yaml.YAMLError as error:
                raise InputError(f"a parameter is not YAML ({' '.join(str(error).split())}); quote it") from None
            execute(parsed.notebook, parsed.output, given)
        elif parsed.command == "publish":
            copied = parsed.output.with_name(f"{parsed.output.name}.partial")
            shutil.copytree(parsed.pages, copied, dirs_exist_ok=True)
            files.replace_folder(copied, parsed.output)
        elif parsed.command == "zip":
            if not (parsed.pages / "index.html").exists():
                raise InputError(f"{parsed.pages}: holds no book; call make book first")
            zip_book(parsed.pages, parsed.output)
        else:
            build_book(parsed.tree, parsed.output)
    except InputError as error:
        print(f"{parser.prog} {parsed.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
