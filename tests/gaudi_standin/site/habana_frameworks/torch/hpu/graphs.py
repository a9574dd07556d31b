"""Keys of recorded graphs."""

from typing import Any

import torch


def input_hash(value: Any) -> int:
    """Hash by structure and shapes, not by content."""
    if isinstance(value, torch.Tensor):
        return hash((tuple(value.shape), value.dtype, str(value.device)))
    if isinstance(value, dict):
        return hash(tuple((key, input_hash(each)) for key, each in value.items()))
    if isinstance(value, (list, tuple)):
        return hash(tuple(input_hash(each) for each in value))
    return hash(value)
