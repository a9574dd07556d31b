"""The names by which vLLM finds our executors."""

from __future__ import annotations

QUALIFIED_NAME = "vllm_hotswap.host.executor.HostedExecutor"


MULTIPROC_QUALIFIED_NAME = "vllm_hotswap.host.executor.HostedMultiprocExecutor"
