"""The backend `hccl`, by gloo. Tensors on `hpu` come to it by their memory."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist


def group(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


if dist.is_available() and not hasattr(dist.Backend, "HCCL"):
    dist.Backend.register_backend("hccl", group, devices=["hpu", "cpu"])
