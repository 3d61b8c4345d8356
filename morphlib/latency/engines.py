"""Engines: a model ready to generate, in a process of its own, behind one small interface.

``Worker`` starts a process for one configuration and asks it for generations, one at a time, so that two
configurations can be timed in turn and neither inherits the other's caches, compiled code or memory.
The two talk in lines of JSON over pipes: the configuration, then for each generation the numbers of tokens
in and out, answered by the times. This file is also that process: ``python -m morphlib.latency.engines``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, get_args

import numpy as np

from morphlib.errors import InputError
from morphlib.latency import models

Engine = Literal["hf-eager", "hf-compiled", "cuda-graph", "vllm"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
SPARE_MEMORY = 0.9  # of what is free; the rest is left to the other programs


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What is timed. ``model`` is a shape, the name of a bundled open model or a folder with a checkpoint.

    ``in_tokens`` random token ids go in, exactly ``out_tokens`` come out, for each of ``batch`` sequences.
    ``temperature`` 0 is greedy. ``threads`` are those of the CPU; None takes every core that the process may use.
    ``device`` is auto (CUDA where there is one), cpu or cuda. ``synchronize=False`` reads the clock without
    waiting for the device, as the authors' scripts do: it is there to show what that costs.
    Raises ``InputError`` for a value that cannot be.
    """

    model: str
    engine: Engine = "hf-eager"
    dtype: str = "bf16"
    device: str = "auto"
    batch: int = 1
    in_tokens: int = 128
    out_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    threads: int | None = None
    seed: int = 0
    synchronize: bool = True

    def __post_init__(self) -> None:
        for name, value, known in (
            ("engine", self.engine, ENGINES),
            ("dtype", self.dtype, tuple(models.DTYPES)),
            ("device", self.device, ("auto", "cpu", "cuda")),
        ):
            if value not in known:
                raise InputError(f"{name} {value!r} is not known; choose one of {', '.join(known)}")
        cores = len(_usable_cores())
        object.__setattr__(self, "threads", cores if self.threads is None else self.threads)
        for name in ("batch", "in_tokens", "out_tokens", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; give a whole number of at least 1")
        if self.threads > cores:  # type: ignore[operator]
            raise InputError(
                f"threads is {self.threads}, but there are {cores} cores; more threads than cores measure their quarrel"
            )
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise InputError(
                f"temperature {self.temperature} and top-p {self.top_p} are no sampling; give 0 or more, and 0 to 1"
            )

    @property
    def cores(self) -> list[int]:
        """The cores that the process is pinned to: the last of those that may be used, one for each thread."""
        return _usable_cores()[-(self.threads or 1) :]


def _usable_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class Generation:
    """The times of one generation, in seconds from its start.

    ``e2e_s`` ends when the call returned and the device is idle, by the host's monotonic clock. ``token_times_s``,
    shape (out_tokens,), ends when each token was chosen: by the same clock on a CPU, by CUDA events on a GPU.
    """

    e2e_s: float
    token_times_s: np.ndarray


class Worker:
    """The process of one configuration; a context manager that ends it.

    ``facts`` says what runs: hardware, versions, number of parameters. Raises ``InputError`` where the configuration
    cannot run here, and where the process dies.
    """

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        python = sys.executable
        if configuration.engine == "vllm":
            python = os.environ.get("MORPH_VLLM_PYTHON", "")
            if not Path(python).is_file():
                raise InputError("the engine vllm needs an environment of its own; set MORPH_VLLM_PYTHON to its python")
        threads = str(configuration.threads)
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [python, "-m", "morphlib.latency.engines"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )
        try:
            self.facts: dict[str, Any] = self._ask(asdict(configuration))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def generate(self, in_tokens: int | None = None, out_tokens: int | None = None) -> Generation:
        """One generation, of the configuration's lengths where none are given."""
        c = self.configuration
        answer = self._ask({"in_tokens": in_tokens or c.in_tokens, "out_tokens": out_tokens or c.out_tokens})
        self.facts["peak_memory_bytes"] = answer["peak_memory_bytes"]
        return Generation(answer["e2e_s"], np.array(answer["token_times_s"]))

    def close(self) -> None:
        """End the process and whatever it started."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        where = f"{self.configuration.model} with {self.configuration.engine}"
        if not line:
            raise InputError(f"{where}: the engine's process ended {self._ending()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            # vLLM's processes write the cause to their log alone
            cause = re.search(r"\w+Error: .+", self._said()) if "root cause above" in answer["error"] else None
            raise InputError(f"{where}: {cause[0] if cause else answer['error']}")
        return answer

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def _ending(self) -> str:
        code = self.process.wait()
        last = ["it said nothing", *filter(str.strip, self._said().splitlines())][-1].strip()
        if code == -9:
            return "(killed, as for want of memory); choose a smaller model or batch"
        return f"(exit code {code}): {last}"


class _HuggingFace:
    """``model.generate`` of transformers: eager with a growing cache, or compiled with a static one.

    ``hf-compiled`` compiles the decode step by torch.compile; ``cuda-graph`` also records it as a CUDA graph
    (mode reduce-overhead). The prefill runs eagerly in both, as transformers does it.
    """

    def __init__(self, configuration: Configuration) -> None:
        import torch
        import transformers

        c = self.configuration = configuration
        torch.set_num_threads(c.threads or 1)
        has_cuda = torch.cuda.is_available()
        if not has_cuda and (c.device == "cuda" or c.engine == "cuda-graph"):
            raise InputError("torch finds no CUDA device here; leave out --device, and use hf-eager or hf-compiled")
        self.device = torch.device("cuda" if has_cuda and c.device != "cpu" else "cpu")
        if c.engine == "cuda-graph" and self.device.type == "cpu":
            raise InputError("a CUDA graph cannot run on the CPU; use hf-compiled")
        model = models.resolve(c.model)
        _check_room(model, c, _memory_bytes(self.device)[0])
        self.model = model.load(c.dtype, self.device, seed=c.seed)
        # a real checkpoint names tokens that end a text: here the length is given
        self.model.generation_config = transformers.GenerationConfig()
        self.facts = model.facts() | {
            "ran_on": self.device.type,
            "hardware": torch.cuda.get_device_name() if self.device.type == "cuda" else models.cpu_name(),
            "torch": torch.__version__,
            "library": f"transformers {transformers.__version__}",
        }

    def generate(self, in_tokens: int, out_tokens: int) -> tuple[float, list[float]]:
        import torch
        from transformers import CompileConfig, GenerationConfig, StoppingCriteriaList

        c, on_gpu = self.configuration, self.device.type == "cuda"
        compiling: dict[str, Any] = {}
        if c.engine != "hf-eager":
            compiled = CompileConfig(mode="reduce-overhead" if c.engine == "cuda-graph" else "default")
            compiled._compile_all_devices = True  # type: ignore[assignment]
            compiling = {"cache_implementation": "static", "compile_config": compiled}
        sampling = {"temperature": c.temperature, "top_p": c.top_p, "top_k": 0} if c.temperature else {}
        generation = GenerationConfig(
            max_new_tokens=out_tokens, do_sample=bool(c.temperature), pad_token_id=0, **sampling, **compiling
        )
        torch.manual_seed(c.seed)
        # token ids of exact length: text would have to be cut into tokens, and not always into as many
        ids = torch.randint(0, self.model.config.vocab_size, (c.batch, in_tokens)).to(self.device)
        stamps = _Stamps(torch.zeros(c.batch, dtype=torch.bool, device=self.device))
        synchronize = torch.cuda.synchronize if on_gpu and c.synchronize else lambda: None
        with torch.inference_mode():
            synchronize()
            start = stamps.now()
            start_s = time.perf_counter()
            out: Any = self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=generation,
                stopping_criteria=StoppingCriteriaList([stamps]),
            )
            synchronize()
            e2e_s = time.perf_counter() - start_s
        if out.shape[1] != in_tokens + out_tokens:
            raise InputError(f"the model wrote {out.shape[1] - in_tokens} tokens in place of {out_tokens}")
        self.facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else _peak_resident_bytes()
        if on_gpu:
            torch.cuda.synchronize()
            return e2e_s, [start.elapsed_time(event) / 1e3 for event in stamps.times[:out_tokens]]
        return e2e_s, [at - start for at in stamps.times]


class _Stamps:
    """Told by ``generate`` of every token that it chose, and ends nothing: a stopping criterion in name only."""

    def __init__(self, nothing_ends: Any) -> None:
        self.nothing_ends = nothing_ends
        self.times: list[Any] = []

    def now(self) -> Any:
        if self.nothing_ends.device.type == "cpu":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.times.append(self.now())
        return self.nothing_ends


class _Vllm:
    """vLLM's engine, stepped by us so that each token has its time; random weights, no tokenizer, no prefix cache."""

    def __init__(self, configuration: Configuration) -> None:
        import torch
        import transformers
        import vllm

        c = self.configuration = configuration
        model = models.resolve(c.model)
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        free, total = _memory_bytes(device)
        _check_room(model, c, free)
        folder = model.path
        if folder is None:
            self._folder = tempfile.TemporaryDirectory()
            folder = Path(self._folder.name)
            model.config.save_pretrained(folder)
        self.llm = vllm.LLM(
            model=str(folder),
            load_format="safetensors" if model.path else "dummy",
            skip_tokenizer_init=True,
            dtype=models.DTYPES[c.dtype],
            max_model_len=c.in_tokens + c.out_tokens,
            max_num_seqs=c.batch,
            enable_prefix_caching=False,
            # of all memory: on a GPU vLLM's own default, on a CPU half of what is free
            **({} if on_gpu else {"gpu_memory_utilization": round(0.5 * free / total, 2)}),
            seed=c.seed,
        )
        self.vocabulary = model.config.vocab_size
        self.facts = model.facts() | {
            "ran_on": device.type,
            "hardware": torch.cuda.get_device_name() if on_gpu else models.cpu_name(),
            "torch": torch.__version__,
            "library": f"vllm {vllm.__version__}, transformers {transformers.__version__}",
        }

    def generate(self, in_tokens: int, out_tokens: int) -> tuple[float, list[float]]:
        from vllm import SamplingParams

        c, engine = self.configuration, self.llm.llm_engine
        asked = SamplingParams(
            temperature=c.temperature,
            top_p=c.top_p,
            min_tokens=out_tokens,
            max_tokens=out_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        prompts = np.random.default_rng(c.seed).integers(0, self.vocabulary, (c.batch, in_tokens)).tolist()
        written = dict.fromkeys(map(str, range(c.batch)), 0)
        token_times: list[float] = []
        start_s = time.perf_counter()
        for name, prompt in zip(written, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, asked)
        while engine.has_unfinished_requests():
            for output in engine.step():
                written[output.request_id] = len(output.outputs[0].token_ids)
            now_s = time.perf_counter() - start_s
            # a token has come when the slowest sequence has it
            token_times += [now_s] * (min(written.values()) - len(token_times))
        self.facts["peak_memory_bytes"] = None  # vLLM reserves what it is allowed to, whatever it needs
        return time.perf_counter() - start_s, token_times


def _check_room(model: models.Model, c: Configuration, free_bytes: int) -> None:
    """Refuse before allocating what the model cannot hold or the memory cannot."""
    if c.in_tokens + c.out_tokens > model.max_tokens:
        raise InputError(f"{c.in_tokens} tokens in and {c.out_tokens} out pass the model's {model.max_tokens}; give fewer")
    needed = model.memory_bytes(c.dtype, c.batch, c.in_tokens + c.out_tokens)
    if needed > SPARE_MEMORY * free_bytes:
        raise InputError(
            f"needs about {needed / 1e9:.1f} GB of memory, and {free_bytes / 1e9:.1f} GB are free; "
            "choose a smaller model or batch, or fewer bits"
        )


def _memory_bytes(device: Any) -> tuple[int, int]:
    """What is free of the device's memory, and all of it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info()
    import psutil

    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _peak_resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _serve(requests: IO[str], replies: IO[str]) -> None:
    """Answer one line with one line until there are no more, on as many cores as there are threads."""

    def reply(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=replies, flush=True)

    try:
        configuration = Configuration(**json.loads(requests.readline()))
        if hasattr(os, "sched_setaffinity"):  # pinned: a thread that moves to another core leaves its cache behind
            os.sched_setaffinity(0, configuration.cores)
        session = (_Vllm if configuration.engine == "vllm" else _HuggingFace)(configuration)
        reply(session.facts)
        for line in requests:
            e2e_s, token_times_s = session.generate(**json.loads(line))
            reply({"e2e_s": e2e_s, "token_times_s": token_times_s, "peak_memory_bytes": session.facts["peak_memory_bytes"]})
    except InputError as error:
        reply({"error": str(error)})
    except Exception as error:  # whatever an engine raises is told in one line, and the other configurations go on
        reply({"error": f"the engine failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}"})


if __name__ == "__main__":
    # what libraries print must not mix with the replies
    own_replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(sys.stdin, own_replies)
