import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar

from conftest import ROOT
from morphlib import scores
from morphlib.errors import InputError

NAMES = list(scores.paper_tasks())
outcomes = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=80)


def record(hits, category=None, **columns):
    n = len(hits)
    standard = {
        "task": "t",
        "paper": None,
        "metric": "acc",
        "ids": [str(i) for i in range(n)],
        "category": category or ["t"] * n,
    }
    standard |= {"scores": {"acc": list(map(float, hits))}, "chance": [0.25] * n, "right": []}
    return {**standard, "nats": [1.0] * n, "bytes": [2] * n, "truncated": 0, **columns}


# the paper's tasks


def test_there_are_eleven_and_winograd_alone_is_not_offline():
    assert len(NAMES) == 11
    assert [name for name, task in scores.paper_tasks().items() if not task["offline"]] == ["winograd"]
    for name, task in scores.paper_tasks().items():
        assert task["metric"] in ("acc", "acc_norm") and task["licence"] and task["source"] and task["difference"], name


def test_averages_of_public_models_come_back_to_the_printed_digit():
    rows = scores.baselines()
    assert len(rows) == 11
    for row in rows:
        assert f"{scores.average({name: float(row[name]) for name in NAMES}):.2f}" == row["average"], row["model"]


def test_the_papers_table_names_rows_of_other_tables_and_agrees_with_them():
    """Averages are those of the accuracies by task where there are any, and layers are those of the shape but once."""
    data = ROOT / "morphlib/data"
    table = pd.read_csv(data / "paper_models.csv")
    latencies = pd.read_csv(data / "latency_reference.csv").set_index("id")
    assert len(table) == 8 and table["source"].notna().all() and table["accuracy"].between(0.49, 0.54).all()
    assert set(table["open_model"]) <= set(pd.read_csv(data / "open_models.csv")["name"])
    averages = {row["model"]: float(row["average"]) for row in scores.baselines()}
    for row in table.dropna(subset=["baseline"]).itertuples():
        assert averages[row.baseline] == row.accuracy, row.model
    layers = [int(latencies["shape"][name].partition("x")[0]) for name in table["latency"]]
    assert table["model"][table["layers"] != layers].tolist() == ["Pythia-1.3B"]


@pytest.mark.parametrize("missing", NAMES)
def test_ten_are_never_averaged_as_eleven(missing):
    values = dict.fromkeys(NAMES, 0.5)
    assert scores.average(values) == 0.5
    with pytest.raises(InputError, match=missing):
        scores.average({name: value for name, value in values.items() if name != missing})


def test_a_mean_says_of_how_many_it_is():
    rows = [{"paper": name, "value": i / 10, "standard_error": 0.01, "chance": 0.2} for i, name in enumerate(NAMES)]
    eleven, ten = scores.of_the_eleven(rows), scores.of_the_eleven(rows[:-1])
    assert eleven["of"] == 11 and eleven["missing"] == [] and eleven["value"] == pytest.approx(0.5)
    assert eleven["standard_error"] == pytest.approx(0.01 / math.sqrt(11))
    assert ten["of"] == 10 and ten["missing"] == ["winograd"] and ten["value"] == pytest.approx(0.45)
    assert scores.of_the_eleven(rows[1:]) is None and scores.of_the_eleven([*rows, rows[0]]) is None
    assert scores.of_the_eleven([{"paper": None, "value": 1.0}]) is None


# one model


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=50))
def test_one_category_is_a_mean_with_its_standard_error(values):
    value, error = scores.macro_mean(values, ["a"] * len(values))
    assert value == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)))


def test_categories_count_alike_whatever_their_size():
    value, error = scores.macro_mean([1, 1, 1, 1, 0, 1], ["a"] * 4 + ["b"] * 2)
    assert value == 0.75 and error == pytest.approx(math.sqrt(0 + 0.5 / 2) / 2)
    row = scores.summary(record([1, 1, 1, 1, 0, 1], ["a"] * 4 + ["b"] * 2))
    assert row["value"] == 0.75 and [part["value"] for part in row["categories"]] == [1.0, 0.5]
    nouns = record([1] * 90 + [0] * 10 + [1] * 10 + [0] * 90, ["near"] * 100 + ["far"] * 100, chance=[0.5] * 200)
    row = scores.summary(nouns)
    assert row["verdict"] == "at chance" and [part["verdict"] for part in row["categories"]] == ["above chance", "below chance"]


def test_one_item_of_a_category_leaves_the_verdict_open():
    row = scores.summary(record([1, 1, 1], ["a", "b", "b"], chance=[0.5] * 3))
    assert row["verdict"] == "too few items" and math.isnan(row["standard_error"])


