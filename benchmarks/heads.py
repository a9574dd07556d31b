"""`python -m benchmarks.heads`: what the bounds of heads and connections cost.

Two servers on fake engines run in processes of their own: one with our protocol class, one with
uvicorn's for httptools; nothing else differs. In turn, each gets requests for `/health` over a few
connections, each of which sends again when it has its answer. In a second case, each request has a
connection of its own. Requests per second also depend on the client. So the CPU time of the
server's process is recorded, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import psutil
import uvicorn

from benchmarks import environment, report
from benchmarks.bodies import until_it_serves
from benchmarks.report import Table
from benchmarks.stats import median, summarize
from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.app import HotswapApp
from vllm_hotswap.config.settings import SwitchingConfig
from vllm_hotswap.connections.connections import Config, Connections, bounded
from vllm_hotswap.connections.listen import bind
from vllm_hotswap.connections.places import Places
from vllm_hotswap.demo.quickstart import free_port
from vllm_hotswap.server.run import Server
from vllm_hotswap.tasks import event_loop
from vllm_hotswap.testing.fake_host import FakeHost

SIDES = ("bounded", "plain")
CASES = ("kept alive", "new connections")
CONNECTIONS = 8
PLACES = 1024
FIELDS = (
    "Host: 127.0.0.1",
    "Accept: application/json",
    "Accept-Encoding: gzip, deflate",
    "User-Agent: OpenAI/Python 1.99.0",
    "X-Stainless-Lang: python",
    "X-Stainless-Runtime: CPython",
    "Authorization: Bearer a-key-of-thirty-two-characters-x",
)
"""As many header fields as clients of OpenAI's API send."""

KEPT, CLOSED = (
    "\r\n".join(["GET /health HTTP/1.1", *FIELDS, *more, "", ""]).encode()
    for more in ((), ("Connection: close",))
)


async def _serve(port: int, side: str) -> None:
    host = FakeHost(("llama", "qwen"))
    app = HotswapApp(host, Access(), SwitchingConfig())
    await host.start()
    await app.coordinator.start(("llama",), "llama")
    config = Config(
        app,
        port=port,
        log_level="warning",
        lifespan="off",
        http="httptools",
        access_log=False,
        proxy_headers=False,
        limit_concurrency=None if side == "bounded" else PLACES,
    )
    config.load()
    if side == "bounded":
        bounded(config, Connections(Places(PLACES)))
        await Server(config, lambda: None).serve([bind("127.0.0.1", port)])
    else:
        await uvicorn.Server(config).serve()


def serve(port: int, side: str) -> None:
    """Run one of the servers until the process is stopped."""
    event_loop.run(_serve(port, side))


class Client(asyncio.Protocol):
    """Sends again as soon as it has its answer, which comes in one piece; `count` is how often."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._transport: asyncio.Transport | None = None
        self.ended = asyncio.get_running_loop().create_future()
        self.count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not data.startswith(b"HTTP/1.1 200"):
            self._end(OSError(f"the server answered {data[:100]!r}"))
        elif self._request is KEPT and self._transport is not None:
            self.count += 1
            self._transport.write(KEPT)
        else:
            self.count += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            if error is None:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(error)


async def _kept(port: int, seconds: float) -> int:
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(CONNECTIONS):
        _, client = await loop.create_connection(lambda: Client(KEPT), "127.0.0.1", port)
        clients.append(client)
    await asyncio.sleep(seconds)
    for client in clients:
        client.close()
    await asyncio.gather(*(client.ended for client in clients))
    return sum(client.count for client in clients)


async def _new(port: int, seconds: float) -> int:
    loop = asyncio.get_running_loop()
    until_s = loop.time() + seconds

    async def again() -> int:
        count = 0
        while loop.time() < until_s:
            _, client = await loop.create_connection(lambda: Client(CLOSED), "127.0.0.1", port)
            await client.ended
            count += client.count
        return count

    return sum(await asyncio.gather(*(again() for _ in range(CONNECTIONS))))


@dataclass(frozen=True, slots=True)
class Sample:
    """One turn of one server."""

    case: str
    side: str
    requests: int
    seconds: float
    cpu_s: float
    """CPU time of the server's process."""

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def cpu_us(self) -> float:
        """CPU time for one request, in microseconds."""
        return self.cpu_s / self.requests * 1e6


