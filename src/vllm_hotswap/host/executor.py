"""The executors of hosted engines: vLLM's own, ending without process-wide cleanup.

A model on one device runs inside the engine host, a tensor-parallel one in worker processes that
the host starts and ends with it. Both are named by their qualified names in
`distributed_executor_backend`, so that the CPU platform, which replaces the word "uni" by the
multi-process executor, lets them be. Checked on vLLM 0.32.0 (`UniProcExecutor._distributed_args`).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

# isort: split
import torch
from vllm import envs
from vllm.distributed.ec_transfer.ec_transfer_state import ensure_ec_transfer_shutdown
from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
from vllm.utils import network_utils
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_hotswap.host.kv_cache import KVLimits, given_bytes, limits
from vllm_hotswap.host.platforms import BIND_VARIABLE, binding_for_ranks
from vllm_hotswap.host.progress import reached
from vllm_hotswap.host.state import compiles_nothing
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap.host")
NO_COMPILER = "TORCH_COMPILE_DISABLE"


KILLED_S = 10.0
"""Within which a worker that was killed is to be gone: the kernel gives its memory back first."""


@dataclass(frozen=True, slots=True)
class LoadTerms:
    """What an executor cannot be told, because vLLM makes it."""

    folder: str
    """Where torch's store of the process group lies: it is never removed by the process itself."""
    limits_kv: bool
    """Whether the load takes no more KV memory than the model can use."""


UNTOLD = LoadTerms(tempfile.gettempdir(), False)
_under_way = ContextVar("_under_way", default=UNTOLD)


@contextmanager
def loading_on(terms: LoadTerms) -> Iterator[None]:
    """Loads inside follow these terms, and later ones those from before."""
    token = _under_way.set(terms)
    try:
        yield
    finally:
        _under_way.reset(token)


class _Reporting:
    """Says which stage of a load an executor has reached."""

    def _init_executor(self) -> None:
        reached("weights")
        super()._init_executor()  # type: ignore[misc]

    def determine_available_memory(self) -> list[int]:
        """What is free for KV memory, but not more than is given: not every worker asks.

        Nor more than all sequences can use, which only the loaded model tells for certain. Where
        a number of blocks is given, vLLM takes that many, whatever is said here.
        """
        found: list[int] = super().determine_available_memory()  # type: ignore[misc]
        config: Any = self.vllm_config  # type: ignore[attr-defined]
        if (given := config.cache_config.kv_cache_memory_bytes) is not None:
            found = [min(given, free) for free in found]
        if config.cache_config.num_gpu_blocks_override is not None:
            planned = zip(found, self._limits(), strict=True)
            return [given_bytes(config, limit) or free for free, limit in planned]
        if _under_way.get().limits_kv:
            most = [limit.most for limit in self._limits()]
            path = value_text(config.model_config.model)
            log.info("event=kv_limit model=%s bytes=%s", path, most)
            found = [min(free, limit) for free, limit in zip(found, most, strict=True)]
        return found

    def _limits(self) -> list[KVLimits]:
        return limits(self.vllm_config, self.get_kv_cache_specs())  # type: ignore[attr-defined]

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        reached("kv_cache")
        super().initialize_from_config(kv_cache_configs)  # type: ignore[misc]

    def compile_or_warm_up_model(self) -> None:
        reached("warm_up")
        super().compile_or_warm_up_model()  # type: ignore[misc]


class HostedExecutor(_Reporting, UniProcExecutor):  # type: ignore[misc]  # vLLM's types stop here
    """`UniProcExecutor` for one of several engines in a process."""

    def _distributed_args(self) -> tuple[str, int, int]:
        method, rank, local_rank = super()._distributed_args()
        if method.startswith("file://"):
            name = method.rpartition("/")[2]
        elif hasattr(network_utils, "get_file_store_init_method"):
            # On ROCm vLLM takes a TCP store, on all interfaces, for a kernel of several workers.
            name = f"vllm_dist_{uuid4().hex}"
        else:  # a worker of an older vLLM knows no other
            return method, rank, local_rank
        return f"file://{_under_way.get().folder}/{name}", rank, local_rank

    def shutdown(self) -> None:
        """End what the worker has started; `host.teardown` gives its memory back.

        vLLM's own worker shutdown would also reset what other engines of the process use.
        """
        ensure_kv_transfer_shutdown()
        ensure_ec_transfer_shutdown()
        worker = getattr(getattr(self, "driver_worker", None), "worker", None)
        if release := getattr(worker, "release_graphs", None):
            release()
        for name in ("profiler", "weight_transfer_engine", "elastic_ep_executor"):
            if shutdown := getattr(getattr(worker, name, None), "shutdown", None):
                shutdown()


class HostedMultiprocExecutor(_Reporting, MultiprocExecutor):  # type: ignore[misc]
    """`MultiprocExecutor` whose workers share the cores of the host."""

    def _init_executor(self) -> None:
        threads = torch.get_num_threads()
        with (
            _cores_for_each(self.parallel_config.local_world_size),
            _compiling_nothing(self.vllm_config),
        ):
            super()._init_executor()
        # vLLM takes this process for one that only schedules, and leaves it one thread.
        torch.set_num_threads(threads)

    def shutdown(self) -> None:
        super().shutdown()
        # vLLM does not wait for workers that it has killed; their memory is not free until then.
        for worker in getattr(self, "workers", None) or ():
            worker.proc.join(KILLED_S)
        # vLLM registers `shutdown` for the end of the process, which would keep this object.
        if finalizer := getattr(self, "_finalizer", None):
            finalizer.detach()


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Have an environment variable meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _compiling_nothing(vllm_config: Any) -> AbstractContextManager[None]:
    """Start the workers of a model that is not to be compiled without torch's compiler.

    Some of vLLM's functions are compiled at their first call, whatever the model: embedding a
    token of a model that is divided among workers, or counting ranks for log-probabilities.
    """
    if not compiles_nothing(vllm_config):
        return nullcontext()
    return _variable(NO_COMPILER, "1")  # read by torch when a process imports it


@contextmanager
def _cores_for_each(workers: int) -> Iterator[None]:
    """Have vLLM bind the workers' threads to parts of the host's cores.

    vLLM divides cores by NUMA node, one for each worker, and refuses where there are fewer.
    """
    binding = binding_for_ranks(os.environ, workers)
    if binding is None:
        yield
        return
    with _environment_read_anew(), _variable(BIND_VARIABLE, binding):
        yield


@contextmanager
def _environment_read_anew() -> Iterator[None]:
    """Have vLLM, which may have read all variables already, read them again when it asks."""
    was_cached = envs._is_envs_cache_enabled()
    envs.disable_envs_cache()
    try:
        yield
    finally:
        if was_cached:
            envs.enable_envs_cache()  # which reads them all: after they are as they were
