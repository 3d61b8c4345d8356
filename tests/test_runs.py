import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT
from morphlib import runs
from morphlib.errors import InputError
from morphlib.shapes import CONVENTIONS, Shape


def test_the_papers_table(paper):
    """Counts from the authors' scripts: 35 rows at 20N, 23 at 40N, 18 at 160N, 35 shapes, the fit sets."""
    assert paper["budget"].value_counts().to_dict() == {"20N": 35, "40N": 23, "160N": 18}
    assert paper["name"].nunique() == 35
    sets = {name: int(paper[name].sum()) for name in paper if name.startswith("fit_")}
    assert sets == {
        "fit_main": 27, "fit_20N_only": 24, "fit_random_trial1": 6, "fit_random_trial2": 6, "fit_random_trial4": 6,
        "fit_all_160N": 35,
    }  # fmt: skip
    assert set(paper["n_count"]) == {"total"}
    assert paper["source"].str.len().min() > 0


def test_bundled_tables_name_their_sources():
    for path in (ROOT / "morphlib/data").glob("*.csv"):
        table = pd.read_csv(path)
        # measured here: their source is the machine, the commit and the date
        if path.stem.startswith("latency_cpu") or path.stem == "latency_small":
            assert table[["hardware", "library", "commit", "date"]].notna().all(axis=None)
        elif path.stem == "small_runs":
            assert table[["hardware", "torch", "commit", "date", "corpus"]].notna().all(axis=None)
        elif path.stem not in ("latency_grid", "latency_small_grid", "agreement_words", "tables", "columns"):  # ours
            assert table["source"].notna().all(), path.name


@pytest.mark.parametrize("count", CONVENTIONS)
def test_a_table_converts_between_conventions_and_back(paper, tmp_path, count):
    converted = runs.load("paper", count)
    tables = {"total": 0, "without_input_embedding": 1, "non_embedding": 2}[count]
    assert np.array_equal(converted["n_params"], paper["n_params"] - tables * 50432 * paper["d_model"])
    converted.to_csv(tmp_path / "runs.csv", index=False)
    assert np.array_equal(runs.load(tmp_path / "runs.csv", "total")["n_params"], paper["n_params"])


REQUIRED = ["name", "n_params", "d_model", "n_layers", "tokens", "loss"]


def written(table, path):
    table.to_csv(path, index=False)
    return path


def test_the_smallest_table_needs_a_convention(paper, tmp_path):
    path = written(paper[REQUIRED], tmp_path / "runs.csv")
    with pytest.raises(InputError, match="n_count"):
        runs.load(path)
    table = runs.load(path, "total")
    assert set(table["n_count"]) == {"total"}
    assert table["family"].nunique() > 1


def test_a_rounded_count_agrees_with_its_shape_and_another_convention_does_not(paper, tmp_path):
    rounded = paper.assign(n_params=[float(f"{n:.3g}") for n in paper["n_params"]])
    assert len(runs.load(written(rounded, tmp_path / "runs.csv"))) == 76
    for other in ("without_input_embedding", "non_embedding"):
        with pytest.raises(InputError, match="does not agree"):
            runs.load(written(paper.assign(n_count=other), tmp_path / "runs.csv"))


FAULTS = {
    "missing column": (lambda t: t.drop(columns="loss"), "column loss is missing"),
    "text in a number": (lambda t: t.astype(object).assign(loss=["high", *t["loss"][1:]]), "row 2, column loss: high"),
    "negative loss": (lambda t: t.assign(loss=[-1.0, *t["loss"][1:]]), "row 2, column loss: -1.0"),
    "missing value": (lambda t: t.assign(tokens=[np.nan, *t["tokens"][1:]]), "row 2, column tokens: the value is missing"),
    "infinite": (lambda t: t.assign(tokens=[np.inf, *t["tokens"][1:]]), "row 2, column tokens: inf"),
    "zero layers": (lambda t: t.assign(n_layers=[*t["n_layers"][:-1], 0]), "row 77, column n_layers: 0"),
    "half a layer": (lambda t: t.assign(n_layers=[*t["n_layers"][:-1], 2.5]), "row 77, column n_layers: 2.5"),
    "duplicate row": (lambda t: pd.concat([t, t.iloc[[3]]]), "row 78 repeats"),
    "not a fit set": (lambda t: t.assign(fit_main=2), "row 2, column fit_main: 2"),
    "unknown convention": (lambda t: t.assign(n_count="active"), "row 2, column n_count: active"),
    "mixed conventions": (
        lambda t: t.drop(columns=["d_ff"]).assign(n_count=["total"] * 75 + ["non_embedding"]), "mixes conventions"),
    "count against shape": (lambda t: t.assign(n_params=2 * t["n_params"]), "row 2, column n_params"),
    "heads": (lambda t: t.assign(n_heads=7), "row 2: 7 heads"),
    "kv heads without heads": (
        lambda t: t.drop(columns="n_heads").assign(n_kv_heads=4), "column n_heads is missing"),
    "a width beyond all": (lambda t: t.assign(d_model=1e25), "row 2, column d_model: 1e+25"),
    "no rows": (lambda t: t.head(0), "there are no rows"),
}  # fmt: skip


