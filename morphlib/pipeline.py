"""From notebooks to a book: strict execution by papermill, and the tree that the book is built from.

Run by the Snakefile. By hand: ``python -m morphlib.pipeline execute NOTEBOOK OUTPUT --preset laptop``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import yaml

from morphlib import claims, files, results, tables
from morphlib.errors import InputError

MADE_OF = "made_of.json"  # in built pages: what they are, and what they were made of
COLAB_BRANCH = "colab"  # holds the notebooks as Colab opens them
BUILD_BYTES = 100e6  # what pages and MathJax take while they are built, and as much again
REFUSED = "MORPH_REFUSED"  # names, to the steps of a run, the file for what they refuse
TIMESTAMP = ".snakemake_timestamp"  # Snakemake's, in a folder it made
_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


class _EachKeyOnce(yaml.SafeLoader):
    """YAML takes the last of two values under one key, and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.MarkedYAMLError(problem=f"{twice} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_presets(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The presets file: preset -> notebook -> parameter -> value."""
    try:
        presets = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}); give a presets file") from None
    try:
        return {preset: {name: dict(v or {}) for name, v in (notebooks or {}).items()} for preset, notebooks in presets.items()}
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{path}: holds no presets; write preset, notebook, parameter and value as nested keys") from None


def declared_parameters(notebook: Path) -> dict[str, ast.expr]:
    """The parameters of a notebook and their annotations, from its cell tagged ``parameters``.

    The cell is read, not run. Every line of it is ``name: type = default``.
    """
    content = results.read_notebook(notebook)
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
    cell fails. The parameters are checked before a kernel starts. The whole notebook carries a digest
    of itself (`is_whole`).
    """
    check_parameters(notebook, parameters)
    import papermill  # two seconds, and only needed here

    partial = output.with_name(f"{output.stem}.partial.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(notebook, partial, dict(parameters), progress_bar=True)
    except papermill.PapermillExecutionError as error:
        at = re.findall(r"-> *\d+ (.*)", re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)))
        said = f"{error.ename}: {error.evalue or ''.join(at[:1])}"  # an assertion without words is told by its line
        raise InputError(f"{notebook}: cell {error.exec_count} failed with {said}; what ran is in {partial}") from None
    except RuntimeError as error:  # cells run in a process of their own: this is about that process
        raise InputError(f"{notebook}: its kernel died ({error}); see that there is memory, and run it again") from None
    content = json.loads(partial.read_text(encoding="utf-8"))
    content["metadata"]["morphlib"] = {"sha256": _digest(content)}
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(output)


def _digest(content: Mapping[str, Any]) -> str:
    """The digest of an executed notebook, of all but the digest it carries."""
    metadata = {key: value for key, value in content["metadata"].items() if key != "morphlib"}
    return hashlib.sha256(json.dumps({**content, "metadata": metadata}, sort_keys=True).encode()).hexdigest()


def is_whole(executed: Path) -> bool:
    """Whether an executed notebook is, to the letter, what `execute` wrote."""
    try:
        content = json.loads(executed.read_text(encoding="utf-8"))
        return content["metadata"]["morphlib"]["sha256"] == _digest(content)
    except (OSError, ValueError, KeyError, TypeError):  # cut off, or no notebook of ours
        return False


def _refuse_damaged(folder: Path) -> None:
    for path in results.executed(folder):
        if not is_whole(path):
            raise InputError(f"{path}: is not what its execution wrote; remove it, and it is executed again")


def _made_of(pages: Path, tree: Path) -> dict[str, dict[str, str]]:
    """The digests of the files of built pages, and of the executed notebooks that they show."""
    own = (path for path in sorted(pages.rglob("*")) if path.is_file() and path.name not in (MADE_OF, TIMESTAMP))
    return {
        "pages": {str(path.relative_to(pages)): files.sha256(path) for path in own},
        "notebooks": {path.name: files.sha256(path) for path in results.executed(tree / "notebooks")},
    }


def are_whole(pages: Path, tree: Path) -> bool:
    """Whether built pages are as `build_book` left them, and show the executed notebooks that lie in ``tree`` now."""
    try:
        return json.loads((pages / MADE_OF).read_text(encoding="utf-8")) == _made_of(pages, tree)
    except (OSError, ValueError):
        return False


def discard_damaged(build: Path, records: Path = Path(".snakemake/metadata")) -> None:
    """Remove, and name, what is not as the pipeline left it under ``build``, so that Snakemake makes it anew.

    Snakemake looks at times, not at contents, and where its own ``records`` are gone it takes every output for good.
    """
    known = _readable(records)
    for tree in sorted(build.glob("*/tree")):
        pages = tree.with_name("html")
        damaged = []
        for path in results.executed(tree / "notebooks"):
            if not Path("notebooks", path.name).exists():
                why = "is of no notebook any more; it is removed"
            elif not known:
                why = "has no readable record of what it was made from; it is executed again"
            elif not is_whole(path):
                why = "is not what its execution wrote; it is executed again"
            else:
                continue
            print(f"{path}: {why}", file=sys.stderr)
            damaged.append(path)
            path.unlink()
        if pages.exists() and not (known and are_whole(pages, tree)):
            if not damaged:
                print(f"{pages}: not as it was built from these notebooks; it is built again", file=sys.stderr)
            shutil.rmtree(pages)


def _readable(records: Path) -> bool:
    found = [path for path in records.rglob("*") if path.is_file()]
    try:
        return bool(found) and all(json.loads(path.read_text(encoding="utf-8")) for path in found)
    except ValueError:
        return False


def check_sources() -> None:
    """Refuse to start where a file of the checkout is gone, or the presets are none."""
    command = ["git", "ls-files", "--deleted", "--", "morphlib", "notebooks", "book", "_config.yml", "_toc.yml"]
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no checkout: then nobody knows
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        if gone := done.stdout.split("\n")[:-1]:
            raise InputError(f"{', '.join(gone)}: deleted; bring it back with git checkout, or take it out with git rm")
    read_presets(Path("notebooks/presets.yml"))


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


def build_book(tree: Path, output: Path, only: str | None = None) -> None:
    """Build the book in ``tree``, where the executed notebooks lie; ``output`` appears only when it is whole.

    Every page is built anew, nitpicking on, and a warning is an error. What pages say of several notebooks is made from the
    results in them: numbers, named figures and the ledger of claims. The results lie beside the pages, those that were
    measured live in a folder of their own. With ``only`` the page of that one notebook is built, whose links to other pages
    lead nowhere. An executed notebook that is not as its execution left it is refused.
    """
    _refuse_damaged(tree / "notebooks")
    if shutil.disk_usage(tree).free < BUILD_BYTES:
        raise InputError(f"{tree}: less than {BUILD_BYTES / 1e6:.0f} MB are left on its disk; make room, and build again")
    found = results.read(tree / "notebooks")
    shutil.rmtree(tree / "book", ignore_errors=True)
    shutil.copytree("book", tree / "book")
    config = yaml.safe_load(Path("_config.yml").read_text(encoding="utf-8"))
    config = book_configuration(config, repository_url(Path("pyproject.toml")))
    if only is None:
        shutil.copy("_toc.yml", tree / "_toc.yml")
        config["parse"] = config.get("parse", {}) | {"myst_substitutions": _substitutions(tree, found)}
    else:
        (tree / "_toc.yml").write_text(f"format: jb-book\nroot: notebooks/{only}\n", encoding="utf-8")
    (tree / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    work = tree.with_name(f"{tree.name}-build")
    shutil.rmtree(work, ignore_errors=True)  # what a kill left: a page of it may be of no chapter any more
    jupyter_book = str(Path(sys.executable).with_name("jupyter-book"))
    strict = ["-n", "-W", "--keep-going"] if only is None else ["--quiet", "--quiet"]
    command = [jupyter_book, "build", str(tree), "--path-output", str(work), "--all", *strict]
    if subprocess.run(command, check=False).returncode:
        raise InputError(f"the book in {tree} has warnings or errors, shown above; mend the pages they name")
    html = work / "_build" / "html"
    _prune(html / "_static")
    for name, result in found.items():
        for folder, kinds in (("results", ("numbers", "figures")), ("results/live", ("live",))):
            (html / folder).mkdir(exist_ok=True)
            kept = {key: result[key] for key in ("notebook", "preset", "parameters", *kinds)}
            (html / folder / f"{name}.json").write_text(f"{files.to_json(kept, indent=1)}\n", encoding="utf-8")
    for page in html.rglob("*.html"):
        page.write_text(for_readers(page.read_text(encoding="utf-8")), encoding="utf-8")
    (html / MADE_OF).write_text(json.dumps(_made_of(html, tree), indent=1), encoding="utf-8")
    files.replace_folder(html, output)
    shutil.rmtree(work)


def for_readers(page: str) -> str:
    """A page without what Sphinx, its theme and its extensions write into it to no reader's use.

    Fonts loaded ahead, which a browser refuses from disk (where they are used they load all the same); sphinx-thebe, which
    fails and names another host; roles of docutils that ARIA has withdrawn; the number of a field where it has no words of
    its own. The theme knows one branch; to Colab it is `COLAB_BRANCH`.
    """
    page = re.sub(r"(https://colab\.research\.google\.com/github/[^/]+/[^/]+/blob)/[^/]+/", rf"\1/{COLAB_BRANCH}/", page)
    return re.sub(
        r'<link rel="preload" as="font"[^>]*>\s*'
        r'|<script>const THEBE_JS_URL.*?</script>\s*|<script async="async" src="[^"]*sphinx-thebe\.js[^"]*"></script>\s*'
        r'| role="doc-biblioentry"| role="list"(?= class="citation-list")'
        r"|<p>Alias for field number \d+</p>\s*",
        "",
        page,
        flags=re.DOTALL,
    )


def colab_notebooks(output: Path) -> None:
    """The notebooks as Colab opens them, with a first cell, tagged ``colab``, that installs the package at this commit.

    A source cannot name its own commit. So these are made with the pages, and lie on a branch of their own, `COLAB_BRANCH`.
    Raises InputError where the repository has no address, and where a file differs from the commit.
    """
    url, commit = repository_url(Path("pyproject.toml")), files.commit()
    if url is None:
        raise InputError("pyproject.toml: [project.urls] names no Repository to install from; name it there")
    if commit.endswith("-dirty"):
        raise InputError(f"{commit.removesuffix('-dirty')}: files differ from this commit; commit them first")
    install = f"""if "google.colab" in str(get_ipython()):
    %pip install --quiet "morphlib[models,notebooks] @ git+{url}@{commit}\""""
    with files.replacing(output) as folder:
        (folder / "notebooks").mkdir(parents=True)
        for source in sorted(Path("notebooks").glob("*.ipynb")):
            notebook = results.read_notebook(source)
            cell = nbformat.v4.new_code_cell(install, id="colab", metadata={"tags": ["colab"]})
            notebook.cells.insert(0, cell)
            nbformat.write(notebook, folder / "notebooks" / source.name)


