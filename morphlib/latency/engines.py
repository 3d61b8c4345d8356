"""Engines: a model ready to generate, in a process of its own, behind one small interface.

``Worker`` starts a process for one configuration and asks it for generations, one at a time, so that two
configurations can be timed in turn and neither inherits the other's caches, compiled code or memory.
Its types must be known to both sides: the process of vLLM has an environment of its own, and ours loads no torch.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from morphlib.errors import InputError
from morphlib.latency import models

ENGINES = ("hf-eager", "hf-compiled", "cuda-graph", "vllm")
DEVICES = ("auto", "cpu", "cuda")
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
    engine: str = "hf-eager"
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
        for name, known in {"engine": ENGINES, "dtype": tuple(models.DTYPES), "device": DEVICES}.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is not known; choose one of {', '.join(known)}")
        cores = len(_usable_cores())
        object.__setattr__(self, "threads", cores if self.threads is None else self.threads)
        for name in ("batch", "in_tokens", "out_tokens", "threads"):
            number = getattr(self, name)
            if not isinstance(number, int) or number < 1:
                raise InputError(f"{name} is {number!r}; give a whole number of at least 1")
        if self.threads > cores:  # type: ignore[operator]
            raise InputError(f"threads is {self.threads}, and there are {cores} cores; give no more threads than cores")
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            sampling = f"temperature {self.temperature} and top-p {self.top_p} are no sampling"
            raise InputError(f"{sampling}; give 0 or more, and 0 to 1")

    @property
    def cores(self) -> list[int]:
        """The cores that the process is pinned to: the last of those that may be used, one for each thread."""
        return _usable_cores()[-(self.threads or 1) :]


def _usable_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


class Generation(NamedTuple):
    """The times of one generation, in seconds from its start, and the most memory that its process has held so far.

    ``e2e_s`` ends when the call returned and the device is idle, by the host's monotonic clock. ``token_times_s``,
    shape (out_tokens,), ends when each token was chosen: by the same clock on a CPU, by CUDA events on a GPU.
    ``peak_memory_bytes`` is None with vLLM, which reserves what it is allowed to, whatever it needs.
    """

    e2e_s: float
    token_times_s: np.ndarray
    peak_memory_bytes: int | None


class Worker:
    """The process of one configuration, until it is closed.

    ``facts`` says what runs: hardware, versions, number of parameters. Raises ``InputError`` where the configuration
    cannot run here, and where the process dies.
    """

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        python = sys.executable
        if configuration.engine == "vllm":
            python = os.environ.get("MORPH_VLLM_PYTHON", "")
            if not shutil.which(python):
                raise InputError("the engine vllm needs an environment of its own; set MORPH_VLLM_PYTHON to its python")
        environment = os.environ | {
            "OMP_NUM_THREADS": str(configuration.threads),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "PYTHONSAFEPATH": "1",  # else a torch.py in the current folder, which a model may have come with, would be run
        }
        # as long as the process, which may write what is no text
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [python, "-c", f"from morphlib.latency import engines; engines._serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=environment,
            )
        try:
            self.facts: dict[str, Any] = self._ask(configuration)
        except BaseException:
            self.close()
            raise

    def generate(self, in_tokens: int | None = None, out_tokens: int | None = None) -> Generation:
        """One generation, of the configuration's lengths where none are given."""
        c = self.configuration
        generation: Generation = self._ask((in_tokens or c.in_tokens, out_tokens or c.out_tokens))
        self.facts["peak_memory_bytes"] = generation.peak_memory_bytes
        return generation

    def close(self) -> None:
        """End the process and whatever it started."""
        self._pipe.close()  # it ends when there are no more requests
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()

    def _ask(self, request: Any) -> Any:
        try:
            self._pipe.send(request)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            answer = f"the engine's process ended {self._ending()}"
        if isinstance(answer, str):
            # vLLM's processes write the cause to their log alone
            cause = re.search(r"\w+Error: .+", self._said()) if "root cause above" in answer else None
            raise InputError(f"{self.configuration.model} with {self.configuration.engine}: {cause[0] if cause else answer}")
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
        on_gpu = torch.cuda.is_available() and c.device != "cpu"
        if not on_gpu and (c.device == "cuda" or c.engine == "cuda-graph"):
            raise InputError("there is no CUDA device that torch may use; leave out --device, and use hf-eager or hf-compiled")
        self.device = "cuda" if on_gpu else "cpu"
        model, self.facts = _admitted(c, self.device, transformers)
        self.model = model.load(c.dtype, self.device, seed=c.seed)
        # a real checkpoint names tokens that end a text: here the length is given
        self.model.generation_config = transformers.GenerationConfig()

    def generate(self, in_tokens: int, out_tokens: int) -> Generation:
        import torch
        from transformers import CompileConfig, GenerationConfig, StoppingCriteriaList

        c, on_gpu = self.configuration, self.device == "cuda"
        settings: dict[str, Any] = {"max_new_tokens": out_tokens, "do_sample": bool(c.temperature), "pad_token_id": 0}
        if c.temperature:
            settings |= {"temperature": c.temperature, "top_p": c.top_p, "top_k": 0}
        if c.engine != "hf-eager":
            compiled = CompileConfig(mode="reduce-overhead" if c.engine == "cuda-graph" else "default")
            compiled._compile_all_devices = True  # type: ignore[assignment]
            settings |= {"cache_implementation": "static", "compile_config": compiled}
        torch.manual_seed(c.seed)
        # token ids of exact length: text would have to be cut into tokens, and not always into as many
        ids = torch.randint(0, self.model.config.vocab_size, (c.batch, in_tokens)).to(self.device)
        nothing_ends = torch.zeros(c.batch, dtype=torch.bool, device=self.device)
        stamps: list[Any] = []

        def now() -> Any:
            if on_gpu:
                return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
            return time.perf_counter()

        def stamp(*_: Any, **__: Any) -> Any:
            """Told of every token that is chosen, and ends nothing: a stopping criterion in name only."""
            stamps.append(now())
            return nothing_ends

        synchronize = torch.cuda.synchronize if on_gpu and c.synchronize else lambda: None
        with torch.inference_mode():
            synchronize()
            start = now()
            start_s = time.perf_counter()
            out: Any = self.model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=GenerationConfig(**settings),
                stopping_criteria=StoppingCriteriaList([stamp]),
            )
            synchronize()
            e2e_s = time.perf_counter() - start_s
        if out.shape[1] != in_tokens + out_tokens:
            raise InputError(f"the model wrote {out.shape[1] - in_tokens} tokens in place of {out_tokens}")
        if on_gpu:
            torch.cuda.synchronize()
            token_times_s = np.array([start.elapsed_time(event) for event in stamps[:out_tokens]]) / 1e3
            return Generation(e2e_s, token_times_s, torch.cuda.max_memory_allocated())
        import resource

        peak_resident_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Generation(e2e_s, np.array(stamps) - start, peak_resident_bytes)


