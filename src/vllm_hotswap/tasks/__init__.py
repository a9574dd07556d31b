"""Tasks on the event loop, and threads: turns, small steps, fair shares, deadlines, rates."""

from __future__ import annotations

from vllm_hotswap.tasks import event_loop
from vllm_hotswap.tasks.deadlines import Deadlines, Pause, Wheel
from vllm_hotswap.tasks.fair_pool import FairPool, Overdue
from vllm_hotswap.tasks.garbage import gc_paused
from vllm_hotswap.tasks.rate import Rate
from vllm_hotswap.tasks.steps import Steps
from vllm_hotswap.tasks.turns import Turns, Work, at_once

__all__ = [
    "Deadlines",
    "FairPool",
    "Overdue",
    "Pause",
    "Rate",
    "Steps",
    "Turns",
    "Wheel",
    "Work",
    "at_once",
    "event_loop",
    "gc_paused",
]
