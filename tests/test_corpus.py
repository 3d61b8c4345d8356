import errno
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from morphlib import corpus, files
from morphlib.corpus import Corpus, Tokenizer, build
from morphlib.errors import InputError

SOME = 200_000  # bytes of docstrings: those of a few files

few_words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=30).map(" ".join)
texts = st.lists(st.text(max_size=30), max_size=20)


def row(name, kind="english", **columns):
    """A source as in the table: of made-up documents unless ``columns`` say where they are."""
    blank = dict.fromkeys(corpus.sources()["wikipedia"], "")
    return {**blank, "name": name, "kind": kind, "default": "1", "wheel": "made.whl", "labelled": "0", **columns}


@contextmanager
def made_up(**documents):
    """Sources of given documents in place of the table; names that begin with api are API prose."""
    table = {name: row(name, "api" if name.startswith("api") else "english") for name in documents}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(corpus, "sources", lambda: table)
        patch.setattr(corpus, "documents", lambda source, progress: iter(documents[source["name"]]))
        yield Path(folder)


def built(folder, **settings):
    build(folder, **settings)
    made = Corpus.open(folder)
    return made.tokenizer.decode(made.train), {name: made.tokenizer.decode(part) for name, part in made.held_out.items()}


def plain(text):
    return " ".join(text.casefold().split())


def held_out(text):
    """The split as its documentation states it, without the module's own code."""
    return int(hashlib.sha256(plain(text).encode()).hexdigest()[:8], 16) < 0.02 * 2**32


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """Puts a wheel of the given files into the cache and returns its source."""
    monkeypatch.setenv("MORPH_HOME", str(tmp_path))

    def make(content, **columns):
        path = tmp_path / "text" / "made.whl"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        return row("made", reader="objects", depth="1", sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **columns)

    return make


# what the table says


def test_the_table_is_whole():
    kinds = {"english", "api", "docstrings", "evaluation", "tokenizer", "model"}
    for name, source in corpus.sources().items():
        assert source["kind"] in kinds and source["reader"] and source["licence"], name
        assert source["default"] in (("",) if source["kind"] in ("evaluation", "tokenizer", "model") else ("0", "1")), name
        if source["wheel"]:
            assert re.fullmatch("[0-9a-f]{64}", source["sha256"]), name
            assert source["kind"] not in ("english", "api") or int(source["bytes"]) > int(source["documents"]) > 0, name
            assert source["wheel"] == f"{source['package'].replace('-', '_')}-{source['version']}-py3-none-any.whl"
    assert "olmes" not in corpus.text_sources("1") and "olmes" in corpus.text_sources()


@pytest.mark.parametrize("name", [name for name, source in corpus.sources().items() if source["wheel"] and name != "smollm2"])
def test_the_real_wheels_hold_what_the_table_says(name):
    source = corpus.sources()[name]
    folder = files.home() / "text"
    if not (folder / source["wheel"]).exists():
        pytest.skip(f"{source['wheel']} is not in {folder}; `morph corpus build` downloads it")
    if name in ("wikipedia", "recipes", "factbook"):  # the others take longer
        found = [text.encode() for text in corpus.documents(source) if text.strip()]
        assert [str(len(found)), str(sum(map(len, found)))] == [source["documents"], source["bytes"]]
    elif name == "gpt-neox":
        pytest.importorskip("tokenizers")
        tokenizer = Tokenizer.of(name)
        assert tokenizer.encode(["Hello world"]).tolist() == [12092, 1533, 0] and tokenizer.vocab == 50432
    else:
        assert isinstance(next(corpus.rows(source))[1], dict)


# tokens


@given(texts)
@example(["", "<|endoftext|>", "é\n\n\0"])
def test_bytes_come_back_as_they_were(documents):
    tokenizer = Tokenizer()
    tokens = tokenizer.encode(documents)
    assert tokenizer.decode(tokens) == documents
    assert tokens.dtype == np.uint16 and len(tokens) == sum(len(text.encode()) + 1 for text in documents)
    assert (tokens == tokenizer.end).sum() == len(documents) and tokens.max(initial=0) < tokenizer.vocab == 257