ODD_FILES = {
    "more fields than the header": ("name,n_params\na,1,2\nb,1,2\n", "cannot be read as a CSV table"),
    "more fields in one row": ("name,n_params\na,1\nb,1,2\n", "cannot be read as a CSV table"),
    "semicolons": ("name;n_params\na;1\n", "not separated by commas"),
    "a column twice": ("name,loss,loss\na,1,2\n", "column loss is there twice"),
    "an empty file": ("", "cannot be read as a CSV table"),
}


@pytest.mark.parametrize("odd", ODD_FILES)
def test_an_odd_file_is_refused_and_not_shifted(tmp_path, odd):
    content, message = ODD_FILES[odd]
    path = tmp_path / "runs.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        runs.load(path)


def test_legal_variations_of_csv(paper, tmp_path):
    """Spaces after commas, a byte-order mark, CRLF, quotes, a trailing comma, an ending that is no compression."""
    text = paper[[*REQUIRED, "n_count"]].to_csv(index=False)
    header, _, rows = text.partition("\n")
    variations = {
        "spaces.csv": text.replace(",", ", "),
        "bom.csv": "\ufeff" + text,
        "crlf.csv": text.replace("\n", "\r\n"),
        "quotes.csv": paper[[*REQUIRED, "n_count"]].to_csv(index=False, quoting=1),
        "trailing.csv": header + "\n" + rows.replace("\n", ",\n"),
        "plain.zip": text,
    }
    for name, content in variations.items():
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        assert np.array_equal(runs.load(tmp_path / name)["n_params"], paper["n_params"]), name


