"""LoRA on CPUs, for batches in which not every request has an adapter.

vLLM marks a token without an adapter by the index -1. Its kernels for accelerators know that; its
operations for CPUs take -1 for the last slot, as Python does. So a request to the model itself
would be answered with the adapter of another request in its batch. If an adapter changes the last
layer, it could be that of an earlier request (https://github.com/vllm-project/vllm/pull/48421).
Here such tokens go into these operations as zeros.

Relies on, in vLLM 0.32.0: `PunicaWrapperCPU`, its three methods below, `token_lora_indices` and
`sampler_indices`; `get_punica_wrapper` of the platform, which names the class.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

QUALIFIED_NAME = "vllm_hotswap.host.lora.MaskingPunica"


def use_masking() -> None:
    """Make models that are loaded in this process from now on use `MaskingPunica`."""
    current_platform.get_punica_wrapper = lambda: QUALIFIED_NAME


class MaskingPunica(PunicaWrapperCPU):  # type: ignore[misc]  # vLLM's types stop here
    """vLLM's operations, in which a token without an adapter changes nothing."""

    def add_shrink(self, y: Any, x: Any, *args: Any, **kwargs: Any) -> None:
        super().add_shrink(y, masked(x, self.token_lora_indices), *args, **kwargs)

    def add_lora_embedding(self, y: Any, x: Any, *args: Any, **kwargs: Any) -> None:
        super().add_lora_embedding(y, masked(x, self.token_lora_indices), *args, **kwargs)

    def add_lora_logits(self, y: Any, x: Any, *args: Any, **kwargs: Any) -> None:
        super().add_lora_logits(y, masked(x, self.sampler_indices), *args, **kwargs)


def masked(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the rows of `x`, one for each index, with zeros where the index is negative."""
    rows = x.view(-1, x.shape[-1])
    return torch.where((indices >= 0).unsqueeze(1), rows, torch.zeros_like(rows))
