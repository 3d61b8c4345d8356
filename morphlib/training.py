r"""Training one model from a recipe to rows: a run, its marks, and what is left if it is killed.

A run reads each text once. With the schedule ``cosine`` the learning rate rises over the warm-up and falls along a cosine to a
hundredth at the end, as the paper's do, so each budget of tokens is a run of its own. With ``trunk`` one long run at a constant
rate, the trunk, serves several budgets: for each, a branch leaves the trunk and lowers the rate linearly to zero over the last
part of its budget (Hu et al. 2024, arXiv 2404.06395, section 4; Hägele et al. 2024, arXiv 2405.18392). The trunk then goes on
from where the branch left it.

Two losses are reported. ``loss`` is the mean cross-entropy of held-out text in nats per token. ``run_averaged_loss`` is the
paper's (`morphlib.runs.run_averaged_loss`) of all steps up to the mark, each with its z-loss.

A run that is killed goes on from its last checkpoint and ends with the same bits, on a CPU of the same machine with as many
threads. It may go on on another CPU, and its row then names both; a GPU does not take over from a CPU or from a GPU of another
name. A checkpoint is one file, whose name holds its checksum; two are kept.

On one CUDA device all steps are replays of a CUDA graph, but the first of the run and the first after a branch: a small model
spends most of an eager step on launching its kernels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from morphlib import files
from morphlib.errors import InputError
from morphlib.latency.models import cpu_name
from morphlib.model import OpenLMConfig, OpenLMForCausalLM
from morphlib.recipes import Recipe
from morphlib.runs import run_averaged_loss
from morphlib.shapes import Shape

Tokens = np.ndarray[Any, np.dtype[Any]]

COOLDOWN_SHARE = 0.2  # of a budget, over which a branch lowers the learning rate to zero
SAVE_EVERY_S = 120.0
KEPT = 2  # checkpoints
_LOG = logging.getLogger(__name__)
_TOLD = ("phase", "step", "losses", "seconds", "machines", "rows", "trunk_losses")  # of a state, in the header of a checkpoint
_NAME = re.compile(r"checkpoint-(\d+)-([0-9a-f]{64})\.safetensors")
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of sharded weights, in the memory of the first process


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps ``start`` to ``end`` of the trunk, or with ``mark`` of a branch that ends at that budget of tokens."""

    start: int
    end: int
    mark: int | None


def phases(recipe: Recipe, marks: Sequence[int]) -> list[Phase]:
    """The parts of a run that reports at each of ``marks``, budgets in tokens, rounded up to whole steps.

    Raises ``InputError`` for several marks with a cosine, whose rate depends on the end, and for marks out of order.
    """
    if not marks or sorted(set(marks)) != list(marks) or marks[0] < 1:
        raise InputError(f"the token budgets are {list(marks)}; give numbers above zero, each larger than the one before")
    ends = [-(-mark // recipe.step_tokens) for mark in marks]
    if recipe.schedule == "cosine" and len(marks) > 1:
        raise InputError("a cosine ends at one budget; train each by itself, or take the schedule trunk")
    if ends[0] <= recipe.warmup_steps:
        steps = f"{marks[0]} tokens are {ends[0]} steps"
        raise InputError(f"{steps}, and the warm-up alone has {recipe.warmup_steps}; give more tokens or a shorter warm-up")
    if recipe.schedule == "cosine":
        return [Phase(0, ends[0], marks[0])]
    found, at = [], 0
    for end, mark in zip(ends, marks, strict=True):
        leaves = max(at, end - max(1, round(COOLDOWN_SHARE * end)))
        found += [Phase(at, leaves, None), Phase(leaves, end, mark)]
        at = leaves
    return [phase for phase in found if phase.end > phase.start]


def learning_rate(recipe: Recipe, phase: Phase, step: int) -> float:
    """The rate of a step, counted from 0: a linear warm-up, then the schedule, the cosine as in open_lm's ``scheduler.py``."""
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    if recipe.schedule == "trunk":
        left = 1.0 if phase.mark is None else (phase.end - step) / (phase.end - phase.start)
        return recipe.learning_rate * warm * left
    done = max(0, step - recipe.warmup_steps) / max(1, phase.end - recipe.warmup_steps)
    share = recipe.final_share + (1 - recipe.final_share) * (1 + math.cos(math.pi * done)) / 2
    return recipe.learning_rate * warm * share


class _Recorded(NamedTuple):
    """A step as a CUDA graph: what it reads, and where it leaves its loss."""

    graph: torch.cuda.CUDAGraph
    batch: Tensor
    rates: list[Tensor]
    loss: Tensor


@dataclass
class _State:
    """All that changes while training, and what the trunk was when a branch left it."""

    model: OpenLMForCausalLM
    optimizer: torch.optim.AdamW
    phase: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    machines: list[str] = field(default_factory=list)  # on which it was trained, one after the other
    rows: list[dict[str, Any]] = field(default_factory=list)
    trunk: dict[str, Tensor] | None = None
    trunk_losses: list[float] = field(default_factory=list)
    records: bool = False  # steps, as a CUDA graph
    recorded: _Recorded | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the weights and of the optimizer's averages. Sharded ones are gathered: each process must call it."""
        weights: Any = get_model_state_dict(self.model, options=_WHOLE)
        found: dict[str, Tensor] = {f"model.{name}": value.clone() for name, value in weights.items()}
        if self.optimizer.state:  # without averages torch would make some up, and count a step for it
            averages: Any = get_optimizer_state_dict(self.model, self.optimizer, options=_WHOLE)
            for name, held in averages.get("state", {}).items():
                found |= {f"optimizer.{name}|{key}": value.clone() for key, value in held.items()}
        return found

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of ``tensors``; of several processes the first one's count."""
        self.recorded = None  # it writes to the averages that give way here
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed.is_initialized())
        set_model_state_dict(self.model, dict(_under("model.", tensors)), options=options)
        averages: dict[str, Any] = {}
        for name, value in _under("optimizer.", tensors):
            weight, _, key = name.rpartition("|")
            averages.setdefault(weight, {})[key] = value.clone()
        if _agreed(bool(averages)):
            groups = get_optimizer_state_dict(self.model, self.optimizer, options=StateDictOptions())["param_groups"]
            set_optimizer_state_dict(self.model, self.optimizer, {"state": averages, "param_groups": groups}, options=options)
        else:
            self.optimizer.state.clear()


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name.removeprefix(prefix), value) for name, value in tensors.items() if name.startswith(prefix)]