async def turn(case: str, side: str, port: int, pid: int, seconds: float) -> Sample:
    """Load one server for so long. Raises `OSError` if it does not answer 200."""
    process = psutil.Process(pid)
    before, began_s = process.cpu_times(), time.perf_counter()
    requests = await (_kept if case == "kept alive" else _new)(port, seconds)
    after, ended_s = process.cpu_times(), time.perf_counter()
    cpu_s = after.user + after.system - before.user - before.system
    return Sample(case, side, requests, ended_s - began_s, cpu_s)


async def measure(servers: dict[str, tuple[int, int]], rounds: int, seconds: float) -> list[Sample]:
    """Measure each case; the servers alternate, also in who is first. The first round is dropped.

    Args:
        servers: port and process of each side.
    """
    samples = []
    for case in CASES:
        for number in range(rounds + 1):
            for side in SIDES if number % 2 else SIDES[::-1]:
                sample = await turn(case, side, *servers[side], seconds)
                samples += [sample] if number else []
    return samples


def table(samples: Sequence[Sample]) -> Table:
    """Return a table of medians, ranges, and the median of the rounds' ratios."""
    rows = []
    for case in CASES:
        found = {side: [s for s in samples if (s.case, s.side) == (case, side)] for side in SIDES}
        for name, figure in (("requests/s", "per_second"), ("CPU, us/request", "cpu_us")):
            values = {side: [getattr(s, figure) for s in found[side]] for side in SIDES}
            pairs = zip(values["bounded"], values["plain"], strict=True)
            ratio = median([ours / theirs for ours, theirs in pairs])
            cells = [
                f"{s.p50:.0f} ({s.minimum:.0f} to {s.maximum:.0f})"
                for s in (summarize(values[side]) for side in SIDES)
            ]
            rows.append((f"{case}, {name}", *cells, f"{ratio:.3f}"))
    return Table("GET /health", ("median (least to most)", *SIDES, "ratio"), tuple(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.heads",
        description="Measure the cost of the limits of heads and connections.",
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of each server")
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of one round")
    args = parser.parse_args(arguments)
    if args.rounds < 1 or args.seconds <= 0:
        parser.error("--rounds and --seconds must be above 0")
    described = environment.describe([word for word in arguments if not word.startswith("/")])
    started: dict[str, tuple[int, BaseProcess]] = {}
    try:
        for side in SIDES:
            port = free_port()
            process: BaseProcess = multiprocessing.get_context("spawn").Process(
                target=serve, args=(port, side), daemon=True
            )
            process.start()
            started[side] = port, process
            until_it_serves(port, process)
        servers = {side: (port, process.pid or 0) for side, (port, process) in started.items()}
        samples = event_loop.run(measure(servers, args.rounds, args.seconds))
    finally:
        for _, process in started.values():
            process.terminate()
            process.join()
    print(report.render_table(table(samples)))
    kept = ("date", "cpu", "cores", "memory_gib", "python", "git_revision", "load_average_before")
    rows: list[dict[str, Any]] = [
        {"case": s.case, "side": s.side, "requests": s.requests, "s": s.seconds, "cpu_s": s.cpu_s}
        for s in samples
    ]
    content = {
        "environment": {name: described[name] for name in kept},
        "options": {"rounds": args.rounds, "seconds": args.seconds, "connections": CONNECTIONS},
        "rows": rows,
    }
    report.write(args.out / "heads.json", content)
    print(json.dumps({"samples": len(rows), "file": "heads.json"}), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