@pytest.mark.parametrize(
    ("n_right", "n_yes", "verdict"),
    [(25, 0, "at"), (33, 0, "at"), (60, 0, "above"), (5, 0, "below"), (60, 62, "at"), (80, 62, "above")],
)
def test_a_model_at_chance_is_said_to_be_so(n_right, n_yes, verdict):
    right = [1] * n_yes + [0] * (100 - n_yes) if n_yes else []
    row = scores.summary(record([1] * n_right + [0] * (100 - n_right), right=right))
    assert row["verdict"] == f"{verdict} chance"
    assert row["chance"] == (n_yes / 100 or 0.25) and row["low"] < row["value"] < row["high"]


def test_mmlu_online_is_one_task_of_57_subjects():
    parts = [record([i % 2] * (1 + i), task=f"mmlu_{i}", task_hash=str(i), right=[i % 4] * (1 + i)) for i in range(57)]
    other = record([1, 0], task="copa", paper="copa")
    whole, left = scores.merge([other, *parts])
    assert left == other and (whole["task"], whole["paper"]) == ("mmlu", "mmlu")
    row = scores.summary(whole)
    assert row["n"] == sum(range(1, 58)) and row["value"] == pytest.approx(28 / 57) and len(row["categories"]) == 57
    assert len(set(whole["ids"])) == row["n"] == len(whole["right"])
    assert scores.merge([other, *parts[1:]]) == [other, *parts[1:]]


def test_a_model_that_knows_nothing_needs_eight_bits_a_byte():
    sizes = [3, 7, 1, 12]
    row = scores.summary(record([0, 0, 1, 0], nats=[size * math.log(256) for size in sizes], bytes=sizes))
    assert row["bits_per_byte"] == pytest.approx(8) and row["bits_per_byte_error"] == pytest.approx(0, abs=1e-9)


# two models


@given(outcomes)
def test_a_comparison_is_mcnemars(pairs):
    first, second = (record(side) for side in zip(*pairs, strict=True))
    (row,) = scores.compare([first], [second])
    table = np.zeros((2, 2))
    for x, y in pairs:
        table[x, y] += 1
    assert row["p"] == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert row["difference"] == pytest.approx((row["gained"] - row["lost"]) / len(pairs))
    assert row["low"] <= row["difference"] + 1e-12 and row["difference"] <= row["high"] + 1e-12
    (other,) = scores.compare([second], [first])
    assert other["difference"] == pytest.approx(-row["difference"]) and other["p"] == pytest.approx(row["p"])


def test_the_interval_is_that_of_paired_differences():
    rng = np.random.default_rng(0)
    x = rng.random(2000) < 0.5
    y = np.where(rng.random(2000) < 0.8, x, rng.random(2000) < 0.7)
    (row,) = scores.compare([record(x)], [record(y)])
    change = y.astype(float) - x
    half = 1.96 * change.std(ddof=1) / math.sqrt(2000)
    assert [row["low"], row["high"]] == pytest.approx([change.mean() - half, change.mean() + half], abs=0.1 * half)
    assert row["verdict"] == ("not told apart" if row["low"] <= 0 <= row["high"] else "second is better")


def test_a_few_items_that_are_all_alike_make_no_model_better():
    """Three items that only the second has right: p = 2 / 2^3; six: 2 / 2^6."""
    (few,), (enough,) = (scores.compare([record([0] * n)], [record([1] * n)]) for n in (3, 6))
    assert (few["low"], few["high"], few["p"]) == (1.0, 1.0, 0.25) and few["verdict"] == "not told apart"
    assert enough["p"] == 2 / 64 and enough["verdict"] == "second is better"
    names = [str(i) for i in range(57)]
    (single,) = scores.compare([record([0] * 57, names)], [record([1] * 2 + [0] * 55, names)])
    assert single["verdict"] == "too few items" and math.isnan(single["low"]) and math.isnan(single["high"])


@given(outcomes, st.randoms(use_true_random=False))
def test_items_are_matched_by_name(pairs, random):
    x, y = zip(*pairs, strict=True)
    order = list(range(len(y)))
    random.shuffle(order)
    shuffled = record([y[i] for i in order], ids=[str(i) for i in order])
    assert scores.compare([record(x)], [shuffled]) == scores.compare([record(x)], [record(y)])


def test_only_common_items_count_and_there_must_be_some():
    (row,) = scores.compare([record([1, 0, 1])], [record([0, 1], ids=["1", "7"])])
    assert row["n"] == 1 and (row["first"], row["second"]) == (0.0, 0.0)
    for other in (record([1], ids=["x"]), record([1], task="u")):
        with pytest.raises(InputError, match="no item in common"):
            scores.compare([record([1, 0])], [other])


def test_tasks_of_the_paper_are_also_compared_together():
    first = [record([1, 0, 0, 0], task=name, paper=name) for name in NAMES[:2]]
    second = [record([1, 1, 0, 1], task=name, paper=name) for name in NAMES[:2]]
    rows = scores.compare(first, second)
    assert [row["task"] for row in rows] == [*NAMES[:2], "mean of 2 tasks"]
    assert rows[-1]["difference"] == 0.5
    assert rows[-1]["high"] - rows[-1]["low"] < rows[0]["high"] - rows[0]["low"]