def train(
    shape: Shape,
    tokens: Tokens,
    held_out: Mapping[str, Tokens],
    marks: Sequence[int],
    recipe: Recipe,
    folder: Path,
    *,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda line: None,
    save_every_s: float = SAVE_EVERY_S,
) -> list[dict[str, Any]]:
    """Train a shape on ``tokens``, shape (n,), and return one row for each of ``marks``, budgets in tokens.

    The sequences are read in an order that ``recipe.seed`` draws, the same for every shape, and none twice. ``held_out`` has
    token ids by source; a source with less than a sequence of them is left out. ``folder`` keeps checkpoints; for each mark a
    model as transformers saves it, and the loss of every step up to it (``losses-MARK.csv``, for
    `morphlib.runs.loss_from_log`); and the rows as a run table, ``rows.csv``. A call with the same arguments goes on where the
    last one stopped, or returns the rows.

    Where torch.distributed is initialized the weights are sharded over the processes (FSDP), each takes its part of every
    batch, and the first one writes. Raises ``InputError`` for too few tokens to train on or held out, a folder of another run,
    one that cannot be written, and a loss that is no number.
    """
    plan, n_processes = phases(recipe, marks), distributed.get_world_size() if distributed.is_initialized() else 1
    if recipe.batch % (n_processes * recipe.accumulate):
        raise InputError(f"a batch of {recipe.batch} cannot be shared by {n_processes} processes in {recipe.accumulate} parts")
    n_sequences, needed = (len(tokens) - 1) // recipe.sequence, plan[-1].end * recipe.batch
    if n_sequences < needed:
        raise InputError(
            f"{marks[-1]} tokens need {needed} sequences of {recipe.sequence}, and the text has {n_sequences}; no text is read "
            "twice, so give more text or a smaller budget"
        )
    held_out = {name: ids for name, ids in held_out.items() if len(ids) > recipe.sequence}
    if not held_out:
        raise InputError(f"no source has {recipe.sequence} held-out tokens, one sequence; give more text or shorter sequences")
    order = np.random.default_rng(recipe.seed).permutation(n_sequences)
    plain = not (distributed.is_initialized() or recipe.gradient_checkpointing or recipe.compile)
    records = plain and device.startswith("cuda")
    texts = {
        name: hashlib.sha256(np.ascontiguousarray(ids).data).hexdigest() for name, ids in {"train": tokens, **held_out}.items()
    }
    identity = {"shape": str(shape), "norm": shape.norm, "marks": list(marks), "recipe": asdict(recipe), "text": texts}
    identity["device"] = _device_name(device)
    busy = "another run is at work in this folder; wait until it has ended, or give another folder"
    with files.locked(folder / "lock", busy) if _is_first() else nullcontext(), _own_stream(device):
        torch.manual_seed(recipe.seed)
        model = OpenLMForCausalLM(OpenLMConfig.of(shape, qk_norm=recipe.qk_norm, max_tokens=recipe.sequence))
        model.to(device)  # type: ignore[arg-type]
        _spare_memory(model, recipe, device)
        state = _State(model, _optimizer(model, recipe, records), records=records)
        _resume(folder, identity, state, _machine(device))
        forward: Any = torch.compile(model) if recipe.compile else model
        start_s, saved_s = time.monotonic() - state.seconds, time.monotonic()
        begun, begun_s = _steps_done(state, plan), time.monotonic()
        while state.phase < len(plan):
            phase = plan[state.phase]
            goes_on = state.phase + 1 < len(plan)  # from where this branch leaves
            if goes_on and phase.mark is not None and state.trunk is None and state.step == phase.start:
                state.trunk, state.trunk_losses = state.tensors(), list(state.losses)
            while state.step < phase.end:
                state.losses.append(_step(forward, state, recipe, phase, _batch(tokens, order, state.step, recipe), device))
                state.step += 1
                state.seconds = time.monotonic() - start_s
                steps_per_s = (_steps_done(state, plan) - begun) / (time.monotonic() - begun_s)
                progress(_told(state, plan, recipe, steps_per_s))
                if _agreed(time.monotonic() - saved_s > save_every_s):
                    _save(folder, identity, state)
                    saved_s = time.monotonic()
            if phase.mark is not None:
                state.rows.append(_row(shape, state, phase.mark, recipe, held_out, device))
                _publish(folder, phase.mark, state, recipe)
                if goes_on:
                    state.put(state.trunk or {})
                    state.losses, state.step, state.trunk = state.trunk_losses, phase.start, None
            state.phase += 1
            _save(folder, identity, state)
            saved_s = time.monotonic()
        return state.rows


