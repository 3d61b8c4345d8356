"""The models that are timed: random weights of any shape, bundled open models, and checkpoints on disk.

The authors' sweeps time Llama-type models of random weights (the configuration of Llama-2-7b with other
sizes); how fast a model answers does not depend on what it has learned. Nothing here asks the network, and
no code that comes with a model is run: configurations are read by the classes of transformers and by that of
`morphlib.model`, weights from safetensors only.
"""

from __future__ import annotations

import copy
import json
import platform
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphlib.errors import InputError
from morphlib.latency import DATA
from morphlib.shapes import TRANSFORMERS_NAMES, Shape

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
INITIAL_STD = 0.02  # of random weights, whatever a configuration says
LLAMA_2_POSITIONS = 4096  # max_position_embeddings of Llama-2-7b, kept by the authors' sweeps
_TWO_MATRICES = {"opt", "gpt_neox", "gpt_neo"}  # in the feed-forward layer, where a Llama has three
_UNSAFE_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that can be loaded: its ``name``, its transformers ``config``, and where its weights come from.

    ``path`` is the folder of a real checkpoint; without one the weights are random. ``built_as`` is the architecture
    of transformers that is built, and says so where that stands in for another. In the methods ``dtype`` is a key of
    DTYPES, and each raises ``InputError`` for a configuration that transformers cannot build as a causal language model.
    """

    name: str
    config: PretrainedConfig
    path: Path | None = None
    built_as: str = "llama"

    @property
    def shape(self) -> Shape | None:
        """The shape where ``Shape`` describes the model: a Llama or an Open-LM whose heads make up its width."""
        sizes = dimensions(self.config)
        heads_width = sizes["n_heads"] * sizes.pop("head_size")
        return Shape(**sizes) if self.built_as in ("llama", "open_lm") and heads_width == sizes["d_model"] else None

    @property
    def max_tokens(self) -> int:
        """The longest context in tokens, prompt and answer together; no limit for positions without a table (ALiBi)."""
        return int(getattr(self.config.get_text_config(), "max_position_embeddings", sys.maxsize))

    def n_params(self) -> int:
        """Parameters of the model as built; a tied table counts once."""
        return self._weightless("fp32").num_parameters()

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes that the cache of keys and values grows by with each token: those of ``Shape``, for any head size.

        With multi-head latent attention it is one vector for all heads (see `Shape.kv_bytes_per_token`).
        """
        sizes, text = dimensions(self.config), self.config.get_text_config()
        width = 2 * sizes["n_kv_heads"] * sizes["head_size"]
        if latent := getattr(text, "kv_lora_rank", None):
            width = latent + text.qk_rope_head_dim
        return sizes["n_layers"] * width * (4 if dtype == "fp32" else 2)

    def facts(self, dtype: str) -> dict[str, Any]:
        """What a measurement records of the model: shape, sizes (see `dimensions`), parameters, kind of weights."""
        return dimensions(self.config) | {
            "shape": str(self.shape) if self.shape else None,
            "n_params": self.n_params(),
            "kv_bytes_per_token": self.kv_bytes_per_token(dtype),
            "built_as": self.built_as,
            "weights": "random" if self.path is None else "checkpoint",
        }

    def memory_bytes(self, dtype: str, batch: int, context: int) -> int:
        """Bytes that generating ``batch`` sequences of ``context`` tokens (prompt and answer) needs, foretold.

        The weights and buffers, to the byte; the key-value cache at its full length (a sliding window is not
        subtracted); and what is alive at once while the whole context is read: the widest point of a layer
        (three rows of d_ff, the queries, keys and values, four rows of d_model), the scores twice in fp32 where
        attention is not fused, and five fp32 rows of logits, which sampling sorts. Nothing is allocated. What
        the libraries take for themselves is not in it.
        """
        model, sizes = self._weightless(dtype), dimensions(self.config)
        heads = sizes["n_heads"] + 2 * sizes["n_kv_heads"]
        widest = 3 * sizes["d_ff"] + heads * sizes["head_size"] + 4 * sizes["d_model"]
        rows = context * (self.kv_bytes_per_token(dtype) + widest * model.dtype.itemsize)
        scores = 2 * 4 * sizes["n_heads"] * context**2 if model.config._attn_implementation == "eager" else 0
        return model.get_memory_footprint() + batch * (rows + scores + 5 * 4 * sizes["vocab"])

    def load(self, dtype: str, device: torch.device | str, *, seed: int = 0) -> PreTrainedModel:
        """The model in ``dtype`` on the device, in evaluation mode, its logits checked to be finite.

        Random weights are drawn on the device as transformers initializes them, with standard deviation 0.02 (a model of
        Open-LM with its own): matrices normal, biases 0, norms neutral; the same for the same seed and kind of device. Raises
        ``InputError`` where the logits are not finite and where a checkpoint is not whole.
        """
        import torch
        from transformers import AutoModelForCausalLM

        model: Any
        if self.path is None:
            model = self._weightless(dtype).to_empty(device=device)
            model.tie_weights()  # before they are drawn: leaving the meta device has untied them
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model.init_weights()  # fills the buffers too (rotary frequencies, masks): they are empty memory until then
        else:
            with _refusing(f"{self.path}: transformers cannot read the checkpoint", "give a whole one"):
                read: Any = AutoModelForCausalLM.from_pretrained(
                    self.path,
                    config=copy.deepcopy(self.config),
                    dtype=getattr(torch, DTYPES[dtype]),
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
                model, missing = read[0], read[1]["missing_keys"]
                if missing:  # transformers has drawn these at random
                    raise ValueError(f"weights missing from it, such as {min(missing)}")
            model.to(device)
        with torch.inference_mode():
            logits = model.eval()(torch.zeros(1, 8, dtype=torch.long, device=device)).logits
        if not torch.isfinite(logits).all():
            raise InputError(f"{self.name}: the logits are not finite in {dtype}; choose another dtype")
        return model

    def _weightless(self, dtype: str) -> PreTrainedModel:
        """The model on the device ``meta``, where no weight is drawn and none takes memory."""
        import torch

        with torch.device("meta"):
            return self._built(dtype)

    def _built(self, dtype: str) -> PreTrainedModel:
        import torch
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.config)  # transformers notes the dtype in it
        for field in ("initializer_range", "init_std"):
            if hasattr(config, field):
                setattr(config, field, INITIAL_STD)
        with _refusing(f"{self.name}: cannot be built as a causal language model", "mend its configuration"):
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPES[dtype]))


