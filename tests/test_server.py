"""Starts that end before anything slow is done."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest

from vllm_hotswap import server
from vllm_hotswap.config import parse_config
from vllm_hotswap.demo import free_port
from vllm_hotswap.errors import ConfigError


def test_an_address_in_use_is_named() -> None:
    """With the flag that chooses another one."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}.*--port"):
            server.bind("127.0.0.1", port)


def test_a_free_address_is_bound() -> None:
    """Before the models are loaded, so that nobody else takes it meanwhile."""
    port = free_port()
    with server.bind("127.0.0.1", port) as sock:
        assert ("127.0.0.1", port) == sock.getsockname()


def test_an_environment_without_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started, and no traceback shown."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = parse_config({"models": {"llama": {"model": "org/llama"}}}, Path("models.yaml"))

    with pytest.raises(ConfigError, match="vLLM is not installed"):
        server.run(config, [])