def _spare_memory(model: OpenLMForCausalLM, recipe: Recipe, device: str) -> None:
    """Make the model keep less: not what a backward pass can compute again, and of several processes its shard alone."""
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if distributed.is_initialized():
        mesh = init_device_mesh(torch.device(device).type, (distributed.get_world_size(),))
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)


def _own_stream(device: str) -> AbstractContextManager[Any]:
    """On CUDA a stream for all of a run: a graph cannot be recorded on the default one, nor of work that began there."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.startswith("cuda") else nullcontext()


def _optimizer(model: OpenLMForCausalLM, recipe: Recipe, recorded: bool = False) -> torch.optim.AdamW:
    """AdamW over two groups: matrices, whose rate may follow the width, and the embedding and the norms. Both decay.

    ``recorded`` is for steps that a CUDA graph holds.
    """
    embedding = model.tok_embeddings.weight
    matrices = [part.weight for part in model.modules() if isinstance(part, nn.Linear) and part.weight is not embedding]
    inside = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    share = recipe.base_width / model.config.hidden_size if recipe.base_width else 1.0
    groups = [{"params": matrices, "share": share}, {"params": others, "share": 1.0}]
    return torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        weight_decay=recipe.weight_decay,
        fused=recorded or None,
        capturable=recorded,
    )


def _batch(tokens: Tokens, order: np.ndarray, step: int, recipe: Recipe) -> Tensor:
    """The token ids of a step, shape (batch, sequence + 1): each sequence and the token after it."""
    starts = order[step * recipe.batch : (step + 1) * recipe.batch] * recipe.sequence
    return torch.from_numpy(np.stack([tokens[at : at + recipe.sequence + 1] for at in starts]).astype(np.int64))


def _step(model: Any, state: _State, recipe: Recipe, phase: Phase, batch: Tensor, device: str) -> float:
    """One step of the optimizer; the loss before it, z-loss included, in nats per token."""
    state.model.train()
    rates = [learning_rate(recipe, phase, state.step) * group["share"] for group in state.optimizer.param_groups]
    if state.recorded:
        state.recorded.batch.copy_(batch)
        for held, rate in zip(state.recorded.rates, rates, strict=True):
            held.fill_(rate)
        state.recorded.graph.replay()
        told = state.recorded.loss.item()
    else:
        for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        told = _descend(model, state, recipe, batch.to(device)).item()
        if state.records:
            state.recorded = _record(model, state, recipe, device)
    if not math.isfinite(told):
        raise InputError(
            f"the loss of step {state.step} is {told}; lower the learning rate or lengthen the warm-up, in another folder"
        )
    return told


def _record(model: Any, state: _State, recipe: Recipe, device: str) -> _Recorded:
    """The next steps as a CUDA graph, after an eager one has made the averages; nothing is computed here."""
    batch = torch.zeros((recipe.batch, recipe.sequence + 1), dtype=torch.int64, device=device)
    rates = [torch.zeros((), device=device) for _ in state.optimizer.param_groups]
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # as a number it would be part of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        loss = _descend(model, state, recipe, batch)
    return _Recorded(graph, batch, rates, loss)


def _descend(model: Any, state: _State, recipe: Recipe, batch: Tensor) -> Tensor:
    """A step at the rates that the optimizer has, on a batch of shape (batch, sequence + 1); its loss, shape ()."""
    state.optimizer.zero_grad(set_to_none=True)
    total, n_processes, rank = torch.zeros((), device=batch.device), 1, 0
    if distributed.is_initialized():
        n_processes, rank = distributed.get_world_size(), distributed.get_rank()
    for part in batch.chunk(n_processes)[rank].chunk(recipe.accumulate):
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=recipe.dtype == "bf16"):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
        targets = part[:, 1:].reshape(-1, 1)
        loss = _LossWithZ.apply(logits.float().flatten(0, 1), targets, recipe.z_loss) / recipe.accumulate
        loss.backward()
        total += loss.detach()
    if n_processes > 1:
        distributed.all_reduce(total)
    nn.utils.clip_grad_norm_(state.model.parameters(), recipe.clip)
    state.optimizer.step()
    return total / n_processes


class _LossWithZ(torch.autograd.Function):
    r"""Mean of :math:`z - l_y + w z^2` over logits of shape (n, vocabulary), with :math:`z = \log \sum_v e^{l_v}`.

    Its slope is :math:`((1 + 2 w z)\, \mathrm{softmax}(l) - 1_y) / n`.
    It goes over the logits about as often as a cross-entropy alone does.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weight: float) -> Tensor:
        log_shares = torch.log_softmax(logits, dim=-1)
        z = logits[:, :1] - log_shares[:, :1]
        ctx.save_for_backward(log_shares, targets, z)
        ctx.weight = weight
        return weight * (z**2).mean() - log_shares.gather(1, targets).mean()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        log_shares, targets, z = ctx.saved_tensors
        slopes = log_shares.exp().mul_(1 + 2 * ctx.weight * z)
        slopes.scatter_add_(1, targets, torch.full_like(z, -1.0))
        return slopes.mul_(slope / len(targets)), None, None


