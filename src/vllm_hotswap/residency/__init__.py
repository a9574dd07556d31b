"""Where models are, and moving them: parked, asleep, discarded, cold."""

from __future__ import annotations

from vllm_hotswap.residency.ladder import Ladder, OperationResult, refuse_failed, up_cost_s
from vllm_hotswap.residency.lookahead import Lookahead
from vllm_hotswap.residency.operations import Operations
from vllm_hotswap.residency.planner import Move, Plan

__all__ = [
    "Ladder",
    "Lookahead",
    "Move",
    "OperationResult",
    "Operations",
    "Plan",
    "refuse_failed",
    "up_cost_s",
]
