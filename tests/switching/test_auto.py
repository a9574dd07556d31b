"""Mode `auto`: clients name a model, and the server switches to it."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from unittest.mock import AsyncMock

import pytest

from tests.conftest import MakeServer, Play
from tests.helpers.support import CHAT, Server, settled
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.errors import HotswapError
from vllm_hotswap.events import RequestEnded, SwitchEnded
from vllm_hotswap.models.engine import Previewed
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.models.registry import ModelSettings
from vllm_hotswap.testing.fake_settings import FakeSettings

BAD_STREAM = b'{"model": "mistral", "stream": true, "max_tokens": "many"}'


@pytest.fixture
async def auto(make_server: MakeServer) -> Server:
    """A server in mode `auto`: llama is active, qwen is parked, mistral is cold."""
    return await make_server(mode="auto")


def targets(server: Server) -> list[str]:
    return [event.target for event in server.events.of(SwitchEnded)]


def model_of(response: Any) -> str:
    assert 200 == response.status_code, response.text
    return str(response.json()["model"])


# --- served requests ----------------------------------------------------------------------------


async def test_request_for_another_model_switches_to_it(auto: Server) -> None:
    """No switch call is needed; the answer is the named model's."""
    assert "qwen" == model_of(await auto.ask("qwen"))
    assert "qwen" == auto.coordinator.active
    assert "llama" == model_of(await auto.ask("llama"))
    assert ["qwen", "llama"] == targets(auto)


async def test_request_for_the_active_model_switches_nothing(auto: Server) -> None:
    """Requests for the active model, or without a model, switch nothing, as in `manual`."""
    assert "llama" == model_of(await auto.ask("llama"))
    assert "llama" == model_of(await auto.ask(None))
    assert [] == targets(auto)


async def test_cold_model_is_loaded_by_its_first_request(auto: Server) -> None:
    """A model that was never loaded has no frontend yet; its requests wait nevertheless."""
    assert "mistral" == model_of(await auto.ask("mistral"))
    assert ["mistral"] == targets(auto)


async def test_request_waits_for_those_that_run(auto: Server) -> None:
    """A request for another model waits until those of the active model have ended uncut."""
    first = await auto.start_stream("llama")
    second = auto.ask("qwen")
    await auto.settled()
    assert "llama" == auto.coordinator.active
    assert 1 == auto.coordinator.snapshot().waiting

    assert (await first.finish()).is_whole
    assert "qwen" == model_of(await second)


async def test_while_others_wait_the_active_model_serves_on(make_server: MakeServer) -> None:
    """`batch` admits later requests of the active model, too, until others have lost enough."""
    server = await make_server(mode="auto", min_active=1000)
    first = await server.start_stream("llama")
    waiting = server.ask("qwen")
    await server.settled()

    assert "llama" == model_of(await server.ask("llama"))
    assert not waiting.done()
    await first.finish()


async def test_queue_of_a_model_is_served_by_one_switch(auto: Server) -> None:
    """Requests that alternate between models are grouped by model."""
    auto.host.hold("step", "llama")
    asked = [auto.ask(("llama", "qwen")[n % 2]) for n in range(20)]
    await auto.settled()
    auto.host.release("step", "llama")

    assert ["llama", "qwen"] * 10 == [model_of(await one) for one in asked]
    assert len(targets(auto)) <= 2


async def test_fifo_serves_strictly_in_order(make_server: MakeServer) -> None:
    """`fifo` switches once for every change of name: the baseline for grouping."""
    server = await make_server(mode="auto", policy="fifo")
    names = ["llama", "qwen"] * 4
    asked = [server.ask(name, name=f"{name}{n}") for n, name in enumerate(names)]
    assert names == [model_of(await one) for one in asked]
    assert [f"{name}{n}" for n, name in enumerate(names)] == server.answered
    assert names[1:] == targets(server)