@contextmanager
def _refusing(what: str, advice: str) -> Iterator[None]:
    """Turns whatever transformers, and what it reads files with, raises for a wrong file or configuration into one line."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what} ({textwrap.shorten(str(error), 300)}); {advice}") from None


def config_of(shape: Shape) -> PretrainedConfig:
    """The configuration of Llama-2-7b with the sizes of the shape, as in the authors' latency sweeps.

    Raises ``InputError`` for a head size that is odd. Source: ``open-lm-morph@1872be3``
    ``inference/measure_latency_variants_hf_1b.py``; theirs have Llama's vocabulary of 32000 and untied tables.
    """
    from transformers import LlamaConfig

    if shape.head_size % 2:
        raise InputError(f"{shape}: the head size {shape.head_size} is odd, and rotary positions halve it; choose other heads")
    sizes = {theirs: getattr(shape, ours) for ours, theirs in TRANSFORMERS_NAMES.items()}
    return LlamaConfig(**sizes, max_position_embeddings=LLAMA_2_POSITIONS, rms_norm_eps=1e-5)


def open_models() -> pd.DataFrame:
    """The bundled configurations, indexed by name; ``data/columns.csv`` explains the columns."""
    import pandas as pd

    return pd.read_csv(DATA / "open_models.csv", index_col="name", keep_default_na=False)


def resolve(text: str) -> Model:
    """The model that a user names.

    ``text`` is the name of a bundled open model or the last part of it, in any case; a folder as of Hugging Face
    (a checkpoint if it holds safetensors, else random weights for its ``config.json``); such a configuration as a
    ``.json`` file; or what `Shape.parse` reads. Raises ``InputError`` for anything else, saying what can be given.
    """
    path, row = Path(text), _bundled(text)
    if row is None and _is_on_disk(path):
        return _from_disk(path)
    if row is None:
        return Model(name=path.name if path.suffix == ".json" else text, config=config_of(_parsed(text)))
    sizes = {theirs: row[ours] for ours, theirs in TRANSFORMERS_NAMES.items()}
    sizes |= {"head_dim": row["head_size"], "max_position_embeddings": row["max_tokens"]}
    config = _auto_config().for_model(row["model_type"], **sizes, **json.loads(row["other_fields"] or "{}"))
    stand_in = "" if row["architecture"] == row["model_type"] else f", standing in for {row['architecture']}"
    return Model(name=row["name"], config=config, built_as=row["model_type"] + stand_in)


def full_name(text: str) -> str:
    """What a row of measurements calls the model that a user names, so that no two share a name (see `resolve`).

    The whole name of a bundled model, the whole path of what is on disk, a specification as it is written.
    """
    path, row = Path(text), _bundled(text)
    if row is None and (path.suffix == ".json" or _is_on_disk(path)):
        return str(path.resolve())
    return text if row is None else str(row["name"])


def shape_of(text: str) -> tuple[Shape, str]:
    """The shape of what a user names (see `resolve`) for a prediction, and the architecture that runs it.

    Neither torch nor transformers is loaded, but for a configuration on disk. A specification is a Llama, as it is
    built here. Bytes of weights and FLOPs of matrices are those of the model: where the feed-forward layer has two
    matrices and not three, its width is given as 2/3 of itself, and where the heads do not make up the width (Gemma),
    that of the feed-forward layer is changed by the difference. Raises ``InputError`` as `resolve`.
    """
    path, row = Path(text), _bundled(text)
    if row is None and _is_on_disk(path):
        config = _from_disk(path).config
        row = dimensions(config) | {"architecture": config.model_type}
    if row is None:
        return _parsed(text), "llama"
    width = row["d_ff"] * 2 // 3 if row["architecture"] in _TWO_MATRICES else row["d_ff"]
    # what heads that do not make up the width read more or less than those that do, the feed-forward layer stands in for
    beyond = row["head_size"] - row["d_model"] // row["n_heads"]
    width += 2 * beyond * (row["n_heads"] + row["n_kv_heads"]) // 3
    sizes = {field: row[field] for field in TRANSFORMERS_NAMES} | {"d_ff": width}
    # MiniCPM dispatches what a Llama does and a few multiplications, which nobody has counted
    return Shape(**sizes), "llama" if row["architecture"] == "minicpm" else row["architecture"]


def _bundled(text: str) -> dict[Any, Any] | None:
    for row in open_models().reset_index().to_dict("records"):
        if text.lower() in (row["name"].lower(), row["name"].lower().rpartition("/")[2]):
            return row
    return None


def _parsed(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        names = ", ".join(name.rpartition("/")[2] for name in open_models().index)
        others = f"; or give a checkpoint's folder, a config.json or an open model: {names}"
        is_shape_or_file = re.match(r"\d+x\d|.*\.json$", text)
        raise InputError(f"{error}{'' if is_shape_or_file else others}") from None


def _is_on_disk(path: Path) -> bool:
    """Whether it is a configuration as of Hugging Face; a JSON file without a model type is Open-LM's."""
    if path.is_dir():
        return (path / "config.json").is_file()
    return path.suffix == ".json" and path.is_file() and b'"model_type"' in path.read_bytes()


