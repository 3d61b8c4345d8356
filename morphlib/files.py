"""Files of ours: where they are kept between runs, and how they are written whole or not at all; JSON without NaN."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from morphlib import __version__
from morphlib.errors import InputError


def home() -> Path:
    """What belongs to this machine and outlives a run: ``$MORPH_HOME``, or ``~/.cache/morph``.

    Raises ``InputError`` where neither that variable nor a home folder is known.
    """
    try:
        return Path(os.environ.get("MORPH_HOME") or Path.home() / ".cache/morph")
    except RuntimeError:
        raise InputError("no home folder is known here; set MORPH_HOME to a folder that stays") from None


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits; the file may be larger than the memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(paths: Iterable[str]) -> str:
    """One SHA-256 for several files, of their names and contents."""
    return hashlib.sha256("".join(f"{path} {sha256(Path(path))}\n" for path in paths).encode()).hexdigest()


def commit() -> str:
    """The commit of this package's checkout, ``-dirty`` where a file differs; else what pip installed it at, or its version."""
    tracked = ["git", "ls-files", "--error-unmatch", "__init__.py"]  # else a checkout around an installed package would answer
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        for command in (tracked, describe):
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    with suppress(metadata.PackageNotFoundError, KeyError, ValueError):  # it came from an index, or lies there uninstalled
        installed = json.loads(metadata.distribution("morphlib").read_text("direct_url.json") or "")
        return str(installed["vcs_info"]["commit_id"][:12])
    return f"morphlib {__version__}"


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text. It has no NaN and no infinity; what cannot be said is null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=indent)


@contextmanager
def writing(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turns what the operating system says against writing ``path``, and ``errors``, into ``InputError``."""
    try:
        yield
    except (OSError, *errors) as error:  # type: ignore[misc]
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be written ({why}); name a place of yours with room") from None


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[int]:
    """Holds a file against other processes, for as long as the context or this process lasts.

    Gives the file's descriptor: a process that inherits it holds the file too.

    Where another process holds it, waits, or with ``busy`` raises an ``InputError`` that says so. Raises it as `writing` too.
    """
    import fcntl  # Windows has none, and what writes no file needs no lock

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise InputError(str(busy)) from None
        yield file.fileno()


def replace_folder(source: Path, destination: Path) -> None:
    """Move ``source`` to ``destination``, which is never seen half-written, and after a failure is what it was."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    old = _brought_back(destination)
    shutil.rmtree(old, ignore_errors=True)
    if destination.is_dir():
        destination.replace(old)
    try:
        source.replace(destination)
    finally:
        _brought_back(destination)
    shutil.rmtree(old, ignore_errors=True)


def _brought_back(folder: Path) -> Path:
    """Where a folder lies while another takes its place; one that was left there is put back."""
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir() and not folder.exists():
        old.replace(folder)
    return old


@contextmanager
def own_place(folder: Path, name: str) -> Iterator[Path]:
    """A path inside ``folder`` for this writer alone; what still lies there at the end is removed.

    So is what a killed writer left under this name: each holds a lock, which the operating system ends with it. Raises
    ``InputError`` as `locked`, and ``OSError``.
    """
    for left in folder.glob(f".{glob.escape(name)}-*.partial/lock"):
        with suppress(InputError), locked(left, "its writer is at work"):
            shutil.rmtree(left.parent, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-", suffix=".partial", ignore_cleanup_errors=True) as own,
        locked(Path(own, "unheld")),
    ):
        Path(own, "unheld").rename(Path(own, "lock"))  # only now: others take a lock that nobody holds for one that was left
        yield Path(own, "made")


@contextmanager
def replacing(path: Path, *errors: type[Exception]) -> Iterator[Path]:
    """A path for a file or a folder, which takes the place of ``path`` at the end; after a failure nothing of it is left.

    The folder above is made where there is none. Of two writers of a file at once the last one to end stays. Raises
    ``InputError`` as `writing`, and for a path without a name.
    """
    if not path.name:
        raise InputError(f"{path}: cannot be replaced; give the name of a file or folder inside it")
    with writing(path, *errors):
        path.parent.mkdir(parents=True, exist_ok=True)
        _brought_back(path)
        with own_place(path.parent, path.name) as partial:
            yield partial
            if partial.is_dir():
                replace_folder(partial, path)
            else:
                partial.replace(path)
