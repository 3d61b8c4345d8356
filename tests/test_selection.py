import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from conftest import ROOT
from morphlib import diagnostics, fitting, laws, runs, selection, uncertainty
from morphlib.errors import InputError
from morphlib.latency.analytic import Machine, Workload
from morphlib.selection import Caps, Predicted, Tabled, lifetime, optimum, predict_rank_select, select, to_train, undominated
from morphlib.shapes import Shape, Shapes, candidates, paper_shapes
from test_cli import morph, refuse_constant

BUDGET = {"params": 1.66e9, "tokens": 29e9}


@pytest.fixture(scope="module")
def fit(paper):
    return fitting.fit(paper, laws.get("inference-aware"))


@pytest.fixture(scope="module")
def refits(paper, fit):
    return uncertainty.bootstrap(paper, fit, 400, cluster="name").values


@pytest.fixture(scope="module")
def on_a100():
    return Predicted(candidates(1.7e9), Machine.of("A100-40GB"))


def fine_grid(step_width=16, layers=range(4, 65)):
    """Shapes whose feed-forward layer is exactly 8 / 3 of the width: what a continuous width is a limit of."""
    widths = np.arange(512, 6000, step_width, dtype=float)
    d_model, n_layers = (a.ravel() for a in np.meshgrid(widths, np.array(layers, dtype=float)))
    ones = np.ones(len(d_model))
    return Shapes(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=ones,
        n_kv_heads=ones,
        d_ff=d_model * 8 / 3,
        vocab=50432 * ones,
        tied=np.zeros(len(d_model), dtype=bool),
    )


@pytest.mark.parametrize("gpu", ["A100-40GB", "H100"])
@pytest.mark.parametrize(
    ("mode", "latency_s", "law"),
    [
        ("eager", 1.9, "inference-aware"),
        ("eager", 3.0, "inference-aware"),
        ("graph", 0.4, "inference-aware"),
        ("graph", 2.0, "chinchilla+log-quadratic"),
        ("compiled", 0.9, "width-depth"),
    ],
)
def test_the_continuous_optimum_and_the_exact_one_agree_within_the_grid(paper, gpu, mode, latency_s, law):
    fit = fitting.fit(paper, laws.get(law))
    latencies = Predicted(fine_grid(), Machine.of(gpu, mode))
    caps = Caps(**BUDGET, latency_s=latency_s)
    found = select(paper, fit, latencies, caps)
    best, exact = found.optimum, found.candidates.iloc[0]
    # whole depths and widths can only be worse, by no more than the corner of the grid's cell that meets the caps
    assert best.loss <= exact["loss"] + 1e-9
    ranges = selection.fitted_ranges(paper, fit)
    cell = latencies.shapes.where(
        (np.abs(latencies.shapes.n_layers - best.n_layers) < 1) & (np.abs(latencies.shapes.d_model - best.d_model) <= 16)
    )
    corners = selection.scored(fit, replace(latencies, shapes=cell), caps.tokens)
    meets = (corners["n_params"] <= caps.params) & (corners["latency_s"] <= latency_s)
    for name, column in selection.RANGES.items():
        meets &= corners[column].between(*ranges[name])
    worst_corner = corners["loss"].max() if not meets.any() else corners["loss"][meets].min()
    assert exact["loss"] <= worst_corner + 1e-12
    for limit, (column, *_) in selection.CAPPED.items():
        assert getattr(caps, limit) >= exact[column]
    assert best.latency_s <= latency_s * (1 + 1e-6) and best.n_params <= caps.params * (1 + 1e-6)


