"""A complete server without vLLM: fake engines, in this process or in a host process."""

from __future__ import annotations

from vllm_hotswap.testing.fake_server import WORD_S, FakeEngines

__all__ = [
    "WORD_S",
    "FakeEngines",
]
