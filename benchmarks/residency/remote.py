"""The server's HTTP interface, as far as the benchmark uses it. Times in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.client import BadAnswer, Connection
from benchmarks.load import completion, prompts

DOWN: Mapping[str, tuple[str, Mapping[str, Any]] | None] = {
    "parked": None,
    "asleep": ("sleep", {"level": 1}),
    "discarded": ("sleep", {"level": 2}),
    "cold": ("unload", {}),
}
"""Residency -> the operation that brings a parked model there."""

STATES = tuple(DOWN)
PHASES = ("validate", "drain", "make_room", "bring_up", "activate")


@dataclass(frozen=True, slots=True)
class Switch:
    """One switch and the first request after it."""

    model: str
    state: str
    """The residency of the model before."""
    call_ms: float
    """By the client's clock."""
    server_ms: float
    """By the server's clock."""
    phases_ms: Mapping[str, float]
    first_token_ms: float
    """Of the request after the switch, from the start of that request."""
    down_ms: float
    """How long it took to move the model down to `state`."""


class Remote:
    """A running server. One connection per call: servers close those that idle for seconds."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._prompts: Iterator[str] = prompts("residency", words=1)

    async def switch(self, alias: str) -> tuple[float, dict[str, Any]]:
        """Make a model active. Returns the client's milliseconds and the answer."""
        async with Connection(self._port) as connection:
            answer = await connection.post("/v1/models/switch", {"model": alias})
        told: dict[str, Any] = answer.json()
        if told["current_model"] != alias or told["evicted"]:
            raise BadAnswer(f"the switch to {alias!r} gave an unexpected result: {told}")
        return answer.duration_s * 1000, told

    async def operate(self, alias: str, operation: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Do `load`, `unload`, `sleep` or `wake`; return the answer."""
        async with Connection(self._port) as connection:
            answer = await connection.post(f"/admin/models/{alias}/{operation}", body)
        told: dict[str, Any] = answer.json()
        return told

    async def status(self) -> dict[str, Any]:
        async with Connection(self._port) as connection:
            told: dict[str, Any] = (await connection.get("/admin/status")).json()
        return told

    async def first_token(self, alias: str) -> float:
        """Return the milliseconds to the first token of a short streamed request."""
        async with Connection(self._port) as connection:
            stream = await connection.stream(completion(alias, next(self._prompts), 2))
        if stream.model != alias:
            raise BadAnswer(f"asked {alias!r}, but {stream.model!r} answered")
        return stream.ttft_s * 1000

    async def lower(self, alias: str, state: str) -> float:
        """Bring a parked model to `state`. Returns milliseconds by the server's clock."""
        way = DOWN[state]
        told = await self.operate(alias, *way) if way else None
        residency = (await self.status())["models"][alias]["residency"]
        if residency != state:
            raise BadAnswer(f"{alias!r} is {residency}, but should be {state}")
        return float(told["duration_ms"]) if told else 0.0

    async def switch_from(self, state: str, alias: str, home: str) -> Switch:
        """Bring a model to `state` while `home` is active, then switch to the model."""
        await self.switch(home)
        await self.operate(alias, "load", {})
        down_ms = await self.lower(alias, state)
        call_ms, told = await self.switch(alias)
        first_token_ms = await self.first_token(alias)
        return Switch(
            alias, state, call_ms, told["duration_ms"], told["phases"], first_token_ms, down_ms
        )
