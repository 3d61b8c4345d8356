"""The project's own files agree with each other."""

import ast
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import morphlib
from conftest import ROOT
from morphlib import laws
from morphlib.latency import engines

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text().splitlines()
PINS = dict(line.split("==") for line in LOCK)
EXTRAS = PROJECT["optional-dependencies"]


def test_the_lock_pins_versions_and_nothing_else():
    for line in LOCK:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line
    assert PINS["torch"] == "2.13.0"
    assert not [name for name in PINS if name.startswith(("nvidia", "triton", "cuda"))]


@pytest.mark.parametrize("text", sum((EXTRAS[name] for name in EXTRAS if name != "paper"), PROJECT["dependencies"]))
def test_the_lock_satisfies_what_the_project_asks_for(text):
    requirement = Requirement(text)
    pinned = {canonicalize_name(name): version for name, version in PINS.items()}
    assert pinned[canonicalize_name(requirement.name)] in requirement.specifier


def test_conda_users_get_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(item for item in environment["dependencies"] if str(item).startswith("python="))
    assert python == PROJECT["requires-python"].replace(">=", "python=")
    assert {"pip": ["-r requirements.lock"]} in environment["dependencies"]


def test_binder_gets_the_same_with_the_cpu_build_of_torch():
    folder = ROOT / ".binder"
    lines = [line for line in (folder / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["--extra-index-url https://download.pytorch.org/whl/cpu", "-r ../requirements.lock"]
    assert (folder / lines[1].removeprefix("-r ")).resolve() == ROOT / "requirements.lock"
    assert (folder / "runtime.txt").read_text().strip() == PROJECT["requires-python"].replace(">=", "python-")
    assert (folder / "postBuild").stat().st_mode & 0o111
    install = (folder / "postBuild").read_text().splitlines()[-1]
    assert install.removeprefix("pip ") in (ROOT / "Makefile").read_text()


def test_the_release_is_what_make_zip_makes():
    made = re.search(r"(_build/morph-book)-\$\$\(.*__version__.*\)(\.zip)", (ROOT / "Makefile").read_text())
    steps = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["release"]["steps"]
    upload = steps[-1]["run"]
    assert {"run": "make zip"} in steps
    assert f'"{made[1]}-${{GITHUB_REF_NAME#v}}{made[2]}"' in upload


def test_open_lm_comes_from_a_pinned_commit_and_only_for_the_paper():
    assert len(EXTRAS["paper"]) == 1
    assert re.fullmatch(r"open_lm @ git\+https://github\.com/mlfoundations/open_lm@[0-9a-f]{40}", EXTRAS["paper"][0])
    assert not any("open_lm" in line for line in LOCK)


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changelog = re.search(r"^## ([0-9.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert PROJECT["version"] == morphlib.__version__ == citation["version"] == changelog[1]


def test_arrows_between_modules_go_one_way():
    """A module imports only those named before it, and laws and shapes nothing of ours but the exception."""
    order = ["errors", "files", "laws", "shapes", "runs", "model", "corpus", "recipes", "least_squares", "fitting",
             "uncertainty", "diagnostics", "design", "ablations", "latency", "latency.hardware", "latency.models",
             "latency.engines", "latency.timing", "latency.analytic", "latency.commands", "training", "selection",
             "minimal_pairs", "scores", "evaluation", "study", "tables", "results", "claims", "report", "pipeline",
             "training_commands", "evaluation_commands", "cli"]  # fmt: skip
    folder = ROOT / "morphlib"
    names = (".".join(path.relative_to(folder).with_suffix("").parts) for path in folder.rglob("*.py"))
    found = {name.removesuffix(".__init__") for name in names}
    assert found == {"__init__", *order}
    for position, module in enumerate(order):
        path = folder / module.replace(".", "/")
        tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("morphlib"):
                package = node.module.partition(".")[2]
                names = {f"{package}.{alias.name}".strip(".") for alias in node.names}
                imported |= {name for name in names if name in found} or {package}
        allowed = {"errors"} if module in ("laws", "shapes") else {*order[:position], "", "__version__"}
        assert imported <= allowed, f"{module} imports {imported - allowed}"


def test_the_page_of_the_python_interface_has_every_module():
    """But for those behind the commands."""
    folder = ROOT / "morphlib"
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in folder.rglob("*.py") if path.stem != "__init__"}
    listed = re.findall(r"^\.\. automodule:: (\S+)$", (ROOT / "book/api.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(name for name in names if not name.endswith(("commands", ".cli")))


def test_laws_and_engines_are_in_the_tables_of_the_book():
    for page, names in {
        "notation": (*laws.NAMES, *laws.SHAPE_TERMS),
        "bring_your_own_hardware": engines.ENGINES,
    }.items():
        text = (ROOT / f"book/{page}.md").read_text()
        assert [name for name in names if f"`{name}`" not in text] == []


def test_contributing_names_tests_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"\b(test_\w+)`", text)
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []
