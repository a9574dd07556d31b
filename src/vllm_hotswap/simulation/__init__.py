"""Traces of requests: recording them, and replaying them against a policy."""

from __future__ import annotations

from vllm_hotswap.simulation import command
from vllm_hotswap.simulation.record import Recorder, trace_header

__all__ = [
    "Recorder",
    "command",
    "trace_header",
]