@pytest.fixture(scope="module")
def pairs():
    pytest.importorskip("tokenizers")
    return Tokenizer.of("bpe:300", ["the cat and the hat and the bat"] * 9)


@given(texts)
@example(["", "<|endoftext|>", "the hat  the hat", "é\n\n\0"])
def test_byte_pairs_come_back_as_they_were(pairs, documents):
    tokens = pairs.encode(documents)
    assert pairs.decode(tokens) == documents
    assert (tokens == pairs.end).sum() == len(documents) and tokens.max(initial=0) < pairs.vocab <= 300
    assert len(pairs.encode(["the hat and"])) < len(Tokenizer().encode(["the hat and"]))


def test_large_vocabularies_take_four_bytes():
    assert Tokenizer(vocab=2**16).encode(["a"]).dtype == np.uint16
    assert Tokenizer(vocab=2**16 + 1).encode(["a"]).dtype == np.uint32


def test_a_part_of_a_character_or_document_is_shown_all_the_same():
    assert Tokenizer().decode(np.array([97, 256, 0xC3, 98])) == ["a", "\ufffdb"]


# what is left out


@settings(max_examples=50)
@given(st.lists(st.text(alphabet="aA b\n", max_size=4), min_size=1, max_size=30))
def test_no_text_is_there_twice(documents):
    with made_up(some=["the one that is always there", *documents], more=documents) as folder:
        train, parts = built(folder)
    kept = [plain(text) for text in [*train, *parts["some"], *parts["more"]]]
    assert sorted(kept) == sorted({"the one that is always there", *filter(None, map(plain, documents))})
    assert not parts["more"]  # the first source that has a text keeps it


def thirteen(text):
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


@given(st.lists(few_words, max_size=8), st.lists(few_words, max_size=4))
def test_texts_that_share_13_words_are_found_and_no_others(documents, evaluations):
    forbidden = set().union(*map(thirteen, evaluations))
    expected = [bool(thirteen(text) & forbidden) for text in documents]
    assert corpus.contaminated(documents, evaluations).tolist() == expected


def test_case_and_punctuation_do_not_hide_an_evaluation_item():
    item = "One two three four five six seven eight nine ten eleven twelve thirteen"
    hidden = "And ONE, two; three four five-six seven eight\nnine (ten) eleven twelve 'thirteen'!"
    short = hidden.replace("thirteen", "fourteen")
    assert corpus.contaminated([hidden, short], [item]).tolist() == [True, False]
    with made_up(some=[hidden, short, hidden.lower()]) as folder:
        train, _ = built(folder, evaluations=iter([item]))
        counts = json.loads((folder / corpus.MANIFEST).read_text())["documents"]
    assert train == [short]
    assert {count["fate"]: count["documents"] for count in counts} == {"contaminated": 1, "duplicate": 1, "train": 1}


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.lists(st.integers(1, 40), max_size=40))
def test_api_prose_is_at_most_a_third(english, api):
    prose = {
        "some": [f"{i:04}" + "x" * n for i, n in enumerate(english)],
        "api": [f"{i:04}" + "y" * n for i, n in enumerate(api)],
    }
    # of few documents all may be held out
    prose["some"].append(next(f"word {i}" for i in range(100) if not held_out(f"word {i}")))
    with made_up(**prose) as folder:
        counts = build(folder)["documents"]
    sizes = {(count["source"], count["fate"]): count["bytes"] for count in counts}
    kept = {name: sizes.get((name, "train"), 0) + sizes.get((name, "held_out"), 0) for name in prose}
    assert kept["api"] <= sum(kept.values()) / 3
    if ("api", "over_share") in sizes:  # not one more would have fitted than the largest
        assert kept["api"] + 44 > kept["some"] / 2
    assert kept["some"] == sum(map(len, prose["some"]))


