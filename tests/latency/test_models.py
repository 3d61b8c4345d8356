"""Models to time: every bundled configuration to its published count, what cannot be built refused in one line."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morphlib.errors import InputError
from morphlib.latency import models
from morphlib.latency.models import Model
from morphlib.shapes import Shape

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from operations import count_operations  # noqa: E402 - it needs both

OPEN = models.open_models()

# One small configuration of each architecture in the table, with what makes it different from a Llama.
SMALL = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "gemma": {"num_key_value_heads": 1, "head_dim": 32},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
}


def small(architecture, **fields):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 128}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "max_position_embeddings": 32}
    config = transformers.AutoConfig.for_model(architecture, **(sizes | tokens | SMALL[architecture] | fields))
    return Model(name=architecture, config=config)


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(12).reshape(1, 12)).logits


# --- what is bundled


@pytest.mark.parametrize("name", OPEN.index)
def test_an_open_model_builds_with_its_published_count(name):
    model = models.resolve(name)
    assert model.n_params() == OPEN.loc[name, "n_params"]
    assert models.dimensions(model.config) == {
        field: OPEN.loc[name, field]
        for field in ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_size", "d_ff", "vocab", "tied")
    }
    assert model.max_tokens == OPEN.loc[name, "max_tokens"]


# Non-embedding parameters from the reports (arXiv 2403.08295 and 2408.00118, table 2; 2404.06395, table 2) and
# from the README of EleutherAI/pythia.
REPORTED = {
    "google/gemma-2b": 1_981_884_416,
    "google/gemma-7b": 7_751_248_896,
    "google/gemma-2-2b": 2_024_517_888,
    "google/gemma-2-9b": 8_324_201_984,
    "openbmb/MiniCPM-1B-sft-bf16": 1_247_442_432,
    "openbmb/MiniCPM-2B-sft-bf16-llama-format": 2_442_057_984,
    "EleutherAI/pythia-1.4b-v0": 1_208_602_624,
}


@pytest.mark.parametrize(("name", "non_embedding"), REPORTED.items())
def test_and_with_the_non_embedding_count_of_its_report(name, non_embedding):
    row = OPEN.loc[name]
    tables = 1 if row.tied else 2
    assert models.resolve(name).n_params() - tables * row.vocab * row.d_model == non_embedding


def test_open_lm_counts_by_the_papers_formula():
    shapes = {"Open-LM-1B": "1b_v1", "Morph-1B-v1": "1b_v1", "Morph-1B-v2": "1b_v3", "Morph-1B": "1b_v8"}
    for name, shape in shapes.items():
        assert OPEN.loc[name, "n_params"] == Shape.parse(shape).n_params("total")
        assert models.resolve(name).built_as == "open_lm"
    assert OPEN.loc["Open-LM-1B", "n_params"] == 1_439_795_200


def test_every_row_names_its_sources():
    assert (OPEN[["source", "n_params_source"]] != "").all().all()
    assert not OPEN.index.has_duplicates


def test_names_are_found_by_their_last_part_in_any_case():
    last = [name.rpartition("/")[2].lower() for name in OPEN.index]
    assert len(set(last)) == len(OPEN)
    assert models.resolve("llama-3.2-1b").name == "meta-llama/Llama-3.2-1B"
    assert models.resolve("GOOGLE/Gemma-7B").facts("bf16")["head_size"] == 256  # 16 heads of 256 in a width of 3072


# --- shapes


@st.composite
def shapes(draw):
    n_kv_heads = draw(st.integers(1, 3))
    n_heads = n_kv_heads * draw(st.integers(1, 3))
    return Shape(
        d_model=n_heads * 2 * draw(st.integers(1, 8)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_ff=draw(st.integers(1, 100)),
        vocab=draw(st.integers(3, 100)),
        tied=draw(st.booleans()),
    )


@settings(max_examples=20)
@given(shapes())
def test_a_shape_is_built_with_as_many_parameters_as_it_counts(shape):
    model = Model(name=str(shape), config=models.config_of(shape))
    assert model.shape == shape
    assert model.n_params() == shape.n_params("total")
    sizes = models.dimensions(model.config)
    assert sizes.pop("head_size") == shape.head_size
    assert all(value == getattr(shape, field) for field, value in sizes.items())


def test_the_papers_shape_keeps_its_name_and_heads():
    model = models.resolve("1b_v8")
    assert (model.name, model.path, model.max_tokens) == ("1b_v8", None, 4096)
    assert model.shape == Shape.parse("12x3072/16h")
    facts = model.facts("bf16")
    assert facts["n_params"] == 1_668_885_504
    assert (facts["shape"], facts["kv_bytes_per_token"]) == (str(model.shape), model.shape.kv_bytes_per_token(16))
    assert (facts["weights"], facts["built_as"]) == ("random", "llama")


def test_a_model_that_a_shape_does_not_describe_has_none():
    """Heads that do not make up the width, another architecture, and one that stands in for another."""
    for name in ("Gemma-7B", "opt-1.3b", "MiniCPM-1B-sft-bf16"):
        assert models.resolve(name).shape is None
    gemma = models.resolve("Gemma-7B").facts("fp32")
    assert gemma["shape"] is None and gemma["kv_bytes_per_token"] == 2 * 28 * 16 * 256 * 4


# --- shapes of open models, to predict with


@pytest.mark.parametrize("name", OPEN.index)
def test_the_shape_of_an_open_model_weighs_what_the_model_weighs(name):
    row = OPEN.loc[name]
    shape, architecture = models.shape_of(name)
    # biases, LayerNorm's and learned positions (4 M in OPT and GPT-Neo) are not in a shape
    assert shape.n_params("total") == pytest.approx(row.n_params, rel=0.004)
    if architecture in ("llama", "mistral", "open_lm"):
        assert shape.n_params("total") == row.n_params
    assert architecture == ("llama" if row.architecture == "minicpm" else row.architecture)


def test_the_shape_of_anything_else(tmp_path):
    assert models.shape_of("2x64/4h/2kv") == (Shape.parse("2x64/4h/2kv"), "llama")
    config = small("qwen2").config
    config.save_pretrained(tmp_path)
    shape, architecture = models.shape_of(str(tmp_path))
    assert (str(shape), architecture) == ("2x64/4h/2kv/96ff/128v", "qwen2")
    with pytest.raises(InputError, match="or an open model"):
        models.shape_of("nothing")


# --- random weights


@pytest.mark.parametrize("architecture", SMALL)
def test_random_weights_are_what_transformers_draws(architecture):
    """Against a model built in the ordinary way: the buffers, the norms, the biases and the ties are the same."""
    ours = small(architecture).load("fp32", "cpu")
    theirs = transformers.AutoModelForCausalLM.from_config(small(architecture).config, dtype=torch.float32).eval()
    assert not ours.training
    buffers = dict(theirs.named_buffers())
    assert buffers.keys() == dict(ours.named_buffers()).keys()
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    weights = dict(theirs.named_parameters())
    assert weights.keys() == dict(ours.named_parameters()).keys()
    for name, weight in ours.named_parameters():
        assert weight.shape == weights[name].shape
        if weight.dim() == 1:
            assert torch.equal(weight, weights[name]), name
    assert ours.config._attn_implementation == theirs.config._attn_implementation


def test_their_standard_deviation_is_002_whatever_the_configuration_says():
    for field, architecture in (("initializer_range", "llama"), ("init_std", "opt")):
        model = small(architecture, hidden_size=256, word_embed_proj_dim=256, intermediate_size=512, **{field: 0.5})
        loaded = model.load("fp32", "cpu")
        for name, weight in loaded.named_parameters():
            if weight.dim() == 2:  # four standard errors of a standard deviation
                assert weight.std().item() == pytest.approx(0.02, rel=4 / (2 * weight.numel()) ** 0.5), name
        assert getattr(model.config, field) == 0.5, "the configuration given is left alone"


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_seed_and_dtype(dtype, expected):
    state = torch.get_rng_state()
    model = models.resolve("2x64/128v/tied")
    first, again, other = (model.load(dtype, "cpu", seed=seed) for seed in (0, 0, 1))
    assert first.dtype == expected
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
    assert torch.equal(torch.get_rng_state(), state)


# --- memory


@pytest.mark.parametrize("architecture", SMALL)
@pytest.mark.parametrize(("batch", "context"), [(1, 1), (3, 7), (2, 32)])
def test_memory_covers_the_weights_and_the_cache(architecture, batch, context):
    model = small(architecture, **({"sliding_window": 64} if "sliding_window" in SMALL[architecture] else {}))
    built = model.load("bf16", "cpu")
    held = sum(t.nbytes for tensors in (built.parameters(), built.buffers()) for t in tensors)
    with torch.inference_mode():
        output = built(torch.zeros(batch, context, dtype=torch.long), use_cache=True)
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    needed = model.memory_bytes("bf16", batch, context)
    sizes = models.dimensions(model.config)
    working = needed - held - cache
    assert working >= batch * 4 * sizes["vocab"] + batch * context * 2 * (sizes["d_ff"] + sizes["d_model"])
    # all but what is held grows with the batch
    assert model.memory_bytes("bf16", 2 * batch, context) - held == 2 * (needed - held)


def test_memory_of_a_known_case():
    """Llama-2-7b in 16 bits: 13.5 GB of weights, and half a MB of cache for a token (2 x 32 layers x 4096 x 2 bytes)."""
    model = models.resolve("Llama-2-7b-hf")
    one, more = (model.memory_bytes("bf16", batch, 2048) for batch in (1, 5))
    cache = 2 * 32 * 4096 * 2 * 2048
    assert 0 < (more - one) / 4 - cache < 0.35 * cache
    assert one - (more - one) / 4 == pytest.approx(2 * 6_738_415_616, rel=1e-6)
    assert 2 * 6_738_415_616 < model.memory_bytes("bf16", 1, 1) < model.memory_bytes("fp32", 1, 1) / 1.99


LATENT = {"q_lora_rank": None, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("falcon", {}),
        ("falcon", {"multi_query": False}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("gpt_bigcode", {"n_positions": 64}),
        ("minicpm3", LATENT),
        ("deepseek_v3", LATENT | {"moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "n_routed_experts": 2}),
    ],
)
def test_the_cache_grows_as_said_with_one_head_for_all_and_with_a_latent(architecture, fields):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 128}
    config = transformers.AutoConfig.for_model(architecture, **(sizes | {"pad_token_id": None} | fields))
    model = Model(name=architecture, config=config)
    with torch.inference_mode():
        cache = model.load("fp32", "cpu")(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert 5 * model.kv_bytes_per_token("fp32") == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# --- operations


@pytest.mark.parametrize("architecture", SMALL)
def test_operations_counted_on_fake_tensors_are_those_of_the_real_model(architecture):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func)
            return func(*args, **(kwargs or {}))

    names = []
    model = small(architecture)
    loaded = model.load("bf16", "cpu")
    with torch.no_grad():
        cache = loaded(torch.zeros(1, 8, dtype=torch.long), use_cache=True).past_key_values
        token = torch.zeros(1, 1, dtype=torch.long)
        with Record():
            loaded(token, past_key_values=cache, use_cache=True)
    views = sum(op.is_view or op.name() in ("aten::_unsafe_view", "aten::detach_") for op in names)
    counted = count_operations(model)
    assert 2 * counted.views_per_layer + counted.views_outside == views
    assert 2 * counted.per_layer + counted.outside == len(names) - views


def test_operations_of_a_llama_layer_by_hand():
    norm = len(["to_fp32", "pow", "mean", "add_eps", "rsqrt", "mul", "to_bf16", "mul_gain"])
    rotary = len(["mul_cos", "neg", "cat", "mul_sin", "add"])
    attention = len(["q", "k", "v", "cache_k", "cache_v", "attend", "o"])
    feed_forward = len(["gate", "silu", "up", "mul", "down"])
    by_hand = 2 * norm + 2 * rotary + attention + feed_forward + 2  # and two sums with the residual stream
    for name in ("llama-3.2-1b", "1b_v8", "2x64/4h/2kv"):  # neither width nor depth nor shared heads change it
        counted = count_operations(models.resolve(name))
        assert (counted.per_layer, counted.outside) == (by_hand, 21)


# --- from disk


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt_neo"])
def test_a_checkpoint_answers_as_the_model_that_was_saved(tmp_path, architecture):
    saved = small(architecture).load("fp32", "cpu", seed=3)
    saved.save_pretrained(tmp_path)
    model = models.resolve(str(tmp_path))
    assert (model.path, model.built_as, model.name) == (tmp_path, architecture, tmp_path.name)
    assert model.facts("fp32")["weights"] == "checkpoint"
    assert torch.equal(logits(model.load("fp32", "cpu")), logits(saved))


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_configuration_alone_gets_random_weights(tmp_path, as_folder):
    small("qwen2").config.save_pretrained(tmp_path)
    model = models.resolve(str(tmp_path if as_folder else tmp_path / "config.json"))
    assert (model.path, model.name) == (None, tmp_path.name)
    assert torch.isfinite(logits(model.load("fp32", "cpu"))).all()


def test_an_open_lm_configuration_is_a_shape(tmp_path):
    file = tmp_path / "m.json"
    file.write_text(json.dumps({"hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 300}))
    model = models.resolve(str(file))
    assert (model.name, model.n_params()) == ("m.json", Shape.of(96, 2, n_heads=4, vocab=300).n_params("total"))


def test_nothing_that_comes_with_a_model_is_run(tmp_path):
    mark = tmp_path / "ran"
    (tmp_path / "configuration_evil.py").write_text(
        f"import pathlib\nfrom transformers import PretrainedConfig\npathlib.Path({str(mark)!r}).touch()\n"
        "class Evil(PretrainedConfig):\n    model_type = 'evil'\n"
    )
    for model_type in ("evil", "llama"):
        config = {"model_type": model_type, "auto_map": {"AutoConfig": "configuration_evil.Evil"}, "attn_implementation": "a/b"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if model_type == "evil":
            with pytest.raises(InputError, match="transformers cannot read its configuration"):
                models.resolve(str(tmp_path))
        else:
            assert models.resolve(str(tmp_path)).config._attn_implementation is None
    assert not mark.exists()


def broken(tmp_path, what):
    """A saved checkpoint with one thing wrong."""
    loaded = small("llama").load("fp32", "cpu")
    if what == "not finite":
        loaded.lm_head.weight.data[0, 0] = float("nan")
    loaded.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if what == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "incomplete":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif what == "another size":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"intermediate_size": 64}))
    elif what == "pickled":
        weights.rename(tmp_path / "pytorch_model.bin")
    elif what == "quantized":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    elif what == "odd heads":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"head_dim": 15}))
    elif what == "not JSON":
        config.write_text("{")
    elif what == "no configuration":
        config.unlink()
    elif what == "of another kind":
        config.write_text(json.dumps({"model_type": "t5"}))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("not finite", "the logits are not finite in fp32"),
        ("cut", "cannot read the checkpoint"),
        ("incomplete", r"weights missing from it, such as model\.norm\.weight"),
        ("another size", "cannot read the checkpoint"),
        ("pickled", r"reading a \.bin file could run code"),
        ("quantized", "is quantized"),
        ("odd heads", "RoPE requires an even rotary dimension"),
        ("not JSON", "cannot read its configuration"),
        ("no configuration", "a checkpoint's folder, a config.json"),
        ("of another kind", "Unrecognized configuration class"),
    ],
)
def test_a_broken_folder_is_refused_in_one_line(tmp_path, what, said):
    with pytest.raises(InputError, match=said) as refused:
        models.resolve(broken(tmp_path, what)).load("fp32", "cpu")
    assert "\n" not in str(refused.value) and "; " in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("12x3073/16h", "16 heads do not divide the width 3073"),
        ("2x60/4h", "the head size 15 is odd"),
        ("12y3072", "or an open model: Llama-2-7b-hf, "),
        ("meta-llama/Llama-9", "a checkpoint's folder, a config.json"),
        ("absent.json", "absent.json: cannot be read"),
        ("12x", "is not a shape"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(text, said):
    with pytest.raises(InputError, match=re.escape(said)) as refused:
        models.resolve(text)
    assert "\n" not in str(refused.value)


def test_importing_the_module_loads_no_torch():
    script = (
        "import sys, morphlib.latency.models as m; m.shape_of('opt-1.3b'); print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "set()"
