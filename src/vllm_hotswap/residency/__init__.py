"""Where models are, and moving them: parked, asleep, discarded, cold."""

from __future__ import annotations

from vllm_hotswap.residency.commands import refuse_failed
from vllm_hotswap.residency.costs import up_cost_s
from vllm_hotswap.residency.idle import IdlePolicies, idle_residency
from vllm_hotswap.residency.ladder import Ladder
from vllm_hotswap.residency.lookahead import Lookahead, PredictionStats
from vllm_hotswap.residency.operations import OperationResult, Operations
from vllm_hotswap.residency.planner import Move, Plan
from vllm_hotswap.residency.prediction import Prediction
from vllm_hotswap.residency.relief import Relief

__all__ = [
    "IdlePolicies",
    "Ladder",
    "Lookahead",
    "Move",
    "OperationResult",
    "Operations",
    "Plan",
    "Prediction",
    "PredictionStats",
    "Relief",
    "idle_residency",
    "refuse_failed",
    "up_cost_s",
]
