"""Parked requests: frozen with their engine, kept open, resumed, or ended with an explicit error.

Under virtual time, on a whole server with fake engines.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from itertools import pairwise
from typing import Any

from tests.conftest import Play
from tests.helpers.support import Answer, Server, Stream
from vllm_hotswap.api.relay import COMMENT_S
from vllm_hotswap.config.settings import LimitsConfig
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.events import RequestsParked, RequestsResumed
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.testing.fake_settings import FakeSettings

MIB = 1 << 20
NO_SLEEP = FakeSettings(weights_bytes=2 * MIB, kv_bytes=2 * MIB, levels=frozenset())
"""A model that can only be unloaded to make room."""


async def switch(server: Server, alias: str, **body: Any) -> dict[str, Any]:
    response = await server.post("/v1/models/switch", json={"model": alias, **body})
    assert 200 == response.status_code, response.text
    return dict(response.json())


park = partial(switch, drain_timeout=0, on_drain_timeout="park")


async def parked_stream(server: Server, words: int = 8) -> Stream:
    """Return a stream of llama that was parked after its first word; qwen is active."""
    stream = await server.start_stream("llama", words=words)
    await park(server, "qwen")
    return stream


def choices_of(answer: Answer) -> list[object]:
    """Return each event except the comments, without what differs per response, as the id."""
    events = [event.removeprefix("data: ") for event in answer.events if event != ": parked"]
    return [json.loads(text)["choices"] if text.startswith("{") else text for text in events]


def test_a_parked_stream_goes_on_where_it_was(play: Play) -> None:
    """A parked stream is frozen while another model serves, then ends as if never parked."""

    async def story(server: Server) -> None:
        undisturbed = await (await server.start_stream("llama", words=8)).finish()
        stream = await server.start_stream("llama", words=8)

        told = await park(server, "qwen")
        assert (1, 0, 0) == tuple(told[f"requests_{how}"] for how in ("parked", "cut", "lost"))
        status = (await server.get("/admin/status")).json()["models"]["llama"]
        assert (1, 1) == (status["parked"], status["in_flight"])
        assert "qwen" == (await server.ask("qwen")).json()["model"]
        await switch(server, "llama")
        answer = await stream.finish()

        assert answer.is_whole
        assert choices_of(undisturbed) == choices_of(answer)
        assert [1] == [event.count for event in server.events.of(RequestsParked)]
        assert [1] == [event.count for event in server.events.of(RequestsResumed)]

    play(story)


def test_a_parked_stream_is_kept_open_with_comments(play: Play) -> None:
    """A parked stream gets a comment every few seconds, only between two events."""

    async def story(server: Server) -> None:
        stream = await parked_stream(server)
        await stream.next_event()  # was already on its way
        comments, times_s = [], []

        for _ in range(4):
            comments.append(await stream.next_event())
            times_s.append(asyncio.get_running_loop().time())

        assert [": parked\n\n"] * 4 == comments
        assert [COMMENT_S] * 3 == [b - a for a, b in pairwise(times_s)]
        await switch(server, "llama")
        assert 4 == (await stream.finish()).events.count(": parked")

    play(story)


def test_a_parked_request_without_a_stream_is_answered_later(play: Play) -> None:
    """A parked request without a stream is answered later; nothing is sent in the meantime."""

    async def story(server: Server) -> None:
        server.host.hold("step", "llama")
        call = server.ask("llama", max_tokens=2)
        await server.settled()
        await park(server, "qwen")
        server.host.release("step", "llama")
        await asyncio.sleep(60)
        assert not call.done()

        await switch(server, "llama")

        assert "I am" == (await call).json()["choices"][0]["message"]["content"]

    play(story)


def test_a_parked_request_may_sleep_with_its_model(play: Play) -> None:
    """A parked request survives its model's sleep with weights, however little room there is."""

    async def story(server: Server) -> None:
        stream = await parked_stream(server)
        assert "asleep" == server.residency("llama")

        await switch(server, "llama")

        assert (await stream.finish()).is_whole

    size = FakeSettings(weights_bytes=2 * MIB, kv_bytes=2 * MIB)
    play(story, settings={"llama": size, "qwen": size}, budget=Usage(6 * MIB), load=("llama",))


