"""The soak's counts and figures, with answers that are right, wrong, lost and late. No vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.client import BadAnswer
from benchmarks.soak import results
from benchmarks.soak.__main__ import parse
from benchmarks.soak.actors import choose_case, choose_manner, seeded
from benchmarks.soak.cases import ALIASES, Case, all_cases, cosine, refuse_alike
from benchmarks.soak.growth import (
    Sample,
    Use,
    growth_per_restart,
    growths,
    sample,
    settled,
)
from benchmarks.soak.ledger import Ledger, Outcome, Verdict, judge, judge_call
from benchmarks.soak.run import (
    RECOVERY_S,
    Kill,
    Plan,
    Run,
    Switched,
    take_references,
)
from benchmarks.soak.runner import Found, configuration
from benchmarks.stats import pooled_slope, student_t
from benchmarks.wire import PATIENT, Manner, Reply, ask
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.demo import quickstart as demo

CASE = Case("llama", "/v1/completions", "Hello", 3)
CHAT = Case("llama", "/v1/chat/completions", "Hello", 3)
TEXTS = Case("embed", "/v1/embeddings", "Hello")
GOLDEN = "I am llama"
SLOW = Manner(pause_s=0.001)
IMPATIENT = Manner(deadline_s=0.05)


def http(status: int, content: object) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def event(data: object) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}\n\n".encode()


def piece(text: str, finish: str | None = None, model: str = "llama") -> bytes:
    return event({"model": model, "choices": [{"text": text, "finish_reason": finish}]})


def stream(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def whole(text: str = GOLDEN, finish: str = "length", model: str = "llama") -> bytes:
    return http(200, {"model": model, "choices": [{"text": text, "finish_reason": finish}]})


def embedding(*vector: float, model: str = "embed") -> bytes:
    return http(200, {"model": model, "data": [{"embedding": vector}]})


def error(code: str, message: str = "because") -> dict[str, Any]:
    return {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


DONE = event("[DONE]")
STREAM = stream(piece("I am"), piece(" llama", "length"), DONE)


@asynccontextmanager
async def answering(answer: bytes, *, then_hangs: bool = False) -> AsyncIterator[int]:
    """Run a server that answers everything with the same bytes, then closes or falls silent."""
    told_to_end = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if then_hangs:
            await told_to_end.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        told_to_end.set()


async def asked(
    answer: bytes,
    case: Case = CASE,
    reference: str | tuple[float, ...] = GOLDEN,
    manner: Manner = PATIENT,
    *,
    then_hangs: bool = False,
) -> Verdict:
    """Return the verdict on a request to a server that answers with these bytes."""
    async with answering(answer, then_hangs=then_hangs) as port:
        reply = await ask(port, case.path, case.body(stream=case.can_stream), manner)
    return judge(case, reference, reply, manner)


# --- how a request ends -----------------------------------------------------------------


async def test_a_whole_answer_that_is_the_golden_is_an_answer() -> None:
    """An answer equal to the golden one counts as answered, on all three kinds of routes."""
    chat = {"message": {"content": GOLDEN}, "finish_reason": "stop"}

    assert Outcome.ANSWERED is (await asked(whole())).outcome
    assert (
        Outcome.ANSWERED
        is (await asked(http(200, {"model": "llama", "choices": [chat]}), CHAT)).outcome
    )
    assert Outcome.ANSWERED is (await asked(embedding(0.6, 0.8), TEXTS, (0.6, 0.8))).outcome


async def test_a_stream_that_is_the_golden_is_an_answer() -> None:
    """A stream equal to the golden counts, also a chat with a role event first and usage last."""
    role = {"model": "llama", "choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]}
    text = {"model": "llama", "choices": [{"delta": {"content": GOLDEN}, "finish_reason": "stop"}]}
    usage = {"model": "llama", "choices": [], "usage": {}}
    chat = stream(*map(event, (role, text, usage)), DONE)

    assert Outcome.ANSWERED is (await asked(STREAM)).outcome
    assert Outcome.ANSWERED is (await asked(chat, CHAT)).outcome


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (b"", "before the answer was complete"),
        (whole()[:-3], "before the answer was complete"),
        (STREAM[:-20], "before the answer was complete"),
        (stream(piece("I am"), piece(" llama", "length")), "without [DONE] and without an error"),
    ],
    ids=["no head", "half a body", "half a stream", "no end of the stream"],
)
async def test_an_answer_that_ends_without_saying_so_is_lost(answer: bytes, detail: str) -> None:
    """A connection or stream that stops without its proper end is lost."""
    verdict = await asked(answer)

    assert Outcome.LOST is verdict.outcome
    assert detail in verdict.detail


async def test_a_request_that_nobody_accepts_is_lost() -> None:
    """A request that no server accepts is lost."""
    async with answering(b"") as port:
        pass
    reply = await ask(port, CASE.path, CASE.body())

    assert Outcome.LOST is judge(CASE, GOLDEN, reply).outcome
    assert "ConnectionRefusedError" in reply.detail


async def test_a_request_past_its_deadline_hangs() -> None:
    """A request past its deadline hangs, before the first byte or in the middle."""
    nothing = await asked(b"", manner=IMPATIENT, then_hangs=True)
    half = await asked(STREAM[:-20], manner=IMPATIENT, then_hangs=True)

    assert [Outcome.HUNG, Outcome.HUNG] == [nothing.outcome, half.outcome]


async def test_a_client_that_leaves_is_no_loss() -> None:
    """A client that leaves after a time, or after some events, is not a loss."""
    soon = Manner(leave_after_s=0.02)
    early = Manner(leave_after_events=1)

    assert Outcome.LEFT is (await asked(b"", manner=soon, then_hangs=True)).outcome
    assert Outcome.LEFT is (await asked(STREAM, manner=early)).outcome


async def test_what_a_client_has_read_before_it_left_is_checked() -> None:
    """What a client read before it left is still checked."""
    verdict = await asked(stream(piece("I am qwen"), DONE), manner=Manner(leave_after_events=1))

    assert Outcome.WRONG is verdict.outcome


async def test_a_slow_client_gets_everything() -> None:
    """A slow client gets everything, however small its buffers are."""
    long = "llama " * 5000
    chunks = [piece(long[at : at + 100]) for at in range(0, len(long), 100)]
    answer = stream(*chunks, piece("", "length"), DONE)

    assert Outcome.ANSWERED is (await asked(answer, reference=long, manner=SLOW)).outcome


async def test_only_a_slow_client_may_lose_its_connection() -> None:
    """Only a slow client may lose its connection, once its answer started."""
    cut = STREAM[:-20]

    assert Outcome.EVICTED is (await asked(cut, manner=SLOW)).outcome
    assert Outcome.LOST is (await asked(cut)).outcome
    assert Outcome.LOST is (await asked(b"", manner=SLOW)).outcome


async def test_events_have_the_time_at_which_they_were_complete() -> None:
    """Events have the time at which they were complete, however they were split on the way."""
    body = bytearray(b"data: a\n\n: parked\n\ndata: b\n\n")
    reply = Reply(body=body, arrivals=[(4, 1.0), (20, 2.0), (len(body), 3.0)])

    assert [(2.0, "data: a"), (2.0, ": parked"), (3.0, "data: b")] == reply.events()


# --- what is wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "detail"),
    [
        (whole(model="qwen"), "asked 'llama', but qwen answered"),
        (whole("I am qwen"), "'I am qwen' instead of 'I am llama'"),
        (whole("I am"), "'I am' instead of 'I am llama'"),
        (whole("I am llama, and"), "instead of 'I am llama'"),
        (whole(finish="abort"), "finish_reason 'abort'"),
        (stream(piece("I am"), DONE), "'I am' instead of 'I am llama'"),
        (stream(piece("I am"), piece(" llama", "length", "qwen"), DONE), "qwen answered"),
        (stream(piece("I am qwen"), event(error("drain_timeout"))), "instead of 'I am llama'"),
        (http(500, error("wrong_stamp")), "the stamp of another model"),
        (stream(DONE), "'' instead of"),
    ],
)
async def test_an_answer_that_the_model_alone_would_not_give_is_wrong(
    answer: bytes, detail: str
) -> None:
    """An answer is wrong if another model made it, its text differs, or it is silently cut."""
    verdict = await asked(answer)

    assert Outcome.WRONG is verdict.outcome
    assert detail in verdict.detail


@pytest.mark.parametrize("vector", [(0.8, 0.6), (0.6, 0.8, 0.0), (0.62, 0.78)])
async def test_an_embedding_of_another_direction_is_wrong(vector: tuple[float, ...]) -> None:
    """An embedding of another direction or size is wrong."""
    assert Outcome.WRONG is (await asked(embedding(*vector), TEXTS, (0.6, 0.8))).outcome


@pytest.mark.parametrize(
    "answer",
    [
        http(500, error("internal_error")),
        http(400, error("invalid_request")),
        http(503, error("drain_timeout", message="")),
        http(502, b"<html>Bad Gateway</html>"),
        http(200, {"model": "llama"}),
        stream(event(error("drain_timeout")), DONE),
        stream(piece("I am"), event(error("internal_error"))),
        stream(event("[]")),
    ],
)
async def test_an_error_that_the_contract_does_not_know_is_told(answer: bytes) -> None:
    """An unknown error is reported: half an object, one followed by [DONE], or anything else."""
    assert Outcome.UNEXPECTED is (await asked(answer)).outcome


@pytest.mark.parametrize(
    ("status", "code", "outcome"),
    [
        (404, "model_not_active", Outcome.REFUSED),
        (409, "switch_in_progress", Outcome.REFUSED),
        (429, "queue_full", Outcome.REFUSED),
        (503, "model_switching", Outcome.REFUSED),
        (503, "drain_timeout", Outcome.FAILED),
        (503, "engine_unavailable", Outcome.FAILED),
        (503, "parked_request_ended", Outcome.FAILED),
        (504, "wait_timeout", Outcome.FAILED),
    ],
)
async def test_an_error_says_whether_a_request_was_accepted(
    status: int, code: str, outcome: Outcome
) -> None:
    """An error's code tells whether the request was accepted."""
    verdict = await asked(http(status, error(code)))

    assert (outcome, code) == (verdict.outcome, verdict.detail)


async def test_a_stream_may_end_with_an_error() -> None:
    """A stream may end with an error after a correct start, without [DONE]."""
    verdict = await asked(stream(piece("I am"), event(error("drain_timeout"))))

    assert Verdict(Outcome.FAILED, "drain_timeout") == verdict


async def test_a_stream_that_was_parked_is_known_by_its_comment() -> None:
    """A parked stream is recognised by its comment, and must have the same text."""
    parked = stream(piece("I am"), b": parked\n\n", piece(" llama", "length"), DONE)
    mixed = stream(piece("I am"), b": parked\n\n", piece(" qwen", "length"), DONE)

    assert Verdict(Outcome.ANSWERED, "", was_parked=True) == await asked(parked)
    assert (Outcome.WRONG, True) == ((v := await asked(mixed)).outcome, v.was_parked)


async def test_calls_are_judged_by_their_errors() -> None:
    """Calls are judged by their errors; the code that sends them checks their answers."""
    for answer, outcome in (
        (http(200, {"switched": True}), Outcome.ANSWERED),
        (http(409, error("drain_refused")), Outcome.REFUSED),
        (http(503, error("switch_failed")), Outcome.FAILED),
        (http(500, error("internal_error")), Outcome.UNEXPECTED),
        (http(500, b"oh"), Outcome.UNEXPECTED),
        (b"", Outcome.LOST),
    ):
        async with answering(answer) as port:
            assert outcome is judge_call(await ask(port, "/v1/models/switch", {})).outcome


# --- counts -----------------------------------------------------------------------------


def test_every_request_has_one_end() -> None:
    """Every request has one end: a second is an error of the soak, a missing one is reported."""
    ledger = Ledger()
    first, _ = ledger.begin("stream"), ledger.begin("stream")
    ledger.end(first, Verdict(Outcome.ANSWERED), Reply(), "")

    assert 1 == ledger.unaccounted
    assert {2: "stream"} == ledger.open
    with pytest.raises(KeyError):
        ledger.end(first, Verdict(Outcome.ANSWERED), Reply(), "")


def test_faults_are_kept_with_what_was_asked() -> None:
    """Faults are kept with their requests, so that the cause can be found."""
    ledger = Ledger()
    reply = Reply(status=200, body=bytearray(b"I am qwen"), sent_s=1.0, ended_s=3.0)
    ledger.end(ledger.begin("stream"), Verdict(Outcome.WRONG, "qwen"), reply, "llama 'Hello'")

    (fault,) = ledger.faults
    assert ("llama 'Hello'", "qwen", "I am qwen") == (
        fault["what"],
        fault["detail"],
        fault["body_end"],
    )
    assert (1, 2.0) == (ledger.total(Outcome.WRONG), ledger.longest_s)


@dataclass
class StandIn:
    """The parts of a server that a run uses."""

    port: int = 0
    exit_status: int | None = None


