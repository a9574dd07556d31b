"""Who is next: policies, and what they decide from."""

from __future__ import annotations

from vllm_hotswap.scheduling.costs import SwitchCosts
from vllm_hotswap.scheduling.policies import batch, make_policy
from vllm_hotswap.scheduling.policy import (
    NEVER,
    Decision,
    Policy,
    PolicySettings,
    SwitchTo,
    WaitUntil,
)
from vllm_hotswap.scheduling.scheduler import (
    DEFAULT_TERMS,
    ModelTerms,
    RequestTerms,
    Scheduler,
    Ticket,
)

__all__ = [
    "DEFAULT_TERMS",
    "Decision",
    "ModelTerms",
    "NEVER",
    "Policy",
    "PolicySettings",
    "RequestTerms",
    "Scheduler",
    "SwitchCosts",
    "SwitchTo",
    "Ticket",
    "WaitUntil",
    "batch",
    "make_policy",
]
