"""vLLM's engines and frontends, as the API process sees them."""

from __future__ import annotations

from vllm_hotswap.engines import frontend
from vllm_hotswap.engines.base_memory import expected_memory
from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.engines.stamps import make_stamp, read_stamp
from vllm_hotswap.engines.vllm_host import VllmHost
from vllm_hotswap.engines.vllm_metrics import VLLM_REGISTRIES

__all__ = [
    "VLLM_REGISTRIES",
    "HostLink",
    "VllmHost",
    "expected_memory",
    "frontend",
    "make_stamp",
    "read_stamp",
]
