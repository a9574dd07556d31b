"""What the server tells of itself: metrics, log lines, progress."""

from __future__ import annotations

from vllm_hotswap.telemetry import metrics
from vllm_hotswap.telemetry.metrics import SwitchMetrics
from vllm_hotswap.telemetry.progress import (
    CheckProgress,
    EventLog,
    ProgressTimer,
    StartupProgress,
    waiting,
)

__all__ = [
    "CheckProgress",
    "EventLog",
    "ProgressTimer",
    "StartupProgress",
    "SwitchMetrics",
    "metrics",
    "waiting",
]