def run_of(server: Any = None) -> Run:
    """Return a run in which everything required has happened, and nothing else."""
    plan = Plan(60.0, 1, 20.0, 4, ("abort", "park", "refuse"))
    run = Run(server or StandIn(), plan, {CASE: GOLDEN}, Path("none"))
    happened = [
        ("stream", Verdict(Outcome.ANSWERED, was_parked=True)),
        ("stream", Verdict(Outcome.LEFT)),
        ("whole answer", Verdict(Outcome.ANSWERED)),
        ("embedding", Verdict(Outcome.ANSWERED)),
    ]
    for kind, verdict in happened:
        run.ledger.end(run.ledger.begin(kind), verdict, Reply(), "")
    run.switched["one"] = Switched(1.0, "qwen", "park", 0.0, 2, 3.0, {"drain": 1.0}, 0, 1)
    run.kills.append(Kill("SIGKILL", "idle", 5.0, noticed_s=0.1, ready_s=4.0, answered_s=4.5))
    return run


def found_of(run: Run, **changes: Any) -> Found:
    counters = {"hotswap_host_restarts_total": 1.0}
    return replace(Found(run, counters, 0, 0, (), 0), **changes)


def failed(found: Found) -> list[str]:
    return [check.name for check in results.checks(found) if check.count]


def test_a_run_without_faults_passes() -> None:
    """A run without faults passes: all counts that must be 0 are 0."""
    assert [] == failed(found_of(run_of()))


async def test_a_wrong_answer_fails_the_run() -> None:
    """A wrong answer fails the run, from the wire to the check."""
    async with answering(whole("I am qwen")) as port:
        run = run_of(StandIn(port))
        await run.request(CASE)

    assert ["requests wrong"] == failed(found_of(run))


async def test_a_lost_answer_fails_the_run() -> None:
    """A lost answer fails the run, from the wire to the check."""
    async with answering(whole()[:-1]) as port:
        run = run_of(StandIn(port))
        await run.request(CASE)

    assert ["requests lost"] == failed(found_of(run))


async def test_an_answer_that_hangs_fails_the_run() -> None:
    """An answer that hangs fails the run, from the wire to the check."""
    async with answering(b"", then_hangs=True) as port:
        run = run_of(StandIn(port))
        await run.request(CASE, manner=IMPATIENT)

    assert ["requests hung"] == failed(found_of(run))


async def test_a_call_with_an_unknown_error_fails_the_run() -> None:
    """A call with an unknown error fails the run, from the wire to the check."""
    async with answering(http(500, error("internal_error"))) as port:
        run = run_of(StandIn(port))
        told = await run.call("switch call", "/v1/models/switch", {"model": "qwen"})

    assert told is None
    assert ["requests unexpected error"] == failed(found_of(run))


async def test_a_request_that_never_ended_fails_the_run() -> None:
    """A request that is still open when a run ends fails the run."""
    run = run_of()
    run.ledger.begin("stream")

    assert ["requests without an outcome"] == failed(found_of(run))


async def test_a_status_that_does_not_come_fails_the_run() -> None:
    """A failed read of `/admin/status` or `/ready` fails the run."""
    async with answering(b"") as port:
        run = run_of(StandIn(port))
        assert (0, None) == await run.get("/ready")

    assert ["other problems"] == failed(found_of(run))


