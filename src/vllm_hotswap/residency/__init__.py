"""Where models are, and moving them: parked, asleep, discarded, cold."""

from __future__ import annotations

from vllm_hotswap.residency.ladder import Ladder, OperationResult, refuse_failed, up_cost_s
from vllm_hotswap.residency.lookahead import Lookahead, PredictionStats
from vllm_hotswap.residency.operations import Operations
from vllm_hotswap.residency.planner import Move, Plan
from vllm_hotswap.residency.prediction import Prediction

__all__ = [
    "Ladder",
    "Lookahead",
    "Move",
    "OperationResult",
    "Operations",
    "Plan",
    "Prediction",
    "PredictionStats",
    "refuse_failed",
    "up_cost_s",
]
