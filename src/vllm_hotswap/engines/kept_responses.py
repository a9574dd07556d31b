"""The responses that vLLM's frontend of one model keeps. Checked on vLLM 0.32.0.

Relies on `OpenAIServingResponses`: its `response_store` (which is filled if the variable
`VLLM_ENABLE_RESPONSES_API_STORE` is set), `msg_store`, `event_store` and `background_tasks`, all by
id. vLLM never removes a response from its stores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

STORES = ("response_store", "msg_store", "event_store")


class KeptResponses:
    """The responses that one model's frontend keeps."""

    def __init__(self, serving: Any) -> None:
        self._serving = serving

    def __contains__(self, response_id: object, /) -> bool:
        return response_id in self._serving.response_store

    @property
    def running(self) -> Mapping[str, asyncio.Task[Any]]:
        running: Mapping[str, asyncio.Task[Any]] = self._serving.background_tasks
        return running

    def settle(self, response_id: str, why: str) -> None:
        """Mark an unfinished response as failed.

        vLLM sets `failed` itself when a response in one piece is cancelled, and nothing otherwise.
        """
        response = self._serving.response_store.get(response_id)
        if response is None or response.status not in ("queued", "in_progress", "failed"):
            return
        response.status = "failed"
        if getattr(response, "error", None) is None:
            response.error = {"code": "server_error", "message": why}

    def forget(self, response_id: str) -> None:
        for name in STORES:
            getattr(self._serving, name, {}).pop(response_id, None)