def unrecovered(run: Run) -> None:
    run.kills.append(Kill("SIGSTOP", "drain", 9.0, noticed_s=0.1))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda run: run.switched.clear(), "no switch"),
        (lambda run: run.ledger.parked.clear(), "no parked stream that was resumed"),
        (
            lambda run: run.ledger.counts.pop(("embedding", Outcome.ANSWERED)),
            "no embedding",
        ),
        (unrecovered, "kills without a recovery"),
        (lambda run: run.problem("two switches have the same epoch"), "other problems"),
    ],
)
def test_what_did_not_happen_proves_nothing(change: Callable[[Run], object], name: str) -> None:
    """A run without, for example, parked streams fails, because its zeros prove nothing."""
    run = run_of()
    change(run)

    assert name in failed(found_of(run))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"exit_status": 1}, "exit status after SIGTERM"),
        ({"exit_status": None}, "exit status after SIGTERM"),
        ({"processes_left": 2}, "processes left behind"),
        ({"counters": {"hotswap_outputs_refused_total": 1.0}}, "outputs with a wrong stamp"),
        ({"counters": {"hotswap_host_restarts_total": 2.0}}, "unexpected restarts"),
    ],
)
def test_what_a_server_leaves_behind_fails_the_run(changes: dict[str, Any], name: str) -> None:
    """Processes left behind, a wrong exit status or the server's own counters fail the run."""
    assert [name] == failed(found_of(run_of(), **changes))


def test_the_tables_and_the_data_tell_the_same() -> None:
    """Tables and data have the same counts, as texts for people and numbers for programs."""
    part = results.part(found_of(run_of()))
    by_title = {table.title: table for table in part.tables}

    assert ["whole", "drain"] == [row[0] for row in by_title["Switches, ms"].rows]
    assert ("stream", "1", "0", "1", *"000000") in by_title["Requests"].rows
    assert ("median", "0.10", "4.00", "4.50") in by_title["Recovery, s from the signal"].rows
    assert 1 == part.samples["requests"]["stream"]["answered"]
    assert {"answered": 1} == part.samples["streams_that_were_parked"]
    json.dumps(part.samples)


async def test_recovery_ends_with_an_answer_to_a_request_sent_after_the_kill() -> None:
    """Recovery ends with the answer to a request that was sent after the kill, not before."""
    async with answering(whole()) as port:
        run = run_of(StandIn(port))
        run.kills.append(Kill("SIGKILL", "idle", at_s=float("inf")))
        await run.request(CASE)
        assert run.kills[-1].answered_s is None

        run.kills[-1].at_s = 0.0
        await run.request(CASE)
        assert run.kills[-1].answered_s is not None


def test_a_run_is_not_over_before_its_last_kill_has_been_recovered_from() -> None:
    """A run waits until its last kill is recovered from or cannot be, or the server ended."""
    server = StandIn()
    run = run_of(server)
    run.started_s = float("-inf")
    assert run.is_over

    run.kills.append(Kill("SIGKILL", "idle", at_s=time.perf_counter(), ready_s=1.0))
    assert not run.is_over

    run.kills[-1].at_s -= RECOVERY_S
    assert run.is_over

    run.kills[-1] = Kill("SIGKILL", "idle", at_s=time.perf_counter())
    server.exit_status = 1
    assert run.is_over


# --- goldens ----------------------------------------------------------------------------


async def test_goldens_are_what_models_answer_alone() -> None:
    """Goldens are what each model answers alone; a switch uses one of them, too."""
    async with answering(whole()) as port:
        assert {CASE: GOLDEN} == await take_references(StandIn(port), [CASE])


async def test_a_server_that_does_not_answer_alone_is_not_soaked() -> None:
    """A server that does not answer a request alone is not soaked, and its answer is reported."""
    async with answering(http(500, error("internal_error"))) as port:
        with pytest.raises(BadAnswer, match=r"'llama' did not answer 'Hello': .*internal_error"):
            await take_references(StandIn(port), [CASE])


def test_models_that_answer_alike_prove_nothing() -> None:
    """Models that answer alike are refused, because a wrong answer would pass for a right one."""
    other = replace(CASE, alias="qwen")

    refuse_alike({CASE: "I am llama", other: "I am qwen"})
    with pytest.raises(BadAnswer, match="as another model does"):
        refuse_alike({CASE: "I am", other: "I am"})
    with pytest.raises(BadAnswer, match="gives an empty answer"):
        refuse_alike({CASE: "", other: "I am"})