def _auto_config() -> Any:
    import transformers

    import morphlib.model  # noqa: F401 - makes Open-LM known to transformers

    return transformers.AutoConfig


def _from_disk(path: Path) -> Model:
    with _refusing(f"{path}: transformers cannot read its configuration", "give a config.json of a type it knows"):
        config = _auto_config().from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # a configuration can ask for kernels from the Hub, which are code: of attention by name, of quantizers unasked
    config._attn_implementation = None
    if getattr(config, "quantization_config", None):
        raise InputError(f"{path}: is quantized, which is not timed here; give a checkpoint in bf16, fp16 or fp32")
    suffixes = {file.suffix for file in path.iterdir()} if path.is_dir() else set()
    checkpoint = path if ".safetensors" in suffixes else None
    if checkpoint is None and (unsafe := suffixes & _UNSAFE_WEIGHTS):
        raise InputError(f"{path}: reading a {min(unsafe)} file could run code that is in it; convert it to safetensors")
    name = (path.parent if path.name == "config.json" else path).resolve().name
    return Model(name=name, config=config, path=checkpoint, built_as=config.model_type)


def dimensions(config: PretrainedConfig) -> dict[str, Any]:
    """The sizes of a configuration under the names of `Shape`; whole numbers, ``tied`` a bool.

    ``head_size`` stands for itself: in some models (Gemma) it is not d_model / n_heads. Raises ``InputError``
    for a configuration that has no width, depth or heads.
    """
    text = config.get_text_config()
    sizes: dict[str, Any] = {ours: getattr(text, theirs, None) for ours, theirs in TRANSFORMERS_NAMES.items()}
    missing = [TRANSFORMERS_NAMES[field] for field in ("d_model", "n_layers", "n_heads") if not isinstance(sizes[field], int)]
    if missing:
        raise InputError(f"a {config.model_type} has no {', '.join(missing)}; give a decoder-only transformer")
    # Falcon does not count the heads of its first form, where all share one
    one_for_all = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
    return sizes | {
        "n_kv_heads": sizes["n_kv_heads"] or (1 if one_for_all else sizes["n_heads"]),
        "head_size": getattr(text, "head_dim", None) or sizes["d_model"] // sizes["n_heads"],
        # OPT calls it ffn_dim; GPT-2 and GPT-Neo leave it out where it is four times the width
        "d_ff": getattr(text, "ffn_dim", None) or sizes["d_ff"] or 4 * sizes["d_model"],
        "tied": bool(sizes["tied"]),
    }


def cpu_name() -> str:
    """The name of this machine's processor, as its system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.MULTILINE) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()