class _Vllm:
    """vLLM's engine, stepped by us so that each token has its time; random weights, no tokenizer, no prefix cache."""

    def __init__(self, configuration: Configuration) -> None:
        import psutil
        import torch
        import transformers
        import vllm

        c = self.configuration = configuration
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if c.device not in ("auto", device):
            raise InputError(f"vLLM runs on {device} here, not on {c.device}; leave out --device")
        model, self.facts = _admitted(c, device, vllm, transformers)
        if model.config.model_type == "open_lm":
            raise InputError(f"vLLM has no Open-LM; time a Llama of its shape: {model.shape}")
        self._folder = tempfile.TemporaryDirectory()  # as long as the engine
        model.config.save_pretrained(self._folder.name)
        memory = psutil.virtual_memory()
        self.llm = vllm.LLM(
            model=str(model.path or self._folder.name),
            load_format="safetensors" if model.path else "dummy",
            skip_tokenizer_init=True,
            dtype=models.DTYPES[c.dtype],
            max_model_len=c.in_tokens + c.out_tokens,
            max_num_seqs=c.batch,
            enable_prefix_caching=False,
            # of all memory: on a GPU vLLM's own default, on a CPU half of what is free
            **({} if device == "cuda" else {"gpu_memory_utilization": round(0.5 * memory.available / memory.total, 2)}),
            seed=c.seed,
        )

    def generate(self, in_tokens: int, out_tokens: int) -> Generation:
        from vllm import SamplingParams

        c, engine = self.configuration, self.llm.llm_engine
        asked = SamplingParams(
            temperature=c.temperature, top_p=c.top_p, max_tokens=out_tokens, ignore_eos=True, detokenize=False
        )
        prompts = np.random.default_rng(c.seed).integers(0, self.facts["vocab"], (c.batch, in_tokens)).tolist()
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
        return Generation(time.perf_counter() - start_s, np.array(token_times), None)


def _admitted(c: Configuration, device: str, *libraries: Any) -> tuple[models.Model, dict[str, Any]]:
    """The model, and the facts of what runs it; refused before allocating what the model cannot hold or the memory cannot."""
    import psutil
    import torch

    model, context, on_gpu = models.resolve(c.model), c.in_tokens + c.out_tokens, device == "cuda"
    if context > model.max_tokens:
        raise InputError(f"{c.in_tokens} tokens in and {c.out_tokens} out pass the model's {model.max_tokens}; give fewer")
    needed = model.memory_bytes(c.dtype, c.batch, context)
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    if needed > SPARE_MEMORY * free:
        room = f"needs about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        raise InputError(f"{room}; choose a smaller model or batch, or fewer bits")
    return model, model.facts(c.dtype) | {
        "ran_on": device,
        "hardware": torch.cuda.get_device_name() if on_gpu else models.cpu_name(),
        "torch": str(torch.__version__),
        "library": ", ".join(f"{library.__name__} {library.__version__}" for library in libraries),
    }


def _serve(fileno: int) -> None:
    """Answer requests until there are no more, on as many cores as there are threads; a line of text where it cannot."""
    os.set_inheritable(fileno, False)  # what an engine starts must not keep the pipe open when this process has ended
    with Connection(fileno) as pipe:
        try:
            configuration: Configuration = pipe.recv()
            if hasattr(os, "sched_setaffinity"):  # pinned: a thread that moves to another core leaves its cache behind
                os.sched_setaffinity(0, configuration.cores)
            session = (_Vllm if configuration.engine == "vllm" else _HuggingFace)(configuration)
            pipe.send(session.facts)
            while True:
                pipe.send(session.generate(*pipe.recv()))
        except EOFError:
            return
        except InputError as error:
            pipe.send(str(error))
        except Exception as error:  # whatever an engine raises is told in one line, and the other configurations go on
            pipe.send(f"the engine failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}")
