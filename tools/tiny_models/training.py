"""One training loop for all models."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

LOG = logging.getLogger(__name__)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate for a step: a short rise, then a straight fall to nearly nothing."""
    rise = min(1.0, (step + 1) / 40)
    return peak * min(rise, 1.0 - 0.98 * step / steps)


def optimise(
    model: torch.nn.Module, loss_of: Callable[[int], torch.Tensor], steps: int, peak: float
) -> float:
    """Train `model` on `loss_of(step)` and return the seconds it took."""
    optimiser = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.98), weight_decay=0.01)
    began, shown = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        shown = loss.item() if step == 0 else 0.95 * shown + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            LOG.info("step %d/%d loss %.4f %.0fs", step + 1, steps, shown, time.monotonic() - began)
    return time.monotonic() - began


@dataclass(frozen=True)
class Job:
    """What the command line asks for."""

    folder: Path
    seed: int
    more: int = 0
    """Steps to train a chat model on, from the weights in its folder; 0 makes it from nothing."""


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: training is about ten times faster on small machines."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (AttributeError, OSError):
        LOG.info("no mallopt here: training will take longer")
