"""Files of the expected next model are read ahead, and the benefit is counted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server
from vllm_hotswap.events import PredictionSettled
from vllm_hotswap.models.footprint import Usage
from vllm_hotswap.testing.fake_settings import FakeSettings

MIB = 1 << 20
ALIASES = ("a", "b", "c")


async def make(make_server: MakeServer, host_mib: float = 100, **kwargs: Any) -> Server:
    """Make a server whose device holds one model, so that every other one is cold."""
    settings = {alias: FakeSettings(levels=frozenset()) for alias in ALIASES}
    budget = Usage(2 * MIB, int(host_mib * MIB))
    return await make_server(
        aliases=ALIASES, load=("a",), default="a", settings=settings, budget=budget, **kwargs
    )


async def walk(server: Server, *aliases: str) -> None:
    for alias in aliases:
        assert 200 == (await server.switch(alias)).status_code
        await server.settled()


async def predictions(server: Server) -> dict[str, Any]:
    return dict((await server.get("/admin/status")).json()["predictions"])


def reads(server: Server) -> list[str]:
    return [alias for operation, alias in server.host.operations if operation == "prefetch"]


# --- predictions ------------------------------------------------------------------------------


async def test_likely_model_is_read_ahead(make_server: MakeServer) -> None:
    """A habitual next model is read ahead; the status has the expectation, and the hits."""
    server = await make(make_server)

    await walk(server, "b", "a", "b", "a")

    assert ["b"] == reads(server)
    assert {"model": "b", "probability": 0.643} == (await predictions(server))["next"]
    await walk(server, "b")
    assert {"hits": 1, "misses": 0, "used_bytes": MIB, "wasted_bytes": 0}.items() <= (
        await predictions(server)
    ).items()
    text = (await server.get("/metrics")).text
    assert 'hotswap_predictions_total{result="hit"} 1.0' in text
    assert 'hotswap_prefetched_bytes_total{result="used"} 1.048576e+06' in text


async def test_reading_stops_when_a_switch_goes_elsewhere(make_server: MakeServer) -> None:
    """Reading stops as a switch elsewhere starts; bytes read so far are waste."""
    server = await make(make_server)
    await walk(server, "b", "a", "b", "a")
    server.host.hold("load", "c")
    server.host.hold("prefetch", "b")
    await walk(server, "b", "a")  # read again, and held half-way
    reading = server.coordinator.registry.model("b").prefetch
    assert reading is not None

    switching = server.switch("c")
    await server.settled()
    assert reading.task.cancelled()
    assert server.coordinator.registry.model("b").prefetch is None

    server.host.release("load", "c")
    await switching
    tally = await predictions(server)
    assert (1, MIB // 2) == (tally["misses"], tally["wasted_bytes"])
    assert [True, False] == [event.hit for event in server.events.of(PredictionSettled)][-2:]


async def test_nothing_is_read_for_a_model_that_is_loaded(server: Server) -> None:
    """A predicted model that is loaded is not read, and the prediction counts nevertheless."""
    await walk(server, "qwen", "llama", "qwen", "llama", "qwen")

    assert [] == reads(server)
    assert 1 == (await predictions(server))["hits"]


async def test_recovery_is_neither_a_hit_nor_a_miss(make_server: MakeServer) -> None:
    """Recovery is neither a hit nor a miss, because no other model was requested."""
    server = await make(make_server)
    await walk(server, "b", "a", "b", "a")

    server.host.kill_engine("a")
    await server.settled()

    assert "a" == server.coordinator.active
    tally = await predictions(server)
    assert ("b", 0, 0) == (tally["next"]["model"], tally["hits"], tally["misses"])


async def test_predictions_are_off_with_one_setting(make_server: MakeServer) -> None:
    """With one setting, nothing is expected, read or counted."""
    server = await make(make_server, predict=False)

    await walk(server, "b", "a", "b", "a", "b", "a")

    assert [] == reads(server)
    assert {"next": None, "hits": 0, "misses": 0, "used_bytes": 0, "wasted_bytes": 0} == (
        await predictions(server)
    )


async def test_prediction_reads_no_more_than_there_is_to_spare(make_server: MakeServer) -> None:
    """A prediction reads no more than the spare memory, and nothing where there is none."""
    tight, none = await make(make_server, host_mib=0.5), await make(make_server, host_mib=0)

    for server in (tight, none):
        await walk(server, "b", "a", "b", "a", "b")

    assert MIB // 2 == (await predictions(tight))["used_bytes"]
    assert ([], 1) == (reads(none), (await predictions(none))["hits"])


# --- announcements ----------------------------------------------------------------------------


async def announce(server: Server, model: str) -> dict[str, Any]:
    return dict((await server.post("/admin/next", json={"model": model})).json())


async def test_announced_model_is_read_at_once(make_server: MakeServer) -> None:
    """An announced model is read at once, as the answer says; nothing is switched or evicted."""
    server = await make(make_server)

    answer = await announce(server, "c")
    await server.settled()

    assert answer == {
        "model": "c",
        "residency": "cold",
        "prefetch": "begun",
        "limit_bytes": MIB,
        "wake": "not_needed",
    }
    assert ([("prefetch", "c")], "a") == (server.host.operations, server.coordinator.active)
    assert "done" == (await announce(server, "c"))["prefetch"]
    await walk(server, "c")
    assert MIB == (await predictions(server))["used_bytes"]


async def test_announcement_outlives_switches_to_others(make_server: MakeServer) -> None:
    """An announcement lasts until its model is active, or another one is announced."""
    server = await make(make_server)
    await announce(server, "c")
    await walk(server, "b", "a")

    assert "done" == (await announce(server, "c"))["prefetch"]
    await announce(server, "b")

    assert MIB == (await predictions(server))["wasted_bytes"]
    assert server.coordinator.registry.model("c").prefetch is None


async def test_announcement_has_precedence_over_a_prediction(make_server: MakeServer) -> None:
    """Where there is room for one of them only, the announced model is read."""
    server = await make(make_server, host_mib=1)
    await walk(server, "b", "a", "b", "a")  # b is expected, and read
    assert MIB == server.coordinator.ladder.prefetches.held_bytes

    assert "begun" == (await announce(server, "c"))["prefetch"]
    await server.settled()

    assert ["b", "c"] == reads(server)
    assert server.coordinator.registry.model("b").prefetch is None


async def test_model_that_was_predicted_and_announced_counts_once(make_server: MakeServer) -> None:
    """A model that was predicted and announced counts once, because it was read once."""
    server = await make(make_server)
    await walk(server, "b", "a", "b", "a")

    assert "done" == (await announce(server, "b"))["prefetch"]
    await walk(server, "b")

    assert {"hits": 1, "used_bytes": MIB}.items() <= (await predictions(server)).items()


async def test_prefetch_that_was_called_for_is_not_given_up(make_server: MakeServer) -> None:
    """An explicit prefetch survives an announcement of its model, and then of another."""
    server = await make(make_server)
    await server.operate("b", "prefetch")

    assert "done" == (await announce(server, "b"))["prefetch"]
    assert "begun" == (await announce(server, "c"))["prefetch"]

    assert server.coordinator.registry.model("b").prefetch is not None
    assert 0 == (await predictions(server))["wasted_bytes"]


async def test_prefetch_is_called_for_by_whoever_joins_it(make_server: MakeServer) -> None:
    """An explicit call that joins a prefetch for an announcement keeps it from being cancelled."""
    server = await make(make_server)
    server.host.hold("prefetch", "b")
    assert "begun" == (await announce(server, "b"))["prefetch"]
    joined = server.operate("b", "prefetch")
    await server.settled()

    assert "begun" == (await announce(server, "c"))["prefetch"]
    server.host.release("prefetch", "b")

    assert MIB == (await joined).json()["prefetched_bytes"]
    assert 0 == (await predictions(server))["wasted_bytes"]


@pytest.mark.parametrize(
    ("alias", "prefetch"), [("a", "not_needed"), ("b", "no_room"), ("c", "no_room")]
)
async def test_answer_says_why_nothing_was_begun(
    make_server: MakeServer, alias: str, prefetch: str
) -> None:
    """The answer says that the model is active, or that the host budget has no room."""
    server = await make(make_server, host_mib=0)

    assert prefetch == (await announce(server, alias))["prefetch"]
    assert [] == server.host.operations


async def test_unknown_model_cannot_be_announced(server: Server) -> None:
    """Announcing an unknown model gets 404, as a switch does; a body without a model gets 400."""
    assert "model_not_found" == (await announce(server, "gpt"))["error"]["code"]
    assert 400 == (await server.post("/admin/next")).status_code


# --- the host budget --------------------------------------------------------------------------


async def test_prefetches_together_keep_to_the_host_budget(make_server: MakeServer) -> None:
    """Prefetches keep to the host budget while they run; a cancelled one returns its memory."""
    server = await make(make_server, host_mib=1.5)
    server.host.hold("prefetch", "b")

    first = server.operate("b", "prefetch")
    await server.settled()
    second = (await server.operate("c", "prefetch")).json()

    assert MIB // 2 == second["prefetched_bytes"]
    used = (await server.get("/admin/status")).json()["memory"]["host"]["used"]
    assert int(1.5 * MIB) == used
    await server.operate("b", "prefetch", cancel=True)
    await first
    assert MIB == (await server.operate("c", "prefetch")).json()["prefetched_bytes"]


async def test_load_gives_back_what_was_read_ahead(make_server: MakeServer) -> None:
    """A load returns what was read ahead, and files of others may use the memory."""
    server = await make(make_server, host_mib=1)
    await server.operate("b", "prefetch")
    assert 0 == (await server.operate("c", "prefetch")).json()["prefetched_bytes"]

    await walk(server, "b")

    assert MIB == (await server.operate("c", "prefetch")).json()["prefetched_bytes"]
