"""Files of ours: where they are kept between runs, and how they are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from morphlib.errors import InputError


def home() -> Path:
    """What belongs to this machine and outlives a run: ``$MORPH_HOME``, or ``~/.cache/morph``."""
    return Path(os.environ.get("MORPH_HOME") or Path.home() / ".cache/morph")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits; the file may be larger than the memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turns what the operating system says against writing ``path``, and ``errors``, into ``InputError``."""
    try:
        yield
    except (OSError, *errors) as error:  # type: ignore[misc]
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be written ({why}); name a place of yours with room") from None


@contextmanager
def replacing(path: Path, *errors: type[Exception]) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` at the end; after a failure nothing of it is left.

    The folder is made where there is none. Raises ``InputError`` as `writing`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path, *errors):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()
