"""Kernels do not run on the stand-in: what a step has sampled is made up here, token 5 for all.

Python imports this module at its start, because `build.environment` puts its folder on the path. It
changes four functions of vLLM 0.26 once their modules are imported, and nothing else.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys

TOKEN, ONE_TOKEN = 5, 1
"""What 64-bit results are (tokens), and 32-bit ones (how many of them there are)."""


def made_up(result):
    import torch

    value = {torch.int64: TOKEN, torch.int32: ONE_TOKEN}.get(result.dtype, 0)
    return torch.full(result.shape, value, dtype=result.dtype)


def with_tokens(module):
    """Change `vllm.v1.worker.gpu.async_utils`, where sampled tokens come from the device."""
    module.async_copy_to_np = lambda result: made_up(result).numpy()


def with_tokens_of_v1(module):
    """Change `vllm.v1.worker.gpu_model_runner` in the same way, for the older runner."""
    fetch = module.AsyncGPUModelRunnerOutput.get_output

    def get_output(self):
        import torch

        with torch.inference_mode():  # in which the runner has made it
            self.sampled_token_ids_cpu.fill_(TOKEN)
        return fetch(self)

    module.AsyncGPUModelRunnerOutput.get_output = get_output


def with_logprobs(module):
    """Change `vllm.v1.outputs` in the same way, for probabilities."""

    def to_cpu_nonblocking(self):
        import torch

        return type(self)(
            torch.full(self.logprob_token_ids.shape, TOKEN, dtype=self.logprob_token_ids.dtype),
            torch.zeros(self.logprobs.shape),
            torch.ones(self.selected_token_ranks.shape, dtype=torch.int64),
            *tuple(self)[3:],
        )

    module.LogprobsTensors.to_cpu_nonblocking = to_cpu_nonblocking


def with_counts_of_adapters(module):
    """Change `vllm.lora...lora_kernel_metadata`: `torch.unique` needs a kernel for its size."""

    class Torch:
        def __getattr__(self, name):
            import torch

            return getattr(torch, name)

        def unique(self, values, **options):
            import torch

            found = torch.unique(values[:1].cpu(), **options)
            return tuple(each.to(values.device) for each in found)

    module.torch = Torch()


CHANGES = {
    "vllm.lora.ops.triton_ops.lora_kernel_metadata": with_counts_of_adapters,
    "vllm.v1.worker.gpu.async_utils": with_tokens,
    "vllm.v1.worker.gpu_model_runner": with_tokens_of_v1,
    "vllm.v1.outputs": with_logprobs,
}


class Loader(importlib.abc.Loader):
    """Load a module normally, and change it then."""

    def __init__(self, inner, change):
        self.inner, self.change = inner, change

    def create_module(self, spec):
        return self.inner.create_module(spec)

    def exec_module(self, module):
        self.inner.exec_module(module)
        self.change(module)


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = Loader(spec.loader, CHANGES[name])
        return spec


sys.meta_path.insert(0, Finder())
