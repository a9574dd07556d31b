"""The quickstart's online flow, on tiny models that ship with the package."""

from __future__ import annotations

from vllm_hotswap.demo import quickstart

__all__ = [
    "quickstart",
]
