r"""The Open-LM decoder as a transformers model, with the layout and the names of Open-LM's own weights.

A block is :math:`x + \mathrm{out}(\mathrm{attention}(\mathrm{norm}(x)))`, then
:math:`h + w_3(\mathrm{silu}(g) \cdot u)` with :math:`(g, u) = w_{12}(\mathrm{norm}(h))`: pre-norm, rotary positions on
queries and keys, SwiGLU, no biases. Queries, keys and values are one matrix, and so are gate and up, as in Open-LM, so that a
step launches what Open-LM's launches and its checkpoints load without being taken apart.

Initialization, as Open-LM: normal, cut at three standard deviations; 1 / sqrt(fan-in), and for the two
matrices that write to the residual stream divided by sqrt(2 (layer + 1)), layers counted from 0. Embedding and head:
1 / sqrt(width).

Source: ``open_lm/model.py``, ``norms.py`` and ``positional_embedding/rotary.py`` of ``mlfoundations/open_lm@9bb92ef``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils.generic import can_return_tuple

from morphlib import files
from morphlib.errors import InputError
from morphlib.shapes import OPEN_LM_NORMS, TRANSFORMERS_NAMES, Shape, open_lm_configuration

_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "module.")  # of FSDP, of torch.compile, of DDP


@strict
class OpenLMConfig(PreTrainedConfig):
    """The sizes of an Open-LM decoder under the names of transformers; `of` makes one from a `Shape`.

    ``norm`` is a ``Norm`` of `morphlib.shapes`; ``qk_norm`` norms queries and keys, over their whole width.
    """

    model_type = "open_lm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - as transformers declares it

    vocab_size: int = 50432
    hidden_size: int = 512
    intermediate_size: int = 1536
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    max_position_embeddings: int = 2048
    norm: str = "gain_only_layer_norm"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    use_cache: bool = True
    rope_parameters: dict | None = None  # type: ignore[type-arg]

    def validate_architecture(self) -> None:
        """Called by transformers; the checks are those of `Shape`."""
        _ = self.shape

    @classmethod
    def of(cls, shape: Shape, *, qk_norm: bool = False, max_tokens: int = 2048) -> OpenLMConfig:
        """The configuration of a shape. Raises ``InputError`` for an odd head size, which rotary positions cannot halve."""
        if shape.head_size % 2:
            raise InputError(
                f"{shape}: the head size {shape.head_size} is odd, and rotary positions halve it; choose other heads"
            )
        sizes = {theirs: getattr(shape, ours) for ours, theirs in TRANSFORMERS_NAMES.items()}
        return cls(**sizes, max_position_embeddings=max_tokens, norm=shape.norm, qk_norm=qk_norm)

    @property
    def shape(self) -> Shape:
        sizes = {ours: getattr(self, theirs) for ours, theirs in TRANSFORMERS_NAMES.items()}
        return Shape(**sizes, norm=self.norm)  # type: ignore[arg-type]


def _norm(config: OpenLMConfig, width: int) -> nn.Module:
    if config.norm == "rms_norm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.norm == "layer_norm")


def _linear(n_in: int, n_out: int, std: float) -> nn.Linear:
    """A matrix without bias that knows the standard deviation it is drawn with."""
    linear = nn.Linear(n_in, n_out, bias=False)
    linear.initial_std = std  # type: ignore[assignment]
    return linear


class Attention(nn.Module):
    """Causal attention with rotary positions; keys and values go through the cache where there is one."""

    is_causal = True

    def __init__(self, config: OpenLMConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, std = config.hidden_size, config.hidden_size**-0.5
        self.head_size = width // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads  # read by transformers' attention
        self.kv_width = self.head_size * config.num_key_value_heads
        self.in_proj = _linear(width, width + 2 * self.kv_width, std)
        self.out_proj = _linear(width, width, std / math.sqrt(2 * (layer + 1)))
        self.q_norm = _norm(config, width) if config.qk_norm else nn.Identity()
        self.k_norm = _norm(config, self.kv_width) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None, **more: Any
    ) -> Tensor:
        queries, keys, values = self.in_proj(x).split([x.shape[-1], self.kv_width, self.kv_width], dim=-1)
        by_head = (*x.shape[:-1], -1, self.head_size)
        queries, keys = self.q_norm(queries).view(by_head).transpose(1, 2), self.k_norm(keys).view(by_head).transpose(1, 2)
        values = values.view(by_head).transpose(1, 2)
        queries, keys = apply_rotary_pos_emb(queries, keys, *rotation)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(self, queries, keys, values, mask, dropout=0.0, scaling=self.head_size**-0.5, **more)
        return self.out_proj(attended.reshape(x.shape))


class FeedForward(nn.Module):
    """SwiGLU: w3(silu(gate) * up), gate and up being the halves of w12."""

    def __init__(self, config: OpenLMConfig, layer: int) -> None:
        super().__init__()
        width, d_ff = config.hidden_size, config.intermediate_size
        self.w12 = _linear(width, 2 * d_ff, width**-0.5)
        self.w3 = _linear(d_ff, width, d_ff**-0.5 / math.sqrt(2 * (layer + 1)))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * up)


class Block(GradientCheckpointingLayer):
    def __init__(self, config: OpenLMConfig, layer: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(config, layer), FeedForward(config, layer)
        self.attention_norm, self.ffn_norm = _norm(config, config.hidden_size), _norm(config, config.hidden_size)

    def forward(self, x: Tensor, *arguments: Any, **more: Any) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *arguments, **more)
        return x + self.feed_forward(self.ffn_norm(x))


class OpenLMForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its head. Its state dict has Open-LM's names."""

    config_class = OpenLMConfig
    config: OpenLMConfig
    supports_gradient_checkpointing = True
    _input_embed_layer = "tok_embeddings"
    _no_split_modules = ["Block"]  # noqa: RUF012 - this and the next as transformers declares them
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}  # noqa: RUF012
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: OpenLMConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.tok_embeddings = nn.Embedding(config.vocab_size, width)
        self.tok_embeddings.initial_std = width**-0.5
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = _norm(config, width)
        self.output = _linear(width, config.vocab_size, width**-0.5)
        self.rotary = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(module, "initial_std", None)
        if std is not None:
            init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)  # type: ignore[arg-type]
        else:
            super()._init_weights(module)  # norms, and the frequencies of the rotation

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output = new_embeddings  # type: ignore[assignment]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of shape (batch, tokens, vocabulary), the cache, and with ``labels`` the mean loss in nats per token."""
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not self.training:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotation = self.rotary(x, position_ids)
        for block in self.layers:
            x = block(x, rotation, mask, past_key_values, **more)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(self.norm(x)[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


AutoConfig.register("open_lm", OpenLMConfig)
AutoModelForCausalLM.register(OpenLMConfig, OpenLMForCausalLM)


def config_of_open_lm(path: Path, model_norm: str | None = None) -> OpenLMConfig:
    """The configuration in an Open-LM model JSON, as in its ``model_configs`` folder.

    ``model_norm`` is Open-LM's argument of that name, which counts where the file does not say; without either it is
    Open-LM's default, ``default_layer_norm``. Raises ``InputError`` for a file that cannot be read or asks for weights that
    this model does not have.
    """
    given = open_lm_configuration(path)
    name = given.get("model_norm", model_norm or "default_layer_norm")
    if name not in OPEN_LM_NORMS or given["positional_embedding_type"] != "rotary":
        norms = ", ".join(OPEN_LM_NORMS)
        raise InputError(f"{path}: has the norm {name!r} or other positions; this model has rotary ones and {norms}")
    shape = replace(given["shape"], norm=OPEN_LM_NORMS[name])
    return OpenLMConfig.of(shape, qk_norm=given["qk_norm"], max_tokens=given["seq_len"])


def read_open_lm(checkpoint: Path, config: OpenLMConfig) -> OpenLMForCausalLM:
    """The model of an Open-LM checkpoint: a ``.pt`` of its trainer or of weights alone, with FSDP or DDP prefixes or without.

    Nothing in the file is run: torch reads tensors and plain values only. Raises ``InputError`` for a file that is
    none, that holds anything else, or whose weights are not those of ``config``.
    """
    try:
        held = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that it does not trust or cannot read
        first = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{checkpoint}: is not read ({type(error).__name__}: {first}); give weights of plain tensors"
        ) from None
    states = held.get("state_dict", held) if isinstance(held, Mapping) else None
    if not isinstance(states, Mapping) or not all(isinstance(value, Tensor) for value in states.values()):
        raise InputError(f"{checkpoint}: holds no state dict; give a checkpoint of Open-LM")
    weights = {_bare(name): value for name, value in states.items() if not _bare(name).endswith("inv_freq")}
    model = OpenLMForCausalLM(config)
    own = model.state_dict()
    if config.tie_word_embeddings:
        embedding = weights.get("tok_embeddings.weight", own["output.weight"])
        if not torch.equal(weights.setdefault("output.weight", embedding), embedding):
            raise InputError(f"{checkpoint}: has an output head of its own; give the configuration without weight_tying")
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    other = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or unknown or other:
        what = {"lacks": missing, "has beyond it": unknown, "has in another shape": other}
        told = "; ".join(f"{verb} {names[0]} ({len(names)} in all)" for verb, names in what.items() if names)
        raise InputError(f"{checkpoint}: is not a checkpoint of {config.shape}: it {told}; give its own configuration")
    model.load_state_dict(weights)
    return model.eval()


def write_open_lm(model: OpenLMForCausalLM, checkpoint: Path) -> None:
    """Write the weights as an Open-LM checkpoint without trainer state, which open_lm loads; all or nothing."""
    own = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # open_lm keeps the frequencies of the rotation in its state dict
    frequencies = {f"layers.{i}.attention.pos_embed.inv_freq": model.rotary.inv_freq.cpu() for i in range(len(model.layers))}
    # an open file, so that a full disk is the system's error and not torch's own
    with files.replacing(checkpoint) as partial, partial.open("wb") as file:
        torch.save({**own, **frequencies}, file)


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
