"""What the engine host answers to commands that fail, and what the API process makes of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.errors import HotswapError, NoRoom
from vllm_hotswap.host.messages import Answer, Message, Wake
from vllm_hotswap.host.obey import Obedience


class Asleep:
    """An engine whose wake fails."""

    is_loaded = True

    def __init__(self, error: Exception) -> None:
        self.error = error

    def wake(self) -> None:
        raise self.error

    def unload(self) -> None:
        self.is_loaded = False

    def has_input(self) -> bool:
        return False

    def has_work(self) -> bool:
        return False


def answer_to_wake(error: Exception) -> tuple[Asleep, Answer]:
    """What the host says, and the engine afterwards."""
    sent: list[Message] = []
    host, engine = Obedience(sent.append), Asleep(error)
    host.loop.add("one", engine)  # type: ignore[arg-type]
    host.take(Wake(7, "one"))
    host.loop._obey()
    (answer,) = sent
    assert isinstance(answer, Answer)
    return engine, answer


@pytest.mark.parametrize(
    ("error", "stays", "lacks_room"),
    [
        (NoRoom("waking takes 5 MiB"), True, True),
        (HotswapError("a copy has failed"), False, False),
        (RuntimeError("a copy has failed"), False, False),
    ],
)
def test_only_a_model_without_room_is_still_there_after_a_wake_that_failed(
    error: Exception, stays: bool, lacks_room: bool
) -> None:
    """Of any other failure nobody knows what it has left."""
    engine, answer = answer_to_wake(error)

    assert (stays, lacks_room) == (engine.is_loaded, answer.lacks_room)
    assert answer.error is not None
    assert "takes 5 MiB" in answer.error or "a copy has failed" in answer.error


@pytest.mark.parametrize(("lacks_room", "kind"), [(True, NoRoom), (False, HotswapError)])
async def test_an_answer_says_whether_room_was_lacking(lacks_room: bool, kind: type[Any]) -> None:
    """So that the caller can tell a model that is still asleep from one that is gone."""
    link = HostLink()
    link._pending[7] = future = asyncio.get_running_loop().create_future()

    link._receive(Answer(7, error="why", lacks_room=lacks_room))

    error = future.exception()
    assert kind is type(error)
    assert "why" == str(error)