def test_shadow_prices_are_the_multipliers_of_the_optimum(paper, fit, on_a100):
    """Independent of the solver: at the optimum grad L + sum of multiplier times grad of each binding constraint is zero."""
    caps = Caps(params=1.4e9, tokens=29e9, latency_s=2.0)
    found = select(paper, fit, on_a100, caps)
    assert set(found.binding_caps) == {"params", "tokens", "latency_s"}
    best, like, h = found.optimum, found.chosen, 1e-4

    def numbers(log_width, log_depth):
        width = np.exp([log_width])
        shape = Shapes(
            d_model=width, n_layers=np.exp([log_depth]), n_heads=np.ones(1), n_kv_heads=np.ones(1),
            d_ff=width * like.d_ff / like.d_model, vocab=np.array([50432.0]), tied=np.array([False]),
        )  # fmt: skip
        row = selection.scored(fit, Predicted(shape, on_a100.machine), caps.tokens).iloc[0]
        return np.array([row["loss"], math.log(row["n_params"]), math.log(row["latency_s"])])

    x = np.log([best.d_model, best.n_layers])
    slopes = np.stack([(numbers(*(x + step)) - numbers(*(x - step))) / (2 * h) for step in h * np.eye(2)], axis=1)
    multipliers = np.linalg.solve(slopes[1:].T, -slopes[0])
    assert (multipliers > 0).all()
    prices = found.shadow_prices
    # a price is a difference over one per cent of a cap, a multiplier the slope: they differ by the curvature over it
    assert prices["nats_per_parameter"] * caps.params == pytest.approx(multipliers[0], rel=0.02)
    assert prices["nats_per_ms"] * caps.latency_s * 1e3 == pytest.approx(multipliers[1], rel=0.02)
    p, n = fit.parameters, best.n_params
    ratio = 1 + p["epsilon"] * (best.d_model / best.n_layers) ** p["alpha"]
    slope = p["alpha"] * p["B"] * caps.tokens ** -(p["alpha"] + 1) * ratio
    assert prices["nats_per_token"] == pytest.approx(slope, rel=0.02)
    assert n == pytest.approx(caps.params)


def test_a_cap_that_does_not_bind_is_worth_nothing(paper, fit, on_a100):
    wide = select(paper, fit, on_a100, Caps(params=1.4e9, tokens=29e9, latency_s=100.0))
    assert "latency_s" not in wide.binding_caps and wide.shadow_prices["nats_per_ms"] == pytest.approx(0, abs=1e-9)
    tighter = select(paper, fit, on_a100, Caps(params=1.4e9, tokens=29e9, latency_s=100.0, kv_bytes=5e7))
    assert "kv_bytes" in tighter.binding_caps and tighter.shadow_prices["nats_per_kv_byte"] > 0
    assert tighter.candidates["kv_bytes"].max() <= 5e7
    assert tighter.candidates["loss"][0] > wide.candidates["loss"][0]


def test_looser_caps_never_choose_a_worse_shape(paper, fit, on_a100):
    losses = [
        select(paper, fit, on_a100, Caps(params=n, tokens=d, latency_s=t)).candidates["loss"][0]
        for n, d, t in ((8e8, 1e10, 1.5), (1.6e9, 1e10, 1.5), (1.6e9, 1e10, 2.5), (1.6e9, 4e10, 2.5))
    ]
    assert losses == sorted(losses, reverse=True)


def test_every_shape_is_counted_once(paper, fit, on_a100):
    found = select(paper, fit, on_a100, Caps(params=1.2e9, tokens=29e9, latency_s=2.5))
    assert len(found.candidates) + sum(found.left_out.values()) == len(on_a100.shapes)
    assert set(found.left_out) <= {"memory", "range of N", "range of R", *selection.CAPPED}
    assert not found.candidates["extrapolated"].any()


def test_a_law_that_falls_with_depth_recommends_nonsense_where_nobody_trained(paper, fit):
    """Without the latency cap and the range of the runs the paper's law takes the deepest shape there is."""
    latencies = Predicted(candidates(1.7e9), Machine.of("A100-40GB", "graph"))
    caps = Caps(params=1.7e9, tokens=29e9, latency_s=1e3)
    inside, outside = (select(paper, fit, latencies, caps, extrapolate=more) for more in (False, True))
    assert inside.chosen.n_layers < outside.chosen.n_layers and outside.chosen.n_layers > 50
    assert "range of R" in inside.left_out and not any(reason.startswith("range") for reason in outside.left_out)
    assert outside.candidates["extrapolated"][0] and outside.candidates["loss"][0] < inside.candidates["loss"][0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.01, 1))
def test_those_to_train_are_the_fewest_that_contain_the_best(odds, contain):
    odds = np.array(odds)
    picked = to_train(odds, contain)
    total = odds.sum()
    assert picked.any()
    assert odds[picked].sum() >= contain * total * (1 - 1e-9)
    fewer = np.sort(odds)[::-1][: picked.sum() - 1].sum()
    assert picked.sum() == 1 or fewer < contain * total


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=25, unique=True))
def test_nothing_beats_the_front_and_something_beats_the_rest(points):
    loss, latency = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    for i, on_front in enumerate(undominated(loss, latency)):
        beaten = ((loss <= loss[i]) & (latency <= latency[i]) & ((loss < loss[i]) | (latency < latency[i]))).any()
        assert on_front == (not beaten)