def test_api_prose_alone_is_refused():
    with made_up(api=["a", "b"]) as folder, pytest.raises(InputError, match="English beside API prose"):
        build(folder)


# the split


def test_the_split_is_told_by_the_text_alone():
    many = [f"document {i}" for i in range(3000)]
    with made_up(some=many[:2000], more=many[2000:]) as folder:
        first, parts = built(folder / "a", seed=0)
        again, other_parts = built(folder / "b", seed=1)
        alone, _ = built(folder / "c", names=["more"])
    assert parts["some"] and parts["more"] and first != again
    assert sorted(first) == sorted(again) == [text for text in sorted(many) if not held_out(text)]
    assert {name: sorted(part) for name, part in parts.items()} == {
        "some": sorted(text for text in many[:2000] if held_out(text)),
        "more": sorted(text for text in many[2000:] if held_out(text)),
    }
    assert {name: sorted(part) for name, part in other_parts.items()} == {name: sorted(part) for name, part in parts.items()}
    assert set(alone) < set(first)
    assert 40 < sum(map(len, parts.values())) < 80  # 2 % of 3000


# building


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docstrings")
    return folder, build(folder, ["docstrings"], limit_bytes=SOME)


def test_a_corpus_of_docstrings(docstrings):
    folder, manifest = docstrings
    made = Corpus.open(folder)
    assert manifest == made.manifest
    assert made.vocab == 257 and isinstance(made.train, np.memmap)
    assert 0.8 * SOME < len(made.train) < SOME
    assert made.tokenizer.decode(made.train)[0].strip()
    assert manifest["sizes"]["train"]["bytes"] == pytest.approx(len(made.train), rel=0.02)
    assert manifest["sources"]["docstrings"]["licence"] and manifest["settings"]["tokenizer"] == "bytes"
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "train.npy", "docstrings.npy"}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:400"])
def test_the_same_settings_give_the_same_bytes(tmp_path, tokenizer):
    if tokenizer != "bytes":
        pytest.importorskip("tokenizers")
    build(tmp_path / "a", ["docstrings"], tokenizer, limit_bytes=SOME)
    elsewhere = f"build(Path('b'), ['docstrings'], {tokenizer!r}, limit_bytes={SOME})"
    command = [sys.executable, "-c", f"from pathlib import Path; from morphlib.corpus import build; {elsewhere}"]
    paths = os.pathsep.join(map(str, [ROOT, os.environ.get("PYTHONPATH", "")]))
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": paths}, check=True)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second and (tokenizer == "bytes" or "tokenizer.json" in first)
    assert Corpus.open(tmp_path / "a").vocab == (257 if tokenizer == "bytes" else 400)


def test_progress_is_told(tmp_path):
    lines = []
    with made_up(some=["a text"]) as folder:
        build(folder, progress=lines.append)
    assert lines[0] == "some: 0.0 MB of text" and len(lines) == 2


def test_too_little_text_for_an_epoch(docstrings):
    made = Corpus.open(docstrings[0])
    made.require(len(made.train))
    with pytest.raises(InputError, match=rf"one epoch is {len(made.train)} tokens, not 1000000; .* wikipedia.*olmes"):
        made.require(1_000_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"names": ["wikipdia"]}, "wikipdia: no such source of text; .*wikipedia"),
     ({"names": ["evaluations"]}, "no such source of text"),
     ({"tokenizer": "gpt2"}, "'gpt2' is not a tokenizer"),
     ({"tokenizer": "bpe:"}, "is not a tokenizer")],
)  # fmt: skip
def test_a_slip_is_told_before_anything_is_read(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        build(tmp_path / "corpus", **arguments)
    assert not (tmp_path / "corpus").exists()


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file.*Not a directory.*; name a place") as raised:
        build(tmp_path / "file" / "corpus", ["docstrings"], limit_bytes=SOME)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["disk", "key"])
