"""Who is next: policies, and what they decide from."""

from __future__ import annotations

from vllm_hotswap.scheduling.average import Average
from vllm_hotswap.scheduling.costs import SwitchCosts
from vllm_hotswap.scheduling.policies import batch, make_policy
from vllm_hotswap.scheduling.policy import (
    NEVER,
    ActiveView,
    Decision,
    Policy,
    PolicyFactory,
    PolicySettings,
    QueueView,
    ServeOn,
    Snapshot,
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
    "NEVER",
    "ActiveView",
    "Average",
    "Decision",
    "ModelTerms",
    "Policy",
    "PolicyFactory",
    "PolicySettings",
    "QueueView",
    "RequestTerms",
    "Scheduler",
    "ServeOn",
    "Snapshot",
    "SwitchCosts",
    "SwitchTo",
    "Ticket",
    "WaitUntil",
    "batch",
    "make_policy",
]