def test_a_parked_request_ends_when_its_model_must_be_unloaded(play: Play) -> None:
    """A parked request whose model is unloaded ends with an error, and the switch counts it."""

    async def story(server: Server) -> None:
        stream = await server.start_stream("llama", words=8)

        told = await park(server, "qwen")

        answer = await stream.finish()
        await server.settled()
        assert (1, 1) == (told["requests_parked"], told["requests_lost"])
        assert "parked_request_ended" in answer.events[-1]
        assert "data: [DONE]" not in answer.events
        assert 1 == server.host.engines["llama"].steps.aborted
        assert 0 == server.in_flight["llama"]

    settings = {"llama": NO_SLEEP, "qwen": NO_SLEEP}
    play(story, settings=settings, budget=Usage(6 * MIB), load=("llama",))


def test_a_parked_request_ends_when_its_time_is_over(play: Play) -> None:
    """A parked request ends with an explicit error when its time is over."""

    async def story(server: Server) -> None:
        stream = await parked_stream(server)

        await asyncio.sleep(31)

        answer = await stream.finish()
        await server.settled()
        assert "it was parked for more than 30 s" in answer.events[-1]
        assert (0, 1) == (server.in_flight["llama"], server.host.engines["llama"].steps.aborted)

    play(story, parked_timeout=30)


def test_a_parked_request_ends_when_its_client_leaves(play: Play) -> None:
    """A parked request ends at once when its client leaves, although nothing is sent to it."""

    async def story(server: Server) -> None:
        stream = await parked_stream(server)

        stream.disconnect()
        await server.settled()

        assert (0, 1) == (server.in_flight["llama"], server.host.engines["llama"].steps.aborted)

    play(story)


def test_no_more_are_parked_than_may_be(play: Play) -> None:
    """Only the oldest requests are parked, up to the limit; the others get the drain error."""

    async def story(server: Server) -> None:
        first = await server.start_stream("llama", words=8)
        second = await server.start_stream("llama", words=8)

        told = await park(server, "qwen")

        assert (1, 1) == (told["requests_parked"], told["requests_cut"])
        assert "drain_timeout" in (await second.finish()).events[-1]
        await switch(server, "llama")
        assert (await first.finish()).is_whole

    play(story, max_parked=1)


def test_a_switch_may_refuse_to_end_anything(play: Play) -> None:
    """A switch that aborts nothing gets 409, and the source stays active and unaffected."""

    async def story(server: Server) -> None:
        stream = await server.start_stream("llama", words=8)

        response = await server.switch("qwen", 5)

        assert (409, "drain_refused") == (
            response.status_code,
            response.json()["error"]["code"],
        )
        assert "1 requests to 'llama' were still running after 5 s" in response.text
        assert "llama" == (await server.ask("llama")).json()["model"]
        assert (await stream.finish()).is_whole
        assert 0 == server.coordinator.snapshot().switches_failed
        assert 200 == (await server.switch("qwen", 0)).status_code

    play(story, on_drain_timeout="refuse")


def test_a_failed_switch_lets_parked_requests_go_on(play: Play) -> None:
    """After a failed switch the source is back, and its parked requests continue."""

    async def story(server: Server) -> None:
        stream = await server.start_stream("llama", words=8)
        server.host.fail_next("load", "mistral", ConfigError("weights are broken"))

        body = {"model": "mistral", "drain_timeout": 0, "on_drain_timeout": "park"}
        response = await server.post("/v1/models/switch", json=body)

        assert 503 == response.status_code
        assert (await stream.finish()).is_whole
        assert [] == server.coordinator.registry.model("llama").parked

    play(story)


def test_answers_of_parked_requests_wait_for_the_verdict(play: Play) -> None:
    """Output of parked requests is held until their woken engine is verified."""

    async def story(server: Server) -> None:
        stream = await parked_stream(server)
        server.host.corrupt("llama")

        response = await server.switch("llama")

        assert 503 == response.status_code
        assert "failed in phase verify" in response.text
        *told, error = (await stream.finish()).events
        assert 2 == len(told)  # what was sent, or on its way, when it was parked
        assert "parked_request_ended" in error
        assert {"llama": "cold", "qwen": "active"} == {
            alias: server.residency(alias) for alias in ("llama", "qwen")
        }

    size = FakeSettings(weights_bytes=2 * MIB, kv_bytes=2 * MIB)
    play(story, settings={"llama": size, "qwen": size}, budget=Usage(6 * MIB), load=("llama",))


