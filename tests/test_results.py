"""What a notebook hands over, what a figure shows, and what differs between two executions."""

import base64
import html
import json
import math
import re
import shlex
import sys

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from morphlib import pipeline, report, results
from morphlib.errors import InputError


def executed(path, numbers, figures=None, preset="laptop", live=None):
    found = {"notebook": path.stem, "preset": preset, "parameters": {}, "numbers": numbers, "figures": figures or {},
             "live": live or {}}  # fmt: skip
    cell = nbformat.v4.new_code_cell("report.provenance()")
    cell.outputs = [
        nbformat.v4.new_output("display_data", {"text/html": "<p></p>"}, metadata={"text/html": {results.KEY: found}})
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


numbers = st.dictionaries(
    st.text("abc", min_size=1, max_size=2), st.floats(allow_nan=False, allow_infinity=False) | st.text("x")
)


@given(numbers, numbers)
def test_what_differs_is_found_and_nothing_else(before, after):
    changed = set(results.differences(before, after)["number"])
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        if isinstance(old, float) and isinstance(new, float):
            assert (name in changed) == (abs(new - old) > results.RELATIVE * abs(old))
        else:
            assert (name in changed) == (old != new)


def test_results_survive_the_notebook(tmp_path):
    executed(tmp_path / "03_law.ipynb", {"mse": 0.1, "best": "12x3072"}, {"A figure": "ab"}, live={"seconds": 3.0})
    found = results.read(tmp_path)["03_law"]
    assert found["numbers"] == {"mse": 0.1, "best": "12x3072"} and found["live"] == {"seconds": 3.0}


@pytest.mark.parametrize("content", [b"", b"{", b'{"cells": []}', b"[]", b"null", b"\xff\xfe", b'{"nbformat": 9}'])
def test_a_truncated_notebook_is_named(tmp_path, content):
    path = tmp_path / "03_law.ipynb"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"03_law\.ipynb.*execute it"):
        results.read(tmp_path)


