"""Outputs are delivered only to requests that own their stamps."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from tests.helpers.support import lease as lease_of
from tests.helpers.virtual import VirtualLoop
from vllm_hotswap.engines.engine_share import EngineShare
from vllm_hotswap.engines.stamps import StampedCore, make_stamp, read_stamp
from vllm_hotswap.errors import DrainCut, EngineUnavailable, GrammarTimeout, WrongStamp
from vllm_hotswap.host.grammars import ACCOUNT
from vllm_hotswap.models.pace import OUTPUTS, PER_TURN, Pace
from vllm_hotswap.models.registry import Lease, current_lease


@dataclass
class Sampling:
    structured_outputs: str | None = "a grammar"
    extra_args: dict[str, str] | None = None


@dataclass
class Request:
    request_id: str
    prompt_token_ids: tuple[int, ...] = (1, 2, 3)
    sampling_params: Sampling | None = None
    cache_salt: str | None = None


@dataclass
class Output:
    request_id: str
    finish_reason: int | None = None
    new_token_ids: tuple[int, ...] = (7,)


@dataclass
class Outputs:
    weight_version: str | None
    outputs: list[Output]


@dataclass
class Core:
    """A stand-in for vLLM's client of an engine core, with what it receives and sends."""

    says: list[Any] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)
    name = "core"

    async def add_request_async(self, request: Request) -> None:
        self.told.append(request.request_id)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.told.append(request_ids)

    async def get_output_async(self) -> Any:
        return self.says.pop(0)


@pytest.fixture
def core() -> Core:
    return Core()


@pytest.fixture
def stamped(core: Core) -> StampedCore:
    return StampedCore("llama", core)


async def begin(stamped: StampedCore, request_id: str, lease: Lease | None) -> None:
    current_lease.set(lease)
    await stamped.add_request_async(Request(request_id))


async def delivered(stamped: StampedCore, core: Core, stamp: str | None, *ids: str) -> list[str]:
    core.says.append(Outputs(stamp, [Output(request_id) for request_id in ids]))
    return [output.request_id for output in (await stamped.get_output_async()).outputs]


@pytest.mark.parametrize("alias", ["llama", "org/model#2", "a#b"])
def test_stamp_says_alias_and_epoch(alias: str) -> None:
    """A stamp gives alias and epoch back, whatever characters the alias has."""
    assert (alias, 17) == read_stamp(make_stamp(alias, 17))


def test_no_stamp_is_of_no_epoch() -> None:
    """vLLM's own stamp, from before any activation, belongs to no epoch."""
    assert ("default", -1) == read_stamp("default")


async def test_output_of_the_leases_epoch_is_delivered(stamped: StampedCore, core: Core) -> None:
    """Output of the lease's epoch is delivered, and so is output of older vLLMs without a stamp."""
    lease = lease_of("llama", 3)
    await begin(stamped, "r", lease)

    assert ["r"] == await delivered(stamped, core, "llama#3", "r")
    assert ["r"] == await delivered(stamped, core, None, "r")
    assert lease.cut is None


@pytest.mark.parametrize("stamp", ["llama#2", "llama#4", "qwen#3", "default", "llama#x"])
async def test_output_of_another_epoch_or_model_ends_its_request(
    stamped: StampedCore, core: Core, stamp: str
) -> None:
    """Output of another epoch or model is not delivered and ends its request; a canary has none."""
    lease = lease_of("llama", 3)
    await begin(stamped, "r", lease)
    await begin(stamped, "canary", None)

    assert ["canary"] == await delivered(stamped, core, stamp, "r", "canary")

    assert isinstance(lease.cut, WrongStamp)
    assert stamp in lease.cut.message


async def test_resumed_request_owns_all_its_epochs(stamped: StampedCore, core: Core) -> None:
    """A resumed request owns all its epochs: output from before it was parked may be read later."""
    lease = lease_of("llama", 3)
    await begin(stamped, "r", lease)
    lease.hold_output(7)

    for stamp in ("llama#3", "llama#7"):
        assert ["r"] == await delivered(stamped, core, stamp, "r")
    assert [] == await delivered(stamped, core, "llama#8", "r")