def three_of_the_paper(low=1.0, high=1.0):
    rows = {"shape": ["24x2048", "16x2560", "12x3072"], "latency_s": [3.61, 2.57, 1.96], "latency_kind": "quoted"}
    table = pd.DataFrame(rows)
    return Tabled.of(table.assign(latency_low_s=low * table["latency_s"], latency_high_s=high * table["latency_s"]))


def test_the_probability_of_being_best_is_that_of_the_order(paper, fit):
    """Against `diagnostics.ordering_probability`, which knows nothing of draws of parameters."""
    n = 20_000
    # only what the law is linear in is drawn, so that the predicted losses are as normal as the orders take them to be
    linear = np.isin(fit.law.parameters, fit.law.linear)
    covariance = uncertainty.cluster_covariance(paper, fit, "name").matrix * np.outer(linear, linear)
    draws = np.random.default_rng(5).multivariate_normal(fit.values, covariance, size=n, method="eigh")
    latencies = three_of_the_paper()
    found = select(paper, fit, latencies, Caps(**BUDGET | {"params": 1.7e9}, latency_s=5.0), parameters=draws, run_noise=True)
    planned = pd.DataFrame(selection.without_latency(fit, latencies.shapes, 29e9, latencies.work))
    jacobian = fit.law.jacobian(fit.values, runs.variables(planned))
    noise = selection._run_deviation(paper, fit)
    orders = diagnostics.ordering_probability(
        planned["loss"], jacobian @ covariance @ jacobian.T + noise**2 * np.eye(3), n_draws=n, seed=1
    )
    best = {str(latencies.shapes[i]): orders.probabilities[orders.orders[:, 0] == i].sum() for i in range(3)}
    said = found.candidates.set_index("shape")["probability_best"]
    for shape, probability in best.items():
        # four standard deviations of the difference of two shares, each of n draws
        assert said[shape] == pytest.approx(probability, abs=4 * math.sqrt(2 * probability * (1 - probability) / n))
    assert said.sum() == pytest.approx(1)


def test_what_single_runs_deviate_by_decides_what_is_told_apart(paper, fit, on_a100):
    """With one law for all draws, two losses that differ by g and deviate by s each change places with Phi(-g / (s sqrt 2))."""
    n, caps = 4000, Caps(**BUDGET, latency_s=2.5)
    draws = np.tile(fit.values, (n, 1))
    sure = select(paper, fit, on_a100, caps, parameters=draws).candidates
    assert (sure["told_apart"] == (sure["loss"] > sure["loss"][0])).all()
    noisy = select(paper, fit, on_a100, caps, parameters=draws, run_noise=True).candidates
    expected = norm.sf((noisy["loss"] - noisy["loss"][0]) / (selection._run_deviation(paper, fit) * math.sqrt(2)))[1:]
    found = noisy["probability_not_worse"].to_numpy()[1:]
    # five standard deviations of a share of n draws, for the farthest off of a hundred or more
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()
    assert ((found < selection.NOT_WORSE) == noisy["told_apart"][1:]).all()


def test_probabilities_add_up_and_regret_is_what_the_best_would_save(paper, fit, refits, on_a100):
    found = select(paper, fit, on_a100, Caps(**BUDGET, latency_s=2.5), parameters=refits)
    rows = found.candidates
    assert rows["probability_best"].sum() + found.probability_none == pytest.approx(1)
    assert (rows["expected_regret"] >= 0).all()
    assert (rows["probability_best"] <= rows["probability_within"] + 1e-12).all()
    assert (rows["loss_low"] <= rows["loss_high"]).all()
    chosen = rows.iloc[0]
    assert chosen["probability_not_worse"] == 1 and not chosen["told_apart"]
    assert rows["train"].sum() == to_train(rows["probability_best"].to_numpy()).sum()


def test_memory_in_chunks_changes_nothing_of_the_law(paper, fit, refits, on_a100, monkeypatch):
    caps = Caps(**BUDGET, latency_s=2.5)
    whole = select(paper, fit, on_a100, caps, parameters=refits).candidates
    monkeypatch.setattr(selection, "CHUNK_NUMBERS", 5000)
    parts = select(paper, fit, on_a100, caps, parameters=refits).candidates
    pd.testing.assert_frame_equal(whole[["loss_low", "loss_high"]], parts[["loss_low", "loss_high"]])
    tolerance = 5 * math.sqrt(0.25 / len(refits))  # other draws of the latency
    assert np.abs(whole["probability_within"] - parts["probability_within"]).max() < tolerance


