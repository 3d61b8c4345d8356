import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from torch.nn import functional  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from morphlib.errors import InputError  # noqa: E402
from morphlib.model import (  # noqa: E402
    OpenLMConfig,
    OpenLMForCausalLM,
    config_of_open_lm,
    read_open_lm,
    write_open_lm,
)
from morphlib.shapes import OPEN_LM_NORMS, Shape, paper_shapes  # noqa: E402

SHAPES = [
    Shape.of(64, 3, n_heads=4, vocab=101),
    Shape.of(96, 2, n_heads=6, n_kv_heads=2, vocab=101, norm="rms_norm"),
    Shape.of(64, 2, n_heads=2, vocab=101, tied=True, norm="layer_norm", d_ff=176),
]
VARIANTS = [(shape, qk_norm) for shape in SHAPES for qk_norm in (False, True)]
each_variant = pytest.mark.parametrize(("shape", "qk_norm"), VARIANTS, ids=str)


def built(shape, qk_norm=False, seed=0):
    """A model with every weight moved away from its initial value, so that none can be left out unseen."""
    torch.manual_seed(seed)
    model = OpenLMForCausalLM(OpenLMConfig.of(shape, qk_norm=qk_norm)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def tokens(shape, length=17, batch=2):
    return torch.randint(0, shape.vocab, (batch, length), generator=torch.Generator().manual_seed(3))


def by_the_formulas(model, ids):
    """Open-LM's decoder written out once more: no classes, no cache, attention as a softmax of a matrix."""
    w, c = model.state_dict(), model.config
    width, heads, kv = c.hidden_size, c.num_attention_heads, c.num_key_value_heads
    size = width // heads

    def norm(x, name):
        if c.norm == "rms_norm":
            return x / torch.sqrt((x**2).mean(-1, keepdim=True) + c.norm_eps) * w[f"{name}.weight"]
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + c.norm_eps) * w[f"{name}.weight"]
        return scaled + w.get(f"{name}.bias", 0.0)

    angle = torch.arange(ids.shape[1])[:, None] / 10_000 ** (torch.arange(0, size, 2) / size)

    def rotated(x):
        real, imaginary = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)

    x = w["tok_embeddings.weight"][ids]
    for i in range(c.num_hidden_layers):
        part = f"layers.{i}."
        q, k, v = (norm(x, part + "attention_norm") @ w[part + "attention.in_proj.weight"].T).split(
            [width, kv * size, kv * size], dim=-1
        )
        if c.qk_norm:
            q, k = norm(q, part + "attention.q_norm"), norm(k, part + "attention.k_norm")
        q, k, v = (t.reshape(*ids.shape, -1, size) for t in (q, k, v))
        q, k = rotated(q), rotated(k).repeat_interleave(heads // kv, dim=2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(size)
        later = torch.triu(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool), diagonal=1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        attended = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(heads // kv, dim=2))
        x = x + attended.reshape(x.shape) @ w[part + "attention.out_proj.weight"].T
        gate, up = (norm(x, part + "ffn_norm") @ w[part + "feed_forward.w12.weight"].T).chunk(2, dim=-1)
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w[part + "feed_forward.w3.weight"].T
    return norm(x, "norm") @ w["output.weight"].T


@each_variant
def test_logits_are_those_of_the_formulas(shape, qk_norm):
    model, ids = built(shape, qk_norm), tokens(shape)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, by_the_formulas(model, ids), atol=1e-5)


def test_logits_are_open_lms_own(tmp_path):
    """Against the package itself, which is on no index: skipped where it is not installed."""
    open_lm = pytest.importorskip("open_lm.model", reason="open_lm is not installed; it is on no package index")
    from open_lm.attention import torch_attn
    from open_lm.norms import get_norm_class

    ids = tokens(SHAPES[0], 33)
    for name, norm in OPEN_LM_NORMS.items():
        for qk_norm in (False, True):
            theirs = open_lm.Transformer(
                open_lm.Params(
                    dim=64, n_layers=3, n_heads=4, vocab_size=101, norm_type=get_norm_class(name), attn_func=torch_attn,
                    apply_qk_norm=qk_norm,
                )
            ).eval()  # fmt: skip
            torch.save(
                {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "c.pt"
            )
            shape = Shape.of(64, 3, n_heads=4, vocab=101, norm=norm)
            ours = read_open_lm(tmp_path / "c.pt", OpenLMConfig.of(shape, qk_norm=qk_norm))
            with torch.no_grad():
                assert torch.allclose(ours(ids).logits, theirs(ids)[0], atol=1e-5)
            write_open_lm(ours, tmp_path / "back.pt")
            theirs.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True))


