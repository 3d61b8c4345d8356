"""Recipes: how a model is trained, as data with sources, and the files with which open_lm trains one.

``data/recipes.csv`` has every hyper-parameter of the paper's runs (``paper``), of its largest one (``morph-1b``), and of the
runs that a CPU can carry (``laptop``).
"""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from morphlib import files
from morphlib.errors import InputError
from morphlib.shapes import OPEN_LM_NORMS, Shape

Schedule = Literal["cosine", "trunk"]
Precision = Literal["fp32", "bf16"]
TINY = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is trained. The defaults that have no size in them are the paper's (``data/recipes.csv``).

    A step reads ``batch`` sequences of ``sequence`` tokens, in ``accumulate`` parts. ``learning_rate`` is the peak, which a
    cosine lowers to ``final_share`` of it. With ``base_width`` that of matrices is multiplied by base_width / width, that of
    the embedding and of norms is not: the rates of muP for Adam, not its initialization (Yang et al., arXiv 2203.03466,
    table 3). ``z_loss`` multiplies the mean of logsumexp^2. ``dtype`` is fp32, or bf16 for autocast. Raises ``InputError`` for
    a number that cannot be.
    """

    learning_rate: float = 3e-3
    final_share: float = 0.01
    warmup_steps: int = 2000
    schedule: Schedule = "cosine"
    batch: int = 512
    sequence: int = 2048
    accumulate: int = 1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.033
    clip: float = 1.0
    z_loss: float = 1e-4
    base_width: int | None = None
    qk_norm: bool = False
    dtype: Precision = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        def within(low: float, high: float, *names: str) -> None:
            for name in names:
                if not low <= getattr(self, name) <= high:
                    raise InputError(f"{name} is {getattr(self, name)}; give a number from {low} to {high}")

        within(TINY, math.inf, "learning_rate", "epsilon", "clip")
        within(1, 2**31, "batch", "sequence", "accumulate", *([] if self.base_width is None else ["base_width"]))
        within(0, 2**31, "warmup_steps", "seed", "weight_decay", "z_loss")
        within(0, 1 - TINY, "beta1", "beta2")
        within(0, 1, "final_share")
        for name, known in (("schedule", get_args(Schedule)), ("dtype", get_args(Precision))):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        if self.batch % self.accumulate:
            raise InputError(f"a batch of {self.batch} cannot be taken in {self.accumulate} equal parts; choose a divisor")

    @property
    def step_tokens(self) -> int:
        return self.batch * self.sequence

    @classmethod
    def of(cls, quantities: Mapping[str, Any]) -> Recipe:
        """The recipe that has these `quantities`; those of another kind, such as GPUs, are passed over."""
        return cls(**{field.name: quantities[field.name] for field in fields(cls) if field.name in quantities})


def quantities(name: str) -> dict[str, Any]:
    """What ``data/recipes.csv`` says of a recipe: the fields of `Recipe`, a ``norm`` of `morphlib.shapes`, and some more.

    Those are ``shape``, ``tokens``, ``chunks``, ``gpus`` and how open_lm prepares the text, where the recipe names them. Raises
    ``InputError`` for an unknown name.
    """
    with resources.files("morphlib").joinpath("data/recipes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {row["quantity"]: _value(row["value"]) for row in rows if row["recipe"] == name}
    if not found:
        raise InputError(f"{name!r} is not a recipe; choose one of {', '.join(dict.fromkeys(row['recipe'] for row in rows))}")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def start_times(hours: Sequence[float], gpus_each: Sequence[int], n_gpus: int) -> list[float]:
    """When each of several runs starts on ``n_gpus`` GPUs that are alike: in the order given, none before the one ahead of it.

    A run holds its ``gpus_each`` for its ``hours``, and starts as soon as so many are free. The makespan is the latest end. For
    runs of one GPU each this is list scheduling: the makespan is at most total / n + (1 - 1 / n) longest, and so less than
    twice the least (Graham 1966, doi 10.1002/j.1538-7305.1966.tb01709.x). Raises ``InputError`` for a run that needs more GPUs
    than there are.
    """
    free, now, starts = [0.0] * n_gpus, 0.0, []
    for duration, needed in zip(hours, gpus_each, strict=True):
        if not 1 <= needed <= n_gpus:
            raise InputError(f"a run takes {needed} GPUs, and there are {n_gpus}; give it from 1 to that many")
        free.sort()  # when each GPU is free again
        now = max(now, free[needed - 1])
        starts.append(now)
        free[:needed] = [now + duration] * needed
    return starts


def write_open_lm_launch(folder: Path, shape: Shape, tokens: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Write what open_lm needs to train ``shape`` on ``tokens`` tokens: ``model.json``, ``train.sh`` and ``prepare_data.sh``.

    ``given`` are `quantities`, among them the chunks of fresh text between which open_lm saves. Returns the shape, the paper's
    N, tokens, steps and files. Raises ``InputError`` for what open_lm cannot train so: a shape that its configuration cannot
    say, or a batch that the GPUs cannot share, or chunks that are not whole steps and whole
    shards for each GPU (it reads no part of a shard); and where the folder
    cannot be written.
    """
    recipe, chunks, gpus = Recipe.of(given), given.get("chunks", 1), given.get("gpus", 1)
    default = Shape.of(
        shape.d_model, shape.n_layers, n_heads=shape.n_heads, vocab=shape.vocab, tied=shape.tied, norm=shape.norm
    )
    if shape != default:
        raise InputError(f"{shape}: open_lm has no key-value heads and its own width of the feed-forward layer; give {default}")
    if recipe.schedule != "cosine" or recipe.base_width:
        raise InputError("open_lm lowers the learning rate along a cosine and for all widths alike; leave the others out")
    shards = gpus * given["shard_sequences"] * recipe.sequence
    if recipe.batch % (gpus * recipe.accumulate):
        told = f"a batch of {recipe.batch} in {recipe.accumulate} parts cannot be shared equally by {gpus} GPUs"
        raise InputError(f"{told}; choose a divisor")
    unit = chunks * math.lcm(recipe.step_tokens, shards)
    if tokens % unit:
        whole = max(1, round(tokens / unit)) * unit
        told = f"{recipe.step_tokens} tokens and shards of {shards} tokens for {gpus} GPUs, in each of {chunks} chunks"
        raise InputError(f"{tokens} tokens are not whole steps of {told}; give {whole}")
    model = {
        "hidden_dim": shape.d_model,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
        "seq_len": recipe.sequence,
        "vocab_size": shape.vocab,
        "post_embed_norm": False,
        "weight_tying": shape.tied,
        "model_norm": next(theirs for theirs, ours in OPEN_LM_NORMS.items() if ours == shape.norm),
        "qk_norm": recipe.qk_norm,
    }
    numbers = {"tokens": tokens, "steps": tokens // recipe.step_tokens, "step_tokens": recipe.step_tokens}
    filled = {**given, **asdict(recipe), **numbers, "shape": shape, "gpus": gpus, "chunks": chunks}
    filled |= {"chunk_tokens": tokens // chunks, "final_rate": recipe.learning_rate * recipe.final_share}
    filled |= {"name": shlex.quote(folder.resolve().name), "precision": "amp_bfloat16" if recipe.dtype == "bf16" else "fp32"}
    filled["flags"] = "--fsdp \\\n  --grad-checkpointing" if recipe.gradient_checkpointing else "--fsdp"
    texts = {"model.json": json.dumps(model, indent=2) + "\n"}
    for name in ("prepare_data.sh", "train.sh"):  # with one worker, since each takes whole shards by itself
        template = resources.files("morphlib").joinpath("data/open_lm", name).read_text(encoding="utf-8")
        texts[name] = template.format(**filled)
    for name, text in texts.items():
        with files.replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    paths = [str(folder / name) for name in texts]
    counted = replace(shape, norm="gain_only_layer_norm")  # as the paper counts, whatever the norm
    return {"shape": str(shape), "n_params": counted.n_params("total"), **numbers, "gpus": gpus, "files": paths}