def _substitutions(tree: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """What ``{{ ... }}`` on a page of prose can show; named figures become files that a page includes."""
    figures = tree / "book" / "figures"
    figures.mkdir()
    for notebook in found:
        for name, html in results.figures(tree / "notebooks" / f"{notebook}.ipynb").items():
            (figures / f"{name}.html").write_text(html, encoding="utf-8")
    numbers = {notebook: result["numbers"] for notebook, result in found.items()}
    ledger = claims.judge(claims.read(Path("book/claims.csv")), numbers)
    return {
        "numbers": numbers,
        "ledger": claims.page(ledger),
        "verdicts": ledger["verdict"].value_counts().to_dict(),
        "displays": claims.displays(Path("book/displays.csv")),
        "data_dictionary": tables.dictionary(),
    }


def record(notebooks: Path, output: Path) -> None:
    """Write the numbers of executed notebooks as those that are published. Every notebook has to be there, at one preset."""
    found = results.read(notebooks)
    if missing := {path.stem for path in Path("notebooks").glob("*.ipynb")} - set(found):
        raise InputError(f"{notebooks}: lacks {', '.join(sorted(missing))}; execute all notebooks first, with make book")
    if any(result.get("preset") != "laptop" for result in found.values()):
        raise InputError(f"{notebooks}: was not executed at the preset laptop, which is the one that is published")
    _refuse_damaged(notebooks)
    kept = {name: {key: result[key] for key in ("numbers", "figures")} for name, result in found.items()}
    with files.replacing(output) as partial:
        partial.write_text(f"{files.to_json(kept, indent=1)}\n", encoding="utf-8")


def difference(before: Path, after: Path) -> str:
    """What changed between the numbers of two executions, as Markdown: numbers, figures, and verdicts on the paper's claims.

    A claim that rests on a number which one of them lacks has no verdict to compare.
    """
    old, new = results.read(before), results.read(after)
    parts = []
    for notebook in sorted({*old, *new}):
        if notebook not in old or notebook not in new:
            parts.append(f"- `{notebook}` is only in {before if notebook in old else after}")
            continue
        changed = results.differences(old[notebook]["numbers"], new[notebook]["numbers"]).to_dict("records")
        by = [f" ({row['relative']:+.2%})" if math.isfinite(row["relative"]) else "" for row in changed]
        lines = [f"  - `{row['number']}`: {row['before']} → {row['after']}{how}" for row, how in zip(changed, by, strict=True)]
        redrawn = results.differences(old[notebook]["figures"], new[notebook]["figures"])
        lines += [f"  - figure: {caption}" for caption in redrawn["number"]]
        if lines:
            parts += [f"- `{notebook}`", *lines]
    both = [{name: result["numbers"] for name, result in found.items()} for found in (old, new)]
    stated = claims.comparable(claims.read(Path("book/claims.csv")), *both)
    verdicts = [claims.judge(stated, numbers) for numbers in both]
    moved = [f"- **{claim}**: {was} → {now}" for claim, was, now in
             zip(stated["claim"], verdicts[0]["verdict"], verdicts[1]["verdict"], strict=True) if was != now]  # fmt: skip
    return "\n".join([
        f"Numbers of `{before}` and `{after}`", "", *(parts or ["No number and no figure changed."]), "",
        *(["Verdicts that moved:", "", *moved] if moved else ["No verdict moved."]),
    ])  # fmt: skip


def notebook_named(prefix: str) -> Path:
    """The notebook of that name or number: ``03`` is the chapter, ``03_solutions`` its solutions."""
    found = [
        path for path in sorted(Path("notebooks").glob("*.ipynb")) if path.stem == prefix or path.stem.startswith(f"{prefix}_")
    ]
    chapters = [path for path in found if not path.stem.endswith("_solutions")] or found
    if len(chapters) != 1:
        names = ", ".join(path.stem for path in sorted(Path("notebooks").glob("*.ipynb")))
        raise InputError(f"no notebook is meant by {prefix!r}; name one of {names}, or its number")
    return chapters[0]


def _prune(static: Path) -> None:
    """Leave what a page loads: of MathJax the TeX-to-HTML bundle, fonts and the extensions loaded by name; no source maps."""
    mathjax = static / "mathjax"
    keep = (mathjax / "tex-chtml.js", mathjax / "output/chtml/fonts", mathjax / "input/tex/extensions")
    for path in list(static.rglob("*")):
        unused = path.is_relative_to(mathjax) and not any(path.is_relative_to(kept) for kept in keep)
        if path.is_file() and (unused or path.suffix == ".map"):
            path.unlink()


def zip_book(html: Path, output: Path) -> None:
    """The pages in ``html`` as one archive, in a folder named as the archive; the same pages give the same bytes."""
    with files.replacing(output) as partial, zipfile.ZipFile(partial, "w") as archive:
        for path in sorted(path for path in html.rglob("*") if path.is_file() and not path.name.startswith(".")):
            entry = zipfile.ZipInfo(f"{output.stem}/{path.relative_to(html).as_posix()}")  # dated 1980, whenever it is made
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)


