"""The book at the smoke preset, built with warnings as errors, and the sources it is built from."""

import ast
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml

from conftest import ROOT, chapters, entries
from morphlib import claims, files, pipeline, results

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if not path.stem.endswith("_solutions")]
SOLVED = [path for path in CHAPTERS if path.with_name(f"{path.stem[:2]}_solutions.ipynb").exists()]


class Page(HTMLParser):
    """What the tests look at in a page: what it loads, what it links to, its pictures, its anchors, its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded, self.links, self.pictures, self.anchors, self.text = [], [], [], set(), []
        self.feed(pipeline.for_readers(path.read_text(encoding="utf-8")))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors.add(values.get("id"))
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon"):
            self.loaded.append(values["href"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "img":
            self.pictures.append(values.get("alt"))
        if tag == "svg" and values.get("role") == "img":
            self.pictures.append(values.get("aria-label"))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="session")
def pages(book) -> dict[Path, Page]:
    return {path: Page(path) for path in book.rglob("*.html") if "_static" not in path.parts}


def test_every_chapter_of_the_contents_is_a_page(book):
    assert {path.stem for path in NOTEBOOKS} == {Path(name).name for name in chapters() if name.startswith("notebooks/")}
    for chapter in chapters():
        assert (book / f"{chapter}.html").exists()
    assert (book / "index.html").exists()


def test_nothing_is_loaded_from_another_host(book, pages):
    for path, page in pages.items():
        for address in page.loaded:
            assert not urlsplit(address).netloc, f"{path}: {address}"
            assert (path.parent / unquote(urlsplit(address).path)).exists(), f"{path}: {address}"
    for sheet in book.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?https?:", sheet.read_text(encoding="utf-8")), sheet


def test_the_book_is_small(book, pages):
    megabytes = {path: path.stat().st_size / 1e6 for path in book.rglob("*") if path.is_file()}
    assert sum(megabytes.values()) < 15
    assert {path: size for path, size in megabytes.items() if path in pages and size >= 1.5} == {}


def test_what_no_reader_has_use_for_is_left_out(book, pages):
    for path in pages:
        html = path.read_text(encoding="utf-8")
        assert not re.search(r'unpkg|as="font"|role="doc-biblioentry"|role="list" class="citation', html, re.IGNORECASE), path


@pytest.fixture(scope="session")
def plain(book, tmp_path_factory) -> Path:
    """The tree of the book, whose repository now has an address, built by Sphinx alone."""
    tree, html = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("html")
    shutil.copytree(book.with_name("tree"), tree, dirs_exist_ok=True)
    config = yaml.safe_load((tree / "_config.yml").read_text())
    (tree / "_config.yml").write_text(yaml.safe_dump(pipeline.book_configuration(config, "https://github.com/someone/book")))
    programs = Path(sys.executable).parent
    for command in (["jupyter-book", "config", "sphinx", tree], ["sphinx-build", "-q", "-n", "-W", "-b", "html", tree, html]):
        done = subprocess.run([programs / command[0], *command[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return html


def test_plain_sphinx_builds_the_same_pages(plain, book, pages):
    for chapter in chapters():
        texts = [(folder / f"{chapter}.html").read_text(encoding="utf-8") for folder in (book, plain)]
        ours, theirs = (pipeline.for_readers(text).partition('<article class="bd-article"')[2] for text in texts)
        assert ours.partition("</article>")[0] == theirs.partition("</article>")[0] != "", chapter
    built = [{path.relative_to(folder) for path in folder.rglob("*.html")} for folder in (book, plain)]
    assert built[0] == built[1]


def test_buttons_lead_to_the_sources_once_the_repository_has_an_address(plain):
    """On each notebook's page: its source to edit, to open in Colab and in Binder. Without an address there are none."""
    for chapter in chapters():
        links = Page(plain / f"{chapter}.html").links
        blob = f"https://colab.research.google.com/github/someone/book/blob/{pipeline.COLAB_BRANCH}"
        edit = [link for link in links if "/edit/" in link]
        source = f"{chapter}.ipynb" if chapter.startswith("notebooks/") else f"{chapter}.md"
        assert (ROOT / source).exists()
        assert edit == [f"https://github.com/someone/book/edit/main/{source}"]
        launchers = ("colab.research.google.com", "mybinder.org")
        launch = {host: link for link in links if (host := urlsplit(link).netloc) in launchers}
        if chapter.startswith("notebooks/"):
            assert launch == {
                "colab.research.google.com": f"{blob}/{chapter}.ipynb",
                "mybinder.org": f"https://mybinder.org/v2/gh/someone/book/main?urlpath=tree/{chapter}.ipynb",
            }
        else:
            assert launch == {}


def test_links_inside_the_book_lead_somewhere(pages):
    for path, page in pages.items():
        for link in page.links:
            target = urlsplit(link)
            if target.scheme == "data":  # the numbers of a figure
                continue
            if target.scheme or target.netloc:
                assert target.scheme == "https" and re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", target.netloc), f"{path}: {link}"
                continue
            file = (path.parent / unquote(target.path)).resolve() if target.path else path
            assert file.exists(), f"{path}: {link}"
            if target.fragment and file in pages:
                assert unquote(target.fragment) in pages[file].anchors, f"{path}: {link}"


