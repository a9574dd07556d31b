"""The relay of one response, and the handling of a refusal by its application."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.types import Message

from tests.helpers.support import lease as lease_of
from vllm_hotswap.api.refusals import DOOR
from vllm_hotswap.api.relay import REFUSAL_BYTES, ResponseRelay
from vllm_hotswap.errors import AdapterUnavailable, QueueFull


class Door:
    """Notes refused and served requests, and delays none."""

    def __init__(self) -> None:
        self.told: list[str] = []

    async def hold_back_refusal(self, _: object) -> None:
        self.told.append("refused")

    def note_refusal(self, _: object) -> None:
        self.told.append("noted")

    def note_served(self, _: object) -> None:
        self.told.append("let in")


class Said:
    """A response, what its client was sent, and its door."""

    def __init__(self) -> None:
        self.door = Door()
        self.sent: list[Message] = []
        scope = {"type": "http", "path": "/v1/completions", DOOR: lambda: self.door}
        self.answer = ResponseRelay(scope, self._receive, self._send)
        self.lease = lease_of("llama", 1)
        self.answer.attach(self.lease)

    async def _receive(self) -> Message:
        raise AssertionError("nobody listens")

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    async def start(self, status: int) -> None:
        await self.answer.send({"type": "http.response.start", "status": status, "headers": []})

    async def body(self, content: bytes, **more: Any) -> None:
        await self.answer.send({"type": "http.response.body", "body": content, **more})

    @property
    def told(self) -> tuple[list[int], bytes]:
        """Return the statuses and the body that the client got."""
        statuses = [message["status"] for message in self.sent if "status" in message]
        return statuses, b"".join(message.get("body", b"") for message in self.sent)


async def test_a_refusal_of_the_application_waits_until_the_lease_is_over() -> None:
    """A refusal is kept complete until the lease is over, and noted as what the client got."""
    said = Said()
    await said.start(400)
    await said.body(b"no", more_body=True)
    assert not said.lease.is_answered
    await said.body(b"pe")

    assert ([], (True, 400)) == (said.sent, (said.lease.is_answered, said.lease.status))
    await said.answer.send_refusal()
    await said.answer.send_refusal()
    assert ([400], b"nope") == said.told
    assert ["refused"] == said.door.told


@pytest.mark.parametrize(("status", "noted"), [(200, ["let in"]), (302, []), (499, []), (500, [])])
async def test_other_answers_are_passed_on(status: int, noted: list[str]) -> None:
    """Other responses, not the client's fault or after it left, do not count as refusals."""
    said = Said()
    await said.start(status)
    await said.body(b"words")

    assert ([status], b"words") == said.told
    await said.answer.send_refusal()
    assert noted == said.door.told


async def test_a_long_refusal_is_passed_on() -> None:
    """A long refusal is not kept but passed on, and counts nevertheless."""
    said = Said()
    await said.start(404)
    await said.body(bytes(REFUSAL_BYTES), more_body=True)
    assert not said.sent
    await said.body(b"x", more_body=True)
    assert ([404], bytes(REFUSAL_BYTES) + b"x") == said.told
    await said.body(b"y")

    assert said.told[1].endswith(b"xy")
    assert said.answer.complete
    assert ["noted"] == said.door.told


async def test_a_long_refusal_in_one_piece_is_passed_on() -> None:
    """A long refusal in one piece, as vLLM sends it, is passed on."""
    said = Said()
    await said.start(400)
    await said.body(bytes(REFUSAL_BYTES + 1))

    assert ([400], bytes(REFUSAL_BYTES + 1)) == said.told
    assert ["noted"] == said.door.told


async def test_a_stream_that_was_begun_ahead_counts_as_what_it_becomes() -> None:
    """An early stream counts once, as what it becomes, and not before its status is known."""
    for status, noted in ((200, ["let in"]), (400, ["noted"])):
        said = Said()
        await said.answer.begin_event_stream()
        assert [] == said.door.told
        await said.start(status)
        assert noted == said.door.told


async def test_a_refusal_of_the_servers_own_waits_as_well() -> None:
    """A refusal that ends a lease is sent after the lease."""
    said = Said()
    await said.answer.cut(QueueFull("there is no room", retry_after_s=1))
    assert [] == said.sent
    await said.answer.send_refusal()

    assert [429] == said.told[0]
    assert ["refused"] == said.door.told


async def test_a_refusal_that_is_cut_is_no_answer() -> None:
    """If a refusal is cut, the client gets only one answer, the one with the cause."""
    said = Said()
    await said.start(400)
    await said.answer.cut(AdapterUnavailable("llama", "it has failed"))
    await said.answer.send_refusal()

    statuses, body = said.told
    assert [503] == statuses
    assert b"it has failed" in body


async def test_who_has_left_is_not_refused() -> None:
    """A client that has left is not refused, so leaving often does not delay it."""
    said = Said()
    said.lease.client_left = True
    await said.start(400)
    await said.body(b"")

    assert ([400], b"") == said.told
    assert [] == said.door.told
