"""Importing this makes gloo's process groups listen no longer than it takes to make them.

vLLM makes a gloo group for every kind of parallelism, even if a process is alone in it. torch and
vLLM look the class up by name each time, and find `SealedGloo`. Import this in the engine host and
in each worker process before a model is loaded.

Relies on: `ProcessGroupGloo` being looked up in `torch.distributed.distributed_c10d`; on its
constructor having connected all members when it returns, which holds where `TORCH_GLOO_LAZY_INIT`
is not set; on groups being made rather than split off (`VLLM_DISTRIBUTED_USE_SPLIT_GROUP`).
`platforms.host_environment` removes both variables. Checked on torch 2.13, vLLM 0.32.0.
"""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch.distributed import distributed_c10d

from vllm_hotswap.host.sealing import open_files, seal

if torch.distributed.is_gloo_available():

    class SealedGloo(distributed_c10d.ProcessGroupGloo):  # type: ignore[misc]  # torch's own
        """A group of gloo whose listening sockets are closed once its members have met."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            before = open_files()
            super().__init__(*args, **kwargs)
            seal(before, is_alone=self.size() == 1)

    distributed_c10d.ProcessGroupGloo = SealedGloo
