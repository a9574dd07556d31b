"""The command line."""

from __future__ import annotations

from vllm_hotswap.cli import main

__all__ = [
    "main",
]