def test_an_interrupted_build_leaves_the_old_corpus(monkeypatch, fault):
    save, calls = np.save, []

    def failing(path, array):
        calls.append(path)
        if len(calls) == 2:
            raise fault
        save(path, array)

    with made_up(some=["an old text"], more=["a new text"]) as folder:
        before = built(folder, names=["some"])
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        monkeypatch.setattr(np, "save", failing)
        with pytest.raises(KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else InputError, match=r"No space|^$"):
            build(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
        monkeypatch.undo()
        assert built(folder, names=["some"]) == before


def test_a_killed_build_leaves_nothing_after_the_next():
    with made_up(some=["a text"]) as folder:
        staged = f"with corpus._staged(Path({str(folder)!r})) as stage:\n    (stage / 'train.npy').touch()"
        lines = f"import os\nfrom pathlib import Path\nfrom morphlib import corpus\n{staged}\n    os.kill(os.getpid(), 9)"
        command = [sys.executable, "-c", lines]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
        assert len(list(folder.glob(".unfinished-*"))) == 1
        build(folder)
        assert {path.name for path in folder.iterdir()} == {"manifest.json", "train.npy", "some.npy"}


# opening


DAMAGES = {
    "a changed byte": (lambda folder: changed(folder / "train.npy"), "train.npy: its SHA-256 is .*; build it anew"),
    "a cut file": (lambda folder: (folder / "train.npy").write_bytes(b""), "SHA-256"),
    "a missing file": (lambda folder: (folder / "train.npy").unlink(), "No such file"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "holds no corpus"),
    "another manifest": (lambda folder: (folder / "manifest.json").write_text("[1]"), "is no corpus of this version"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff{"), "is no corpus of this version"),
}


def changed(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_corpus_is_refused(damage):
    spoil, message = DAMAGES[damage]
    with made_up(some=["a text", "another"]) as folder:
        build(folder)
        spoil(folder)
        with pytest.raises(InputError, match=message) as raised:
            Corpus.open(folder)
    assert "\n" not in str(raised.value)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    with made_up(some=["a text"]) as folder:
        build(folder)
        manifest = json.loads((folder / corpus.MANIFEST).read_text())
        manifest["sha256"] = {f"../{name}": digest for name, digest in manifest["sha256"].items()}
        (folder / corpus.MANIFEST).write_text(json.dumps(manifest))
        assert Path(Corpus.open(folder).train.filename).parent == folder


# wheels


def test_objects_become_documents(wheel):
    tree = {
        "A": {"title": "One", "steps": ["Do <b>this</b>.", "And\n that &amp; more."], "other": "no"},
        "B": {"title": "Two", "part": {"steps": "Deep."}},
        "C": {"other": "no"},
    }
    source = wheel({"data/one.json": json.dumps(tree), "data/two.txt": "no"}, members="data/*.json", keys="title steps")
    assert list(corpus.documents(source)) == ["One\nDo this.\nAnd that & more.", "Two\nDeep.", ""]
    labelled = {**source, "labelled": "1", "keys": "steps"}
    assert list(corpus.documents(labelled)) == ["A: Do this.\nA: And that & more.", "part: Deep.", ""]
    assert next(corpus.documents({**source, "depth": "0"})).startswith("One\nDo this")
    packed = wheel({"data/one.json.gz": gzip.compress(json.dumps(tree).encode())}, members="one.json.gz", keys="*")
    assert list(corpus.documents(packed))[2] == "no"


def requests(n):
    """A question with two answers, each behind an example, and the answers once more without the question."""
    question = f"Question: an example\nAnswer: yes\n\nQuestion: {n}?\nAnswer:"
    item = {"query": f"{n}?", "choices": ["no", "yes"], "gold": 1}
    for context in (question, "Answer:"):
        for idx, answer in enumerate([" no", " yes"]):
            yield {"idx": idx, "label": n % 2, "doc": item, "request": {"context": context, "continuation": answer}}


def test_right_answers_and_evaluation_items(wheel, monkeypatch):
    lines = "".join(json.dumps(request) + "\n" for n in (1, 2) for request in requests(n))
    source = wheel({"task/requests.jsonl.gz": gzip.compress(lines.encode())}, members="requests.jsonl.gz", keys="*")
    assert list(corpus.documents({**source, "reader": "gold_answers"})) == [
        "Question: 1?\nAnswer: yes",
        "Question: 2?\nAnswer: no",
    ]
    monkeypatch.setattr(corpus, "sources", lambda: {"evaluations": source})
    assert sorted(set(corpus.evaluation_texts())) == ["1?\nno\nyes", "2?\nno\nyes"]


def test_arrow_files_are_evaluation_items(wheel, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"question": ["What?", "Who?"], "choices": [["a"], ["b", "c"]], "idx": [0, 1]})
    stream = io.BytesIO()
    with arrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    source = wheel({"sets/x/data.arrow": stream.getvalue()}, members="*.arrow requests.jsonl.gz", keys="*")
    monkeypatch.setattr(corpus, "sources", lambda: {"evaluations": source})
    assert list(corpus.evaluation_texts()) == ["What?\na", "Who?\nb\nc"]


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "data/../../evil.json", "data\\..\\evil.json"])
def test_a_member_outside_the_archive_is_refused(wheel, tmp_path, name):
    source = wheel({"data/a.json": "{}", name: "{}"}, members="*.json")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"reaches outside the archive; do not use this file"):
        list(corpus.documents(source))
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_of_a_wheel_is_unpacked_or_run(wheel, tmp_path):
    members = {"made/__init__.py": "raise SystemExit('run')", "made/a.json": '{"a": {"text": "Text."}}'}
    source = wheel(members, members="made/*.json", keys="text")
    before = sorted(tmp_path.rglob("*"))
    assert list(corpus.documents(source)) == ["Text."]
    assert "made" not in sys.modules and sorted(tmp_path.rglob("*")) == before