def test_latencies_of_a_table_decide_within_their_intervals(paper, fit, refits):
    caps = Caps(params=1.7e9, tokens=29e9, latency_s=2.6)
    sure = select(paper, fit, three_of_the_paper(), caps, parameters=refits)
    assert str(sure.chosen).startswith("16x2560") and sure.left_out == {"latency_s": 1}
    assert sure.binding_caps == ("tokens", "latency_s") and sure.shadow_prices is None and sure.optimum is None
    assert sure.candidates["latency_kind"].eq("quoted").all() and sure.probability_beyond == 0
    unsure = select(paper, fit, three_of_the_paper(0.7, 1.5), caps, parameters=refits)
    within = unsure.candidates.set_index("shape")["probability_within"]
    assert 0.5 <= within.iloc[0] < within.iloc[1] < 1
    assert unsure.probability_beyond > 0 and unsure.probability_none > 0


def test_measured_rows_bring_their_workload_and_interval(tmp_path):
    from morphlib.latency import timing

    rows = timing.load("cpu").query("engine == 'hf-eager' and dtype == 'bf16' and batch == 1 and out_tokens == 64")
    rows = rows.drop_duplicates("shape")
    read = Tabled.of(rows)
    assert len(read.shapes) == len(rows) and read.rows["latency_kind"].eq("measured").all()
    assert read.work == Workload(batch=1, in_tokens=128, out_tokens=64)
    assert read.rows["latency_s"].to_numpy() == pytest.approx(rows["e2e_s"].to_numpy(), rel=1e-4)
    assert (read.rows["latency_low_s"] < read.rows["latency_high_s"]).all()
    rows.to_csv(tmp_path / "rows.csv", index=False)
    pd.testing.assert_frame_equal(Tabled.read(tmp_path / "rows.csv").rows, read.rows)
    with pytest.raises(InputError, match="its rows have batch 1, not 8; leave one of the two out"):
        Tabled.of(rows, batch=8)
    # what a row does not say of its workload is what is asked for, and nothing else need be
    assert Tabled.of(rows, kv_bits=8).work == replace(read.work, kv_bits=8)
    with pytest.raises(InputError, match="differ in dtype"):
        Tabled.of(pd.concat([rows, rows.assign(dtype="fp32")]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"shape": ["12x3072"], "latency_ms": [1960]}, "column latency_ms is not in seconds; give latency_s"),
        ({"shape": ["12x3072"], "latency_s": [1.96], "latency_low_ms": [1800]}, "column latency_low_ms is not in seconds"),
        ({"shape": ["12x3072"], "seconds": [1.96]}, "column latency_s is missing; give shape and latency_s, in seconds"),
        ({"latency_s": [1.0]}, "column shape is missing"),
        ({"shape": ["12x3072", "24x2048"], "latency_s": [1.0, 0.0]}, "row 3 has no latency"),
        ({"shape": ["12x3072"], "latency_s": [math.nan]}, "row 2 has no latency"),
        ({"shape": ["12x3072"], "latency_s": [1.0], "latency_high_s": [0.5]}, "row 2 has no latency"),
        ({"shape": ["12x3072"], "latency_s": [1.0], "latency_kind": ["guessed"]}, "measured, quoted, predicted"),
        ({"shape": [], "latency_s": []}, "has no rows"),
        ({"shape": ["12by3072"], "latency_s": [1.0]}, "'12by3072' is not a shape"),
        ({"shape": ["12x3072", "12x3072/16h"], "latency_s": [1.0, 2.0]}, "stands in several rows"),
    ],
)
def test_a_table_that_holds_no_latencies(table, message):
    with pytest.raises(InputError, match=message):
        Tabled.of(pd.DataFrame(table))


@pytest.mark.parametrize(
    ("caps", "message"),
    [
        ({"latency_s": 0.01}, "the nearest, 2x768.*has latency_s 0.6.* where 0.01 is allowed"),
        ({"kv_bytes": 1e5}, "has kv_bytes .* where 1e.05 is allowed"),
        ({"tokens": 29.0}, "D of 29 is outside 1.611e.09 to 4.939e.10"),
        ({"params": 7e7}, "no shape meets all caps: the nearest, .* has params"),
    ],
)
def test_caps_that_no_shape_meets_name_the_cap_and_the_nearest_shape(paper, fit, on_a100, caps, message):
    with pytest.raises(InputError, match=message):
        select(paper, fit, on_a100, Caps(**BUDGET | {"latency_s": 2.5} | caps))