def test_cases_are_of_all_models_and_kinds() -> None:
    """Cases cover all models and kinds: short and long text, and embeddings without streams."""
    cases = all_cases()

    assert {"llama", "qwen", "embed"} == {case.alias for case in cases}
    assert {False} == {case.can_stream for case in cases if case.alias == "embed"}
    assert len(cases) == len(set(cases))


def test_the_cosine_of_vectors() -> None:
    """Cosines are right for equal directions, right angles and different sizes."""
    assert [1.0, 0.0, 0.0] == [
        pytest.approx(cosine((1.0, 2.0), (2.0, 4.0))),
        cosine((1.0, 0.0), (0.0, 1.0)),
        cosine((1.0,), (1.0, 0.0)),
    ]


# --- chance -----------------------------------------------------------------------------


def test_one_seed_gives_the_same_choices() -> None:
    """A seed gives the same choices again, and different ones for each actor."""
    by_alias = {alias: [c for c in all_cases() if c.alias == alias] for alias in ALIASES}

    def choices(seed: int, name: str) -> list[object]:
        numbers = seeded(seed, [name])[name]
        return [choose_case(numbers, by_alias, "llama") for _ in range(20)]

    assert choices(1, "a") == choices(1, "a")
    assert choices(1, "a") != choices(1, "b")
    assert choices(1, "a") != choices(2, "a")


def test_clients_behave_in_every_manner() -> None:
    """Clients behave in every manner, including leaving and reading slowly."""
    numbers = seeded(1, ["test"])["test"]
    manners = [choose_manner(numbers, stream=True) for _ in range(200)]

    assert any(manner.is_slow for manner in manners)
    assert any(manner.leave_after_s is not None for manner in manners)
    assert any(manner.leave_after_events is not None for manner in manners)
    assert 100 < sum(manner == Manner(manner.deadline_s) for manner in manners) < 180


# --- growth -----------------------------------------------------------------------------


def samples(host: int, switches: range, server_mib: float, host_mib: float) -> list[Sample]:
    """Return a host's samples, every ten switches; host and server grow by so much per switch."""
    return [
        Sample(
            at_s=float(number),
            switches=number,
            host_pid=host,
            all_loaded=number >= switches.start + 10,
            server=Use(0, round((100 + number * server_mib) * (1 << 20)), 10, 50),
            host=Use(0, round((host + (number - switches.start) * host_mib) * (1 << 20)), 20, 9),
            children=1,
            temp_files=3,
            shm_files=5,
        )
        for number in switches
    ]


def test_growth_is_measured_once_a_host_is_warm() -> None:
    """Growth is measured per host, after all models are loaded and twenty more switches."""
    all_samples = samples(1, range(0, 100, 10), 0, 0) + samples(2, range(100, 200, 10), 0, 0)

    assert [[30, 90], [130, 190]] == [[s[0].switches, s[-1].switches] for s in settled(all_samples)]


def test_growth_of_a_host_is_within_its_life_and_a_new_one_starts_afresh() -> None:
    """Growth is measured within a host's life: the difference between two hosts is not growth."""
    all_samples = samples(1, range(0, 200, 10), 0, 0.5) + samples(900, range(200, 400, 10), 0, 0.5)
    by_name = {growth.name: growth for growth in growths(all_samples)}

    slope = by_name["host: USS"].slope
    assert slope is not None
    assert 0.5 == pytest.approx(slope.value)
    threads = by_name["host: threads"].slope
    assert threads is not None
    assert (0.0, 0.0) == (threads.value, threads.upper)


def test_what_each_restart_adds_to_the_server_is_told() -> None:
    """A restart's effect on the server is measured from the middle of one host to the next."""
    levels = samples(1, range(0, 110, 10), 0, 0) + samples(2, range(110, 220, 10), 0.1, 0)

    (step,) = growth_per_restart(levels)
    assert 18.0 == pytest.approx(step)


def test_a_run_that_is_too_short_has_no_growth() -> None:
    """A run that is too short has no growth figure, rather than one from two samples."""
    assert [] == growths(samples(1, range(0, 20, 10), 0, 0))
    assert all(growth.slope is None for growth in growths(samples(1, range(0, 50, 10), 0, 0)))


