"""One model is active: requests, switches, jobs and recovery."""

from __future__ import annotations

from vllm_hotswap.switching.coordinator import Coordinator
from vllm_hotswap.switching.job_leases import JobLease
from vllm_hotswap.switching.snapshot import (
    MemoryUse,
    ModelSnapshot,
    ServerSnapshot,
    WakingSnapshot,
)
from vllm_hotswap.switching.state import Clock
from vllm_hotswap.switching.switch import SwitchResult

__all__ = [
    "Clock",
    "Coordinator",
    "JobLease",
    "MemoryUse",
    "ModelSnapshot",
    "ServerSnapshot",
    "SwitchResult",
    "WakingSnapshot",
]