@each_variant
def test_it_has_the_parameters_that_its_shape_counts(shape, qk_norm):
    model = OpenLMForCausalLM(OpenLMConfig.of(shape, qk_norm=qk_norm))
    counted = sum(weight.numel() for weight in model.parameters())
    vectors = 2 if shape.norm == "layer_norm" else 1
    of_qk = shape.n_layers * vectors * (shape.d_model + shape.n_kv_heads * shape.head_size) if qk_norm else 0
    assert counted == shape.n_params("total") + of_qk
    assert model.config.shape == shape


def test_every_shape_of_the_paper_can_be_built():
    for name, shape in paper_shapes().items():
        with torch.device("meta"):
            model = OpenLMForCausalLM(OpenLMConfig.of(shape))
        assert sum(weight.numel() for weight in model.parameters()) == shape.n_params("total"), name


def test_initialization_is_open_lms():
    shape = Shape.of(512, 4, n_heads=8, vocab=2000)
    torch.manual_seed(0)
    model = OpenLMForCausalLM(OpenLMConfig.of(shape))
    expected = {"tok_embeddings": 512**-0.5, "output": 512**-0.5}
    for i in range(4):
        depth = math.sqrt(2 * (i + 1))
        expected |= {f"layers.{i}.attention.in_proj": 512**-0.5, f"layers.{i}.attention.out_proj": 512**-0.5 / depth}
        expected |= {f"layers.{i}.feed_forward.w12": 512**-0.5, f"layers.{i}.feed_forward.w3": shape.d_ff**-0.5 / depth}
    cut = 0.98658  # standard deviation of a normal cut at three of its own
    for name, std in expected.items():
        weight = model.get_submodule(name).weight
        # the standard error of a standard deviation of so many draws is its value over sqrt(2 n)
        assert weight.std().item() == pytest.approx(cut * std, rel=5 / math.sqrt(2 * weight.numel())), name
        assert weight.abs().max() <= 3 * std
    assert all((norm.weight == 1).all() for norm in (model.norm, model.layers[0].ffn_norm))


@each_variant
def test_the_cache_changes_nothing(shape, qk_norm):
    model, ids = built(shape, qk_norm), tokens(shape)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :9], use_cache=True)
        rest = model(ids[:, 9:], past_key_values=first.past_key_values).logits
    assert torch.allclose(torch.cat([first.logits, rest], dim=1), whole, atol=1e-5)


def test_it_generates_with_a_growing_and_a_static_cache_and_with_padding():
    model, ids = built(SHAPES[1]), tokens(SHAPES[1], 6)
    settings = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    grown = model.generate(ids, attention_mask=mask, **settings)
    for step in range(6, 13):  # greedy, one whole pass for each token
        with torch.no_grad():
            assert (model(grown[:, :step]).logits[:, -1].argmax(-1) == grown[:, step]).all()
    assert (model.generate(ids, attention_mask=mask, cache_implementation="static", **settings) == grown).all()
    left = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
    assert (model.generate(left, attention_mask=padded, **settings)[:, 3:] == grown).all()


def test_loss_is_the_mean_over_the_next_tokens():
    model, ids = built(SHAPES[0]), tokens(SHAPES[0])
    with torch.no_grad():
        out = model(ids, labels=ids)
    assert out.loss.item() == pytest.approx(
        functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    )