def test_a_sample_is_of_real_processes(tmp_path: Path) -> None:
    """A sample is of real processes, and there is none of a process that is gone."""
    (tmp_path / "socket").touch()
    here = (os.getpid(), os.getpid())
    taken = sample(1.0, 2, here, tmp_path, all_loaded=True)
    assert taken is not None
    assert (1, True) == (taken.temp_files, taken.server.uss_bytes > 1 << 20)
    assert taken.server.threads >= 1

    assert sample(1.0, 2, (os.getpid(), 1 << 30), tmp_path, all_loaded=True) is None


# --- statistics -------------------------------------------------------------------------


def test_the_slope_of_a_line_is_exact() -> None:
    """The slope of a line is exact at any levels of its segments, and certain without noise."""
    slope = pooled_slope(
        [[(x, 2 * x) for x in range(5)], [(x, 2 * x + 100) for x in range(50, 60)]]
    )

    assert slope is not None
    assert (2.0, 2.0, 15) == (pytest.approx(slope.value), pytest.approx(slope.upper), slope.points)


def test_the_bound_holds_what_it_promises() -> None:
    """About 95 % of 400 noisy lines lie below their bound."""
    numbers = seeded(1, ["test"])["test"]
    slopes = [
        pooled_slope([[(x, 0.3 * x + numbers.gauss(0, 5)) for x in range(30)] for _ in range(2)])
        for _ in range(400)
    ]

    held = sum(slope is not None and slope.upper > 0.3 for slope in slopes)
    assert 0.92 < held / 400 < 0.99


def test_neighbours_that_resemble_each_other_tell_less() -> None:
    """Correlated neighbours give a wider bound, so a random walk seldom passes for growth."""
    numbers = seeded(1, ["test"])["test"]
    noise = [(x, numbers.gauss(0, 1)) for x in range(60)]
    level, walk = 0.0, []
    for x, step in noise:
        level = 0.9 * level + step
        walk.append((x, level))
    apart, alike = pooled_slope([noise]), pooled_slope([walk])

    assert apart is not None
    assert alike is not None
    assert alike.upper - alike.value > 3 * (apart.upper - apart.value)


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [[(1.0, 1.0)]],
        [[(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]],
        [[(1.0, float(y)) for y in range(9)]],
    ],
)
def test_too_little_has_no_slope(segments: list[list[tuple[float, float]]]) -> None:
    """Without a point to spare, or with a single place, there is no slope."""
    assert pooled_slope(segments) is None


@pytest.mark.parametrize(("freedom", "value"), [(3, 2.353), (5, 2.015), (10, 1.812), (200, 1.6525)])
def test_students_quantile_is_the_printed_one(freedom: int, value: float) -> None:
    """Student's quantile matches the printed tables for 95 %, one-sided."""
    assert student_t(0.95, freedom) == pytest.approx(value, rel=0.004)


# --- the server's configuration -----------------------------------------------------------


def test_the_server_is_given_deadlines_that_a_soak_meets(tmp_path: Path) -> None:
    """The server's deadlines for parking and hangs suit a soak; restarts suffice for every kill."""
    plan = parse([]).plan
    models = demo.write(tmp_path / "models").parent
    path = tmp_path / "soak.yaml"
    path.write_text(json.dumps(configuration(models, plan)))
    config = load_config(path)

    assert ALIASES == config.aliases
    assert config.switching.parked_timeout < 10
    assert config.recovery.hang_timeout < 10
    assert config.recovery.max_restarts > plan.duration_s / plan.kill_every_s


# --- options ----------------------------------------------------------------------------


def test_fifteen_minutes_with_everything_are_the_default() -> None:
    """The defaults are fifteen minutes with everything, as the pages say."""
    plan = parse([]).plan

    assert (900.0, 120.0, ("abort", "park", "refuse")) == (
        plan.duration_s,
        plan.kill_every_s,
        plan.policies,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--minutes", "nan"], "--minutes must be above 0"),
        (["--kill-every", "-1"], "--kill-every must be at least 0"),
        (["--clients", "1"], "--clients must be at least 2"),
        (["--policies", "parc"], "--policies: unknown parc; known: abort,park,refuse"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options that make no sense are refused before anything starts."""
    with pytest.raises(SystemExit):
        parse(arguments)

    assert message in capsys.readouterr().err
