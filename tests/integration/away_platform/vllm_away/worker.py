"""A worker that, asleep, has no weights and no KV cache: they lie in a store beside it.

It knows one level of sleep, whatever it is asked for, as Intel Gaudi's worker does. Each move is
told on standard error, in a line that begins with `away:`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers import utils as layers
from vllm.v1.worker.cpu_worker import CPUWorker


class AwayWorker(CPUWorker):  # type: ignore[misc]  # vLLM's types stop here
    """vLLM's CPU worker, with `sleep` and `wake_up` of its own.

    Its own state is `_stored`, the weights' bytes while it sleeps, and `_kv_sizes`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._stored: list[torch.Tensor] | None = None
        self._kv_sizes: list[int] = []
        super().__init__(*args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with _unpacked_weights():
            super().load_model(*args, **kwargs)

    def sleep(self, level: int = 1) -> None:
        if self._stored is not None:
            return
        weights, kv = self._weights(), self._kv()
        self._stored = [_bytes_of(storage).clone() for storage in weights]
        self._kv_sizes = [storage.nbytes() for storage in kv]
        for storage in (*weights, *kv):
            storage.resize_(0)
        left = sum(storage.nbytes() for storage in (*self._weights(), *self._kv()))
        stored = sum(copy.nbytes for copy in self._stored)
        self._tell("sleep", level=level, stored=stored, kv=sum(self._kv_sizes), left=left)

    def wake_up(self, tags: list[str] | None = None) -> None:
        if self._stored is None:
            return
        for storage, copy in zip(self._weights(), self._stored, strict=True):
            storage.resize_(copy.nbytes)
            _bytes_of(storage).copy_(copy)
        for storage, size in zip(self._kv(), self._kv_sizes, strict=True):
            storage.resize_(size)
            _bytes_of(storage).zero_()
        restored = sum(copy.nbytes for copy in self._stored)
        self._stored = None
        self._tell("wake_up", restored=restored, kv=sum(self._kv_sizes))

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        if self._stored is not None:
            raise RuntimeError("a sleeping model was asked to run")
        return super().execute_model(*args, **kwargs)

    def _weights(self) -> list[Any]:
        model = self.get_model()
        return _storages([*model.parameters(), *model.buffers()])

    def _kv(self) -> list[Any]:
        return _storages(self.model_runner.kv_caches)

    def _tell(self, done: str, **numbers: int) -> None:
        words = [f"away: {done}", f"model={self.model_config.model}"]
        words += [f"{name}={number}" for name, number in numbers.items()]
        sys.stderr.write(" ".join(words) + "\n")
        sys.stderr.flush()


@contextmanager
def _unpacked_weights() -> Iterator[None]:
    """Have linear layers keep their weights as they are, and not a packed copy that cannot move."""
    before = ops._supports_onednn, layers.check_cpu_sgl_kernel
    ops._supports_onednn, layers.check_cpu_sgl_kernel = False, lambda *_: False
    try:
        yield
    finally:
        ops._supports_onednn, layers.check_cpu_sgl_kernel = before


def _storages(tensors: Iterable[torch.Tensor]) -> list[Any]:
    """The storages behind tensors, each once, empty or not."""
    return list(
        {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}.values()
    )


def _bytes_of(storage: Any) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