def test_gradients_are_the_same_with_checkpointing():
    model, ids = built(SHAPES[0]), tokens(SHAPES[0])
    grads = []
    for checkpointing in (False, True):
        model.train()
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        grads.append([weight.grad.clone() for weight in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_it_compiles_as_one_graph():
    model, ids = built(SHAPES[0]), tokens(SHAPES[0])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(ids, use_cache=False).logits, model(ids).logits, atol=1e-6)


def test_the_auto_classes_read_what_was_saved(tmp_path):
    model, ids = built(SHAPES[2], qk_norm=True), tokens(SHAPES[2])
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, OpenLMConfig) and config.shape == SHAPES[2] and config.qk_norm
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("trainer", [False, True])
def test_open_lm_checkpoints_come_and_go(tmp_path, prefix, trainer):
    model, ids = built(SHAPES[0]), tokens(SHAPES[0])
    states = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    states[f"{prefix}layers.0.attention.pos_embed.inv_freq"] = torch.ones(8)
    torch.save({"epoch": 3, "state_dict": states, "step": 5} if trainer else states, tmp_path / "given.pt")
    read = read_open_lm(tmp_path / "given.pt", model.config)
    write_open_lm(read, tmp_path / "written.pt")
    again = read_open_lm(tmp_path / "written.pt", model.config)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    written = torch.load(tmp_path / "written.pt", weights_only=True)
    assert sum(name.endswith("pos_embed.inv_freq") for name in written) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"given.pt", "written.pt"}


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_a_checkpoint_that_is_none_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, weights = OpenLMConfig.of(SHAPES[0]), built(SHAPES[0]).state_dict()
    faults = {
        "pickle.pt": {"state_dict": Harmful()},
        "list.pt": [1, 2],
        "lacks.pt": {name: value for name, value in weights.items() if "norm" not in name},
        "more.pt": weights | {"extra": torch.ones(1)},
        "shape.pt": weights | {"norm.weight": torch.ones(3)},
    }
    messages = [
        "is not read",
        "holds no state dict",
        "it lacks layers.0.attention_norm",
        "has beyond it extra",
        "another shape",
    ]
    for (name, content), message in zip(faults.items(), messages, strict=True):
        torch.save(content, name)
        with pytest.raises(InputError, match=message) as error:
            read_open_lm(Path(name), config)
        assert "\n" not in str(error.value)
    Path("text.pt").write_text("no checkpoint")
    for name in ("text.pt", "missing.pt"):
        with pytest.raises(InputError, match="is not read"):
            read_open_lm(Path(name), config)
    assert not Path("harm").exists()
    with pytest.raises(InputError, match="cannot be written"):
        write_open_lm(built(SHAPES[0]), Path("text.pt") / "c.pt")


def test_a_tied_checkpoint_with_a_head_of_its_own_is_refused(tmp_path):
    model = built(Shape.of(32, 1, n_heads=2, vocab=40, tied=True))
    untied = {**model.state_dict(), "output.weight": torch.zeros(40, 32)}
    torch.save(untied, tmp_path / "c.pt")
    with pytest.raises(InputError, match="an output head of its own"):
        read_open_lm(tmp_path / "c.pt", model.config)


def test_an_answer_can_be_a_tuple():
    model = built(SHAPES[0])
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)


def test_configurations_of_open_lm(tmp_path):
    path = tmp_path / "model.json"
    given = {
        "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 300, "seq_len": 512, "post_embed_norm": False,
        "weight_tying": True, "model_norm": "gain_only_lp_layer_norm", "qk_norm": True,
    }  # fmt: skip
    path.write_text(json.dumps(given))
    config = config_of_open_lm(path)
    assert config.shape == Shape.of(96, 2, n_heads=4, vocab=300, tied=True) and config.qk_norm
    assert config.max_position_embeddings == 512
    del given["model_norm"]
    path.write_text(json.dumps(given))
    assert config_of_open_lm(path).norm == "layer_norm" and config_of_open_lm(path, "rms_norm").norm == "rms_norm"
    for wrong, message in (
        ({"model_norm": "batch_norm"}, "the norm 'batch_norm'"),
        ({"positional_embedding_type": "head_rotary"}, "other positions"),
        ({"ffn_type": "moe"}, "only rotary positions and swiglu"),
        ({"n_heads": 5}, "5 heads do not divide"),
        ({"n_heads": None}, "give an Open-LM model configuration"),
        ({"n_heads": 32}, "head size 3 is odd"),
    ):
        path.write_text(json.dumps(given | wrong))
        with pytest.raises(InputError, match=message) as error:
            config_of_open_lm(path)
        assert "\n" not in str(error.value)
    for text in ("{", "[]", '{"hidden_dim": 96}'):
        path.write_text(text)
        with pytest.raises(InputError, match="give an Open-LM model configuration"):
            config_of_open_lm(path)
