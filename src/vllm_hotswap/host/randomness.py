"""The random numbers that an engine draws next.

Sampling without a seed draws from the one generator that torch has for each device; vLLM seeds it
at each load, together with those of Python and numpy (`set_random_seed`, checked on 0.32.0).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_hotswap.host.devices import accelerator_module


@dataclass(frozen=True, slots=True)
class Randomness:
    """The state of every generator that vLLM seeds."""

    python: Any
    numpy: Any
    torch: Any
    accelerator: Any
    """The state for the current device; None if there is none."""

    @classmethod
    def now(cls) -> Randomness:
        accelerator = accelerator_module()
        return cls(
            random.getstate(),
            np.random.get_state(),  # it is the one that vLLM seeds
            torch.get_rng_state(),
            None if accelerator is None else accelerator.get_rng_state(),
        )

    def restore(self) -> None:
        """Make the generators continue from this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        accelerator = accelerator_module()
        if accelerator is not None and self.accelerator is not None:
            accelerator.set_rng_state(self.accelerator)


@contextmanager
def drawing_nothing() -> Iterator[None]:
    """Undo what is drawn inside: the next random numbers are those that would have come anyway."""
    before = Randomness.now()
    try:
        yield
    finally:
        before.restore()
