"""The floods: each is what one connection does repeatedly, and how many connections do it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.floods.line import Attack, request
from vllm_hotswap.config.settings import LimitsConfig

MIB = 1 << 20
ANSWERS = LimitsConfig().answers_per_call
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

STEP_S = 0.01
"""Seconds of work before the event loop runs other tasks."""

FIELD_EVERY_S = 1.0
"""How often a head that does not end gets one more header field."""

SIP_BYTES, SIP_PAUSE_S = 512, 0.1
"""How much a slow reader reads, and how long it then pauses."""

PIPELINED = 64
"""Requests in one piece: four times as many as a connection may send ahead."""

RUN_S = 0.002
"""Enough for a request to be read."""

EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

Once = Callable[[Attack], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A flood."""

    name: str
    what: str
    """What is sent, and with which key; for readers of the report."""
    once: Once
    connections: int
    shows: frozenset[str]
    """Any of these outcomes shows that it has reached its aim."""
    is_control: bool = False
    """Whether it does not flood the server, but is what others are compared with."""


# --- what they are compared with -------------------------------------------------------------


async def _nobody(attack: Attack) -> None:
    attack.note("idle")
    await asyncio.sleep(3600)


async def _busy(attack: Attack) -> None:
    """Keep a core busy, as a flood's own process does."""
    attack.note("busy")
    until_s = time.perf_counter() + STEP_S
    while time.perf_counter() < until_s:
        pass
    await asyncio.sleep(0)


async def _elsewhere(attack: Attack) -> None:
    """Send requests to a server in the attacker's own process, as fast as possible."""
    listener = await asyncio.start_server(_answer, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname()[:2])
    try:
        while True:
            writer.write(request("GET", "/"))
            await reader.readexactly(len(EMPTY))
            attack.note("200")
    finally:
        writer.close()
        listener.close()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(EMPTY)
    except (asyncio.IncompleteReadError, OSError):
        writer.close()


def _long_stream(attack: Attack) -> bytes:
    body = {
        "model": attack.target.alias,
        "prompt": "Tell me more",
        "max_tokens": 1500,
        "n": 2,
        "temperature": 1,
        "ignore_eos": True,
        "stream": True,
    }
    return request("POST", COMPLETIONS, _json(body), attack.target.user_key)


async def _streams(attack: Attack) -> None:
    async with attack.line() as line:
        await line.send(_long_stream(attack))
        await line.answer()


# --- connections and heads -------------------------------------------------------------------


async def _connects(attack: Attack) -> None:
    (await attack.socket()).close()
    attack.note("connected")


async def _silent(attack: Attack) -> None:
    async with attack.line() as line:
        attack.note("connected")
        await line.answer()


