"""What faults do to a build: kill -9 at many moments, damaged files, a full disk. What happened, as a table.

python benchmarks/faults.py                   the third notebook, and the pages that stand without the others (smoke preset)
python benchmarks/faults.py --notebooks 03,04 --kills 20
python benchmarks/faults.py --all             the whole book (smoke preset): hours

Works in a clone of HEAD in a temporary folder. Two books are the same when their files are, byte by byte, after this is left
out: made_of.json, with digests of the executed notebooks, in which stand the times of their cells; figures marked as live
and results/live; the time, memory and commit by which a page says how it was made; in notebook 03 the two numbers of the time
and memory that a fit took; of `--all` the pages of the notebooks that time this machine or train on it; searchindex.js, the
words of those pages. Two clean builds are compared first: if they differ, it ends.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pandas as pd
import psutil
import yaml

ROOT = Path(__file__).parent.parent
PAGES = Path("_build/html")
LEFT_OUT = re.compile(r"made_of\.json|searchindex\.js|\.snakemake_timestamp|results/live/.*|notebooks/0[12789]_\w+\.html")
MEASURED = (
    re.compile(r"<figure>(?:(?!</figure>).)*class=\"live\".*?</figure>", flags=re.DOTALL),
    re.compile(r"<th scope='row'>(?:time and memory|commit)</th><td>.*?</td>"),
    re.compile(r'[\d.]+</span> seconds and <span class="pasted-text">[\d.,]+</span> MB'),
)
BUILD = [sys.executable, "-m", "morphlib.pipeline", "snakemake", "publish", "--cores", "all", "--quiet", "rules", "--config",
         "preset=smoke"]  # fmt: skip
READ_ONLY = 'mount --bind _build _build && mount -o remount,ro,bind _build && exec "$@"'
# _build moves to a file system with little more room than it takes; the book that stands there afterwards is handed out
FULL = """old=$(mktemp -d) && cp -a _build/. $old && size=$(($(du -sk _build | cut -f1) + ROOM)) &&
mount -t tmpfs -o size=${size}k tmpfs _build && cp -a $old/. _build/ && rm -rf $old && "$@"
code=$?; rm -rf _after; cp -a _build/html _after; exit $code"""


class Clone:
    """A clone of HEAD in which books are built."""

    def __init__(self, folder: Path, notebooks: list[str] | None) -> None:
        self.folder = folder
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
        if notebooks:
            self._reduce(notebooks)
        self.notebooks = sorted((folder / "notebooks").glob("*.ipynb"))
        self.executed = [folder / "_build/smoke/tree/notebooks" / path.name for path in self.notebooks]
        self.environment = os.environ | {"PYTHONPATH": str(folder)}

    def _reduce(self, kept: list[str]) -> None:
        """Leave these notebooks, and of the contents what refers to no other; the first such page is the root."""
        contents = yaml.safe_load((self.folder / "_toc.yml").read_text())
        chapters = [contents["root"], *re.findall(r"file: (\S+)", yaml.safe_dump(contents["parts"]))]
        left = [
            name
            for name in chapters
            if not name.startswith("notebooks/") or name.startswith(tuple(f"notebooks/{n}" for n in kept))
        ]
        while True:
            gone = {Path(name).name for name in chapters} - {Path(name).name for name in left}
            term = "|{term}`" * ("glossary" in gone)
            refers = re.compile(rf"\{{doc\}}`[^`]*?({'|'.join(sorted(gone))})[`>]|\{{\{{{term}")
            standing = [name for name in left if not refers.search(self._source(name))]
            if standing == left:
                break
            left = standing
        claims = pd.read_csv(self.folder / "book/claims.csv", dtype=str, keep_default_na=False)
        known = [not {number for cell in row if (number := re.match(r"(\d\d)\w*:", cell)) and number[1] not in kept}
                 for row in claims.itertuples(index=False)]  # fmt: skip
        claims[known].to_csv(self.folder / "book/claims.csv", index=False)
        root = next(name for name in left if name.startswith("book/"))
        toc = {"format": "jb-book", "root": root, "chapters": [{"file": name} for name in left if name != root]}
        (self.folder / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False))
        for path in (self.folder / "notebooks").glob("*.ipynb"):
            if f"notebooks/{path.stem}" not in left:
                path.unlink()
        self.git("add", "--all")
        self.git("-c", "user.name=faults", "-c", "user.email=faults@localhost", "commit", "-qm", "a small book")

    def _source(self, name: str) -> str:
        return next(self.folder.glob(f"{name}.*")).read_text(encoding="utf-8")

    def git(self, *arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=self.folder, check=True)

    def start(self, mount: str | None = None) -> subprocess.Popen[str]:
        """A build in a process group of its own; with ``mount`` a shell's line that calls it in mounts of its own."""
        command = ["unshare", "-m", "sh", "-c", mount, "sh", *BUILD] if mount else BUILD
        with (self.folder / ".git/build.log").open("w") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def log(self) -> str:
        return (self.folder / ".git/build.log").read_text(errors="replace")

    def build(self, mount: str | None = None) -> int:
        return self.start(mount).wait()

    def named(self) -> str:
        """The lines of the pipeline itself in the log of the last build, each once: what it names."""
        pattern = (
            r"^(?:python -m morphlib\.pipeline (?:snakemake: )?(\w+: .*)|(_build/.*(?:executed|built) again|_build/.*removed))$"
        )
        found = re.findall(pattern, self.log(), flags=re.MULTILINE)
        return "; ".join(dict.fromkeys(ours or other for ours, other in found))

    def bare(self) -> None:
        for name in ("_build", ".snakemake"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def book(self, at: Path = PAGES) -> dict[str, str]:
        """The files of a book and their digests, without what may differ (see above)."""
        folder, book = self.folder / at, {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_file() and not LEFT_OUT.fullmatch(name):
                content = path.read_bytes()
                if path.suffix == ".html":
                    for part in MEASURED:
                        content = part.sub("", content.decode()).encode()
                book[name] = hashlib.sha256(content).hexdigest()
        return book

    def kernel(self, build: subprocess.Popen[str]) -> psutil.Process:
        """The kernel of a notebook that the build executes, two seconds after it came up."""
        while build.poll() is None:
            for process in psutil.Process(build.pid).children(recursive=True):
                with suppress(psutil.Error):  # a process that just ended
                    if "ipykernel" in " ".join(process.cmdline()):
                        time.sleep(2)
                        return process
            time.sleep(0.1)
        raise SystemExit(f"the build ended without a kernel:\n{self.log()[-3000:]}")


def change_a_number(text: str) -> str:
    """The last digit before the last decimal point of the text is another."""
    at = [match.start() for match in re.finditer(r"\d\.\d{3,}", text)][-1]
    return f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}"


def change_an_output(text: str) -> str:
    """The first digit of an output of an executed notebook is another."""
    return re.sub(r'(text/plain": (?:\[\s*)?"[^"\d]*)(\d)', lambda m: f"{m[1]}{(int(m[2]) + 1) % 10}", text, count=1)


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text(encoding="utf-8")
    if (after := change(before)) == before:
        raise SystemExit(f"{path}: nothing there to damage")
    path.write_text(after, encoding="utf-8")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def title(path: Path) -> None:
    """The first word of a notebook's title is doubled: a change of the source that its page must show."""
    edit(path, lambda text: re.sub(r'"# (\w+)', r'"# \1 \1', text, count=1))


def faults(clone: Clone) -> dict[str, tuple[Callable[[], object], str | None]]:
    """What is done to a built clone, by name, and the mounts that the build after it sees."""
    executed, source = clone.executed[0], clone.notebooks[0]
    table = clone.folder / "morphlib/data/paper_runs.csv"
    page = f"notebooks/{source.stem}.html"
    records = clone.folder / ".snakemake/metadata"
    contents = yaml.safe_load((clone.folder / "_toc.yml").read_text())

    def older() -> None:
        edit(table, change_a_number)
        os.utime(table, (0, 0))

    def later() -> None:
        os.utime(executed, (time.time() + 86400,) * 2)
        os.utime(clone.folder / "_build/smoke/html/.snakemake_timestamp", (time.time() + 86400,) * 2)
        title(source)

    def prose_too() -> None:
        edit(executed, change_an_output)
        edit(clone.folder / f"{contents['root']}.md", lambda text: f"{text}\nMore.\n")

    def interrupted() -> None:
        title(source)
        build = clone.start()
        clone.kernel(build).kill()
        print(f"    exit {build.wait()}: {clone.named()}", flush=True)

    def orphan(which: str) -> None:
        executed.unlink()
        build = clone.start()
        clone.kernel(build)
        process = psutil.Process(build.pid)
        if which == "Snakemake":
            process = next(child for child in process.children() if "snakemake" in " ".join(child.cmdline()))
        process.kill()
        build.wait()

    return {
        "executed notebook cut at half": (lambda: half(executed), None),
        "a number changed in an executed notebook": (lambda: edit(executed, change_an_output), None),
        "the same, and a page of prose edited": (prose_too, None),
        "executed notebook deleted": (executed.unlink, None),
        "a result file of the built book corrupted": (
            lambda: edit(clone.folder / f"_build/smoke/html/results/{source.stem}.json", change_a_number), None),
        "a result file of the published book corrupted": (
            lambda: edit(clone.folder / PAGES / f"results/{source.stem}.json", change_a_number), None),
        "an executed notebook of a chapter that is gone": (
            lambda: shutil.copy(executed, executed.with_name("00_gone.ipynb")), None),
        "data table deleted": (table.unlink, None),
        "data table cut at half": (lambda: half(table), None),
        "a digit changed in a data table": (lambda: edit(table, change_a_number), None),
        "the same, its time that of an old file": (older, None),
        "a page of the published book edited": (lambda: edit(clone.folder / PAGES / page, change_a_number), None),
        "a page of the built book edited": (lambda: edit(clone.folder / "_build/smoke/html" / page, change_a_number), None),
        "_build read-only": (lambda: None, READ_ONLY),
        "disk full while a notebook runs": (executed.unlink, FULL.replace("ROOM", "100")),
        "disk full while the book is built": (lambda: title(source), FULL.replace("ROOM", "4000")),
        ".snakemake deleted": (lambda: shutil.rmtree(clone.folder / ".snakemake"), None),
        ".snakemake corrupted": (lambda: [half(path) for path in records.rglob("*") if path.is_file()], None),
        "presets.yml cut in the middle of a list": (
            lambda: edit(clone.folder / "notebooks/presets.yml", lambda text: text[: text.index("[") + 5]), None),
        "outputs from tomorrow, and a notebook edited": (later, None),
        "a notebook edited, its kernel killed; run again": (interrupted, None),
        "Snakemake alone killed; run again": (lambda: orphan("Snakemake"), None),
        "the outer process alone killed; run at once": (lambda: orphan("outer"), None),
        "a notebook that fails": (
            lambda: edit(source, lambda text: text.replace('"from morphlib', '"1 / 0\\n",\n    "from morphlib', 1)), None),
    }  # fmt: skip


def kills(clone: Clone, clean: dict[str, str], seconds: float, number: int, chance: random.Random) -> None:
    print("| kill -9 after | what lay there | next run | seconds | the book |\n|---|---|---|---|---|", flush=True)
    for kill in range(number):
        clone.bare()
        moment = seconds * (kill + chance.random()) / number
        build = clone.start()
        time.sleep(moment)
        os.killpg(build.pid, signal.SIGKILL)
        build.wait()
        executed = sum(path.exists() for path in clone.executed)
        pages = [name for name in ("_build/smoke/html", str(PAGES)) if (clone.folder / name).exists()]
        lay = f"{executed} of {len(clone.executed)} executed{', pages' * bool(pages)}{', published' * (len(pages) == 2)}"
        start = time.perf_counter()
        code = clone.build()
        same = "same" if clone.book() == clean else "DIFFERENT"
        print(f"| {moment:.1f} s | {lay} | exit {code} | {time.perf_counter() - start:.0f} | {same} |", flush=True)


def others(clone: Clone, clean: dict[str, str], chosen: str) -> None:
    print("\n| fault | exit | what it says | the book after it | mended and run again |\n|---|---|---|---|---|", flush=True)
    for name in faults(clone):
        if not re.search(chosen, name):
            continue
        inject, mount = faults(clone)[name]
        if mount and (os.geteuid() or not shutil.which("unshare")):
            print(f"| {name} | | not done: it takes root, to mount | | |", flush=True)
            continue
        inject()
        while (code := clone.build(mount)) == 2 and "another build" in clone.log():
            print(f"    exit 2: {clone.named()}", flush=True)
            time.sleep(10)
        said = clone.named().replace("|", "\\|")
        after = clone.book(Path("_after") if mount and "_after" in mount else PAGES)
        status = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=clone.folder, capture_output=True, check=True)
        dirty = bool(status.stdout)
        book = "same" if after == clean else "that of the changed source" if dirty and not code else "DIFFERENT"
        clone.git("checkout", "-q", "--", ".")
        shutil.rmtree(clone.folder / "_after", ignore_errors=True)
        mended = (
            "–"
            if after == clean and not (code or dirty)
            else f"exit {clone.build()}, {'same' if clone.book() == clean else 'DIFFERENT'}"
        )
        print(f"| {name} | {code} | {said or 'nothing'} | {book} | {mended} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--notebooks", default="03", help="numbers of the notebooks of the small book, with commas")
    parser.add_argument("--all", action="store_true", help="all notebooks, all pages")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--only", default="", help="of the other faults those whose name matches")
    parser.add_argument("--seed", type=int, default=0, help="for the moments of the kills")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Clone(Path(folder) / "clone", None if arguments.all else arguments.notebooks.split(","))
        books = []
        for _ in range(2):
            clone.bare()
            start = time.perf_counter()
            if clone.build():
                raise SystemExit(f"a clean build fails:\n{clone.log()[-5000:]}")
            books.append(clone.book())
        seconds = time.perf_counter() - start
        differ = [name for name in books[0].keys() | books[1].keys() if books[0].get(name) != books[1].get(name)]
        if differ:
            raise SystemExit(f"two clean builds differ: {', '.join(sorted(differ))}")
        print(
            f"{len(clone.notebooks)} notebooks, {len(books[0])} files, {seconds:.0f} s; two clean builds are the same\n",
            flush=True,
        )
        kills(clone, books[0], seconds, arguments.kills, random.Random(arguments.seed))
        others(clone, books[0], arguments.only)


if __name__ == "__main__":
    main()