def test_what_cannot_choose_a_shape_says_so(paper, fit, on_a100):
    caps = Caps(**BUDGET, latency_s=2.5)
    with pytest.raises(InputError, match="chinchilla has no term for the shape"):
        select(paper, fitting.fit(paper, laws.get("chinchilla")), on_a100, caps)
    with pytest.raises(InputError, match="the cap on tokens is nan"):
        Caps(params=1e9, tokens=math.nan, latency_s=1.0)
    with pytest.raises(InputError, match="do not fit the memory"):
        select(paper, fit, replace(on_a100, work=Workload(batch=100_000)), caps)
    with pytest.raises(InputError, match="3 bits are not counted"):
        select(paper, fit, replace(on_a100, work=Workload(weight_bits=3)), caps)
    for contain in (0.0, 1.5, math.nan):
        with pytest.raises(InputError, match="above 0, at most 1"):
            to_train(np.ones(3), contain)


@settings(max_examples=25)
@given(st.floats(2.6, 3.5), st.floats(0, 1e14))
def test_lifetime_costs_solve_for_the_tokens(loss, inference_tokens):
    paper = runs.load("paper")
    fit = fitting.fit(paper, laws.get("inference-aware"), n_starts=2)
    shapes = candidates(1.7e9, width_multiple=512, depths=range(4, 40, 6))
    cost = lifetime(fit, shapes, loss, inference_tokens)
    p, n = fit.parameters, shapes.n_params("total")
    rest = loss / (1 + p["epsilon"] * shapes.aspect_ratio ** p["alpha"]) - p["E"] - p["A"] * n ** -p["alpha"]
    with np.errstate(invalid="ignore", divide="ignore"):
        tokens = np.where(rest > 0, (p["B"] / rest) ** (1 / p["alpha"]), np.inf)
    near = tokens < 1e14
    assert cost["tokens"].to_numpy()[near] == pytest.approx(tokens[near], rel=1e-9)
    assert np.isinf(cost["tokens"][tokens > 1e15]).all()
    assert cost["flops"].to_numpy()[near] == pytest.approx((6 * n * tokens + 2 * n * inference_tokens)[near], rel=1e-9)


def test_the_cheapest_life_meets_the_condition_of_its_optimum(paper):
    """Sardana et al. 2024: the least 6 N D + 2 N T for T tokens served, at a loss E + A N^-a + B D^-b, has, by Lagrange,
    a A N^-a D = b B D^-b (D + T / 3). Along a loss D falls with N, and the left over the right side with it, so the cost
    falls up to the optimum and rises from it: of sizes in a grid the cheapest has it between its two neighbours."""
    fit, loss = fitting.fit(paper, laws.get("chinchilla", "free")), 3.2
    shapes = fine_grid(8, range(1, 41))
    p, sizes = fit.parameters, np.unique(shapes.n_params("total"))
    sizes = sizes[p["A"] * sizes ** -p["alpha"] < loss - p["E"]]  # smaller ones never reach the loss
    tokens = (p["B"] / (loss - p["E"] - p["A"] * sizes ** -p["alpha"])) ** (1 / p["beta"])
    chosen = []
    for served in (0.0, 1e11, 1e13):
        cost = lifetime(fit, shapes, loss, served)
        best = int(cost["flops"].argmin())
        chosen.append((shapes.n_params("total")[best], cost["tokens"][best]))
        i = int(np.searchsorted(sizes, chosen[-1][0]))
        by_size = p["alpha"] * p["A"] * sizes ** -p["alpha"] * tokens
        by_tokens = p["beta"] * p["B"] * tokens ** -p["beta"] * (tokens + served / 3)
        assert by_size[i - 1] > by_tokens[i - 1] and by_size[i + 1] < by_tokens[i + 1]
    # in closed form without inference (Hoffmann et al. 2022, equation 4): the two terms of the loss are as beta to alpha
    n = (p["A"] * (1 + p["alpha"] / p["beta"]) / (loss - p["E"])) ** (1 / p["alpha"])
    i = int(np.searchsorted(sizes, n))
    assert chosen[0][0] in sizes[i - 1 : i + 1]
    n_params, trained_on = np.transpose(chosen)
    assert (np.diff(n_params) < 0).all() and (np.diff(trained_on) > 0).all()
    with pytest.raises(InputError, match="at least zero"):
        lifetime(fit, shapes, loss, -1.0)