def held_out_loss(model: OpenLMForCausalLM, tokens: Tokens, sequence: int, device: str = "cpu") -> float:
    """Mean cross-entropy in nats per token over the whole sequences of ``tokens``, shape (n,), each read by itself.

    Raises ``InputError`` for less than one sequence.
    """
    n = (len(tokens) - 1) // sequence
    if n < 1:
        raise InputError(f"{len(tokens)} held-out tokens are less than a sequence of {sequence}; give more text")
    total, model, at_once = 0.0, model.eval(), 16 if device == "cpu" else 256
    with torch.inference_mode():
        for start in range(0, n, at_once):
            rows = [tokens[i * sequence : (i + 1) * sequence + 1] for i in range(start, min(n, start + at_once))]
            part = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
            logits = model(input_ids=part[:, :-1], use_cache=False).logits.float().flatten(0, 1)
            total += nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").item()
    return total / (n * sequence)


def _row(shape: Shape, state: _State, mark: int, recipe: Recipe, held_out: Mapping[str, Tokens], device: str) -> dict[str, Any]:
    by_source = {name: held_out_loss(state.model, tokens, recipe.sequence, device) for name, tokens in held_out.items()}
    n_sequences = {name: (len(tokens) - 1) // recipe.sequence for name, tokens in held_out.items()}
    loss = sum(by_source[name] * n_sequences[name] for name in by_source) / sum(n_sequences.values())
    if not math.isfinite(loss):
        raise InputError(f"the held-out loss at {mark} tokens is {loss}; lower the learning rate, in another folder")
    return {
        "name": f"{shape.n_layers}x{shape.d_model}-seed{recipe.seed}",
        "shape": str(shape),
        "n_params": shape.n_params("non_embedding"),
        "n_count": "non_embedding",
        **{name: getattr(shape, name) for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "vocab")},
        "tied": int(shape.tied),
        "tokens": state.step * recipe.step_tokens,
        "budget_tokens": mark,
        "loss": loss,
        "run_averaged_loss": run_averaged_loss(state.losses),
        **{f"loss_{name}": value for name, value in by_source.items()},
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "log": f"losses-{mark}.csv",
        "device": _device_name(device),
        "hardware": ", then ".join(state.machines),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        **{name: value for name, value in asdict(recipe).items() if name != "compile"},
    }