async def test_request_that_was_cut_meanwhile_does_not_reach_the_engine(
    stamped: StampedCore, core: Core
) -> None:
    """A request aborted while it is tokenised does not reach the engine."""
    lease = lease_of("llama", 3)
    lease.end(DrainCut("llama", "qwen", 0))

    with pytest.raises(EngineUnavailable, match="drain"):
        await begin(stamped, "r", lease)

    assert [] == core.told


async def test_request_of_another_models_lease_does_not_reach_the_engine(
    stamped: StampedCore, core: Core
) -> None:
    """A request with another model's lease never reaches the engine, should one get there."""
    with pytest.raises(WrongStamp):
        await begin(stamped, "r", lease_of("qwen", 3))

    assert [] == core.told


async def test_nothing_is_kept_of_requests_that_ended(stamped: StampedCore, core: Core) -> None:
    """Requests that ended by a last output or an abort are forgotten; the lease has the others."""
    lease = lease_of("llama", 3)
    for request_id in ("a", "b", "c"):
        await begin(stamped, request_id, lease)

    core.says.append(Outputs("llama#3", [Output("a", finish_reason=0)]))
    await stamped.get_output_async()
    await stamped.abort_requests_async(["b"])

    assert {"c"} == lease.requests
    assert "<StampedCore llama requests=1 stamp='llama#3'>" == repr(stamped)
    assert "core" == stamped.name


async def test_output_without_a_stamp_ends_its_request_too(
    stamped: StampedCore, core: Core
) -> None:
    """Output without a stamp, as from older vLLMs, ends its request's entry, too."""
    lease = lease_of("llama", 3)
    await begin(stamped, "r", lease)

    core.says.append(Outputs(None, [Output("r", finish_reason=0)]))
    await stamped.get_output_async()

    assert set() == lease.requests
    assert "requests=0" in repr(stamped)


async def test_what_is_released_is_forgotten(stamped: StampedCore, core: Core) -> None:
    """A released request is forgotten, although the engine may send more for it."""
    lease = lease_of("llama", 3)
    await begin(stamped, "r", lease)

    stamped.forget(lease.requests)

    assert set() == lease.requests
    assert ["r"] == await delivered(stamped, core, "llama#9", "r")


@pytest.mark.parametrize(
    ("salt", "own", "sent"),
    [
        ("", None, None),
        ("", "x", "x"),
        ("group a", None, "group a"),
        ("group a", "x", '["group a", "x"]'),
    ],
)
async def test_the_callers_salt_parts_the_prefix_cache(
    stamped: StampedCore, salt: str, own: str | None, sent: str | None
) -> None:
    """The caller's salt divides the prefix cache, and a request's own salt divides that further."""
    current_lease.set(lease_of("llama", 1, cache_salt=salt))
    request = Request("one", cache_salt=own)
    await stamped.add_request_async(request)

    assert sent == request.cache_salt


def structured(**lease: Any) -> tuple[Lease, Request]:
    """Make a request with a grammar, and its lease, which becomes the running task's."""
    current_lease.set(made := lease_of("llama", 3, **lease))
    return made, Request("r", sampling_params=Sampling())


TIMEOUT_S = 300.0


def in_virtual_time(main: Coroutine[Any, Any, None]) -> None:
    loop = VirtualLoop()
    try:
        loop.run(main)
    finally:
        loop.close()


def test_a_grammar_that_takes_too_long_ends_its_request(stamped: StampedCore) -> None:
    """A request with a grammar fails if its first output does not come in time."""

    async def main() -> None:
        lease, request = structured(grammar_timeout_s=TIMEOUT_S)
        await stamped.add_request_async(request)
        await asyncio.sleep(TIMEOUT_S - 1)
        assert lease.cut is None
        await asyncio.sleep(2)
        assert isinstance(lease.cut, GrammarTimeout)
        assert (504, "grammar_timeout") == (lease.cut.status, lease.cut.code)
        assert "limits.grammar_timeout" in lease.cut.message

    in_virtual_time(main())