async def _unfinished_heads(attack: Attack) -> None:
    async with attack.line() as line, line.answering() as answer:
        await line.send(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        attack.note("begun")
        while not (await asyncio.wait([answer], timeout=FIELD_EVERY_S))[0]:
            await line.send(b"X-A: b\r\n")
        await answer


async def _large_heads(attack: Attack) -> None:
    """Send one field of a MiB, then as many fields as fit, then more than that."""
    forms = (
        [f"X-A: {'b' * MIB}"],
        [f"X-{number}: {'b' * 200}" for number in range(250)],
        [f"X-{number}: b" for number in range(5000)],
    )
    heads = attack.kept.setdefault(
        "heads", [request("GET", "/health", b"", "", *form) for form in forms]
    )
    async with attack.line() as line, line.answering() as answer:
        await line.send(heads[next(attack.number) % len(heads)])
        await answer


async def _pipelined(attack: Attack) -> None:
    async with attack.line() as line:
        await line.send(request("GET", "/health") * PIPELINED)
        for _ in range(PIPELINED):
            await line.answer()


# --- requests without permission ---------------------------------------------------------------


async def _again(attack: Attack, content: bytes) -> None:
    """Send the same request on one connection, again after each answer."""
    async with attack.line() as line:
        while True:
            await line.send(content)
            await line.answer()


async def _wrong_keys(attack: Attack) -> None:
    await _again(attack, request("GET", "/v1/models", b"", "sk-nobody-has-this-key"))


async def _switches(attack: Attack) -> None:
    body = _json({"model": attack.target.alias})
    await _again(attack, request("POST", "/v1/models/switch", body, attack.target.user_key))


async def _beyond_rate(attack: Attack) -> None:
    body = _json({"model": attack.target.alias, "prompt": "Hi", "max_tokens": 1})
    await _again(attack, request("POST", COMPLETIONS, body, attack.target.rated_key))


async def _hit_and_run(attack: Attack) -> None:
    """Send a request, and reset the connection before there is an answer."""
    async with attack.line() as line:
        await line.send(request("GET", "/v1/models", b"", "sk-nobody-has-this-key"))
        attack.note("sent")
        await asyncio.sleep(RUN_S)


async def _websockets(attack: Attack) -> None:
    path = f"/v1/realtime?model={attack.target.alias}"
    fields = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    async with attack.line() as line:
        await line.send(request("GET", path, b"", attack.target.user_key, *fields))
        await line.answer()


# --- bodies -----------------------------------------------------------------------------------


async def _unfinished_bodies(attack: Attack) -> None:
    """Send half of 64 MiB, as long as the server does not object, then nothing more."""
    begin = b'{"prompt": "'
    head = request("POST", COMPLETIONS, begin, attack.target.user_key, length=64 * MIB)
    piece = attack.kept.setdefault("piece", b"x" * MIB)
    async with attack.line() as line, line.answering() as answer:
        await line.send(head)
        attack.note("begun")
        for _ in range(32):
            if not answer.done():
                await line.send(piece)
        await answer


async def _junk(attack: Attack) -> None:
    """Send a body close to the bound of values, which the frontend keeps until the answer ends."""
    if "junk" not in attack.kept:
        body = {
            "model": attack.target.alias,
            "messages": [{"role": "user", "content": "Hi"}],
            "chat_template_kwargs": {"junk": ["ab"] * 950_000},
            "max_tokens": 500,
            "ignore_eos": True,
            "stream": True,
        }
        attack.kept["junk"] = request("POST", CHAT, _json(body), attack.target.user_key)
    async with attack.line() as line, line.answering() as answer:
        await line.send(attack.kept["junk"])
        attack.note("sent")
        await answer


async def _invalid_json(attack: Attack) -> None:
    body = b'{"model": "' + attack.target.alias.encode() + b'", "prompt": ' + b"[" * (256 << 10)
    await _again(attack, request("POST", COMPLETIONS, body, attack.target.user_key))


async def _responses(attack: Attack) -> None:
    body = {"input": "word " * 200, "max_output_tokens": 1, "store": True}
    await _ask(attack, "/v1/responses", body)


# --- what engines do ---------------------------------------------------------------------------


async def _ask(attack: Attack, path: str, body: Mapping[str, Any]) -> None:
    content = _json({"model": attack.target.alias, **body})
    async with attack.line() as line:
        await line.send(request("POST", path, content, attack.target.user_key))
        attack.note("sent")
        await line.answer()


async def _schemas(attack: Attack) -> None:
    """Send grammars close to their bounds, never the same twice."""
    unique = f"{attack.seed}{next(attack.number)}"
    names = [f"p{unique}_{index}" for index in range(1700)]
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    form = {"type": "json_schema", "json_schema": {"name": "flood", "schema": schema}}
    messages = [{"role": "user", "content": "Hi"}]
    await _ask(attack, CHAT, {"messages": messages, "max_tokens": 1, "response_format": form})


async def _prompts(attack: Attack) -> None:
    prompts = [f"{number} is a number" for number in range(ANSWERS // 2)]
    await _ask(attack, COMPLETIONS, {"prompt": prompts, "n": 2, "temperature": 1, "max_tokens": 1})


async def _answers(attack: Attack) -> None:
    body = {"prompt": "Hi", "n": ANSWERS, "temperature": 1, "max_tokens": 8, "ignore_eos": True}
    await _ask(attack, COMPLETIONS, body)


async def _items(attack: Attack) -> None:
    items = [f"{number} is a number" for number in range(ANSWERS)]
    body = {"query": "Is it?", "items": items, "label_token_ids": [5, 6]}
    await _ask(attack, "/generative_scoring", body)


async def _conversations(attack: Attack) -> None:
    messages = [[{"role": "user", "content": f"Hi {number}"}] for number in range(ANSWERS)]
    await _ask(attack, "/v1/chat/completions/batch", {"messages": messages, "max_tokens": 1})


async def _slow_readers(attack: Attack) -> None:
    async with attack.line(receive_bytes=4096) as line:
        await line.send(_long_stream(attack))
        await line.sip(SIP_BYTES, SIP_PAUSE_S)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _shows(*outcomes: str) -> frozenset[str]:
    return frozenset(outcomes)


_CONTROLS = (
    Kind("nobody", "nothing at all", _nobody, 1, _shows("idle"), True),
    Kind("busy process", "nothing; it burns one core", _busy, 1, _shows("busy"), True),
    Kind("elsewhere", "requests to a server of its own", _elsewhere, 8, _shows("200"), True),
    Kind("long streams", "3,000 tokens each, read at once", _streams, 24, _shows("200"), True),
)
_FLOODS = (
    Kind("connects", "connections, reset at once", _connects, 32, _shows("connected")),
    Kind("silent", "connections that send nothing", _silent, 4000, _shows("connected")),
    Kind(
        "unfinished heads",
        "one field per second, endless",
        _unfinished_heads,
        2000,
        _shows("begun"),
    ),
    Kind("large heads", "1 MiB, 250 and 5,000 fields", _large_heads, 24, _shows("431")),
    Kind("pipelined", "64 requests in one piece", _pipelined, 24, _shows("200")),
    Kind("wrong keys", "`GET /v1/models`", _wrong_keys, 32, _shows("401")),
    Kind("hit and run", "the same; answers are not read", _hit_and_run, 32, _shows("sent")),
    Kind("switches", "by a user's key", _switches, 32, _shows("403")),
    Kind("beyond the rate", "completions", _beyond_rate, 32, _shows("429")),
    Kind("websockets", "to a model without them", _websockets, 32, _shows("404", "400")),
    Kind("unfinished bodies", "32 of 64 MiB", _unfinished_bodies, 32, _shows("408", "429")),
    Kind("junk bodies", "950,000 values, 500 tokens", _junk, 8, _shows("200")),
    Kind("invalid JSON", "256 KiB of brackets", _invalid_json, 16, _shows("400")),
    Kind("kept responses", "small ones, kept", _responses, 16, _shows("200")),
    Kind("schemas", "1,700 properties, 60 KB", _schemas, 16, _shows("200")),
    Kind("prompts", f"{ANSWERS // 2} prompts, `n: 2`", _prompts, 4, _shows("200", "429")),
    Kind("answers", f"`n: {ANSWERS}`", _answers, 4, _shows("200", "429")),
    Kind("items", f"{ANSWERS} `items` to score", _items, 4, _shows("200", "429")),
    Kind("conversations", f"{ANSWERS} in a batch", _conversations, 4, _shows("200", "429")),
    Kind("slow readers", "long streams, 5 KB/s each", _slow_readers, 24, _shows("200")),
)
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (*_CONTROLS, *_FLOODS)}