def _publish(folder: Path, mark: int, state: _State, recipe: Recipe) -> None:
    """What others read of a mark: the model, the losses, the table of rows; written again where a kill came in between."""
    weights = get_model_state_dict(state.model, options=_WHOLE)
    if not _is_first():
        return
    with files.replacing(folder / f"model-{mark}", SafetensorError) as partial:
        state.model.save_pretrained(partial, state_dict=weights)
    losses = pd.DataFrame({"tokens": recipe.step_tokens * np.arange(1, state.step + 1), "loss": state.losses})
    for name, table in ((f"losses-{mark}.csv", losses), ("rows.csv", pd.DataFrame(state.rows))):
        with files.replacing(folder / name) as partial:
            table.to_csv(partial, index=False)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


def _machine(device: str) -> str:
    return _device_name(device) if device.startswith("cuda") else cpu_name()


def _steps_done(state: _State, plan: Sequence[Phase]) -> int:
    """The steps of all phases so far, those of branches that were left included."""
    before = sum(phase.end - phase.start for phase in plan[: state.phase])
    return before + state.step - plan[state.phase].start if state.phase < len(plan) else before


def _told(state: _State, plan: Sequence[Phase], recipe: Recipe, steps_per_s: float) -> str:
    """Where a run stands, and when it will end at the speed since it began or went on."""
    done, total = _steps_done(state, plan), sum(phase.end - phase.start for phase in plan)
    end = time.strftime("%H:%M", time.localtime(time.time() + (total - done) / steps_per_s))
    speed = steps_per_s * recipe.step_tokens
    return f"step {done} of {total}, loss {state.losses[-1]:.3f}, {speed:,.0f} tokens/s, done at about {end}"


def _save(folder: Path, identity: Mapping[str, Any], state: _State) -> None:
    """A checkpoint of tensors, with all else in the header of the file; older ones than the last two go."""
    tensors = state.tensors()
    if not _is_first():
        return
    tensors |= {f"trunk.{key}": value for key, value in (state.trunk or {}).items()}
    told = {key: getattr(state, key) for key in _TOLD} | {"identity": identity, "in_branch": state.trunk is not None}
    number = 1 + max((number for number, _ in _checkpoints(folder)), default=0)
    unnamed = folder / "checkpoint-unnamed.safetensors"
    with files.replacing(unnamed, SafetensorError) as partial:
        save_file({key: value.contiguous() for key, value in tensors.items()}, partial, {"told": json.dumps(told)})
    unnamed.rename(folder / f"checkpoint-{number}-{files.sha256(unnamed)}.safetensors")
    for _, old in _checkpoints(folder)[:-KEPT]:
        old.unlink()


def _agreed(answer_of_this: Any) -> Any:
    """What the first process says, in all of them: they must save together, and their clocks differ."""
    answer = [answer_of_this]
    if distributed.is_initialized():
        distributed.broadcast_object_list(answer)
    return answer[0]


def _is_first() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _resume(folder: Path, identity: Mapping[str, Any], state: _State, machine: str) -> None:
    """Put the newest whole checkpoint of the folder into ``state``, if there is one; the first process reads it."""
    told, tensors = _newest(folder, identity) if _is_first() else (None, {})
    told = _agreed(told)
    if told is not None:
        state.put(tensors)
        state.trunk = dict(_under("trunk.", tensors)) if told["in_branch"] else None
        for key in _TOLD:
            setattr(state, key, told.get(key, getattr(state, key)))
    if machine not in state.machines:
        state.machines.append(machine)


def _newest(folder: Path, identity: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    damaged = []
    for _, path in reversed(_checkpoints(folder)):
        if not path.name.endswith(f"-{files.sha256(path)}.safetensors"):
            damaged.append(path)
            continue
        with safe_open(path, "pt") as file:
            told, tensors = json.loads(file.metadata()["told"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if other := [key for key in identity if told["identity"].get(key) != json.loads(json.dumps(identity[key]))]:
            raise InputError(f"{folder}: holds a run of another {other[0]}; give another folder")
        for lost in damaged:
            _LOG.warning("%s: is damaged (its checksum differs); going back to the checkpoint before it", lost)
            lost.unlink()
        return told, tensors
    if damaged:
        raise InputError(f"{damaged[0]}: is damaged, as is every checkpoint here; give another folder, or remove them")
    return None, {}


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Their numbers and files, oldest first."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    return sorted((int(name[1]), path) for name, path in found if name)
