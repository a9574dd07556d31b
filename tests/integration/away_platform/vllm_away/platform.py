"""The platform: vLLM's CPU platform, but for the worker."""

from __future__ import annotations

import os
import sys
from typing import Any

from vllm.platforms.cpu import CpuPlatform

WORKER = "vllm_away.worker.AwayWorker"


class AwayPlatform(CpuPlatform):  # type: ignore[misc]  # vLLM's types stop here
    """Chooses its own worker, as the platform of an accelerator does.

    vLLM makes one object of it in each process that asks for its platform.
    """

    def __init__(self) -> None:
        super().__init__()
        sys.stderr.write(f"away: platform of process {os.getpid()}\n")

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = WORKER
        super().check_and_update_config(vllm_config)
