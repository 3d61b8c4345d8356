"""The aten operations of one decode step, as morphlib/data/operations.csv has them.

python benchmarks/operations.py MODEL...   for each model, such as Llama-3.2-1B, 12x3072 or a folder: a row of the table
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import no_init_weights

from morphlib.latency import models

_HIDDEN_VIEWS = ("aten::_unsafe_view", "aten::detach_")  # the schema of these does not say that they only name memory anew


class Operations(NamedTuple):
    """Operations of one decode step that do work, and apart from them the views, which only name memory anew.

    ``per_layer`` and ``views_per_layer`` are means over the layers; the other two are what is left over.
    """

    per_layer: float
    outside: int
    views_per_layer: float
    views_outside: int


def count_operations(model: models.Model) -> Operations:
    """The aten operations that the model dispatches for one token with a key-value cache, in bf16.

    Counted from the model itself at its full size, on fake tensors of the CPU: every operation is dispatched as
    on the CPU, and none computes. These are aten operations, not CUDA kernels, which only a trace on a GPU
    shows. The forward pass alone is counted, without sampling, with the attention that transformers chooses.
    """
    counts: Counter[tuple[bool, bool]] = Counter()
    now = {"in_layer": False}

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "aten":  # fake tensors also ask for their device, which is no operation
                counts[now["in_layer"], func.is_view or func.name() in _HIDDEN_VIEWS] += 1
            return func(*args, **(kwargs or {}))

    n_layers = models.dimensions(model.config)["n_layers"]
    with FakeTensorMode(), no_init_weights(), torch.no_grad():
        built: Any = model._built("bf16").eval()
        lists = (m for m in built.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers)
        for layer in next(lists):
            layer.register_forward_pre_hook(lambda *_: now.update(in_layer=True))
            layer.register_forward_hook(lambda *_: now.update(in_layer=False))
        prompt, token = torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
        cache = built(prompt, use_cache=True).past_key_values
        with Counting():
            built(token, past_key_values=cache, use_cache=True)

    def of(views: bool) -> tuple[float, int]:
        return counts[True, views] / n_layers, counts[False, views]

    return Operations(*of(views=False), *of(views=True))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        counted = count_operations(models.resolve(name))
        print(name, counted.per_layer, counted.views_per_layer, counted.outside, counted.views_outside, sep=",")