def publish(pages: Path, output: Path) -> None:
    """Copy built pages to where readers open them, whole or not at all; nothing where they are the same."""
    tree = pages.with_name("tree")
    if not are_whole(pages, tree):
        raise InputError(f"{pages}: not as it was built from the notebooks in {tree}; remove it, and it is built again")
    if _made_of(output, tree) != _made_of(pages, tree):
        with files.replacing(output, shutil.Error) as copied:
            shutil.copytree(pages, copied, ignore=shutil.ignore_patterns(TIMESTAMP))


def run_snakemake(arguments: Sequence[str]) -> int:
    """Run Snakemake, one at a time in this folder.

    Snakemake's own lock outlives a process that is killed; this one is held by the operating system
    and ends with it. Snakemake holds it too, for the case that only this process is killed. What a step
    refused is raised again at the end, where Snakemake's own words bury it.
    """
    with files.locked(Path("_build/lock"), "another build runs in this folder; wait until it has ended") as lock:
        discard_damaged(Path("_build"))
        command = [sys.executable, "-m", "snakemake", "--nolock", "--rerun-incomplete", *arguments]
        # the rules call python: this one, whether or not its environment is activated
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with tempfile.TemporaryDirectory() as folder:
            refused = Path(folder) / "refused"
            environment = os.environ | {"PATH": path, REFUSED: str(refused)}
            code = subprocess.run(command, check=False, env=environment, pass_fds=[lock]).returncode
            if code and refused.exists():
                raise InputError(refused.read_text(encoding="utf-8").removesuffix("\n"))
            return code