def test_bytes_compare_models_whatever_their_tokens():
    first, second = record([1, 1], nats=[2.0, 4.0], bytes=[2, 4]), record([1, 1], nats=[1.0, 2.0], bytes=[2, 4])
    (row,) = scores.compare([first], [second])
    assert row["bits_per_byte_difference"] == pytest.approx(-0.5 / math.log(2))
    assert row["bits_per_byte_difference_error"] == pytest.approx(0, abs=1e-12)


def test_the_book_says_what_the_tables_say():
    page = (ROOT / "book" / "evaluation.md").read_text(encoding="utf-8")
    for task in scores.paper_tasks().values():
        items = f"{int(task['items']):,}"
        assert f"| `{task['online']}` | {items} | {task['chance']} | `{task['metric']}` | {task['difference']} |" in page
        assert f"| `{task['online']}` | {task['source']} | {task['licence']} |" in page
    for row in scores.baselines():
        mean = scores.average({name: float(row[name]) for name in scores.paper_tasks()})
        assert f"| {row['model']} | {mean:.4f} | {row['average']} |" in page


def test_the_error_of_bits_per_byte_is_that_of_a_ratio_estimator():
    """Bits 1 and 3 of a byte each: 2 a byte, and the root of (1 + 1) n / (n - 1) = 4 over two bytes."""
    row = scores.summary(record([1, 0], nats=[math.log(2), 3 * math.log(2)], bytes=[1, 1]))
    assert (row["bits_per_byte"], row["bits_per_byte_error"]) == pytest.approx((2.0, 1.0), rel=1e-14)


def test_intervals_are_wilsons_of_one_category_and_normal_of_several():
    from statsmodels.stats.proportion import proportion_confint

    row = scores.summary(record([1] * 60 + [0] * 40))
    assert (row["low"], row["high"]) == pytest.approx(proportion_confint(60, 100, method="wilson"), rel=1e-9)
    row = scores.summary(record([1, 1, 1, 1, 0, 1], ["a"] * 4 + ["b"] * 2))
    half = 1.959963984540054 * math.sqrt(0.5 / 2) / 2
    assert (row["low"], row["high"]) == pytest.approx((0.75 - half, 0.75 + half), rel=1e-12)


def test_chance_is_that_of_categories_and_only_of_right_or_wrong():
    row = scores.summary(record([1, 1, 1, 1, 0, 1], ["a"] * 4 + ["b"] * 2, chance=[0.5] * 4 + [0.25] * 2))
    assert row["chance"] == 0.375
    graded = scores.summary(record([0.5, 1, 0]))
    assert graded["value"] == 0.5 and not {"chance", "verdict"} & set(graded)


def test_llm_foundrys_value_is_that_of_its_own_metric():
    row = scores.summary(record([1, 1], scores={"acc": [1.0, 1.0], scores.TOKEN_METRIC: [1.0, 0.0]}))
    assert row["value"] == 1.0 and row["as_llm_foundry"] == 0.5


def test_a_mean_of_ten_is_of_ten_in_all_it_says():
    rows = [{"paper": name, "value": i / 10, "standard_error": 0.01, "chance": 0.2} for i, name in enumerate(NAMES)]
    rows[0]["as_llm_foundry"] = 1.0
    ten = scores.of_the_eleven(rows[:-1])
    assert ten["chance"] == pytest.approx(0.2) and ten["as_llm_foundry"] == pytest.approx(0.45 + 1 / 10)


def test_a_comparison_counts_categories_alike_and_resamples_within_them():
    """Nothing changes in a and everything in b, whatever is drawn: the difference is one half, without spread."""
    category = ["a"] * 4 + ["b"] * 2
    (row,) = scores.compare([record([1, 1, 1, 1, 0, 0], category)], [record([1] * 6, category)])
    assert (row["first"], row["second"]) == (0.5, 1.0)
    assert (row["difference"], row["low"], row["high"]) == (0.5, 0.5, 0.5)


def test_bytes_are_compared_of_common_items():
    first = record([1, 1, 1], nats=[1.0, 2.0, 4.0], bytes=[2, 3, 4])
    second = record([1, 1, 1], ids=["2", "9", "1"], nats=[5.0, 100.0, 2.5], bytes=[4, 9, 3])
    (row,) = scores.compare([first], [second])
    assert row["bits_per_byte_difference"] == pytest.approx((0.5 + 1.0) / (3 + 4) / math.log(2), rel=1e-14)
    without = {name: value for name, value in second.items() if name != "nats"}
    assert "bits_per_byte_difference" not in scores.compare([first], [without])[0]


def test_truncated_items_of_all_subjects_are_counted():
    parts = [record([1], task=f"mmlu_{i}", task_hash=str(i), right=[0], truncated=2) for i in range(57)]
    assert scores.merge(parts)[0]["truncated"] == 2 * 57