async def test_order_within_a_model_is_kept(auto: Server) -> None:
    """Requests of one model are admitted in the order of their arrival."""
    auto.host.hold("activate", "qwen")
    asked = [auto.ask("qwen", name=str(n)) for n in range(5)]
    await auto.settled()
    auto.host.release("activate", "qwen")
    await asyncio.gather(*asked)
    assert ["0", "1", "2", "3", "4"] == auto.answered


# --- requests that never switch -----------------------------------------------------------------


async def test_bad_request_never_switches(auto: Server) -> None:
    """A bad request is refused by its frontend at once, while another model is still active."""
    response = await auto.post(CHAT, json={"model": "qwen", "max_tokens": "many"})
    assert 400 == response.status_code
    assert [] == targets(auto)
    assert "llama" == auto.coordinator.active


async def test_bad_request_never_loads_a_model(auto: Server) -> None:
    """A bad request does not load its model, even if that has no frontend yet."""
    response = await auto.ask("mistral", max_tokens="many")
    assert 400 == response.status_code
    assert ("load", "mistral") not in auto.host.operations


async def test_request_that_needs_no_engine_never_switches(auto: Server) -> None:
    """A request that needs no engine is answered by its frontend, whichever model is active."""
    response = await auto.post("/tokenize", json={"model": "qwen", "prompt": "a b"})
    assert 200 == response.status_code
    assert [] == targets(auto)


async def test_unknown_model_is_refused(auto: Server) -> None:
    response = await auto.ask("gpt-9")
    assert 404 == response.status_code


# --- what the client gets -----------------------------------------------------------------------


async def test_answer_tells_how_long_it_waited(auto: Server) -> None:
    """Headers give the time that an answer waited, unless they were sent before."""
    served = await auto.ask("llama")
    assert ("llama", "0", "1") == tuple(
        served.headers[f"x-hotswap-{name}"] for name in ("model", "switched", "epoch")
    )
    assert 0 <= float(served.headers["x-hotswap-waited"]) < 1
    switched = await auto.ask("qwen")
    assert ("qwen", "1", "2") == tuple(
        switched.headers[f"x-hotswap-{name}"] for name in ("model", "switched", "epoch")
    )


async def test_waiting_stream_is_told_so_at_once(auto: Server) -> None:
    """A waiting stream gets comments at once, which clients skip; they keep it open."""
    first = await auto.start_stream("llama")
    second = auto.stream("qwen")
    assert ": waiting for qwen\n\n" == await second.next_event()
    await first.finish()
    answer = await second.finish()
    assert answer.is_whole
    told = next(event for event in answer.events if event.startswith(": served"))
    assert "switched=1 epoch=2" in told
    assert "x-hotswap-waited" not in answer.headers


async def test_stream_of_a_model_that_was_never_loaded_begins_at_once(auto: Server) -> None:
    """Such a stream begins before its frontend exists; the frontend's answer follows."""
    auto.host.hold("load", "mistral")
    stream = auto.stream("mistral")
    assert ": waiting for mistral\n\n" == await stream.next_event()
    assert not auto.coordinator.registry.model("mistral").is_loaded

    auto.host.release("load", "mistral")
    answer = await stream.finish()

    assert answer.is_whole
    assert (200, "mistral") == (answer.status, answer.headers["x-hotswap-model"])
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = next(event for event in answer.events if event.startswith(": served"))
    assert told.endswith(" switched=1 epoch=2")


async def test_stream_below_a_proxys_prefix_begins_at_once_too(auto: Server) -> None:
    """A stream below a proxy's prefix (`--root-path`) begins at once, too."""
    path, below = f"/api{CHAT}", {"root_path": "/api"}
    body = json.dumps({"model": "mistral", "stream": True, "max_tokens": 1}).encode()

    bad = await auto.request("POST", path, BAD_STREAM, **below).finish()
    loaded_for_bad = targets(auto)
    answer = await auto.request("POST", path, body, **below).finish()

    assert (400, []) == (bad.status, loaded_for_bad)
    assert answer.is_whole
    assert "x-hotswap-waited" not in answer.headers  # they were sent before its turn came