def test_a_folder_without_executed_notebooks_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no executed notebooks"):
        results.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"[1]",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b'{"03_law": {"live": {}}}',
        b'{"notebook": "03_law", "live": {"seconds": 1}}',
    ],
)
def test_a_file_that_holds_no_results_is_refused_in_one_line(tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "none.json"
    path.write_bytes(content)
    assert pipeline.main(["diff", str(path), str(path)]) == 2
    assert re.fullmatch(r".* diff: .*none\.json: (cannot be read|holds no) .*; .*\n", capsys.readouterr().err)


def test_the_numbers_beside_a_page_are_results_too(tmp_path):
    beside = {"notebook": "03_law", "preset": "smoke", "parameters": {}, "numbers": {"mse": 0.1}, "figures": {"A figure": "ab"}}
    (tmp_path / "03_law.json").write_text(json.dumps(beside))
    assert results.read(tmp_path / "03_law.json") == {"03_law": beside}


def test_the_difference_of_two_executions_names_numbers_figures_and_moved_verdicts(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    published = results.read(ROOT / "morphlib/data/published.json")
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    before.write_text(json.dumps(published))
    assert "No number and no figure changed." in pipeline.difference(before, before)
    published["03_fitting_the_law"]["numbers"]["chinchilla_r2"] = 0.5
    published["06_predict_rank_select"]["numbers"]["chosen"] = "10x3072"
    after.write_text(json.dumps(published))
    told = pipeline.difference(before, after)
    assert "`chosen`: 11x3072 → 10x3072\n" in told and "nan" not in told
    assert "`chinchilla_r2`" in told and "Its R² is 0.9895**: reproduced → not supported" in told


def test_two_executions_of_one_notebook_are_compared_with_the_verdicts_that_rest_on_it_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    numbers = results.published()["03_fitting_the_law"]["numbers"]
    before, after = tmp_path / "a/03_fitting_the_law.ipynb", tmp_path / "b/03_fitting_the_law.ipynb"
    for path, r2 in ((before, numbers["chinchilla_r2"]), (after, 0.5)):
        path.parent.mkdir()
        executed(path, numbers | {"chinchilla_r2": r2})
    told = pipeline.difference(before, after)
    assert "Its R² is 0.9895**: reproduced → not supported" in told and told.count("→ not supported") == 1


def test_numbers_are_recorded_only_of_every_notebook_at_the_published_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    executed(tmp_path / "03_fitting_the_law.ipynb", {"x": 1.0})
    with pytest.raises(InputError, match="lacks 01_latency_motivation"):
        pipeline.record(tmp_path, tmp_path / "out.json")
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        executed(tmp_path / notebook.name, {"x": 1.0}, preset="smoke")
    with pytest.raises(InputError, match="not executed at the preset laptop"):
        pipeline.record(tmp_path, tmp_path / "out.json")
    with pytest.raises(InputError, match="not executed at the preset laptop"):
        pipeline.record(ROOT / "morphlib/data/published.json", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_the_published_numbers_are_those_of_every_notebook():
    published = results.published()
    assert set(published) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert all(result["numbers"] for result in published.values())
    assert all(not math.isnan(v) for result in published.values() for v in result["numbers"].values() if isinstance(v, float))


@pytest.mark.parametrize(
    ("name", "stem"),
    [("03", "03_fitting_the_law"), ("03_solutions", "03_solutions"), ("07_small_scale_study", "07_small_scale_study")],
)
def test_a_notebook_is_meant_by_its_number_or_name(monkeypatch, name, stem):
    monkeypatch.chdir(ROOT)
    assert pipeline.notebook_named(name).stem == stem


@pytest.mark.parametrize("name", ["", "0", "99", "fitting"])
def test_a_name_that_means_no_notebook_is_an_error_that_lists_them(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match="03_fitting_the_law"):
        pipeline.notebook_named(name)


@pytest.mark.parametrize("parameters", ["n_starts", "exponents='free", "n_starts=[", "n_starts=2026-99-99", "n_start=3"])
def test_wrong_parameters_of_ones_own_are_one_line_and_exit_code_2(monkeypatch, capsys, parameters):
    monkeypatch.chdir(ROOT)
    assert pipeline.main(["notebook", "03", "--parameters", parameters]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def numbers_on_page(html) -> pd.DataFrame:
    import io

    coded = re.search(r'download="[a-z0-9-]+\.csv" href="data:text/csv;base64,([^"]+)"', html.data)[1]
    return pd.read_csv(io.BytesIO(base64.b64decode(coded)))


def test_a_figure_carries_its_numbers():
    drawing, (left, right) = plt.subplots(1, 2)
    x = np.array([1.0, 2.0, 4.0])
    left.errorbar(x, x**2, yerr=0.5, label="squares")
    left.axhline(1)
    left.set(xlabel="x", ylabel="y")
    right.scatter(x, -x, c=[7.0, 8.0, 9.0], label="points")
    right.bar(x, 2 * x, label="bars", width=0.5)
    right.fill_between(x, x, 2 * x)
    html = report.figure(drawing, "five words that say something", "A caption")
    numbers = numbers_on_page(html)
    squares = numbers[(numbers["series"] == "squares") & (numbers["mark"] == "line")]
    assert squares["y"].tolist() == [1, 4, 16]
    intervals = numbers[numbers["mark"] == "interval"]
    assert intervals[["y", "y_end"]].to_numpy().tolist() == [[0.5, 1.5], [3.5, 4.5], [15.5, 16.5]]
    points = numbers[(numbers["series"] == "points")]
    assert points["colour"].tolist() == [7, 8, 9] and points["panel"].tolist() == [2, 2, 2]
    boxes = numbers[numbers["series"] == "bars"]
    assert boxes["y_end"].tolist() == [2, 4, 8] and np.allclose(boxes["x_end"] - boxes["x"], 0.5)
    assert (numbers["mark"] == "edge of a band").any()
    assert set(numbers["x_axis"].dropna()) == {"x"}


def test_the_interval_of_a_missing_value_is_left_out():
    drawing, axis = plt.subplots()
    axis.errorbar([1, 2], [1, np.nan], yerr=[0.5, np.nan], fmt="o")
    numbers = report.numbers_of(drawing)
    assert numbers[numbers["mark"] == "interval"][["x", "y", "x_end", "y_end"]].to_numpy().tolist() == [[1, 0.5, 1, 1.5]]


def test_a_figure_is_the_same_bytes_each_time():
    def draw():
        drawing, axis = plt.subplots()
        axis.plot([1, 2], [3, 4], "o")
        return report.figure(drawing, "two points on a rising line", "A caption").data

    assert draw() == draw()


def test_a_live_figure_says_so_and_is_in_no_result():
    drawing, axis = plt.subplots()
    axis.plot([1, 2])
    html = report.figure(drawing, "a line that rises to two", "Measured just now", live=True)
    assert "Live." in html.data
    shown = report.provenance("nowhere", {}).metadata[results.KEY]
    assert "Measured just now" not in shown["figures"]


def test_provenance_shows_parameters_and_command_and_keeps_live_numbers_apart(monkeypatch):
    monkeypatch.setenv("MORPH_PRESET", "smoke")
    monkeypatch.setenv("MORPH_COMMAND", "make notebook NB=03 PRESET=smoke")
    report.glue(of_the_test=1.5)
    report.glue(live=True, seconds_of_the_test=2.0)
    page = report.provenance("03_none", {"__annotations__": {"n": int, "name": str}, "n": 3, "name": "a'b", "other": 1})
    found = page.metadata[results.KEY]
    assert found["parameters"] == {"n": 3, "name": "a'b"} and found["preset"] == "smoke"
    assert found["numbers"]["of_the_test"] == 1.5 and found["live"]["seconds_of_the_test"] == 2.0
    assert "seconds_of_the_test" not in found["numbers"]
    for text in (
        "make notebook NB=03 PRESET=smoke",
        "papermill notebooks/03_none.ipynb out.ipynb -y",
        "n = 3",
        "commit",
        "MiB",
    ):
        assert text in page.data


def test_the_command_that_makes_a_page_again_gives_the_same_parameters():
    """It goes through a page, a shell and the YAML of papermill."""
    parameters = {"rate": 1e-5, "tokens": 1e16, "rates": [1e-7, 0.5], "text": "1e-05", "name": "Schrödinger's x: y, " * 9,
                  "rows": None, "on": True, "n": 3}  # fmt: skip
    page = report.provenance("03_none", {"__annotations__": parameters, **parameters}).data
    command = html.unescape(re.search(r"papermill .*(?=</pre>)", page)[0])
    assert yaml.safe_load(shlex.split(command)[-1]) == parameters


def test_peak_memory_counts_in_the_unit_of_the_system(monkeypatch):
    on_linux = report._peak_mib()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert report._peak_mib() == pytest.approx(on_linux / 1024, rel=0.5)


@pytest.mark.parametrize(
    ("count", "short"),
    [(0, "0"), (999, "999"), (999.6, "1k"), (999_499, "999k"), (999_999, "1M"), (78.9e6, "78.9M"), (999.6e6, "1B"),
     (1.439e9, "1.44B"), (999_999_999_999, "1T")],
)  # fmt: skip
def test_a_count_has_three_digits_and_its_unit(count, short):
    assert report.short_count(count) == short


def test_a_page_with_other_numbers_says_how_far_they_are_from_the_published(monkeypatch):
    monkeypatch.setattr(results, "published", lambda: {"03_none": {"numbers": {"of_this_test": 2.0}}})
    monkeypatch.setattr(report, "_NUMBERS", {"of_this_test": 3.0})
    page = report.provenance("03_none", {}).data
    assert "1 of the 1 numbers" in page and "by up to 50 %" in page and "of_this_test" in page
    monkeypatch.setattr(report, "_NUMBERS", {"of_this_test": 2.0 + 1e-7})
    assert "are the published ones" in report.provenance("03_none", {}).data


def test_differences_by_hand():
    before = {"a": -2.0, "b": 1.0, "gone": 1, "zero": 0.0, "text": "x", "same": 1.0, "small": 1.0}
    after = {"a": -1.0, "b": 1.0 + 2e-6, "new": 1, "zero": 1.0, "text": "y", "same": 1.0 + 5e-7, "small": 1.0 - 2e-6}
    found = results.differences(before, after).set_index("number")
    assert list(found.index) == ["a", "b", "gone", "new", "small", "text", "zero"]
    assert found.loc["a", "relative"] == 0.5 and found.loc["small", "relative"] == pytest.approx(-2e-6)
    assert found.loc[["gone", "new", "text", "zero"], "relative"].isna().all()
    assert (found.loc["gone", "after"], found.loc["new", "before"]) == ("–", "–")
    assert found.loc["b", "after"] == "1" and results.differences({"c": 1.0}, {"c": 1.23456789})["after"].item() == "1.23457"


def test_partial_notebooks_are_left_out_and_two_results_refused(tmp_path):
    executed(tmp_path / "03_law.ipynb", {"x": 1.0})
    executed(tmp_path / "04_law.partial.ipynb", {"x": 1.0})
    assert set(results.read(tmp_path)) == {"03_law"}
    notebook = nbformat.read(tmp_path / "03_law.ipynb", as_version=4)
    notebook.cells.append(notebook.cells[0])
    notebook.cells[1] = nbformat.from_dict(dict(notebook.cells[0]) | {"id": "another"})
    nbformat.write(notebook, tmp_path / "03_law.ipynb")
    with pytest.raises(InputError, match="holds 2 results"):
        results.read(tmp_path)