def test_the_method_of_the_paper_from_its_public_numbers(paper):
    """Predict from the small runs, the printed latencies, rank, 'train' by looking the run up, release 12x3072."""
    small = paper[paper["n_params"] < 1e9].reset_index(drop=True)
    fit = fitting.fit(small, laws.get("inference-aware"), "fit_main")
    names = {"24x2048": "1B_v1", "16x2560": "1B_v3", "12x3072": "1B_v8"}
    latency_s = {"24x2048": 3.61, "16x2560": 2.57, "12x3072": 1.96}
    shapes = Shapes.of([Shape.parse(text) for text in names])
    asked = []

    def loss_of(shape):
        asked.append(shape)
        return paper.set_index("name")["loss"][names[f"{shape.n_layers}x{shape.d_model}"]]

    steps = {
        "predict": lambda every: selection.without_latency(fit, every, 28_991_029_248, Workload())["loss"],
        "measure": lambda shape: latency_s[f"{shape.n_layers}x{shape.d_model}"],
        "train": loss_of,
        "evaluate": lambda loss: -loss,
    }
    study = predict_rank_select(shapes, **steps, max_latency_s=2.0)
    assert study.released == Shape.parse("12x3072") and asked == [study.released]
    wider = predict_rank_select(shapes, **steps, max_latency_s=4.0)
    assert wider.released == Shape.parse("24x2048")
    with pytest.raises(InputError, match=r"the fastest, 12x3072.*takes 1\.96 s"):
        predict_rank_select(shapes, **steps, max_latency_s=1.0)


def test_as_many_are_trained_as_the_draws_ask_for():
    shapes = Shapes.of([Shape.of(128, layers) for layers in (2, 4, 6, 8)])
    rng = np.random.default_rng(0)
    values = np.array([3.0, 3.01, 3.02, 4.0])
    study = predict_rank_select(
        shapes,
        predict=lambda every: np.vstack([values, values + 0.02 * rng.standard_normal((2000, 4))]),
        measure=lambda shape: float(shape.n_layers),
        train=lambda shape: shape.n_layers,
        evaluate=float,  # the deepest scores best
        max_latency_s=8.0,
    )
    assert [shape.n_layers for shape in study.trained] == [2, 4, 6]
    assert study.released.n_layers == 6


def test_candidates_hold_the_papers_1b_shapes_under_their_constraints():
    rules = {"n_heads": 16, "width_multiple": 64, "depths": range(2, 25, 2), "tolerance": 0.4}
    found = candidates(2.13e9, **rules)
    every = {found[i] for i in range(len(found))}
    ours = [shape for name, shape in paper_shapes().items() if "1b_v" in name.lower()]
    assert len(ours) == 15
    assert set(ours) <= every


# --- the command

SELECT = ["select", "--runs", "paper", "--max-params", "1.7e9", "--max-tokens", "29e9", "--max-latency-s", "2.5"]


def test_select_keeps_the_contract(capsys):
    code, out, err = morph(capsys, *SELECT, "--gpu", "A100-40GB", "--mode", "eager", "--inference-tokens", "1e12", "--json")
    result = json.loads(out, parse_constant=refuse_constant)
    assert (code, err) == (0, "morph select: 1737 candidate shapes\n")
    assert {"chosen", "candidates", "binding_caps", "shadow_prices", "left_out"} <= set(result)
    wanted = {"shape", "n_params", "loss", "loss_low", "loss_high", "latency_s", "latency_kind", "probability_best"}
    assert all(wanted <= set(row) for row in result["candidates"])
    assert result["chosen"] == result["candidates"][0] and len(result["candidates"]) == 20
    losses = [row["loss"] for row in result["candidates"]]
    assert losses == sorted(losses) and all(row["latency_s"] <= 2.5 for row in result["candidates"])
    assert result["caps"]["kv_bytes"] is None  # no cap
    assert result["probabilities"]["not_told_apart"][0] == result["chosen"]["shape"]
    assert result["lifetime"]["flops"] > 0 and result["n_candidates"] + sum(result["left_out"].values()) == 1737