@pytest.mark.parametrize("how", ["output", "abort", "release", "none", "no grammar"])
def test_a_request_whose_first_output_has_come_goes_on(
    stamped: StampedCore, core: Core, how: str
) -> None:
    """After its first output, without a grammar, or without a timeout, a request has no limit."""

    async def main() -> None:
        lease, request = structured(grammar_timeout_s=None if how == "none" else TIMEOUT_S)
        if how == "no grammar":
            request.sampling_params = Sampling(structured_outputs=None)
        await stamped.add_request_async(request)
        if how == "output":
            await delivered(stamped, core, "llama#3", "r")
        elif how == "abort":
            await stamped.abort_requests_async(["r"])
        elif how == "release":
            stamped.forget(["r"])
        lease.park(10 * TIMEOUT_S, lambda: None)
        lease.settle()
        await asyncio.sleep(2 * TIMEOUT_S)
        assert lease.cut is None

    in_virtual_time(main())


@pytest.mark.parametrize("parked_s", [TIMEOUT_S / 2, 2.5 * TIMEOUT_S])
def test_time_spent_parked_does_not_count_for_a_grammar(
    stamped: StampedCore, parked_s: float
) -> None:
    """Time spent parked does not count toward a grammar's time; the rest is left afterwards."""

    async def main() -> None:
        lease, request = structured(grammar_timeout_s=TIMEOUT_S)
        await stamped.add_request_async(request)
        for _ in range(2):
            await asyncio.sleep(100)
            lease.park(10 * TIMEOUT_S, lambda: None)
            await asyncio.sleep(parked_s)
            lease.settle()
        await asyncio.sleep(99)
        assert lease.cut is None
        await asyncio.sleep(2)
        assert isinstance(lease.cut, GrammarTimeout)

    in_virtual_time(main())


def test_a_request_that_comes_while_parked_has_its_time_when_it_goes_on(
    stamped: StampedCore,
) -> None:
    """A request sent while parked gets its whole time on resume; an aborted one gets none."""

    async def main() -> None:
        lease, request = structured(grammar_timeout_s=TIMEOUT_S)
        ended, late = structured(grammar_timeout_s=TIMEOUT_S)
        for one, sent in ((ended, late), (lease, request)):
            current_lease.set(one)
            one.park(10 * TIMEOUT_S, lambda: None)
            await stamped.add_request_async(sent)
        ended.end(EngineUnavailable("gone"))
        await asyncio.sleep(2 * TIMEOUT_S)
        lease.settle()
        await asyncio.sleep(TIMEOUT_S - 1)
        assert lease.cut is None
        await asyncio.sleep(2)
        assert isinstance(lease.cut, GrammarTimeout)
        assert isinstance(ended.cut, EngineUnavailable)

    in_virtual_time(main())


async def test_an_engine_is_told_for_whom_a_grammar_is(stamped: StampedCore) -> None:
    """The engine gets the account of a request with a grammar, and of no other."""
    _, request = structured(account="group a")
    await stamped.add_request_async(request)
    plain = Request("s", sampling_params=Sampling(structured_outputs=None))
    await stamped.add_request_async(plain)

    assert request.sampling_params == Sampling(extra_args={ACCOUNT: "group a"})
    assert plain.sampling_params == Sampling(structured_outputs=None)


async def test_outputs_of_several_steps_are_not_looked_at_in_one_turn(
    stamped: StampedCore, core: Core
) -> None:
    """Outputs of several steps are handled in several turns, although all have arrived."""
    passed = 0

    async def others() -> None:
        nonlocal passed
        while True:
            await asyncio.sleep(0)
            passed += 1

    other = asyncio.create_task(others())
    await asyncio.sleep(0)
    for _ in range(10):
        await delivered(stamped, core, None, *(str(number) for number in range(OUTPUTS)))
    other.cancel()
    assert 9 == passed


async def test_answers_of_one_call_begin_a_few_in_a_turn(core: Core) -> None:
    """A call's requests reach the engine a few per turn, although vLLM sends them in one task."""
    stamped = StampedCore("llama", core, Pace(asyncio.get_running_loop()))
    current_lease.set(lease_of("llama", 3, calls=100))
    sent = [0]

    async def others() -> None:
        while True:
            await asyncio.sleep(0)
            sent.append(len(core.told))

    other = asyncio.create_task(others())
    for number in range(100):
        await stamped.add_request_async(Request(str(number)))
    other.cancel()

    assert 100 == len(core.told)
    assert max(after - before for before, after in pairwise(sent)) <= 2 * PER_TURN


