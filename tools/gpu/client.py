"""Requests to a server: ours, or vLLM's own. Times by the client's clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.client import Connection
from benchmarks.residency.remote import Remote

PROMPT = "Explain gravity to a child."
TOKENS = 32


class Client:
    """A server on this machine."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._remote = Remote(port)

    async def answer(self, model: str, tokens: int = TOKENS) -> tuple[float, list[int]]:
        """Return milliseconds, and the tokens, chosen greedily."""
        body = {
            "model": model,
            "prompt": PROMPT,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        took_ms, told = await self.post("/v1/completions", body)
        return took_ms, list(told["choices"][0]["token_ids"])

    async def switch(self, model: str) -> float:
        """Switch; return milliseconds."""
        return (await self._remote.switch(model))[0]

    async def sleep(self, model: str) -> float:
        """Put to sleep; return milliseconds."""
        return (await self.post(f"/admin/models/{model}/sleep", {"level": 1}))[0]

    async def unload(self, model: str) -> None:
        await self._remote.operate(model, "unload", {})

    async def status(self) -> dict[str, Any]:
        return await self._remote.status()

    async def residencies(self) -> dict[str, str]:
        models = (await self.status())["models"]
        return {alias: model["residency"] for alias, model in models.items()}

    async def post(self, path: str, body: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """Return milliseconds, and the response. Raises `BadAnswer` unless it is a success."""
        async with Connection(self._port) as connection:
            answer = await connection.post(path, body)
        return answer.duration_s * 1000, answer.json() if answer.body.strip() else {}


def different(found: list[int], wanted: list[int]) -> int:
    """Return how many tokens differ from what they should be; missing ones count."""
    same = sum(a == b for a, b in zip(found, wanted, strict=False))
    return max(len(found), len(wanted)) - same