def test_select_says_it_in_words(capsys, tmp_path):
    code, out, _ = morph(capsys, *SELECT, "--draws", "0", "--top", "3")
    assert code == 0 and "binding: " in out and "P(best)" not in out
    assert out.splitlines()[0].endswith("has the least loss that inference-aware predicts within the caps")
    path = tmp_path / "quoted.csv"
    path.write_text("shape,latency_s,latency_kind\n24x2048,3.61,quoted\n12x3072,1.96,quoted\n")
    code, out, _ = morph(capsys, *SELECT, "--latencies", path, "--draws", "50")
    assert code == 0 and out.startswith("12x3072") and "train 1 to have the best among them" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-latency-s", "0.01"], "no shape meets all caps: the nearest"),
        (["--max-params", "1.7"], "no shape has 1.7 or fewer parameters"),
        (["--max-params", "nan"], "'nan' is not a finite number above zero"),
        (["--max-tokens", "29"], "outside 1.611e+09 to 4.939e+10"),
        (["--law", "chinchilla"], "has no term for the shape"),
        (["--gpu", "B200"], "choose one of A30"),
        (["--mode", "fast"], "choose one of eager, compiled, graph"),
        (["--depths", "9-3"], "is not a range"),
        (["--tolerance", "2"], "is no budget"),
        (["--heads", "7", "--width-multiple", "64", "--depths", "4-4", "--tolerance", "0"], "no shape has"),
        (["--cluster", "nothing"], "no column 'nothing'"),
        (["--latencies", "nowhere.csv"], "nowhere.csv: cannot be read"),
        (["--contain", "0"], "above 0, at most 1"),
        (["--runs", "nowhere.csv"], "nowhere.csv: cannot be read"),
    ],
)
def test_select_refuses_in_one_line(capsys, options, message):
    code, out, err = morph(capsys, *SELECT, *options)
    lines = [line for line in err.splitlines() if not line.endswith("candidate shapes")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert message in lines[0]


def test_the_optimum_starts_within_the_caps(paper, fit, on_a100):
    like = Shape.parse("12x3072")
    found = optimum(fit, like, on_a100, Caps(params=1.67e9, tokens=29e9, latency_s=2.2), selection.fitted_ranges(paper, fit))
    own = selection.scored(fit, Predicted(Shapes.of([like]), on_a100.machine), 29e9)
    assert found.loss <= own["loss"][0]


def test_the_page_shows_what_the_command_prints(capsys):
    """Its command and its example; the two columns that come from random draws may differ by a draw elsewhere."""
    page = (ROOT / "book" / "which_shape.md").read_text(encoding="utf-8")
    command, shown = (re.search(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL)[1].strip() for kind in ("bash", "text"))
    code, out, _ = morph(capsys, *command.split()[1:], "--top", "3")
    assert code == 0
    printed = out.splitlines()
    for line in shown.splitlines():
        assert line.split()[:9] in [other.split()[:9] for other in printed], line


def test_draws_of_a_table_have_its_intervals_and_are_independent():
    table, n = three_of_the_paper(0.7, 1.5), 40_000
    drawn = table.drawn(np.ones(3, dtype=bool), n, np.random.default_rng(0))
    for share, end in ((0.025, "latency_low_s"), (0.5, "latency_s"), (0.975, "latency_high_s")):
        below = (drawn <= table.rows[end].to_numpy()).mean(axis=0)
        assert np.abs(below - share).max() <= 4 * math.sqrt(share * (1 - share) / n)  # standard deviations of a share
    assert np.abs(np.corrcoef(np.log(drawn.T))[np.triu_indices(3, k=1)]).max() < 4 / math.sqrt(n)


def test_measured_rows_of_32_bits_are_of_a_workload_of_32_bits():
    from morphlib.latency import timing

    rows = timing.load("cpu").query("engine == 'hf-eager' and dtype == 'bf16' and batch == 1 and out_tokens == 64")
    read = Tabled.of(rows.drop_duplicates("shape").assign(dtype="fp32"))
    assert read.work.weight_bits == 32


def test_shapes_are_counted_as_in_the_fit_and_their_bytes_follow_the_workload():
    fit = fitting.fit(runs.load("paper", "non_embedding"), laws.get("inference-aware"))
    shapes, work = Shapes.of([Shape.parse("12x3072/16h/4kv")]), Workload(batch=2, in_tokens=100, out_tokens=50, weight_bits=8)
    numbers = selection.without_latency(fit, shapes, 29e9, work)
    assert numbers["n_params"] == shapes[0].n_params("non_embedding")
    assert numbers["weight_bytes"] == shapes[0].n_params("total")  # a byte each
    assert numbers["kv_bytes"] == 2 * 150 * 2 * 12 * 4 * 192 * 2  # keys and values, 12 layers, 4 heads of 192, 2 bytes


def test_a_cap_on_the_weights_binds(paper, fit):
    on_a100 = Predicted(candidates(1.7e9), Machine.of("A100-40GB"))
    found = select(paper, fit, on_a100, Caps(**BUDGET, latency_s=100.0, weight_bytes=2e9))
    assert "weight_bytes" in found.binding_caps and found.shadow_prices["nats_per_weight_byte"] > 0
    assert found.candidates["weight_bytes"].max() <= 2e9
    assert found.optimum.n_params <= 1e9 * (1 + 1e-6)


def test_the_ranges_are_those_of_the_fitted_rows(paper):
    part = fitting.fit(paper, laws.get("inference-aware"), "fit_main")
    rows = paper[part.fitted]
    ratio = rows["d_model"] / rows["n_layers"]
    assert selection.fitted_ranges(paper, part) == {
        "N": (rows["n_params"].min(), rows["n_params"].max()), "D": (rows["tokens"].min(), rows["tokens"].max()),
        "R": (ratio.min(), ratio.max()),
    }  # fmt: skip


def test_the_deviation_of_a_run_is_that_of_weighted_least_squares(paper):
    weights = np.random.default_rng(0).uniform(0.1, 10, 76)
    fit = fitting.fit(paper, laws.get("inference-aware"), weights=weights)
    squares = weights * (paper["loss"] - fit.loss_predicted) ** 2
    assert selection._run_deviation(paper, fit) == pytest.approx(math.sqrt(squares.sum() / (76 - 5)), rel=1e-12)


def odds(loss, latency_s, within, cap_s=2.0):
    """What draws of given losses, (k, n), within the cap or not, (k, n), say of shapes with these latencies."""

    class Law:
        def predict(self, chunk, variables):
            return chunk

    class Fit:
        law = Law()

    numbers = {name: np.ones(len(latency_s)) for name in ("n_params", "tokens", "d_model", "n_layers")}
    listed = pd.DataFrame(numbers | {"latency_s": latency_s})
    drawn = lambda n, rng: np.where(within, 1.0, 3.0)  # noqa: E731
    return selection._odds(listed, Fit(), drawn, cap_s, np.array(loss), 0, 0.0, 0)


def test_what_draws_say_by_hand():
    """Four draws of two candidates and one shape whose latency is put above the cap."""
    loss = [[3.0, 3.1, 2.9], [3.2, 3.1, 3.3], [3.0, 3.3, 2.5], [3.0, 3.1, 2.0]]
    within = np.array([[1, 1, 1], [1, 1, 1], [0, 1, 0], [0, 0, 1]], dtype=bool)
    columns, said = odds(loss, [1.0, 1.5, 2.5], within)
    assert columns["probability_best"].tolist() == [0.25, 0.5, 0.0]
    assert columns["probability_within"].tolist() == [0.5, 0.75, 0.75]
    # the first is within and misses the best by 0 and 0.1; the second by 0.1, 0 and 0; the third by -0.1 and 0.2
    assert columns["expected_regret"] == pytest.approx([0.1 / 2, 0.1 / 3, 0.1 / 2], rel=1e-9)
    assert columns["probability_not_worse"].tolist() == [1.0, 0.25, 0.75]
    assert said == {"probability_beyond": 0.5, "probability_none": 0.25}


def test_a_fit_by_which_tokens_harm_cannot_choose(paper, fit):
    harmful = fitting.Fit(**{**vars(fit), "parameters": fit.parameters | {"B": -1e5}})
    with pytest.raises(InputError, match="more tokens raise the loss"):
        select(paper, harmful, three_of_the_paper(), Caps(**BUDGET, latency_s=5.0))


def test_the_continuous_shape_keeps_its_part_of_the_heads_and_the_width(paper, fit):
    like, latencies = Shape.parse("12x3072/16h/4kv/8192ff"), Predicted(Shapes.of([]), Machine.of("A100-40GB"))
    found = optimum(fit, like, latencies, Caps(params=1.6e9, tokens=29e9, latency_s=5.0), selection.fitted_ranges(paper, fit))
    d, layers = found.d_model, found.n_layers
    counted = 2 * 50432 * d + layers * (2 * d**2 + 2 * d**2 / 4 + 3 * d**2 * 8192 / 3072 + 2 * d) + d
    assert found.n_params == pytest.approx(counted, rel=1e-12)


@pytest.mark.parametrize(("n_not_worse", "apart"), [(4, True), (5, False)])
def test_a_shape_is_told_apart_that_is_no_worse_in_less_than_one_draw_of_twenty(n_not_worse, apart):
    loss = [[3.0, 2.9 if draw < n_not_worse else 3.1] for draw in range(100)]
    columns, _ = odds(loss, [1.0, 1.0], np.ones((100, 2), dtype=bool))
    assert columns["told_apart"].tolist() == [False, apart]