def test_pictures_say_in_words_what_is_seen(pages):
    figures = [alt for page in pages.values() for alt in page.pictures]
    assert any("scatter" in (alt or "") for alt in figures)
    for alt in figures:
        assert alt and len(alt.split()) >= 5, alt
        assert not re.search(r"\.(png|svg|jpg)$", alt)


def test_glued_numbers_arrive(pages):
    """What is glued shows on the page: the key is nowhere, and no number is NaN."""
    for notebook in NOTEBOOKS:
        keys = re.findall(r"\{glue:text\}`([^`:]+)", notebook.read_text(encoding="utf-8"))
        assert keys
        page = next(page for path, page in pages.items() if path.stem == notebook.stem)
        text = " ".join(page.text)
        assert "{glue" not in text
        html = next(path for path in pages if path.stem == notebook.stem).read_text(encoding="utf-8")
        pasted = re.findall(r'<span class="pasted-text">(.*?)</span>', html)
        assert len(pasted) == len(keys)
        assert all(value.strip() and "nan" not in value.lower() for value in pasted), pasted


def test_the_published_numbers_are_on_the_page(pages):
    """The figures of the paper's main table, whatever the preset."""
    text = " ".join(next(page for path, page in pages.items() if path.stem == "03_fitting_the_law").text)
    for number in ("0.003296", "0.9895", "2.75", "3.41", "3.98", "4.10", "0.000554", "0.9982", "0.69", "0.90", "0.92", "1.15",
                   "-0.4000", "0.8198", "0.8681", "0.6190", "54754.4", "778346", "2.9352", "4.38"):  # fmt: skip
        assert number in text, number


