"""`python -m benchmarks.bodies`: how long other requests wait while a large body is processed.

A server on fake engines runs in a process of its own. For each shape and size of body, the worst
`GET /health` and the worst chat of 20 KB are recorded while one such body is sent. It goes to a
model that does not exist, which shows what the server does by itself. Then it goes to the active
one, whose application parses the body with `json.loads` on the event loop, as vLLM's does (vLLM
checks it afterwards, which takes longer).
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks import environment, report
from benchmarks.report import Table
from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.app import HotswapApp
from vllm_hotswap.config.settings import SwitchingConfig
from vllm_hotswap.demo.quickstart import free_port
from vllm_hotswap.tasks import event_loop
from vllm_hotswap.testing.fake_host import FakeHost

MIB = 1 << 20
CASES = ((8, "nobody"), (63, "nobody"), (8, "llama"))
"""MiB of the body, and the model that it names."""

PROBES = 200
CHAT_BYTES = 20 << 10
"""The size of a chat as agents send it: too large to be parsed at once, far below the others."""
START_S = 60.0
"""How long the server may take to start."""
SHAPES = {
    "one text": b"x",
    "escapes": b"\\n",
    "short texts": b'"word",',
    "empty texts": b'"",',
    "empty arrays": b"[],",
    "token lists": b"[1,2,3],",
    "numbers": b"1,",
    "objects": b'{"a":"b"},',
    "keys": b'"m":1,',
    "same keys": b'"model":"a",',
}
"""Shape -> what a body is filled with."""
TEXTS = frozenset(["one text", "escapes"])
KEYS = frozenset(["keys", "same keys"])
FIGURES = {"/health": "worst_health_ms", "a chat of 20 KB": "worst_chat_ms"}
HEADERS = {"Content-Type": "application/json"}


def body_of(shape: str, size: int, model: str) -> bytes:
    """Return a body of about `size` bytes with `model` as its last key, as clients send it."""
    unit = SHAPES[shape]
    filling = unit * (size // len(unit))
    tail = f'"model": "{model}"}}'.encode()
    if shape in TEXTS:
        return b'{"input": "' + filling + b'", ' + tail
    if shape in KEYS:
        return b"{" + filling + tail
    return b'{"input": [' + filling[:-1] + b"], " + tail


async def _serve(port: int) -> None:
    host = FakeHost(("llama", "qwen"))
    app = HotswapApp(host, Access(), SwitchingConfig())
    await host.start()
    await app.coordinator.start(("llama",), "llama")
    config = uvicorn.Config(app, port=port, log_level="warning", lifespan="off")
    await uvicorn.Server(config).serve()


def serve(port: int) -> None:
    """Run a server on fake engines until the process is stopped."""
    event_loop.run(_serve(port))


def send(port: int, body: bytes) -> tuple[int, float]:
    """Send a body; return the status of the answer, and the seconds that it took."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    began_s = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, HEADERS)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status, time.perf_counter() - began_s


def health_s(port: int) -> float:
    """Return the seconds that one `GET /health` takes."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    began_s = time.perf_counter()
    connection.request("GET", "/health")
    connection.getresponse().read()
    connection.close()
    return time.perf_counter() - began_s


def chat_s(port: int) -> float:
    """Return the seconds that a chat of `CHAT_BYTES` with the active model takes; or `OSError`."""
    messages = [{"role": "user", "content": "x" * CHAT_BYTES}]
    body = json.dumps({"messages": messages, "max_tokens": 1, "model": "llama"}).encode()
    status, took_s = send(port, body)
    if status != HTTPStatus.OK:
        raise OSError(f"a chat was answered with {status}")
    return took_s


def measure(port: int, shape: str, size_mib: int, model: str) -> dict[str, Any]:
    """Send one body; until it is answered, request `/health` and a chat by turns.

    Raises whatever sending it raises.
    """
    body = body_of(shape, size_mib * MIB, model)
    waits_s: list[float] = []
    chats_s: list[float] = []
    with ThreadPoolExecutor(1) as sender:
        sending = sender.submit(send, port, body)
        while not waits_s or not sending.done():
            waits_s.append(health_s(port))
            chats_s.append(chat_s(port))
        status, took_s = sending.result()
    return {
        "shape": shape,
        "mib": size_mib,
        "model": model,
        "status": status,
        "took_ms": round(took_s * 1000, 1),
        "worst_health_ms": _worst_ms(waits_s),
        "worst_chat_ms": _worst_ms(chats_s),
        "probes": len(waits_s),
    }


def without_body(port: int) -> dict[str, Any]:
    """Return the worst of as many probes as during a large body, while there is none."""
    return {
        "shape": "none",
        "worst_health_ms": _worst_ms([health_s(port) for _ in range(PROBES)]),
        "worst_chat_ms": _worst_ms([chat_s(port) for _ in range(PROBES)]),
        "probes": PROBES,
    }


def _worst_ms(waits_s: Sequence[float]) -> float:
    return round(max(waits_s) * 1000, 1)


def table(
    title: str, figure: str, rows: Sequence[dict[str, Any]], cases: Sequence[tuple[int, str]]
) -> Table:
    """Return a table of one figure of the rows, by shape."""
    columns = [f"{mib} MiB, {'refused' if to == 'nobody' else 'parsed'}" for mib, to in cases]
    lines = [
        (shape, *(f"{row[figure]:.0f}" for row in rows if row["shape"] == shape))
        for shape in SHAPES
    ]
    idle = tuple(f"{rows[0][figure]:.0f}" for _ in cases)
    return Table(title, ("body", *columns), (("no body", *idle), *lines))


def until_it_serves(port: int, server: BaseProcess) -> None:
    """Wait for the server. Raises `OSError` if it ends, or takes longer than `START_S`."""
    until_s = time.monotonic() + START_S
    while True:
        try:
            health_s(port)
        except ConnectionRefusedError:
            if not server.is_alive():
                raise OSError(f"the server ended with {server.exitcode}") from None
            if time.monotonic() > until_s:
                raise OSError(f"the server did not start within {START_S:.0f} s") from None
            time.sleep(0.05)
        else:
            return


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bodies",
        description="Measure how long other requests wait while a large body is processed.",
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder")
    parser.add_argument("--quick", action="store_true", help="a small run, as a test")
    args = parser.parse_args(arguments)
    cases = ((1, "nobody"), (1, "llama")) if args.quick else CASES
    described = environment.describe([word for word in arguments if not word.startswith("/")])
    port = free_port()
    rows: list[dict[str, Any]] = []
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
    server.start()
    try:
        until_it_serves(port, server)
        rows.append(without_body(port))
        for shape in SHAPES:
            for mib, model in cases:
                rows.append(measure(port, shape, mib, model))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    finally:
        server.terminate()
        server.join()
    for what, figure in FIGURES.items():
        print(report.render_table(table(f"Worst wait for {what}, ms", figure, rows, cases)))
    kept = ("date", "cpu", "cores", "memory_gib", "python", "git_revision", "load_average_before")
    content = {"environment": {name: described[name] for name in kept}, "rows": rows}
    report.write(args.out / "bodies.json", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
