"""vLLM's CPU worker as it is from 0.30 on: it asks whether to warm a model up.

Relies on, before 0.30: both methods here warming up through `model_runner.warming_up_model`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.config import CompilationMode
from vllm.v1.worker import cpu_worker


class WarmUpAwareCPUWorker(cpu_worker.CPUWorker):  # type: ignore[misc]  # vLLM's types stop here
    """The worker of 0.26 to 0.29, which warms up without asking; here it asks as in 0.30."""

    def _should_warm_up_model(self) -> bool:
        """Whether there is something to compile, or the size of the KV memory must be measured."""
        return (
            self.compilation_config.mode != CompilationMode.NONE
            or self.cache_config.kv_cache_memory_bytes is None
        )

    def determine_available_memory(self) -> Any:
        with self._ask_before_warm_up():
            return super().determine_available_memory()

    def compile_or_warm_up_model(self) -> Any:
        with self._ask_before_warm_up():
            return super().compile_or_warm_up_model()

    @contextmanager
    def _ask_before_warm_up(self) -> Iterator[None]:
        """Inside, make vLLM's call of the warm-up ask first."""
        warm_up = self.model_runner.warming_up_model

        def warm_up_if_needed() -> None:
            if self._should_warm_up_model():
                warm_up()

        self.model_runner.warming_up_model = warm_up_if_needed
        try:
            yield
        finally:
            del self.model_runner.warming_up_model


has_warm_up_check = hasattr(cpu_worker.CPUWorker, "_should_warm_up_model")
CPUWorker: Any = cpu_worker.CPUWorker if has_warm_up_check else WarmUpAwareCPUWorker