def _execute_with_preset(notebook: Path, output: Path, presets_file: Path, preset: str, own: Sequence[Sequence[str]]) -> None:
    presets = read_presets(presets_file)
    if preset not in presets:
        raise InputError(f"{presets_file}: has no preset {preset!r}; choose one of {', '.join(presets)}")
    try:
        given = {name: yaml.safe_load(value) for name, value in own}
    except (ValueError, yaml.YAMLError) as error:  # a date that is none
        raise InputError(f"a parameter is not YAML ({' '.join(str(error).split())}); quote it") from None
    # the kernel inherits these, and the page shows them
    number = notebook.stem if notebook.stem.endswith("_solutions") else notebook.stem.partition("_")[0]
    written = shlex.quote(" ".join(f"{name}={shlex.quote(value)}" for name, value in own))
    os.environ |= {
        "MORPH_PRESET": preset,
        "MORPH_COMMAND": f"make notebook NB={number} PRESET={preset}{f' P={written}' if own else ''}",
    }
    execute(notebook, output, presets[preset].get(notebook.stem, {}) | given)


def own_page(notebook: Path, presets: Path, preset: str, parameters: str) -> Path:
    """Execute a notebook with parameters of one's own, ``name=value name=value``, under ``_build/own``, and make its page.

    Raises ``InputError`` for wrong parameters, and while another process makes this page: it would show the other's numbers.
    """
    try:
        pairs = [pair.split("=", 1) for pair in shlex.split(parameters)]
    except ValueError as error:
        raise InputError(f"P={parameters!r}: {error}; write it as P='name=value name=value'") from None
    if wrong := ["=".join(pair) for pair in pairs if len(pair) != 2]:
        raise InputError(f"P: {wrong[0]!r} is no parameter; write name=value")
    folder = Path("_build/own") / notebook.stem
    with files.locked(folder / "lock", f"{folder}: another run makes this page; wait until it has ended"):
        _execute_with_preset(notebook, folder / "tree/notebooks" / notebook.name, presets, preset, pairs)
        build_book(folder / "tree", folder / "html", only=notebook.stem)
    return folder / "html/notebooks" / f"{notebook.stem}.html"