def test_columns_mapped_onto_others(paper, tmp_path):
    path = written(paper.assign(final=paper["loss"] + 1), tmp_path / "runs.csv")
    assert np.array_equal(runs.load(path, columns={"loss": "final"})["loss"], paper["loss"] + 1)
    swapped = written(paper.rename(columns={"loss": "tokens", "tokens": "loss"}), tmp_path / "swapped.csv")
    table = runs.load(swapped, columns={"loss": "tokens", "tokens": "loss"})
    assert np.array_equal(table["loss"], paper["loss"]) and np.array_equal(table["tokens"], paper["tokens"])
    with pytest.raises(InputError, match="mapped to two names"):
        runs.load(path, columns={"loss": "final", "name": "final"})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_table_ends_in_one_clear_line(paper, tmp_path, fault):
    change, message = FAULTS[fault]
    path = written(change(paper), tmp_path / "runs.csv")
    with pytest.raises(InputError) as raised:
        runs.load(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_conversion_needs_the_shape(paper, tmp_path):
    path = written(paper[[*REQUIRED, "n_count"]], tmp_path / "runs.csv")
    with pytest.raises(InputError, match="d_ff, vocab is missing"):
        runs.load(path, "non_embedding")


def test_columns_by_other_names(paper, tmp_path):
    path = written(paper.rename(columns={"n_params": "N", "tokens": "D"}), tmp_path / "runs.csv")
    table = runs.load(path, columns={"n_params": "N", "tokens": "D"})
    assert np.array_equal(table["n_params"], paper["n_params"])
    with pytest.raises(InputError, match="column size, mapped to n_params, is missing"):
        runs.load(path, columns={"n_params": "size"})


def test_planned_runs_need_no_loss(paper, tmp_path):
    path = written(paper.drop(columns="loss"), tmp_path / "runs.csv")
    assert "loss" not in runs.load(path, measured=False)
    with pytest.raises(InputError, match="column loss is missing"):
        runs.load(path)


def test_losses_averaged_from_logs_as_the_paper_does(paper, tmp_path):
    """Written out step by step: a moving average with weight 0.9 on the new value, then its mean from the start."""
    rng = np.random.default_rng(0)
    losses = 3 + 7 * np.exp(-np.arange(50) / 10) + rng.normal(0, 0.1, 50)
    pd.DataFrame({"tokens": np.arange(1, 51) * 1e6, "loss": losses}).to_csv(tmp_path / "one.csv", index=False)
    smoothed, total = losses[0], losses[0]
    for loss in losses[1:20]:
        smoothed = 0.9 * loss + 0.1 * smoothed
        total += smoothed
    table = paper[REQUIRED].head(1).assign(tokens=20e6, log="one.csv", n_count="total").drop(columns="loss")
    path = written(table, tmp_path / "runs.csv")
    assert runs.load(path, average_logs=True)["loss"].item() == round(total / 20, 4)
    for log, message in (("two.csv", "cannot be read"), ("runs.csv", "column loss is missing")):
        with pytest.raises(InputError, match=message):
            runs.load(written(table.assign(log=log), tmp_path / "runs.csv"), average_logs=True)
    with pytest.raises(InputError, match="has no step up to"):
        runs.load(written(table.assign(tokens=5.0), tmp_path / "runs.csv"), average_logs=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_file_is_a_table_or_a_clear_error(tmp_path, content):
    path = tmp_path / "fuzz.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        runs.load(path)
    assert "\n" not in str(raised.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_cell_may_be_anything(paper, tmp_path, data):
    column = data.draw(st.sampled_from([*REQUIRED, "n_count", "n_heads", "d_ff", "vocab", "fit_main"]))
    value = data.draw(st.one_of(st.text(max_size=8), st.floats(), st.integers(-5, 10**12), st.none()))
    table = paper.head(3).astype(object)
    table.loc[1, column] = value
    try:
        loaded = runs.load(written(table, tmp_path / "fuzz.csv"))
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(loaded["loss"]).all() and (loaded["loss"] > 0).all()
        assert (loaded["n_layers"] >= 1).all()


def test_the_variables_are_what_the_laws_say():
    table = {"n_params": [1e8], "tokens": [2e9], "d_model": [512], "n_layers": [8]}
    compute, ratio = 6 * 1e8 * 2e9, 2e9 / 1e8
    expected = {"N": 1e8, "D": 2e9, "R": 64, "d": 512, "L": 8, "W": 512 / 1e4, "C/M": compute / ratio, "CM": compute * ratio}
    # a few roundings each
    assert {name: value.item() for name, value in runs.variables(table).items()} == pytest.approx(expected, rel=1e-14)
    for heads, kv_heads in ((8, 8), (8, 2)):
        groups = Shape.of(512, 8, n_heads=heads, n_kv_heads=kv_heads, d_ff=1408).parameters_by_group()
        found = runs.variables(table | {"d_ff": [1408], "n_heads": [heads], "n_kv_heads": [kv_heads]})
        assert found["M"].item() == pytest.approx(groups["feed_forward"] / groups["attention"], rel=1e-14)
    assert runs.variables(table | {"d_ff": [1408]})["M"].item() == pytest.approx(3 * 1408 / (4 * 512), rel=1e-14)


@pytest.mark.parametrize(("factor", "agrees"), [(1.0095, True), (0.9905, True), (1.0105, False), (0.9895, False)])
def test_a_count_may_be_off_by_one_per_cent(paper, tmp_path, factor, agrees):
    path = written(paper.assign(n_params=factor * paper["n_params"]), tmp_path / "runs.csv")
    if agrees:
        assert len(runs.load(path)) == 76
    else:
        with pytest.raises(InputError, match="does not agree with the shape"):
            runs.load(path)


def test_families_are_chains_of_sizes_within_a_tenth():
    """Each within a tenth of the next smaller, so the first and the last of a family may be further apart."""
    sizes = pd.Series([2.5e8, 1e8, 1.09e8, 1.18e8, 1.4e8], index=[7, 3, 5, 2, 9])
    families = runs.size_families(sizes)
    assert families.to_dict() == {7: "2.5e+08", 3: "1e+08", 5: "1e+08", 2: "1e+08", 9: "1.4e+08"}
    assert list(families.index) == list(sizes.index)


def test_a_log_with_a_gap_is_refused_by_its_row(paper, tmp_path):
    (tmp_path / "one.csv").write_text("tokens,loss\n1e6,3.0\n2e6,\n3e6,2.0\n")
    table = paper[REQUIRED].head(1).assign(tokens=3e6, log="one.csv", n_count="total").drop(columns="loss")
    with pytest.raises(InputError, match=r"one\.csv: row 3 is not two numbers"):
        runs.load(written(table, tmp_path / "runs.csv"), average_logs=True)


def test_a_rounded_count_keeps_its_rounding_and_tied_tables_are_counted_once(paper, tmp_path):
    rounded = paper.assign(n_params=[float(f"{n:.3g}") for n in paper["n_params"]])
    path = written(rounded, tmp_path / "runs.csv")
    assert np.array_equal(runs.load(path)["n_params"], rounded["n_params"])
    without = runs.load(path, "non_embedding")["n_params"]
    assert np.array_equal(without, rounded["n_params"] - 2 * 50432 * paper["d_model"])
    shape = Shape.of(512, 8, vocab=1000, tied=True)
    row = {"name": "a", "n_params": shape.n_params("total"), "d_model": 512, "n_layers": 8, "tokens": 1e9, "loss": 3.0}
    row |= {"n_count": "total", "d_ff": shape.d_ff, "vocab": 1000, "n_heads": shape.n_heads, "tied": 1}
    table = runs.load(written(pd.DataFrame([row]), tmp_path / "tied.csv"), "non_embedding")
    assert table["n_params"].item() == shape.n_params("non_embedding") and table["tied"].item() == 1


def test_of_two_faults_the_upper_row_is_named_and_planned_losses_are_checked(paper, tmp_path):
    last, first = len(paper) - 1, 0
    table = paper.astype({"d_model": float, "tokens": float})
    table.loc[last, "d_model"], table.loc[first, "tokens"] = 2.5, -1.0
    with pytest.raises(InputError, match=r"row 2, column tokens: -1\.0"):
        runs.load(written(table, tmp_path / "runs.csv"))
    planned = written(paper.assign(loss=[*paper["loss"][:-1], -1.0]), tmp_path / "planned.csv")
    with pytest.raises(InputError, match=r"row 77, column loss: -1\.0"):
        runs.load(planned, measured=False)
