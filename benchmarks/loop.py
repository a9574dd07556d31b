"""`python -m benchmarks.loop --side NAME=URL`: how long others wait for one large request.

Each large request asks a running server for many things at once: items, prompts, answers,
conversations, documents or inputs. While it is answered, `GET /health` is sent repeatedly over
another connection, and the longest wait for an answer is recorded. Several servers take turns, so
that other work of the machine affects all of them alike. A large grammar is one of the cases, too.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import environment, report
from benchmarks.report import Table
from benchmarks.stats import median

THINGS = 2048
ANSWERS = 1024
"""The most answers of a generating model that one request may ask for, and prompts in a list."""
PROPERTIES = 1990
"""Properties of a schema, which has few other values; the default bound is 2,000 values."""
PAUSE_S = 0.002
"""The pause between two probes."""
TIMEOUT_S = 600.0

Body = dict[str, Any]


def _properties(count: int) -> Body:
    properties = {f"p{number}": {"type": "string"} for number in range(count)}
    return {"type": "object", "properties": properties}


def _messages(number: int) -> list[Body]:
    return [{"role": "user", "content": f"hello {number}"}]


def _schema(count: int) -> Body:
    answer = {"type": "json_schema", "json_schema": {"name": "a", "schema": _properties(count)}}
    return {"messages": _messages(0), "max_tokens": 1, "response_format": answer}


CASES: Mapping[str, tuple[str, str, Callable[[int], Body]]] = {
    "/generative_scoring, items": (
        "generates",
        "/generative_scoring",
        lambda n: {
            "query": "is it?",
            "items": [f"word {i}" for i in range(n)],
            "label_token_ids": [5, 6],
        },
    ),
    "/v1/completions, prompts": (
        "generates",
        "/v1/completions",
        lambda n: {"prompt": [f"hello {i}" for i in range(n)], "max_tokens": 1},
    ),
    "/v1/completions, n": (
        "generates",
        "/v1/completions",
        lambda n: {"prompt": "hello", "n": n, "temperature": 1, "max_tokens": 1},
    ),
    "/v1/chat/completions, n": (
        "generates",
        "/v1/chat/completions",
        lambda n: {"messages": _messages(0), "n": n, "temperature": 1, "max_tokens": 1},
    ),
    "/v1/chat/completions, n, streamed": (
        "generates",
        "/v1/chat/completions",
        lambda n: {
            "messages": _messages(0),
            "n": n,
            "temperature": 1,
            "max_tokens": 1,
            "stream": True,
        },
    ),
    "/v1/chat/completions/batch": (
        "generates",
        "/v1/chat/completions/batch",
        lambda n: {"messages": [_messages(i) for i in range(n)], "max_tokens": 1},
    ),
    "/v1/chat/completions, schema": (
        "generates",
        "/v1/chat/completions",
        lambda n: _schema(min(n, PROPERTIES)),
    ),
    "/v1/embeddings, inputs": (
        "embeds",
        "/v1/embeddings",
        lambda n: {"input": [f"hello {i}" for i in range(n)]},
    ),
    "/score, documents": (
        "embeds",
        "/score",
        lambda n: {"queries": "hello", "documents": [f"word {i}" for i in range(n)]},
    ),
    "/rerank, documents": (
        "embeds",
        "/rerank",
        lambda n: {"query": "hello", "documents": [f"word {i}" for i in range(n)]},
    ),
}
"""Case -> what its model does, its path, and its body for a number of things."""


class Server:
    """A running server, by its URL."""

    def __init__(self, url: str) -> None:
        self._host = urlsplit(url).netloc

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._host, timeout=TIMEOUT_S)

    def call(self, path: str, body: Body) -> tuple[int, int]:
        """Send a request; return the status of the answer, and its size in bytes."""
        connection = self.connect()
        connection.request(
            "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        size = len(answer.read())
        connection.close()
        return answer.status, size


def health_ms(connection: http.client.HTTPConnection) -> float:
    """Return the milliseconds that one `GET /health` takes."""
    began_s = time.perf_counter()
    connection.request("GET", "/health")
    connection.getresponse().read()
    return (time.perf_counter() - began_s) * 1000


def measure(server: Server, case: str, model: str, things: int) -> dict[str, Any]:
    """Send a large request; until its answer, probe `/health`. Raises `OSError` if it fails."""
    does, path, body_of = CASES[case]
    if does == "generates" and not case.endswith("schema"):
        things = min(things, ANSWERS)
    body = {"model": model, **body_of(things)}
    probe = server.connect()
    before = [health_ms(probe) for _ in range(50)]
    waits: list[float] = []
    with ThreadPoolExecutor(1) as sender:
        began_s = time.perf_counter()
        sending = sender.submit(server.call, path, body)
        while not waits or not sending.done():  # one at least, however fast the answer is
            waits.append(health_ms(probe))
            time.sleep(PAUSE_S)
        status, size = sending.result()
    probe.close()
    if status != HTTPStatus.OK:
        raise OSError(f"{case} was answered with {status}")
    return {
        "case": case,
        "things": things,
        "answer_bytes": size,
        "took_s": round(time.perf_counter() - began_s, 3),
        "idle_worst_ms": round(max(before), 1),
        "worst_ms": round(max(waits), 1),
        "median_ms": round(median(waits), 2),
        "over_50_ms": sum(wait > 50 for wait in waits),
        "probes": len(waits),
    }


def table(rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> Table:
    """Return a table of the longest wait of each request: median and maximum over the requests."""
    columns = [f"{side}, {what}" for side in sides for what in ("median", "max")]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        cells = [case]
        for side in sides:
            worst = [r["worst_ms"] for r in rows if (r["case"], r["side"]) == (case, side)]
            cells += [f"{median(worst):.0f}", f"{max(worst):.0f}"]
        lines.append(tuple(cells))
    return Table(
        "Longest wait for /health during one large request, ms", ("call", *columns), tuple(lines)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loop",
        description="Measure how long other requests wait while one large request is answered.",
    )
    parser.add_argument(
        "--side", action="append", required=True, metavar="NAME=URL", help="a server; repeatable"
    )
    parser.add_argument("--generates", default="llama", help="alias of a model that generates")
    parser.add_argument("--embeds", default="embed", help="alias of a model that embeds")
    parser.add_argument(
        "--things", type=int, default=THINGS, help="prompts, choices or items in each request"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", action="append", choices=CASES, help="only this case; repeatable")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder")
    args = parser.parse_args(arguments)
    sides = dict(side.partition("=")[::2] for side in args.side)
    aliases = {"generates": args.generates, "embeds": args.embeds}
    described = environment.describe([word for word in arguments if not word.startswith("/")])
    rows: list[dict[str, Any]] = []
    for case in args.case or CASES:
        model = aliases[CASES[case][0]]
        for url in sides.values():
            measure(Server(url), case, model, 10)  # a load, a switch, a first time
        for turn in range(args.rounds):
            for side, url in sides.items():
                row = {"side": side, "round": turn}
                row |= measure(Server(url), case, model, args.things)
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    print(report.render_table(table(rows, list(sides))))
    kept = ("date", "cpu", "cores", "memory_gib", "python", "git_revision", "load_average_before")
    content = {"environment": {name: described[name] for name in kept}, "rows": rows}
    report.write(args.out / "loop.json", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
