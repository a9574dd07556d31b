"""The engine host's replies to failing commands, and their effect in the API process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vllm_hotswap.engines.link import HostLink
from vllm_hotswap.errors import HotswapError, NoRoom
from vllm_hotswap.host.commands import VllmCommandHandler
from vllm_hotswap.host.messages import (
    Command,
    CommandResult,
    EngineFailed,
    Message,
    Sleep,
    Wake,
    WakeSlice,
)
from vllm_hotswap.host.together import HalfAsleep
from vllm_hotswap.states import WakeProgress


class Asleep:
    """An engine on which every operation fails."""

    is_loaded = True

    def __init__(self, error: Exception) -> None:
        self.error = error

    def wake(self) -> None:
        raise self.error

    def sleep(self, level: int) -> None:
        raise self.error

    def wake_some(self) -> WakeProgress:
        raise self.error

    def die(self) -> None:
        self.is_loaded = False

    def unload(self) -> None:
        self.is_loaded = False

    def has_input(self) -> bool:
        return False

    def has_work(self) -> bool:
        return False


def told(command: Command, error: Exception) -> tuple[Asleep, list[Message]]:
    """Return the engine after the command, and the host's messages."""
    sent: list[Message] = []
    host, engine = VllmCommandHandler(sent.append), Asleep(error)
    host._loads["one"] = 3
    host.loop.add("one", engine)  # type: ignore[arg-type]
    host.submit(command)
    host.loop._run_commands()
    return engine, sent


def answer_to(command: Command, error: Exception) -> tuple[Asleep, CommandResult]:
    engine, (answer,) = told(command, error)
    assert isinstance(answer, CommandResult)
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
    """Only a model without room survives a failed wake: other failures leave it unknown."""
    engine, answer = answer_to(Wake(7, "one"), error)

    assert (stays, lacks_room) == (engine.is_loaded, answer.lacks_room)
    assert answer.error is not None
    assert "takes 5 MiB" in answer.error or "a copy has failed" in answer.error


@pytest.mark.parametrize(
    ("error", "lacks_room"),
    [(NoRoom("waking takes 5 MiB"), True), (RuntimeError("a copy has failed"), False)],
)
def test_a_slice_that_failed_leaves_its_model_asleep(error: Exception, lacks_room: bool) -> None:
    """A failed slice leaves its model asleep, and has released what slices had taken."""
    engine, answer = answer_to(WakeSlice(7, "one"), error)

    assert engine.is_loaded
    assert lacks_room == answer.lacks_room
    assert answer.error


def test_a_model_that_cannot_fall_asleep_is_as_it_was() -> None:
    """A model that cannot fall asleep, for want of host memory say, is as it was."""
    engine, answer = answer_to(Sleep(7, "one", 1), NoRoom("no host memory"))

    assert engine.is_loaded
    assert answer.lacks_room


def test_a_model_of_which_only_some_workers_sleep_is_given_up() -> None:
    """The death of a half-asleep engine is reported before the reply: the caller knows it then."""
    error = HalfAsleep("a worker could not fall asleep: it is lost")
    engine, (failed, answer) = told(Sleep(7, "one", 1), error)

    assert not engine.is_loaded
    assert EngineFailed("one", 3, "a worker could not fall asleep: it is lost") == failed
    assert isinstance(answer, CommandResult)
    assert answer.error == "a worker could not fall asleep: it is lost"


@pytest.mark.parametrize(("lacks_room", "kind"), [(True, NoRoom), (False, HotswapError)])
async def test_an_answer_says_whether_room_was_lacking(lacks_room: bool, kind: type[Any]) -> None:
    """A reply says whether room was lacking, as then the model is still asleep, not lost."""
    link = HostLink()
    link._pending[7] = future = asyncio.get_running_loop().create_future()

    link._receive(CommandResult(7, error="why", lacks_room=lacks_room))

    error = future.exception()
    assert kind is type(error)
    assert "why" == str(error)