def test_stop_ends_parked_requests_at_once(play: Play) -> None:
    """A stop ends parked requests at once, however long running ones may take."""

    async def story(server: Server) -> None:
        stream = await parked_stream(server)
        began_s = asyncio.get_running_loop().time()

        await server.coordinator.shut_down(600)

        assert asyncio.get_running_loop().time() - began_s < 1
        assert "the server is shutting down" in (await stream.finish()).events[-1]

    play(story)


# --- bounds ---------------------------------------------------------------------------------


def test_a_client_that_takes_in_nothing_is_let_go(play: Play) -> None:
    """A request whose client reads nothing ends and frees its engine; a slow reader stays."""

    async def story(server: Server) -> None:
        watching = asyncio.create_task(server.app.router.disconnect_stalled_clients())
        stuck = await server.start_stream("llama", words=1000)
        slow = await server.start_stream("llama", words=1000)

        for _ in range(30):
            await asyncio.sleep(10)
            await slow.next_event()

        assert [slow.task] == [stream.task for stream in (stuck, slow) if not stream.task.done()]
        assert 1 == server.in_flight["llama"]
        metrics = (await server.get("/metrics")).text
        assert 'hotswap_clients_evicted_total{model="llama"} 1.0' in metrics
        slow.disconnect()
        watching.cancel()

    play(story, limits=LimitsConfig(client_timeout=60.0))


def test_a_model_has_no_more_in_flight_than_it_may(play: Play) -> None:
    """A request beyond the limit in flight of its model gets 429."""

    async def story(server: Server) -> None:
        stream = await server.start_stream("llama", words=8)

        response = await server.ask("llama")

        assert (429, "queue_full") == (response.status_code, response.json()["error"]["code"])
        await stream.finish()
        assert 200 == (await server.ask("llama")).status_code

    play(story, limits=LimitsConfig(in_flight=1))


def test_switch_calls_are_limited(play: Play) -> None:
    """Switch calls pass in a burst, then at the rate; calls for the active model do not count."""

    async def story(server: Server) -> None:
        for alias in ("qwen", "llama", "qwen"):
            await switch(server, alias)

        response = await server.switch("llama")
        assert (429, "2") == (response.status_code, response.headers["retry-after"])
        assert "switch_rate_limited" == response.json()["error"]["code"]
        assert not (await switch(server, "qwen"))["switched"]
        await asyncio.sleep(2)
        await switch(server, "llama")

    play(story, rate=0.5, burst=3)


def test_held_requests_count_as_in_flight(play: Play) -> None:
    """Requests held for a switch count toward their model's limit in flight."""

    async def story(server: Server) -> None:
        server.host.hold("activate", "qwen")
        switching = server.switch("qwen")
        await server.settled()
        held = [server.ask("qwen") for _ in range(2)]
        await server.settled()

        assert 429 == (await server.ask("qwen")).status_code

        server.host.release("activate", "qwen")
        await switching
        assert [200, 200] == [(await request).status_code for request in held]

    play(story, limits=LimitsConfig(in_flight=2))


def test_a_parked_request_ends_when_its_model_cannot_be_woken(play: Play) -> None:
    """Parked requests end with an error if their model cannot be woken; the next load has none."""

    async def story(server: Server) -> None:
        stream = await parked_stream(server)
        server.host.fail_next("wake", "llama", ConfigError("weights are gone"))

        assert 503 == (await server.switch("llama")).status_code

        answer = await stream.finish()
        assert "its model could not be woken" in answer.events[-1]
        assert 0 == server.in_flight["llama"]

    size = FakeSettings(weights_bytes=2 * MIB, kv_bytes=2 * MIB)
    play(story, settings={"llama": size, "qwen": size}, budget=Usage(6 * MIB), load=("llama",))