def _step(parsed: argparse.Namespace) -> None:
    """A step of a build, alone with its output: one whose Snakemake was killed may still run, and is waited for."""
    with files.locked(parsed.output.with_name(f".{parsed.output.name}.lock")):
        if parsed.command == "execute":
            _execute_with_preset(parsed.notebook, parsed.output, parsed.presets, parsed.preset, parsed.parameter)
        elif parsed.command == "publish":
            publish(parsed.pages, parsed.output)
        else:
            build_book(parsed.tree, parsed.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m morphlib.pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("snakemake", help="run Snakemake, one at a time in this folder; its arguments follow")
    one = commands.add_parser("execute", help="execute one notebook with the parameters of a preset")
    one.add_argument("--presets", type=Path, default=Path("notebooks/presets.yml"))
    one.add_argument("--preset", default="laptop")
    one.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "YAML"))
    own = commands.add_parser("notebook", help="execute one notebook with parameters of your own, and make its page")
    own.add_argument("notebook", help="its name, or its number")
    own.add_argument("--presets", type=Path, default=Path("notebooks/presets.yml"))
    own.add_argument("--preset", default="laptop")
    own.add_argument("--parameters", default="", metavar="'NAME=YAML ...'")
    diff = commands.add_parser("diff", help="what changed between the numbers of two executions, and whether a verdict moved")
    diff.add_argument("before", type=Path, help="executed notebooks: one, a folder of them, or recorded numbers")
    diff.add_argument("after", type=Path)
    recorder = commands.add_parser("record", help="record the numbers of executed notebooks as the published ones")
    book = commands.add_parser("book", help="build the book from a tree of executed notebooks")
    copy = commands.add_parser("publish", help="copy built pages to where readers open them, whole or not at all")
    colab = commands.add_parser("colab", help="the notebooks as Colab opens them, which install the package at this commit")
    colab.add_argument("output", type=Path)
    archive = commands.add_parser("zip", help="pack built pages into one file to hand on")
    sources = ((one, "notebook"), (book, "tree"), (copy, "pages"), (archive, "pages"), (recorder, "notebooks"))
    for command, source in sources:
        command.add_argument(source, type=Path)
        command.add_argument("output", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    parsed, others = parser.parse_known_args(arguments)
    if others and parsed.command != "snakemake":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        if parsed.command == "snakemake":
            check_sources()
            return run_snakemake(others)
        if parsed.command == "notebook":
            page = own_page(notebook_named(parsed.notebook), parsed.presets, parsed.preset, parsed.parameters)
            print(f"The page: {page.resolve()}")
        elif parsed.command == "diff":
            print(difference(parsed.before, parsed.after))
        elif parsed.command == "record":
            record(parsed.notebooks, parsed.output)
        elif parsed.command == "colab":
            colab_notebooks(parsed.output)
        elif parsed.command == "zip":
            if not (parsed.pages / "index.html").exists():
                raise InputError(f"{parsed.pages}: holds no book; call make book first")
            zip_book(parsed.pages, parsed.output)
        else:
            _step(parsed)
    except (InputError, OSError) as error:  # a full disk, a file that is gone: both say which
        line = f"{parsed.command}: {' '.join(str(error).splitlines())}"
        print(f"{parser.prog} {line}", file=sys.stderr)
        if refused := os.environ.get(REFUSED):
            with suppress(OSError), Path(refused).open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
