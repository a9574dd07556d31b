"""The executor of a hosted engine: vLLM's single-process one, inside the engine host.

Named by its qualified name in `distributed_executor_backend`, so that the CPU platform, which
replaces the word "uni" by the multi-process executor, lets it be. Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from vllm_hotswap.host.progress import reached

QUALIFIED_NAME = "vllm_hotswap.host.executor.HostedExecutor"


class HostedExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM's types stop here
    """`UniProcExecutor` that says which stage of a load it has reached."""

    def _init_executor(self) -> None:
        reached("weights")
        super()._init_executor()

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        reached("kv_cache")
        super().initialize_from_config(kv_cache_configs)

    def compile_or_warm_up_model(self) -> None:
        reached("warm_up")
        super().compile_or_warm_up_model()
