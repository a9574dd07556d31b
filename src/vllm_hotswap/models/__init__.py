"""The configured models, the engines behind them, and the requests that use them."""

from __future__ import annotations

from vllm_hotswap.models import drain
from vllm_hotswap.models.drain import CUT_GRACE_S
from vllm_hotswap.models.engine import (
    Adapter,
    AdapterFiles,
    EngineFailure,
    EngineHost,
    EngineMemory,
    HostStats,
    Previewed,
    Progress,
    Pulse,
    Responses,
)
from vllm_hotswap.models.footprint import Footprint, Usage, total
from vllm_hotswap.models.pace import OUTPUTS, PER_TURN, Pace, give_back, merged, pace_tasks
from vllm_hotswap.models.registry import (
    Cut,
    Lease,
    Model,
    ModelSettings,
    Prefetch,
    Registry,
    Waking,
    current_lease,
)
from vllm_hotswap.models.routes import (
    MODEL_HEADER,
    WEBSOCKET,
    ForeseenRoutes,
    ModelRoutes,
    request_of,
)

__all__ = [
    "CUT_GRACE_S",
    "MODEL_HEADER",
    "OUTPUTS",
    "PER_TURN",
    "WEBSOCKET",
    "Adapter",
    "AdapterFiles",
    "Cut",
    "EngineFailure",
    "EngineHost",
    "EngineMemory",
    "Footprint",
    "ForeseenRoutes",
    "HostStats",
    "Lease",
    "Model",
    "ModelRoutes",
    "ModelSettings",
    "Pace",
    "Prefetch",
    "Previewed",
    "Progress",
    "Pulse",
    "Registry",
    "Responses",
    "Usage",
    "Waking",
    "current_lease",
    "drain",
    "give_back",
    "merged",
    "pace_tasks",
    "request_of",
    "total",
]
