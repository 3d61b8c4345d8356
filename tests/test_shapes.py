import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from morphlib.errors import InputError
from morphlib.shapes import (
    BITS,
    CONVENTIONS,
    Shape,
    Shapes,
    candidates,
    default_heads,
    paper_shapes,
    plain_swiglu_width,
    swiglu_width,
)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    n_kv_heads = draw(st.integers(1, 8))
    n_heads = n_kv_heads * draw(st.integers(1, 8))
    return Shape(
        d_model=n_heads * draw(st.integers(1, 256)),
        n_layers=draw(st.integers(1, 200)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_ff=draw(st.integers(1, 50_000)),
        vocab=draw(st.integers(1, 200_000)),
        tied=draw(st.booleans()),
    )


@given(shapes())
def test_groups_sum_to_the_total_and_conventions_leave_out_the_tables(shape):
    groups = shape.parameters_by_group()
    total, without_input, non_embedding = (shape.n_params(convention) for convention in CONVENTIONS)
    assert total == sum(groups.values())
    assert without_input == total - (0 if shape.tied else shape.vocab * shape.d_model)
    assert non_embedding == groups["attention"] + groups["feed_forward"] + groups["norms"]


@given(shapes())
def test_the_specification_reads_back(shape):
    assert Shape.parse(str(shape)) == shape


@given(st.integers(1, 20_000))
def test_default_heads_keep_the_contract(d_model):
    heads = default_heads(d_model)
    assert d_model % heads == 0
    if d_model % 16 == 0 and d_model / 16 >= 64:
        assert heads == 16
    else:
        assert all(d_model % more for more in range(heads + 1, d_model // 64 + 1))


def test_the_papers_formula_gives_the_total(paper):
    """N = 2 V d + L (4 d^2 + 3 d d_ff + 2 d) + d, with d_ff by the 256 rule, for all 76 rows."""
    for row in paper.itertuples():
        d, layers, d_ff = row.d_model, row.n_layers, row.d_ff
        formula = 2 * 50432 * d + layers * (4 * d**2 + 3 * d * d_ff + 2 * d) + d
        assert swiglu_width(d) == d_ff
        assert formula == row.n_params == Shape.of(d, layers, n_heads=row.n_heads).n_params("total")


def test_every_shape_of_the_paper_to_the_digit():
    with (ROOT / "morphlib/data/paper_shapes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 87
    for row in rows:
        shape = paper_shapes()[row["name"]]
        assert shape.n_params("total") == int(row["n_params"]), row["name"]
        assert shape.d_ff == swiglu_width(shape.d_model)
        with_biases = Shape.of(shape.d_model, shape.n_layers, n_heads=shape.n_heads, vocab=shape.vocab, norm="layer_norm")
        assert with_biases.n_params("total") == int(row["n_params_layer_norm"]), row["name"]
    assert Shape.parse("scale_open_lm_80m_v1").n_params("total") == 78_914_048
    assert Shape.parse("scale_open_lm_1b_v8").n_params("total") == 1_668_885_504


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("12x3072", "12x3072/16h/16kv/8192ff/50432v"),
        ("12x3072/16h/4kv/8192ff", "12x3072/16h/4kv/8192ff/50432v"),
        ("4x128/ff=8d/3/8h", "4x128/8h/8kv/344ff/50432v"),
        ("2x96/256v/tied", "2x96/1h/1kv/256ff/256v/tied"),
        ("24x1008", "24x1008/14h/14kv/2816ff/50432v"),
    ],
)
def test_defaults_are_printed_back(text, full):
    assert str(Shape.parse(text)) == full


def test_names_of_runs_are_names_of_shapes(paper):
    for row in paper.itertuples():
        assert Shape.parse(row.name).n_params("total") == row.n_params


def test_the_plain_ratio_stays_near_eight_thirds():
    for d_model in range(64, 4096, 8):
        assert plain_swiglu_width(d_model) % 8 == 0
        assert abs(plain_swiglu_width(d_model) - 8 * d_model / 3) <= 4


@pytest.mark.parametrize(
    "text",
    ["", "12", "12x", "x3072", "12x3072/", "12x3072/16", "12x3072/16h/16h", "12x3072/16q", "0x64", "4x0", "12x3072/7h",
     "12x3072/16h/3kv", "12x3072/0ff", "-1x64", "12x3072 ", "12x3072/ff=3d", "no_such.json"],
)  # fmt: skip
def test_what_is_no_shape_says_so(text):
    with pytest.raises(ValueError, match=r"\S"):
        Shape.parse(text)


@given(st.text(alphabet="0123456789x/hkvf=d3tie ", max_size=20))
def test_any_text_is_a_shape_or_a_clear_error(text):
    try:
        shape = Shape.parse(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert Shape.parse(str(shape)) == shape


def test_an_open_lm_configuration(tmp_path):
    path = tmp_path / "config.json"
    config = {"hidden_dim": 3072, "n_layers": 12, "n_heads": 16, "seq_len": 2048, "vocab_size": 50432, "weight_tying": False}
    path.write_text(json.dumps(config))
    assert Shape.parse(str(path)).n_params("total") == 1_668_885_504
    changes = ({"n_layers": "twelve"}, {"post_embed_norm": True}, {"n_heads": 7}, {"qk_norm": True},
               {"weight_tying": "false"}, {"positional_embedding_type": "learned"}, {"ffn_type": "gelu"})  # fmt: skip
    for broken in ("{", "[]", json.dumps({"hidden_dim": 3072}), *(json.dumps(config | change) for change in changes)):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"config\.json"):
            Shape.parse(str(path))


@given(shapes(), st.sampled_from(BITS))
def test_bytes_follow_the_counts_and_the_bits(shape, bits):
    assert shape.weight_bytes(bits) == shape.n_params("total") * bits // 8
    numbers = 2 * shape.n_layers * shape.n_kv_heads * shape.head_size
    assert shape.kv_bytes_per_token(bits) == numbers * bits // 8
    assert shape.kv_bytes_per_token(bits, latent_width=2 * shape.n_kv_heads * shape.head_size) == numbers * bits // 8


@given(shapes(), st.integers(1, 4096))
def test_a_prefill_is_its_tokens_one_by_one_without_their_logits(shape, in_tokens):
    one_by_one = sum(shape.decode_flops_per_token(context) for context in range(1, in_tokens + 1))
    logits = 2 * shape.vocab * shape.d_model * (in_tokens - 1)
    assert shape.prefill_flops_per_token(in_tokens) * in_tokens == pytest.approx(one_by_one - logits)


@pytest.mark.parametrize(
    ("shape", "latent_width", "published"),
    [
        ("32x4096/32h/32kv/11008ff/32000v", None, 524_288),  # Llama-2-7B
        ("80x8192/64h/8kv/29568ff/152064v", None, 327_680),  # Qwen2.5-72B: arXiv 2505.09343, table 1, and the next two
        ("126x16384/128h/8kv/53248ff/128256v", None, 516_096),  # Llama-3.1-405B
        ("61x7168/128h/128kv/18432ff/129280v", 512 + 64, 70_272),  # DeepSeek-V3, multi-head latent attention
    ],
)
def test_published_bytes_of_the_key_value_cache(shape, latent_width, published):
    assert Shape.parse(shape).kv_bytes_per_token(16, latent_width) == published


def test_weights_and_flops_of_llama_2_7b():
    llama = Shape.parse("32x4096/32h/32kv/11008ff/32000v")
    assert llama.weight_bytes() == 2 * 6_738_415_616
    assert llama.weight_bytes(4, "without_input_embedding") == (6_738_415_616 - 32000 * 4096) // 2
    matrices = 6_738_415_616 - 32000 * 4096 - (2 * 32 + 1) * 4096
    assert llama.decode_flops_per_token(1000) == 2 * matrices + 4 * 32 * 4096 * 1000


@pytest.mark.parametrize(
    "wrong",
    [
        lambda shape: shape.weight_bytes(3),
        lambda shape: shape.kv_bytes_per_token(64),
        lambda shape: shape.kv_bytes_per_token(16, latent_width=0),
        lambda shape: shape.prefill_flops_per_token(0),
    ],
)
def test_what_cannot_be_counted_says_what_to_give(wrong):
    with pytest.raises(ValueError, match=r"choose one of|give a whole number"):
        wrong(Shape.parse("2x128"))


@given(st.lists(shapes(), min_size=1, max_size=5), st.sampled_from(CONVENTIONS), st.sampled_from(BITS))
def test_many_shapes_count_as_each_of_them(several, convention, bits):
    many = Shapes.of(several)
    assert len(many) == len(several) and [many[i] for i in range(len(many))] == several
    for i, shape in enumerate(several):
        assert many.n_params(convention)[i] == shape.n_params(convention)
        assert many.weight_bytes(bits)[i] // 1 == shape.weight_bytes(bits)
        assert many.kv_bytes_per_token(bits)[i] // 1 == shape.kv_bytes_per_token(bits)
        assert many.prefill_flops_per_token(100)[i] == shape.prefill_flops_per_token(100)
        assert many.aspect_ratio[i] == shape.aspect_ratio
    picked = many.where(np.array([True] * len(many)))
    assert [picked[i] for i in range(len(picked))] == several


@given(
    st.integers(20, 3000).map(lambda millions: 1e6 * millions),
    st.sampled_from(CONVENTIONS),
    st.sampled_from([64, 128, 192]),
    st.sampled_from([(1,), (1, 4), (8,)]),
    st.sampled_from([(None,), (4.0, None), (2.5,)]),
    st.booleans(),
)
def test_candidates_are_shapes_within_the_budget(budget, count, multiple, queries, ratios, tied):
    rules = {"width_multiple": multiple, "queries_per_kv_head": queries, "d_ff_ratios": ratios, "tied": tied}
    try:
        found = candidates(budget, count=count, tolerance=0.5, depths=range(2, 40, 3), vocab=1000, **rules)
    except ValueError as error:
        assert "the nearest" in str(error)
        return
    built = [found[i] for i in range(len(found))]
    assert len(set(built)) == len(built)
    for shape in built[:: max(1, len(built) // 50)]:
        assert budget / 2 <= shape.n_params(count) <= budget
        assert shape.d_model % multiple == 0 and shape.head_size in (64, 128)
        assert shape.n_heads // shape.n_kv_heads in queries
        assert shape.d_ff == swiglu_width(shape.d_model) or any(
            ratio and abs(shape.d_ff - ratio * shape.d_model) <= 32 for ratio in ratios
        )


@pytest.mark.parametrize(
    ("budget", "rules", "message"),
    [
        (1000, {}, "no shape has 1000 or fewer parameters .total.: under these constraints the nearest, 1x128"),
        (float("nan"), {}, "is no budget"),
        (1e9, {"tolerance": -0.1}, "is no budget"),
        (1e9, {"depths": []}, "depths is"),
        (1e9, {"head_sizes": (0,)}, "head_sizes is"),
        (1e9, {"head_sizes": (96,), "width_multiple": 100_000}, "no width has heads of that size"),
        (1e9, {"d_ff_ratios": (0.0,)}, "must be above zero"),
        (1e9, {"n_heads": 7, "depths": [4], "tolerance": 0.0}, "no shape has 1e.09 to 1e.09"),
    ],
)
def test_constraints_that_leave_no_candidate(budget, rules, message):
    with pytest.raises(ValueError, match=message):
        candidates(budget, **rules)


def test_shapes_of_different_norms_are_not_mixed():
    with pytest.raises(ValueError, match="different norms"):
        Shapes.of([Shape.of(128, 2), Shape.of(128, 2, norm="rms_norm")])


def test_candidates_are_all_the_shapes_there_are():
    rules = {
        "depths": range(1, 4),
        "width_multiple": 64,
        "queries_per_kv_head": (1, 4, 8),
        "d_ff_ratios": (0.05, None),
        "vocab": 100,
    }
    found = candidates(2.6e6, count="non_embedding", tolerance=0.75, **rules)
    expected = set()
    for width in range(64, 2049, 64):
        heads = width // (128 if width % 128 == 0 else 64)
        for queries in (q for q in (1, 4, 8) if heads % q == 0):
            for d_ff in (64 * max(1, round(0.05 * width / 64)), swiglu_width(width)):
                sizes = {"d_model": width, "n_heads": heads, "n_kv_heads": heads // queries, "d_ff": d_ff, "vocab": 100}
                expected |= {Shape(n_layers=depth, **sizes) for depth in (1, 2, 3)}
    expected = {shape for shape in expected if 6.5e5 <= shape.n_params("non_embedding") <= 2.6e6}
    built = [found[i] for i in range(len(found))]
    assert set(built) == expected and len(built) == len(expected)
    assert [(s.n_layers, s.d_model) for s in built] == sorted((s.n_layers, s.d_model) for s in built)


def test_a_budget_holds_both_its_ends_and_heads_of_an_even_size():
    shape = Shape.of(256, 4, n_heads=2)
    for tolerance, budget in ((0.0, shape.n_params("total")), (0.5, 2 * shape.n_params("total"))):
        found = candidates(budget, tolerance=tolerance, depths=[4])
        assert shape in {found[i] for i in range(len(found))}
    found = candidates(1e8, depths=[4], n_heads=16, width_multiple=16)
    assert set((found.d_model / 16) % 2) == {0.0} and found.n_heads.min() == found.n_heads.max() == 16


def test_the_narrowest_plain_width_and_a_norm_that_is_none():
    assert plain_swiglu_width(1) == 8
    with pytest.raises(InputError, match="norm is 'none'; choose one of gain_only_layer_norm"):
        Shape.of(128, 2, norm="none")


def test_norms_of_one_vector():
    gain, rms, bias = (Shape.of(128, 2, norm=norm) for norm in ("gain_only_layer_norm", "rms_norm", "layer_norm"))
    assert rms.n_params("total") == gain.n_params("total") == bias.n_params("total") - (2 * 2 + 1) * 128


def test_many_shapes_have_fractions_of_bytes():
    """Not rounded, for optimizers take their slopes."""
    half = Shapes(**{name: np.array([number]) for name, number in
                     {"d_model": 1.0, "n_layers": 1.0, "n_heads": 1.0, "n_kv_heads": 0.5, "d_ff": 1.0, "vocab": 1.0}.items()},
                  tied=np.array([True]))  # fmt: skip
    assert half.kv_bytes_per_token(4) == 0.5


def test_candidates_of_tied_tables_are_tied_and_d_ff_is_rounded_to_the_nearest():
    found = candidates(1e8, depths=[4], tied=True, d_ff_ratios=(2.7,))
    assert found.tied.all() and set(found.d_ff) == {64 * round(2.7 * width / 64) for width in found.d_model}