async def test_stream_of_a_model_that_cannot_be_loaded_ends_with_the_error(auto: Server) -> None:
    """The stream of a model that cannot be loaded ends with the error as an event."""
    auto.host.fail_next("load", "mistral")
    stream = auto.stream("mistral")

    answer = await stream.finish()

    assert 200 == answer.status
    assert '"code": "switch_failed"' in answer.events[-1]


async def test_answer_that_is_no_stream_does_not_begin_before_its_frontend(auto: Server) -> None:
    """An answer that is not a stream waits, so its status can report a load that failed."""
    auto.host.fail_next("load", "mistral")

    assert 503 == (await auto.ask("mistral")).status_code


async def test_what_the_frontend_refuses_nevertheless_is_the_last_event(
    auto: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that was begun ends with what its frontend refuses, although the preview did not."""
    engine = auto.coordinator.registry.model("mistral").engine
    monkeypatch.setattr(engine, "preview", AsyncMock(return_value=Previewed(is_accepted=True)))

    answer = await auto.request("POST", CHAT, BAD_STREAM).finish()

    assert 200 == answer.status
    assert "max_tokens" in answer.events[-1]
    assert "error" in json.loads(answer.events[-1].removeprefix("data: "))


async def test_stream_that_nobody_has_looked_at_begins_when_somebody_can(
    auto: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a preview a stream begins only when checked, so a bad one gets its error status."""
    engine = auto.coordinator.registry.model("mistral").engine
    monkeypatch.setattr(engine, "preview", AsyncMock(return_value=Previewed()))

    answer = await auto.request("POST", CHAT, BAD_STREAM).finish()

    assert 400 == answer.status
    assert ["mistral"] == targets(auto)


async def test_bad_request_does_not_load_its_model(auto: Server) -> None:
    """A bad request gets its error without a load, and its place is free again."""
    answer = await auto.request("POST", CHAT, BAD_STREAM).finish()

    assert 400 == answer.status
    assert [] == targets(auto)
    assert auto.auto.is_empty


async def test_model_that_is_loaded_meanwhile_takes_the_request_over(
    auto: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loaded model's frontend checks the request before the request waits for a turn."""
    model = auto.coordinator.registry.model("mistral")
    is_looked_at, may_go_on = asyncio.Event(), asyncio.Event()

    async def preview(*_: object) -> Previewed:
        is_looked_at.set()
        await may_go_on.wait()
        return Previewed()

    monkeypatch.setattr(model.engine, "preview", preview)
    stream = auto.request("POST", CHAT, BAD_STREAM)
    await is_looked_at.wait()
    assert 200 == (await auto.operate("mistral", "load")).status_code
    may_go_on.set()

    assert 400 == (await stream.finish()).status
    assert [] == targets(auto)


def test_looking_at_a_request_counts_as_waiting(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of the preview counts in the header, and for `wait_timeout`."""

    async def preview(*_: object) -> Previewed:
        await asyncio.sleep(7)
        return Previewed(is_accepted=True)

    async def story(server: Server) -> None:
        monkeypatch.setattr(server.coordinator.registry.model("mistral").engine, "preview", preview)
        assert 7 <= float((await server.ask("mistral")).headers["x-hotswap-waited"])

    play(story, mode="auto")


def test_stream_that_waits_for_a_load_for_too_long_ends_with_the_error(play: Play) -> None:
    """A stream that waits for a load longer than `wait_timeout` ends with the error."""

    async def story(server: Server) -> None:
        server.host.hold("load", "mistral")
        answer = await server.stream("mistral").finish()
        assert 200 == answer.status
        assert '"code": "wait_timeout"' in answer.events[-1]
        assert 0 == server.coordinator.snapshot().waiting
        server.host.release("load", "mistral")

    play(story, mode="auto", wait_timeout=15)


async def test_client_that_leaves_before_its_model_is_loaded_leaves_the_queue(auto: Server) -> None:
    """A client that leaves during the load leaves the queue, although its answer has begun."""
    auto.host.hold("load", "mistral")
    stream = auto.stream("mistral")
    await stream.next_event()
    assert 1 == auto.coordinator.snapshot().waiting

    stream.disconnect()
    await auto.settled()

    assert 0 == auto.coordinator.snapshot().waiting
    auto.host.release("load", "mistral")
    assert "llama" == model_of(await auto.ask("llama"))


@pytest.mark.parametrize("events", [0, 2])
def test_client_that_takes_in_nothing_while_its_model_is_loaded_is_let_go(
    play: Play, events: int
) -> None:
    """A client that stops reading during a load is disconnected, at once or after some comments."""

    async def story(server: Server) -> None:
        watching = asyncio.create_task(server.app.router.disconnect_stalled_clients())
        server.host.hold("load", "mistral")
        stream = server.stream("mistral")
        for _ in range(events):
            await stream.next_event()
        await asyncio.sleep(200)

        assert stream.task.done()
        assert not isinstance(stream.task.exception(), asyncio.CancelledError)
        assert 0 == server.coordinator.snapshot().waiting
        server.host.release("load", "mistral")
        assert "llama" == model_of(await server.ask("llama"))
        watching.cancel()

    play(story, mode="auto", limits=LimitsConfig(client_timeout=60.0), wait_timeout=1000)


def test_reader_that_is_slow_but_not_silent_holds_no_switch(play: Play) -> None:
    """A slow reader is cut after the drain deadline where no request can be parked."""

    async def story(server: Server) -> None:
        watching = asyncio.create_task(server.app.router.disconnect_stalled_clients())
        server.coordinator.ladder.plans.can_keep_parked = lambda *_, **__: False  # type: ignore[method-assign]
        stream = await server.start_stream("llama", words=1000)
        other = server.ask("qwen", name="other")
        began_s = asyncio.get_running_loop().time()
        while not other.done():
            await asyncio.sleep(4)
            if not stream.task.done():
                await stream.next_event()

        assert "qwen" == model_of(await other)
        assert 30 > asyncio.get_running_loop().time() - began_s
        answer = await stream.finish()
        assert '"code": "client_stalled"' in answer.events[-1]
        assert "the response was read too slowly" in answer.events[-1]
        watching.cancel()

    play(story, mode="auto", drain_timeout=10, wait_timeout=1000)


def test_reader_that_keeps_up_is_waited_for(play: Play) -> None:
    """A client that keeps up is waited for, however long its answer is."""

    async def story(server: Server) -> None:
        server.coordinator.ladder.plans.can_keep_parked = lambda *_, **__: False  # type: ignore[method-assign]
        stream = server.request(
            "POST", CHAT, b'{"model": "llama", "stream": true, "max_tokens": 50}'
        )
        reading = asyncio.create_task(stream.finish())
        await server.settled()
        other = server.ask("qwen")
        assert (await reading).is_whole
        assert "qwen" == model_of(await other)

    play(story, mode="auto", drain_timeout=10, wait_timeout=1000)


def test_comments_are_repeated(play: Play) -> None:
    """Comments are sent as long as the request waits."""

    async def story(server: Server) -> None:
        server.host.hold("activate", "qwen")
        stream = server.stream("qwen")
        assert [": waiting for qwen\n\n"] * 3 == [await stream.next_event() for _ in range(3)]
        server.host.release("activate", "qwen")
        assert (await stream.finish()).is_whole

    play(story, mode="auto")


# --- requests that leave, and refused ones ------------------------------------------------------


async def test_client_that_leaves_leaves_the_queue(auto: Server) -> None:
    """A client that leaves is removed from the queue, and costs no more work."""
    first = await auto.start_stream("llama")
    second = auto.stream("qwen")
    await second.next_event()
    assert 1 == auto.coordinator.snapshot().waiting
    second.disconnect()
    await auto.settled()
    assert 0 == auto.coordinator.snapshot().waiting
    await first.finish()


async def test_full_queue_refuses(make_server: MakeServer) -> None:
    """A request to a full queue gets 429 with a time to retry."""
    server = await make_server(mode="auto", max_waiting=1)
    first = await server.start_stream("llama")
    second = server.ask("qwen")
    await server.settled()
    refused = await server.ask("qwen")
    assert 429 == refused.status_code
    assert "switching.max_waiting" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    await first.finish()
    assert "qwen" == model_of(await second)


def test_request_waits_no_longer_than_it_may(play: Play) -> None:
    """A request that has waited for `wait_timeout` gets 504."""

    async def story(server: Server) -> None:
        first = await server.start_stream("llama", words=2)
        response = await server.ask("qwen")
        assert 504 == response.status_code
        assert "wait_timeout" == response.json()["error"]["code"]
        assert 0 == server.coordinator.snapshot().waiting
        assert (await first.finish()).is_whole

    play(story, mode="auto", wait_timeout=5, drain_timeout=100)


@pytest.mark.parametrize("place", ["load", "activate"])
async def test_request_that_never_had_its_turn_is_not_counted(auto: Server, place: str) -> None:
    """A request without a turn was not admitted: only the failed switch is counted."""
    auto.host.fail_next(place, "mistral", HotswapError("no such file"))
    assert 503 == (await auto.ask("mistral")).status_code
    assert 200 == (await auto.ask("llama")).status_code

    text = (await auto.get("/metrics")).text
    counted = [line for line in text.splitlines() if line.startswith("hotswap_requests_total{")]
    assert ['hotswap_requests_total{model="llama",result="served"} 1.0'] == counted


async def test_model_that_cannot_be_loaded_is_left_alone_for_a_while(auto: Server) -> None:
    """After a failed load waiting requests get the cause, and no request tries again at once."""
    auto.host.fail_next("load", "mistral", HotswapError("no such file"))
    response = await auto.ask("mistral")
    assert (503, "switch_failed") == (response.status_code, response.json()["error"]["code"])
    assert "no such file" in response.json()["error"]["message"]

    again = await auto.ask("mistral")
    assert (503, "switch_failed") == (again.status_code, again.json()["error"]["code"])
    assert int(again.headers["retry-after"]) >= 1
    assert 1 == len(targets(auto))
    assert "llama" == model_of(await auto.ask("llama"))


# --- time ---------------------------------------------------------------------------------------


def test_who_waits_too_long_is_next(play: Play) -> None:
    """After `max_wait` the active model admits nothing more, however many requests wait for it."""

    async def keep_busy(server: Server) -> None:
        while True:
            await asyncio.gather(server.ask("llama"), asyncio.sleep(0.5))

    async def story(server: Server) -> None:
        clients = [asyncio.create_task(keep_busy(server)) for _ in range(3)]
        await asyncio.sleep(5)
        answer = await server.ask("qwen")
        assert "qwen" == model_of(answer)
        assert 3 <= float(answer.headers["x-hotswap-waited"]) <= 3 + 0.8
        for client in clients:
            client.cancel()

    play(
        story,
        mode="auto",
        max_wait=3,
        min_active=1000,
        settings={"llama": FakeSettings(token_s=0.1)},
    )


def test_long_request_is_parked_for_one_that_is_due(play: Play) -> None:
    """After `drain_timeout` it is frozen, and continues when its model is active again."""

    async def story(server: Server) -> None:
        long = server.stream("llama", words=400)
        reading = asyncio.create_task(long.finish())
        await asyncio.sleep(1)
        answer = await server.ask("qwen")
        assert "qwen" == model_of(answer)
        assert 1 <= float(answer.headers["x-hotswap-waited"]) <= 4
        whole = await reading
        assert whole.is_whole
        assert 400 == sum('"content"' in event for event in whole.events)
        assert ["qwen", "llama"] == targets(server)

    play(
        story,
        mode="auto",
        max_wait=2,
        drain_timeout=1,
        settings={"llama": FakeSettings(token_s=0.1)},
    )


def test_round_robin_parks_at_the_end_of_a_slice(play: Play) -> None:
    """Two long requests of two models take turns, slice by slice."""

    async def story(server: Server) -> None:
        both = [server.stream(alias, words=100) for alias in ("llama", "qwen")]
        answers = await asyncio.gather(*(stream.finish() for stream in both))
        assert all(answer.is_whole for answer in answers)
        assert len(targets(server)) >= 8
        assert 0 == sum(event.requests_cut for event in server.events.of(SwitchEnded))

    play(
        story,
        mode="auto",
        policy="round_robin",
        slice=1.0,
        settings={name: FakeSettings(token_s=0.1) for name in ("llama", "qwen")},
    )


def test_more_urgent_model_goes_first(play: Play) -> None:
    """Of two waiting requests, the one with the higher priority is served first."""

    async def story(server: Server) -> None:
        first = await server.start_stream("llama")
        asked = [server.ask("qwen"), server.ask("mistral")]
        await server.settled()
        await first.finish()
        await asyncio.gather(*asked)
        assert ["mistral", "qwen"] == targets(server)

    play(
        story,
        mode="auto",
        load=("llama", "qwen", "mistral"),
        model_settings={"mistral": ModelSettings(priority=5)},
    )


# --- explicit switches, failures ------------------------------------------------------------------


async def test_explicit_switch_waits_for_one_that_nobody_ordered(auto: Server) -> None:
    """An explicit switch waits for an automatic one instead of being refused."""
    auto.host.hold("activate", "qwen")
    waiting = auto.ask("qwen")
    await auto.settled()
    order = auto.switch("mistral")
    await auto.settled()
    auto.host.release("activate", "qwen")
    response = await order
    assert (200, "mistral") == (response.status_code, response.json()["current_model"])
    assert "qwen" == model_of(await waiting)


async def test_death_of_the_host_keeps_who_waits(auto: Server) -> None:
    """Requests that wait survive the host's death, and are served by the next host."""
    first = await auto.start_stream("llama")
    waiting = auto.ask("qwen")
    await auto.settled()
    auto.host.kill()
    assert not (await first.finish()).is_whole
    assert "qwen" == model_of(await waiting)


@pytest.mark.parametrize(("step", "target"), [("activate", "qwen"), ("load", "mistral")])
async def test_a_host_that_dies_in_a_switch_gets_no_requests(
    auto: Server, step: str, target: str
) -> None:
    """Requests for the source that wait for a switch are served by the next host."""
    auto.host.hold(step, target)
    first = auto.ask(target)
    await auto.settled()
    waiting = auto.ask("llama")
    await auto.settled()
    auto.host.kill()

    assert "llama" == model_of(await waiting)
    await first


@pytest.mark.parametrize("target", ["qwen", "mistral"])
async def test_a_client_that_leaves_its_wait_is_not_served(auto: Server, target: str) -> None:
    """A client that leaves while its request waits counts as such, loaded model or not."""
    auto.host.hold("activate", target)
    auto.host.hold("load", target)
    stream = auto.stream(target)
    await auto.settled()
    stream.disconnect()
    await auto.settled()
    auto.host.release("load", target)
    auto.host.release("activate", target)

    assert ["left"] == [one.result for one in auto.events.of(RequestEnded)]


async def test_a_request_that_waits_counts_for_its_name(auto: Server) -> None:
    """A request for a model without a frontend is in flight under the name that it gives."""
    auto.host.hold("load", "mistral")
    auto.ask("mistral")
    await auto.settled()

    assert 1 == auto.coordinator.registry.model("mistral").in_flight_as("mistral")
    auto.host.release("load", "mistral")


async def test_a_connection_that_becomes_idle_in_the_last_drain_is_ended() -> None:
    """A WebSocket that is taken out of a drain while the server stops is ended, too."""
    live = {"llama": FakeSettings(tasks=("generate", "realtime"), token_s=0.15)}
    server = await Server(mode="auto", drain_timeout=60, settings=live).start()
    connection = server.websocket("/v1/realtime", "model=llama")
    await settled()
    connection.send("one two three four five")
    await asyncio.sleep(0.2)
    server.ask("qwen")
    await asyncio.sleep(0.1)
    assert "drain" == server.coordinator.serving().phase

    await server.coordinator.shut_down(5)

    assert not any(model.entered or model.leases for model in server.coordinator.registry)
    await server.stop()


async def test_stop_tells_who_waits(auto: Server) -> None:
    """At the server's stop, every waiting request gets an answer."""
    auto.host.hold("activate", "qwen")
    waiting = auto.ask("qwen")
    await auto.settled()
    await auto.coordinator.shut_down(0)
    assert 503 == (await waiting).status_code


async def test_events_tell_of_waiting(auto: Server) -> None:
    """Events report waits, for metrics and recordings."""
    await auto.ask("qwen", max_tokens=3)
    await auto.settled()
    [ended] = auto.events.of(RequestEnded)
    assert ("qwen", "served", 1, 3) == (
        ended.model,
        ended.result,
        ended.switched,
        ended.output_tokens,
    )
    assert ended.waited_s > 0
    assert ended.service_s is not None
    [switch] = auto.events.of(SwitchEnded)
    assert (True, "parked") == (switch.automatic, switch.residency)


async def test_others_are_served_while_the_last_model_cannot_be_brought_back(auto: Server) -> None:
    """A request for another model does not wait for the repair of the model that died."""
    auto.host.fail_next("load", "llama", HotswapError("its file is gone"))
    auto.host.kill_engine("llama")
    assert "qwen" == model_of(await auto.ask("qwen"))
    assert "qwen" == auto.coordinator.active


# --- trouble ------------------------------------------------------------------------------------


def test_parked_request_goes_on_after_a_switch_that_failed(play: Play) -> None:
    """A parked request continues after failed switches, however often it is parked."""

    async def story(server: Server) -> None:
        long = server.stream("llama", words=60)
        reading = asyncio.create_task(long.finish())
        await asyncio.sleep(3)
        server.host.fail_next("activate", "qwen")
        assert 503 == (await server.ask("qwen")).status_code
        await asyncio.sleep(5)
        assert "qwen" == model_of(await server.ask("qwen"))
        assert (await reading).is_whole

    play(
        story,
        mode="auto",
        policy="round_robin",
        slice=1.0,
        settings={"llama": FakeSettings(token_s=1.0)},
    )


def test_model_that_hosts_die_of_does_not_end_the_server(play: Play) -> None:
    """A model that kills its host gets errors for its requests, and is not tried for a while."""

    async def story(server: Server) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(2, server.host.kill, "out of memory")  # while it is loaded
        response = await server.ask("mistral")
        assert (503, "engine_unavailable") == (
            response.status_code,
            response.json()["error"]["code"],
        )
        await asyncio.sleep(30)
        assert 1 == server.host.restarts
        assert "llama" == model_of(await server.ask("llama"))

    play(story, mode="auto", settings={"mistral": FakeSettings(load_s=5.0)})


def test_who_is_due_is_served_however_tight_memory_is(play: Play) -> None:
    """Even with tight memory due requests are served, instead of parking others in a circle."""

    async def keep_busy(server: Server, alias: str) -> None:
        while True:
            await server.ask(alias, max_tokens=8)

    async def story(server: Server) -> None:
        clients = [asyncio.create_task(keep_busy(server, alias)) for alias in ("llama", "qwen")]
        await asyncio.sleep(10)
        answer = await server.ask("mistral")
        assert "mistral" == model_of(answer)
        assert float(answer.headers["x-hotswap-waited"]) < 60
        for client in clients:
            client.cancel()

    play(
        story,
        mode="auto",
        max_wait=3,
        drain_timeout=1,
        settings=dict.fromkeys(("llama", "qwen", "mistral"), FakeSettings(token_s=1.0, load_s=1)),
        budget=Usage((4 << 20) + (1 << 19), 0),
        load=("llama", "qwen"),
    )


def test_parked_request_of_a_model_that_fails_does_not_make_the_server_try_all_the_time(
    play: Play,
) -> None:
    """The time between two attempts for a parked request of a failing model doubles."""

    async def story(server: Server) -> None:
        long = server.stream("llama", words=1000)
        reading = asyncio.create_task(long.finish())
        await asyncio.sleep(1)
        assert "qwen" == model_of(await server.ask("qwen"))
        for _ in range(4):
            server.host.fail_next("activate", "llama")
        before = len(targets(server))
        await asyncio.sleep(20)
        assert len(targets(server)) - before <= 5
        reading.cancel()

    play(
        story,
        mode="auto",
        policy="round_robin",
        slice=1.0,
        settings={"llama": FakeSettings(token_s=1.0), "qwen": FakeSettings(token_s=1.0)},
    )


async def test_switch_that_is_given_up_leaves_the_queue_alone(auto: Server) -> None:
    """A refused drain says nothing about the target."""
    first = await auto.start_stream("llama")
    auto.auto.scheduler.leased_until_s = float("inf")
    waiting = auto.ask("qwen")
    await auto.settled()
    refused = await auto.post(
        "/v1/models/switch",
        json={"model": "qwen", "drain_timeout": 0, "on_drain_timeout": "refuse"},
    )
    assert 409 == refused.status_code
    assert not waiting.done()
    auto.auto.scheduler.leased_until_s = None
    await first.finish()
    assert "qwen" == model_of(await waiting)


def test_idle_connection_holds_nobody_up(play: Play) -> None:
    """An idle WebSocket is not waited for; when it sends a request, that gets its turn."""

    async def story(server: Server) -> None:
        socket = server.websocket("/v1/realtime", "model=llama")
        await server.settled()
        socket.send("one two")
        await asyncio.sleep(1)
        answer = await server.ask("qwen")
        assert float(answer.headers["x-hotswap-waited"]) < 1
        await asyncio.sleep(700)
        assert ["qwen"] == targets(server)
        socket.send("three")
        await asyncio.sleep(1)
        assert ["qwen", "llama"] == targets(server)
        assert 3 == sum(text["type"] == "transcription.delta" for text in socket.texts)
        socket.leave()

    play(
        story,
        mode="auto",
        settings={"llama": FakeSettings(tasks=("generate", "realtime"))},
    )


def test_connection_that_becomes_idle_in_a_drain_is_not_waited_for(play: Play) -> None:
    """A drain does not wait for the client of a connection whose request ends to hang up."""

    async def story(server: Server) -> None:
        socket = server.websocket("/v1/realtime", "model=llama")
        await server.settled()
        socket.send("one two three four")
        await asyncio.sleep(0.5)
        answer = await server.ask("qwen")
        assert 3 < float(answer.headers["x-hotswap-waited"]) < 5
        assert 4 == sum(text["type"] == "transcription.delta" for text in socket.texts)
        await asyncio.sleep(700)
        assert ["qwen"] == targets(server)
        socket.leave()

    play(
        story,
        mode="auto",
        settings={"llama": FakeSettings(tasks=("generate", "realtime"), token_s=1.0)},
    )


def test_an_arrival_does_not_end_the_wait_for_requests_that_were_ended(play: Play) -> None:
    """An explicit switch continues once they have ended, although another model was requested."""

    async def story(server: Server) -> None:
        async def answer_slowly() -> None:
            async with server.lease("llama") as lease:
                await server.auto.wait_for_turn(lease)
                await asyncio.sleep(3)  # its client reads the error slowly

        running = asyncio.create_task(answer_slowly())
        await asyncio.sleep(1)
        switch = asyncio.create_task(server.coordinator.switch("qwen", 0.0, "abort"))
        await asyncio.sleep(1)
        server.ask("mistral", words=1)
        await switch

        assert running.done()
        assert not server.coordinator.registry.model("llama").leases

    play(story, mode="auto", load=("llama", "qwen", "mistral"))
