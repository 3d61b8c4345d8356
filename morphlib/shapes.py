"""The shape of a decoder-only transformer, and how many parameters it has.

The paper's N counts every weight: both embedding tables, the attention and SwiGLU matrices and
the norm gains. Others count fewer, and fitted exponents change with the convention, so a count
here always names its convention.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from morphlib.errors import InputError

Convention = Literal["total", "without_input_embedding", "non_embedding"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)

Norm = Literal["gain_only_layer_norm", "layer_norm", "rms_norm"]

# Open-LM's names of norms; the low-precision ones compute in bf16 under autocast and have the same weights
OPEN_LM_NORMS: dict[str, Norm] = {
    "default_layer_norm": "layer_norm",
    "lp_layer_norm": "layer_norm",
    "gain_only_layer_norm": "gain_only_layer_norm",
    "gain_only_lp_layer_norm": "gain_only_layer_norm",
    "rms_norm": "rms_norm",
}

Bits = Literal[4, 8, 16, 32]
BITS: tuple[Bits, ...] = get_args(Bits)

GPT_NEOX_VOCABULARY = 50432  # GPT-NeoX-20B's tokenizer, padded, as the paper trains with

_SPECIFICATION = re.compile(r"(?P<n_layers>\d+)x(?P<d_model>\d+)(?P<rest>(/.+)?)")
_PART = re.compile(r"/(?:(\d+)(h|kv|ff|v)|(ff=8d/3)|(tied))(?=/|$)")
_FIELD = {"h": "n_heads", "kv": "n_kv_heads", "ff": "d_ff", "v": "vocab"}
SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "vocab")
TRANSFORMERS_NAMES = {  # of what a shape says, in the configurations of Llama and of those that follow it
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "vocab": "vocab_size",
    "tied": "tie_word_embeddings",
}
_HOW_TO_WRITE = "write LAYERSxWIDTH, for example 12x3072, with /16h /4kv /8192ff /50432v or /ff=8d/3 /tied behind it as needed"


def swiglu_width(d_model: int) -> int:
    """Open-LM's width of the SwiGLU layer: floor(8 d / 3), rounded up to a multiple of 256.

    Source: ``open_lm/model.py`` of mlfoundations/open_lm.
    """
    return 256 * -(-(8 * d_model // 3) // 256)


def plain_swiglu_width(d_model: int) -> int:
    """8 d / 3 rounded to the nearest multiple of 8, which keeps d_ff / d the same for all widths."""
    return 8 * max(1, round(d_model / 3))


def default_heads(d_model: int) -> int:
    """16 heads where that divides the width into heads of 64 or more.

    Otherwise the largest count up to width / 64 that divides the width; at least one.
    """
    if d_model % 16 == 0 and d_model // 16 >= 64:
        return 16
    return max((h for h in range(1, d_model // 64 + 1) if d_model % h == 0), default=1)


Array = NDArray[np.float64]
Number = TypeVar("Number", int, Array)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted(Generic[Number]):
    """Sizes and what follows from them: of one `Shape` in whole numbers, of many (`Shapes`) as arrays."""

    d_model: Number
    n_layers: Number
    n_heads: Number
    n_kv_heads: Number
    d_ff: Number
    vocab: Number
    tied: Any  # bool, or an array of them
    norm: Norm = "gain_only_layer_norm"

    @property
    def head_size(self) -> Number:
        width, heads = self.d_model, self.n_heads
        return width // heads if isinstance(width, int) else width / heads

    @property
    def aspect_ratio(self) -> float | Array:
        """R = d_model / n_layers (paper, section 2)."""
        return self.d_model / self.n_layers

    def parameters_by_group(self) -> dict[str, Number]:
        """Parameters of each group of weights; the groups share no weight and miss none.

        A tied table is listed under the output head, the place where it does arithmetic.
        """
        kv_width = self.n_kv_heads * self.head_size
        norm_vectors = 2 if self.norm == "layer_norm" else 1  # a gain, and for layer_norm a bias
        return {
            "input_embedding": self.vocab * self.d_model * (1 - self.tied),
            "attention": self.n_layers * (2 * self.d_model**2 + 2 * self.d_model * kv_width),
            "feed_forward": self.n_layers * 3 * self.d_model * self.d_ff,
            "norms": (2 * self.n_layers + 1) * self.d_model * norm_vectors,
            "output_head": self.vocab * self.d_model,
        }

    def n_params(self, convention: Convention) -> Number:
        """The number of parameters, by the named convention.

        ``total`` is the paper's N = 2 V d + L (4 d^2 + 3 d d_ff + 2 d) + d for untied tables,
        gain-only norms and as many key-value heads as heads. ``without_input_embedding`` leaves
        out the input table where it is a table of its own, ``non_embedding`` both tables.
        """
        if convention not in CONVENTIONS:
            raise InputError(f"{convention!r} is not a counting convention; choose one of {', '.join(CONVENTIONS)}")
        groups = self.parameters_by_group()
        n_params = groups["attention"] + groups["feed_forward"] + groups["norms"]
        if convention != "non_embedding":
            n_params = n_params + groups["output_head"]
        return n_params + groups["input_embedding"] if convention == "total" else n_params

    def weight_bytes(self, bits: Bits = 16, convention: Convention = "total") -> Number:
        """Bytes of the weights that ``convention`` counts, each of ``bits`` bits, without the scales of a quantizer.

        A decode step reads those of ``without_input_embedding``: of the input table it reads one row per sequence.
        """
        return _bytes(self.n_params(convention), bits)

    def kv_bytes_per_token(self, bits: Bits = 16, latent_width: int | None = None) -> Number:
        """Bytes that the cache of keys and values grows by with each token: 2 L n_kv head_size numbers.

        With ``latent_width`` the attention is multi-head latent attention (MLA), which caches one vector per layer
        for all heads: the compressed keys and values and the rotated key, 512 + 64 wide in DeepSeek-V2
        (arXiv 2405.04434, section 2.1).
        """
        if latent_width is not None and latent_width < 1:
            raise InputError(f"the latent width is {latent_width}; give a whole number of at least 1")
        width = 2 * self.n_kv_heads * self.head_size if latent_width is None else latent_width
        return _bytes(self.n_layers * width, bits)

    def decode_flops_per_token(self, context: float) -> float | Array:
        """FLOPs for one more token that attends to ``context`` tokens, itself among them.

        Two for each weight of a matrix, and 4 L d context for scores and weighted values: a third of the 6 N + 12 L H Q T
        of a training step in PaLM (arXiv 2204.02311, appendix B).
        """
        groups = self.parameters_by_group()
        matrices = groups["attention"] + groups["feed_forward"] + groups["output_head"]
        return 2 * matrices + 4 * self.n_layers * self.d_model * context

    def prefill_flops_per_token(self, in_tokens: int) -> float | Array:
        """Mean FLOPs per token of reading ``in_tokens`` tokens at once, up to the logits of the last token alone.

        A token attends to (in_tokens + 1) / 2 tokens on average, itself among them.
        """
        if in_tokens < 1:
            raise InputError(f"in_tokens is {in_tokens}; give a whole number of at least 1")
        head = 2 * self.parameters_by_group()["output_head"]
        return self.decode_flops_per_token((in_tokens + 1) / 2) - head + head / in_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape(_Counted[int]):
    """A decoder-only transformer with SwiGLU, rotary positions and pre-norm, without linear biases.

    Widths and counts are positive integers. ``n_heads`` divides ``d_model`` and ``n_kv_heads``
    divides ``n_heads``; an ``InputError`` says which of these does not hold.
    """

    vocab: int = GPT_NEOX_VOCABULARY
    tied: bool = False

    def __post_init__(self) -> None:
        for field in SIZES:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{field} is {value!r}; give a whole number of at least 1")
        if self.d_model % self.n_heads:
            raise InputError(f"{self.n_heads} heads do not divide the width {self.d_model}; choose a divisor")
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"{self.n_kv_heads} key-value heads do not divide {self.n_heads} heads; choose a divisor")
        if self.norm not in get_args(Norm):
            raise InputError(f"norm is {self.norm!r}; choose one of {', '.join(get_args(Norm))}")

    @classmethod
    def of(
        cls,
        d_model: int,
        n_layers: int,
        *,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        d_ff: int | None = None,
        vocab: int = GPT_NEOX_VOCABULARY,
        tied: bool = False,
        norm: Norm = "gain_only_layer_norm",
    ) -> Shape:
        """A shape from its width and depth, the rest filled in by the defaults of Open-LM."""
        if d_model < 1:
            raise InputError(f"d_model is {d_model}; give a whole number of at least 1")
        heads = default_heads(d_model) if n_heads is None else n_heads
        return cls(
            d_model=d_model,
            n_layers=n_layers,
            n_heads=heads,
            n_kv_heads=heads if n_kv_heads is None else n_kv_heads,
            d_ff=swiglu_width(d_model) if d_ff is None else d_ff,
            vocab=vocab,
            tied=tied,
            norm=norm,
        )

    @classmethod
    def parse(cls, text: str, vocab: int = GPT_NEOX_VOCABULARY) -> Shape:
        """A shape from a specification, the name of a shape of the paper, or an Open-LM JSON file.

        ``12x3072`` is 12 layers of width 3072; ``12x3072/16h/4kv/8192ff/50432v`` states the rest,
        ``/ff=8d/3`` takes the plain SwiGLU ratio, ``/tied`` shares the embedding with the head. ``vocab``
        is the vocabulary of a specification that states none.
        Raises ``InputError`` with what to write instead.
        """
        if text.endswith(".json"):
            return _of_open_lm(Path(text))
        named = paper_shapes()
        for name in (text, f"scale_open_lm_{text.lower()}"):
            if name in named:
                return named[name]
        match = _SPECIFICATION.fullmatch(text)
        if match is None:
            raise InputError(f"{text!r} is not a shape; {_HOW_TO_WRITE}")
        d_model, n_layers = int(match["d_model"]), int(match["n_layers"])
        given: dict[str, int] = {}  # of what the specification states
        end = 0
        for part in _PART.finditer(match["rest"]):
            number, unit, plain_ratio, tied = part.groups()
            field = "d_ff" if plain_ratio else "tied" if tied else _FIELD[unit]
            if part.start() != end or field in given:
                break
            given[field] = plain_swiglu_width(d_model) if plain_ratio else True if tied else int(number)
            end = part.end()
        if end != len(match["rest"]):
            raise InputError(f"{text!r} is not a shape: cannot read {match['rest'][end:]!r}; {_HOW_TO_WRITE}")
        try:
            return cls.of(d_model, n_layers, **{"vocab": vocab} | given)  # type: ignore[arg-type]
        except ValueError as error:
            raise InputError(f"{text!r} is not a shape: {error}") from None

    def __str__(self) -> str:
        tied = "/tied" if self.tied else ""
        return f"{self.n_layers}x{self.d_model}/{self.n_heads}h/{self.n_kv_heads}kv/{self.d_ff}ff/{self.vocab}v{tied}"


def open_lm_configuration(path: Path) -> dict[str, Any]:
    """An Open-LM model configuration (JSON), as in its ``model_configs`` folder, with its defaults and the ``shape`` it makes.

    The shape's norms are gain-only, as the paper's N counts them, whatever ``model_norm`` says. Raises ``InputError`` for a
    file that cannot be read, lacks a field, or describes weights that are not counted here.
    """
    defaults = {"weight_tying": False, "post_embed_norm": False, "qk_norm": False, "seq_len": 2048}
    try:
        given = defaults | {"ffn_type": "swiglu", "positional_embedding_type": "rotary"} | json.loads(path.read_text("utf-8"))
        positions, feed_forward, tied = (given[name] for name in ("positional_embedding_type", "ffn_type", "weight_tying"))
        if positions not in ("rotary", "head_rotary") or not feed_forward.startswith("swiglu") or given["post_embed_norm"]:
            raise InputError("only rotary positions and swiglu are read, without a norm after the embedding")
        if not isinstance(tied, bool):
            raise InputError("weight_tying must be true or false")
        heads, vocab = int(given["n_heads"]), given["vocab_size"]
        return given | {"shape": Shape.of(given["hidden_dim"], given["n_layers"], n_heads=heads, vocab=vocab, tied=tied)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        known = {KeyError: f"the field {error} is missing", FileNotFoundError: "cannot be read, there is no such file"}
        what = " ".join(known.get(type(error), str(error)).split())
        raise InputError(f"{path}: {what}; give an Open-LM model configuration") from None


def _of_open_lm(path: Path) -> Shape:
    given = open_lm_configuration(path)
    if given["qk_norm"]:
        raise InputError(f"{path}: qk_norm asks for weights that are not counted; remove the option")
    shape: Shape = given["shape"]
    return shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes(_Counted[Array]):
    """Many shapes at once: each size an array of shape (n,), in floating point, which counts exactly up to 2^53.

    Nothing is checked: `candidates` and ``of`` make shapes that can be built, an optimizer may pass fractions.
    """

    @classmethod
    def of(cls, shapes: Sequence[Shape]) -> Shapes:
        """The shapes of a list; their norms must be of one kind, or ``InputError`` says so."""
        norms = {shape.norm for shape in shapes} or {"gain_only_layer_norm"}
        if len(norms) > 1:
            raise InputError(f"the shapes have different norms, {', '.join(sorted(norms))}; take those of one kind")
        sizes = {field: np.array([getattr(shape, field) for shape in shapes], dtype=float) for field in SIZES}
        return cls(**sizes, tied=np.array([shape.tied for shape in shapes], dtype=bool), norm=norms.pop())

    def __len__(self) -> int:
        return len(self.d_model)

    def __getitem__(self, index: int) -> Shape:
        sizes = {field: int(getattr(self, field)[index]) for field in SIZES}
        return Shape(**sizes, tied=bool(self.tied[index]), norm=self.norm)

    def where(self, mask: np.ndarray) -> Shapes:
        """Those that a boolean array, or an array of positions, picks."""
        picked = {field: getattr(self, field)[mask] for field in (*SIZES, "tied")}
        return Shapes(**picked, norm=self.norm)


def candidates(
    max_params: float,
    *,
    tolerance: float = 1.0,
    count: Convention = "total",
    depths: Sequence[int] = range(1, 129),
    width_multiple: int = 128,
    head_sizes: Sequence[int] = (128, 64),
    n_heads: int | None = None,
    queries_per_kv_head: Sequence[int] = (1,),
    d_ff_ratios: Sequence[float | None] = (None,),
    vocab: int = GPT_NEOX_VOCABULARY,
    tied: bool = False,
) -> Shapes:
    """Every shape of (1 - ``tolerance``) ``max_params`` to ``max_params`` parameters, by ``count``, within these constraints.

    Widths are multiples of ``width_multiple``. The heads of a width have the first of ``head_sizes`` that divides it;
    with ``n_heads`` they are that many, of any even size. Each head of keys and values serves one of
    ``queries_per_kv_head`` heads: 1 is MHA, more is GQA. A feed-forward layer is one of ``d_ff_ratios`` times as wide as
    the model, rounded to 64; None is Open-LM's rule (`swiglu_width`). Ordered by depth, then width. Raises ``InputError``
    for constraints that make no sense, and where no shape is left, with the size of the smallest.
    """
    for name, numbers in (("depths", depths), ("head_sizes", head_sizes), ("queries_per_kv_head", queries_per_kv_head)):
        if not len(numbers) or min(numbers) < 1:
            raise InputError(f"{name} is {list(numbers)}; give whole numbers of at least 1")
    if min(width_multiple, vocab, n_heads or 1) < 1 or any(ratio is not None and not ratio > 0 for ratio in d_ff_ratios):
        raise InputError("width_multiple, n_heads, vocab and the ratios of d_ff must be above zero")
    if not (0 < max_params < np.inf and 0 <= tolerance <= 1):
        raise InputError(
            f"{max_params:.4g} parameters with a tolerance of {tolerance:.4g} is no budget; give a finite number above zero, "
            "and from 0 to 1"
        )
    min_params = (1 - tolerance) * max_params
    # a layer's attention alone has 2 d^2 parameters or more
    widest = max(width_multiple, int(np.sqrt(max_params / 2)))
    rows = []
    for width in range(width_multiple, widest + 1, width_multiple):
        sizes = [width // n_heads] if n_heads and width % (2 * n_heads) == 0 else []
        heads = width // next((size for size in (sizes if n_heads else head_sizes) if width % size == 0), width + 1)
        for queries in (q for q in queries_per_kv_head if heads and heads % q == 0):
            for ratio in d_ff_ratios:
                d_ff = swiglu_width(width) if ratio is None else 64 * max(1, round(ratio * width / 64))
                rows.append((width, heads, heads // queries, d_ff))
    if not rows:
        raise InputError("no width has heads of that size or number; give others, or another width_multiple")
    by_width, layers = np.array(list(dict.fromkeys(rows)), dtype=float), np.array(sorted(set(depths)), dtype=float)
    d_model, heads_, kv_heads, d_ff_ = np.tile(by_width.T, len(layers))
    every = Shapes(
        d_model=d_model,
        n_layers=np.repeat(layers, len(by_width)),
        n_heads=heads_,
        n_kv_heads=kv_heads,
        d_ff=d_ff_,
        vocab=np.full(len(d_model), float(vocab)),
        tied=np.full(len(d_model), tied),
    )
    n_params = every.n_params(count)
    within = (n_params >= min_params) & (n_params <= max_params)
    if not within.any():
        nearest = int(np.abs(np.log(n_params / np.clip(n_params, min_params, max_params))).argmin())
        budget = f"{min_params:.4g} to {max_params:.4g}" if min_params else f"{max_params:.4g} or fewer"
        raise InputError(
            f"no shape has {budget} parameters ({count}): under these constraints the nearest, {every[nearest]}, "
            f"has {n_params[nearest]:.4g}; change the budget or the constraints"
        )
    return every.where(within)


def _bytes(numbers: Number, bits: int) -> Number:
    """Of so many numbers; of one shape in whole bytes, of arrays not rounded, for optimizers take their slopes."""
    if bits not in BITS:
        raise InputError(f"{bits!r} bits are not counted; choose one of {', '.join(map(str, BITS))}")
    return numbers * bits // 8 if isinstance(numbers, int) else numbers * bits / 8


@cache
def paper_shapes() -> Mapping[str, Shape]:
    """The shapes of the paper's configuration files and its further 1B candidates, by name.

    Candidates without a configuration file have no published head count; theirs is the default.
    """
    with resources.files("morphlib").joinpath("data/paper_shapes.csv").open(encoding="utf-8") as file:
        return MappingProxyType(
            {
                row["name"]: Shape.of(
                    int(row["d_model"]),
                    int(row["n_layers"]),
                    n_heads=int(row["n_heads"]) if row["n_heads"] else None,
                    d_ff=int(row["d_ff"]),
                    vocab=int(row["vocab"]),
                )
                for row in csv.DictReader(file)
            }
        )
