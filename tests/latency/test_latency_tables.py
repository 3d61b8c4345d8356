"""The tables of what the authors timed, and how."""

import re

import pandas as pd
import pytest

from conftest import ROOT
from morphlib.latency import models
from morphlib.shapes import Shape, swiglu_width

DATA = ROOT / "morphlib" / "data"
CONFIGS = pd.read_csv(DATA / "latency_configs.csv", keep_default_na=False)
PROTOCOLS = pd.read_csv(DATA / "latency_protocols.csv", keep_default_na=False)
OPEN_GROUPS = ("prod", "baseline_1b")


def test_every_row_has_a_source_in_the_authors_repository():
    for table in (CONFIGS, PROTOCOLS):
        assert table["source"].str.contains(r"github\.com/Waterpine/open-lm-morph@[0-9a-f]{7} inference/", regex=True).all()


def test_the_457_configurations_count_as_said():
    """Random weights: N by the paper's formula, d_ff by the 256 rule, as the authors' scripts compute it."""
    assert len(CONFIGS) == 457
    ours = CONFIGS[~CONFIGS["group"].isin(OPEN_GROUPS)]
    assert len(ours) == 436
    for row in ours.itertuples():
        heads = int(row.n_heads or 1)  # the file that names no heads: they do not change the count
        shape = Shape.of(row.d_model, row.n_layers, n_heads=heads, vocab=row.vocab)
        assert row.n_kv_heads == row.n_heads
        assert row.d_ff == swiglu_width(row.d_model) == shape.d_ff
        assert row.n_params == shape.n_params("total"), row
        assert row.vocab == (50432 if row.architecture == "open_lm" else 32000)
        assert not row.n_heads or shape.head_size % 2 == 0


def test_the_open_models_are_those_of_the_table_of_open_models():
    table = models.open_models()
    theirs = CONFIGS[CONFIGS["group"].isin(OPEN_GROUPS)].set_index("variant")
    assert len(theirs) == 21
    fields = ["architecture", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "vocab", "n_params"]
    assert (theirs[fields].astype(str) == table.loc[theirs.index, fields].astype(str)).all().all()


def test_no_configuration_is_listed_twice():
    assert not CONFIGS.duplicated(["group", "variant", "gpu", "framework", "source"]).any()


def test_the_accuracy_models_are_the_morphs():
    exp = CONFIGS[(CONFIGS["group"] == "exp_1b") & (CONFIGS["gpu"] == "A100")]
    shapes = [Shape.of(row.d_model, row.n_layers, n_heads=int(row.n_heads)) for row in exp.itertuples()]
    assert shapes == [Shape.parse(name) for name in ("1b_v1", "1b_v3", "1b_v6", "1b_v8")]


def test_protocol_names_are_unique_and_readable():
    assert len(PROTOCOLS) == 35
    assert not PROTOCOLS["protocol"].duplicated().any()
    for row in PROTOCOLS.itertuples():
        assert re.fullmatch(r"paper-[a-z0-9-]+", row.protocol)
        assert row.framework in row.protocol.split("-")
        assert not row.gpu or row.gpu.lower() in row.protocol.split("-")


@pytest.mark.parametrize("row", list(PROTOCOLS.itertuples()), ids=list(PROTOCOLS["protocol"]))
def test_a_protocol_can_be_followed(row):
    batches = [int(batch) for batch in str(row.batch_sizes).split()]
    assert batches == sorted(set(batches)) and batches[0] >= 1
    assert row.in_tokens >= 1 and row.out_tokens >= 1 and row.repeats == 5
    assert (row.temperature, row.top_p) == (0.8, 0.95)
    assert row.metric == ("throughput" if "throughput" in row.protocol else "ttft" if row.out_tokens == 1 else "e2e")
    assert row.models in set(CONFIGS["group"])
    script = row.source.rpartition("/")[2]
    timed = CONFIGS[CONFIGS["scripts"].str.split().map(lambda scripts: script in scripts)]
    assert set(timed["group"]) == {row.models}
    assert timed["framework"].str.split().map(lambda frameworks: row.framework in frameworks).all()
    assert not row.gpu or timed["gpu"].str.split().map(lambda gpus: row.gpu in gpus).any()


def test_the_protocol_of_the_main_table():
    """Input 128, output 256, batch 1 on an A100 with Hugging Face generate, as the paper states."""
    row = PROTOCOLS.set_index("protocol").loc["paper-exp-1b-hf-a100"]
    assert (row.in_tokens, row.out_tokens, str(row.batch_sizes)) == (128, 256, "1")