def test_docstrings_are_parsed_and_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "loud_package"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text('"""Module."""\nraise SystemExit("imported")\n')
    (package / "broken.py").write_text("def (:\n")
    (package / "sub" / "a.py").write_text(
        'class A:\n    """Class."""\n    async def f(self):\n        """Method."""\ndef g(): pass\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = row("docstrings", "docstrings", reader="docstrings", wheel="", members="absent_package loud_package")
    assert list(filter(None, corpus.documents(source))) == ["Module.", "Class.", "Method."]
    assert "loud_package" not in sys.modules


def test_a_folder_that_only_shares_a_packages_name_is_no_text(tmp_path, monkeypatch):
    """Python takes it for a namespace package, which lies in no one file."""
    (tmp_path / "namesake").mkdir()
    (tmp_path / "mine.py").write_text('"""A text of one\'s own."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    source = row("docstrings", "docstrings", reader="docstrings", wheel="", members="namesake")
    assert list(corpus.documents(source)) == []


# downloads


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that does as it is told, and a source that is not in the cache."""
    monkeypatch.setenv("MORPH_HOME", str(tmp_path))

    def answer(behaviour):
        def run(command, **_):
            assert "--only-binary=:all:" in command and "--no-deps" in command and command[-1] == "thing==1.0"
            destination = next(part for part in command if part.startswith("--dest="))
            return behaviour(Path(destination.removeprefix("--dest=")))

        monkeypatch.setattr(corpus.subprocess, "run", run)

    return answer


THING = row("thing", package="thing", version="1.0", wheel="thing.whl", sha256=hashlib.sha256(b"right").hexdigest())


def sending(content):
    def behaviour(destination):
        (destination / "thing.whl").write_bytes(content)
        return SimpleNamespace(returncode=0, stderr="")

    return behaviour


def test_a_download_is_kept_and_checked_again(pip, tmp_path):
    pip(sending(b"right"))
    path = corpus.download(THING)
    assert path == tmp_path / "text" / "thing.whl" and path.read_bytes() == b"right"
    pip(None)  # not called again
    assert corpus.download(THING) == path
    path.write_bytes(b"wrong")
    with pytest.raises(InputError, match=r"thing.whl: its SHA-256 is .*; remove the file, and it is downloaded anew"):
        corpus.download(THING)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MORPH_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file.*Not a directory.*; name a place"):
        corpus.download(THING)


def interrupted(destination):
    (destination / "thing.whl").write_bytes(b"rig")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [(sending(b"wrong"), InputError, r"SHA-256 is .* not kept; take thing==1.0 from PyPI, or use the source docstrings"),
     (lambda _: SimpleNamespace(returncode=0, stderr=""), InputError, "no such wheel"),
     (lambda _: SimpleNamespace(returncode=1, stderr="A: a\nB: b\n"), InputError, r"\(B: b\); .*docstrings"),
     (interrupted, KeyboardInterrupt, None)],
)  # fmt: skip
def test_a_failed_download_leaves_nothing(pip, tmp_path, behaviour, error, message):
    pip(behaviour)
    with pytest.raises(error, match=message) as raised:
        corpus.download(THING)
    assert "\n" not in str(raised.value)
    assert list((tmp_path / "text").iterdir()) == []


def test_no_network(tmp_path, monkeypatch):
    """With the real pip, against an address where nobody listens."""
    for name, value in {"MORPH_HOME": tmp_path, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
                        "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "FORCE_COLOR": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    told = r"recipes: .* cannot be downloaded \(ERROR: No matching .*\); go online, or use the source docstrings, which needs"
    with pytest.raises(corpus.NotDownloaded, match=told) as raised:
        next(corpus.documents(corpus.sources()["recipes"]))
    assert "\n" not in str(raised.value)
    with pytest.raises(corpus.NotDownloaded, match=r"smollm2: .*; go online$"):  # no text stands in for a model
        corpus.download(corpus.sources()["smollm2"])
    assert list((tmp_path / "text").iterdir()) == []


def test_dclm_without_a_network_names_the_offline_path(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"dclm: cannot be streamed .* wheels, .*docstrings"):
        next(corpus.documents(corpus.sources()["dclm"]))


def test_dclm_is_read_no_further_than_asked(monkeypatch, tmp_path):
    read = []

    def load_dataset(name, split, streaming):
        assert (name, split, streaming) == ("mlfoundations/dclm-baseline-1.0", "train", True)
        for i in range(1000):
            read.append(i)
            yield {"text": f"{i:010}"}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert build(tmp_path, ["dclm"], limit_bytes=100)["sizes"]["train"]["tokens"] == 110
    assert len(read) == 11


def test_the_book_lists_every_source_with_its_licence_size_and_hash():
    page = (ROOT / "book" / "train_your_own.md").read_text(encoding="utf-8")
    rows = [re.split(r" \| ", line.strip("| ")) for line in page.splitlines() if line.startswith("| `")]
    licences = {cells[0].strip("`"): cells[2] for cells in rows if len(cells) == 3}
    wheels = {cells[0].strip("`"): cells[1:] for cells in rows if len(cells) == 5}
    for name, source in corpus.sources().items():
        assert licences[name] == source["licence"]
        if source["wheel"]:
            package, mb, documents, sha256 = wheels[name]
            assert package == f"{source['package']} {source['version']}"
            assert source["sha256"].startswith(sha256.strip("`")) and len(sha256) > 12
        if source["bytes"]:
            assert (mb, documents) == (f"{int(source['bytes']) / 1e6:.1f}", f"{int(source['documents']):,}")