def sharing(core: Core, places: int) -> StampedCore:
    return StampedCore("llama", core, share=EngineShare(places, 1000, lambda: 0.0))


async def ask(stamped: StampedCore, request_id: str, **lease: Any) -> asyncio.Task[None]:
    """Start a request of an account that is held to its share."""
    made = lease_of("llama", 3, **{"engine_share": 0.5, **lease})
    task = asyncio.create_task(begin(stamped, request_id, made))
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def test_accounts_share_their_engine(core: Core) -> None:
    """Requests beyond an account's share wait until those of another account are sent."""
    stamped = sharing(core, places=2)
    held = [await ask(stamped, f"a{number}", account="a") for number in range(5)]
    await ask(stamped, "b", account="b")
    assert ["a0", "a1", "a2", "b"] == core.told

    for request_id in ("a0", "a1", "a2"):
        await delivered_last(stamped, core, request_id)
    await asyncio.sleep(0)

    assert ["a3"] == core.told[4:]
    held[-1].cancel()


async def delivered_last(stamped: StampedCore, core: Core, request_id: str) -> None:
    core.says.append(Outputs("llama#3", [Output(request_id, finish_reason=0)]))
    await stamped.get_output_async()


async def test_whose_share_is_everything_never_waits(core: Core) -> None:
    """Requests with the whole share, as an admin's or without keys, never wait."""
    stamped = sharing(core, places=1)
    for number in range(5):
        await ask(stamped, f"{number}", engine_share=1.0)

    assert 5 == len(core.told)


async def test_what_waits_before_its_engine_can_be_given_up(core: Core) -> None:
    """A request that waits for its share can be aborted; the engine never sees it."""
    stamped = sharing(core, places=1)
    lease = lease_of("llama", 3, account="a", engine_share=0.5)
    held = [asyncio.create_task(begin(stamped, f"a{number}", lease)) for number in range(3)]
    await asyncio.sleep(0)
    assert 1 == lease.held_back

    await stamped.abort_requests_async(["a2"])

    assert isinstance((await asyncio.gather(held[2], return_exceptions=True))[0], BaseException)
    assert 0 == lease.held_back
    assert ["a0", "a1"] == core.told


async def test_a_place_is_given_back_by_an_abort(core: Core) -> None:
    stamped = sharing(core, places=1)
    for number in range(3):
        await ask(stamped, f"a{number}", account="a")

    await stamped.abort_requests_async(["a0"])
    for _ in range(3):
        await asyncio.sleep(0)

    assert ["a0", "a1", ["a0"], "a2"] == core.told


async def test_what_was_cut_before_its_turn_takes_no_place(core: Core) -> None:
    """A request aborted while it waits is refused in its turn, and the next one takes its place."""
    stamped = sharing(core, places=1)
    await ask(stamped, "a0", account="a")
    await ask(stamped, "a1", account="a")
    lease = lease_of("llama", 3, account="a", engine_share=0.5)
    cut = asyncio.create_task(begin(stamped, "a2", lease))
    await asyncio.sleep(0)
    await ask(stamped, "a3", account="a")
    lease.end(DrainCut("llama", "qwen", 1.0))

    await delivered_last(stamped, core, "a0")
    for _ in range(5):
        await asyncio.sleep(0)

    assert isinstance((await asyncio.gather(cut, return_exceptions=True))[0], EngineUnavailable)
    assert ["a0", "a1", "a3"] == core.told


async def test_a_request_that_cannot_be_sent_takes_no_place(core: Core) -> None:
    """A request that cannot be sent, as the engine's client is broken, takes no place."""
    stamped = sharing(core, places=1)
    core.add_request_async = broken  # type: ignore[method-assign]
    for number in range(4):
        task = await ask(stamped, f"a{number}", account="a")
        assert isinstance(task.exception(), OSError)


async def broken(_: Request) -> None:
    raise OSError("the socket is closed")
