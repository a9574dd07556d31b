"""Start-up, serving and shutdown of the whole server."""

from __future__ import annotations

from vllm_hotswap.server import run
from vllm_hotswap.server.run import Engines, Prepared, Start

__all__ = [
    "Engines",
    "Prepared",
    "Start",
    "run",
]
