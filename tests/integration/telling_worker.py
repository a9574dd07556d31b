"""A worker for tests that reports, at every load and step, what `QUANT_CONFIG` is."""

from __future__ import annotations

import os
from typing import Any

from vllm_hotswap.host.cpu_worker import HostedCPUWorker


class TellingWorker(HostedCPUWorker):
    """The worker; vLLM imports it by its qualified name."""

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        self._tell("load")
        return super().load_model(*args, **kwargs)

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        self._tell("step")
        return super().execute_model(*args, **kwargs)

    def _tell(self, what: str) -> None:
        name = self.vllm_config.model_config.served_model_name
        with open(os.environ["TOLD"], "a", encoding="utf-8") as file:  # noqa: PTH123  # once per step
            file.write(f"{name} {what} {os.environ.get('QUANT_CONFIG')}\n")