def stated_defaults(prose: str) -> dict[str, str]:
    """The table of parameters: name to default."""
    table = prose[prose.index("| parameter | type | default | meaning |") :].partition("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|", table, flags=re.MULTILINE))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_a_source(path):
    """No outputs, little code in small cells, a kernel that papermill can start, its parameters explained."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert len(code) <= 20
    assert max(len(cell.source.splitlines()) for cell in code) <= 30
    assert notebook.metadata.kernelspec.language == "python"
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.search(r"^\s*% ", prose, flags=re.MULTILINE)  # MyST takes such a line for a comment and drops it
    parameters = pipeline.declared_parameters(path)
    assert list(stated_defaults(prose)) == list(parameters)
    assert f"papermill notebooks/{path.name} out.ipynb" in prose


def test_defaults_in_the_table_of_parameters_are_those_of_the_cell():
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
        prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        stated = stated_defaults(prose)
        for statement in ast.parse(cell.source).body:
            default = ast.literal_eval(statement.value)
            text = stated[statement.target.id].strip("`").replace(",", "")
            if isinstance(default, list):
                continue
            assert text == ("none" if default is None else f"{default:.0f}" if isinstance(default, float) else str(default))


def test_plain_papermill_takes_other_parameters(tmp_path):
    """The README's command, with each exponent free."""
    out = tmp_path / "out.ipynb"
    papermill = Path(sys.executable).with_name("papermill")
    command = [papermill, "notebooks/03_fitting_the_law.ipynb", out, "-p", "exponents", "free", "-p", "n_starts", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    text = json.dumps(nbformat.read(out, as_version=4))
    assert "beta" in text and "gamma" in text


def test_a_second_execution_hands_over_the_same_bytes(book, tmp_path):
    """All but what is live; the chapter has both."""
    name = "03_fitting_the_law"
    presets = pipeline.read_presets(ROOT / "notebooks/presets.yml")
    pipeline.execute(ROOT / f"notebooks/{name}.ipynb", tmp_path / f"{name}.ipynb", presets["smoke"][name])
    first, second = (results.read(path)[name] for path in (book.parent / "tree/notebooks" / f"{name}.ipynb", tmp_path))
    assert second["live"].keys() == first["live"].keys() != set()
    for kind in ("numbers", "figures", "parameters"):
        assert files.to_json(second[kind]) == files.to_json(first[kind])


def test_every_notebook_ends_with_its_provenance(book):
    for path in NOTEBOOKS:
        assert nbformat.read(path, as_version=4).cells[-1].source == f'report.provenance("{path.stem}", globals())'
        html = (book / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        for text in ("How this page was made", "make notebook NB=", "PRESET=smoke", "-y &#39;{"):
            assert text in html or text.replace("&#39;", "&#x27;") in html
        kept = json.loads((book / "results" / f"{path.stem}.json").read_text(encoding="utf-8"))
        live = json.loads((book / "results/live" / f"{path.stem}.json").read_text(encoding="utf-8"))
        assert kept["numbers"] and not set(kept["numbers"]) & set(live["live"])


def test_figures_can_be_downloaded_as_numbers(book):
    """Under each figure with points or lines; only the flow chart of the method has none."""
    without = []
    for path in NOTEBOOKS:
        html = (book / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        figures = re.findall(r'<svg role="img".*?</figcaption>', html, flags=re.DOTALL)
        without += [caption for caption in figures if 'href="data:text/csv;base64,' not in caption]
    assert len(without) == 1 and "flow chart" in without[0]


def test_the_ledger_on_its_page_is_computed_from_the_results(book):
    page = (book / "book/claims.html").read_text(encoding="utf-8")
    numbers = {name: result["numbers"] for name, result in results.read(book.parent / "tree/notebooks").items()}
    ledger = claims.judge(claims.read(ROOT / "book/claims.csv"), numbers)
    shown = re.findall(r"verdict-[0-3]'>([^<]+)<", page)
    assert shown == list(ledger["verdict"])
    assert set(shown) == set(claims.VERDICTS)


def test_no_page_shows_a_warning(book):
    """What libraries write to stderr is on a page unless its cell says otherwise."""
    for path in results.executed(book.parent / "tree/notebooks"):
        for cell in results.read_notebook(path).cells:
            said = [output["text"] for output in cell.get("outputs", ()) if output.get("name") == "stderr"]
            assert not said or "remove-stderr" in cell.metadata.get("tags", []), f"{path.name}: {said}"


def test_a_table_of_ones_own_runs_through_the_chapter(tmp_path, paper):
    """A table with the required columns and n_count, nothing more, and all rows fitted."""
    path = tmp_path / "runs.csv"
    paper[["name", "n_params", "n_count", "d_model", "n_layers", "tokens", "loss"]].to_csv(path, index=False)
    parameters = {"runs": str(path), "fit_on": None, "n_starts": 4, "candidates": ["12x3072", "24x2048/16h/4kv"]}
    pipeline.execute(ROOT / "notebooks/03_fitting_the_law.ipynb", tmp_path / "out.ipynb", parameters)
    assert (tmp_path / "out.ipynb").exists()


def cells_of(path: Path) -> list[nbformat.NotebookNode]:
    return nbformat.read(path, as_version=4).cells


def solutions_of(chapter: Path) -> Path:
    return chapter.with_name(f"{chapter.stem[:2]}_solutions.ipynb")


def exercises(chapter: Path) -> dict[str, str]:
    """The exercises of a chapter: number to title; each is a MyST admonition that states its minutes."""
    (text,) = (cell.source for cell in cells_of(chapter) if cell.source.startswith("## Exercises"))
    opened = re.findall(r"^:::\{admonition\}.*$", text, flags=re.MULTILINE)
    found = [re.fullmatch(r":::\{admonition\} Exercise (\d\.\d): (.+) \((?:[\w -]+, )?\d+ minutes\)", line) for line in opened]
    assert all(found), opened
    assert len(opened) == len(re.findall(r"^:::$", text, flags=re.MULTILINE))
    return {match[1]: match[2] for match in found if match}


def sections(notebook: Path) -> dict[str, str]:
    """The sections of a notebook: heading to the code under it."""
    heading, code = "", {"": ""}
    for cell in cells_of(notebook):
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^## (.+)$", cell.source, flags=re.MULTILINE):
                code[heading] = ""
        else:
            code[heading] += f"{cell.source}\n"
    return code


def test_every_chapter_has_solutions():
    assert [path.stem[:2] for path in CHAPTERS] == [f"{number:02}" for number in range(1, 10)]
    assert SOLVED == CHAPTERS


@pytest.mark.parametrize("chapter", SOLVED, ids=lambda path: path.stem)
def test_a_chapter_ends_in_exercises(chapter):
    """Three to five, numbered, each with its time, in the last cell of prose, which links to the solutions."""
    number = int(chapter.stem[:2])
    found = exercises(chapter)
    assert list(found) == [f"{number}.{k}" for k in range(1, len(found) + 1)]
    assert 3 <= len(found) <= 5
    last = [cell.source for cell in cells_of(chapter) if cell.cell_type == "markdown"][-1]
    assert last.startswith("## Exercises") and f"{{doc}}`{solutions_of(chapter).stem}`" in last


@pytest.mark.parametrize("chapter", SOLVED, ids=lambda path: path.stem)
def test_every_exercise_is_solved_and_its_answer_checked(chapter):
    """Under the same number and title, by an assert that runs with the section: to execute it is to test it."""
    solved = sections(solutions_of(chapter))
    assert [heading for heading in solved if heading.startswith("Exercise")] == [
        f"Exercise {number}: {title}" for number, title in exercises(chapter).items()
    ]
    for heading, code in solved.items():
        asserts = [node.test for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)]
        if heading.startswith("Exercise"):
            assert asserts, heading
        assert not any(isinstance(test, ast.Constant) for test in asserts), heading


@pytest.mark.parametrize("chapter", SOLVED, ids=lambda path: path.stem)
def test_solutions_stand_under_their_chapter(chapter):
    entry = next(entry for entry in entries() if entry["file"] == f"notebooks/{chapter.stem}")
    assert entry["sections"] == [{"file": f"notebooks/{solutions_of(chapter).stem}"}]
    title = cells_of(chapter)[0].source.partition("\n")[0].removeprefix("# ")
    assert cells_of(solutions_of(chapter))[0].source.startswith(f"# Solutions: {title}\n")
