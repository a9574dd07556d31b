"""Commands for a running server: one HTTP call each, printed for people or as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args
from urllib.parse import quote

import httpx

from vllm_hotswap.errors import HotswapError, one_line
from vllm_hotswap.keys import split_keys
from vllm_hotswap.settings import DrainPolicy

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "VLLM_HOTSWAP_URL"
KEY_VARIABLE = "VLLM_HOTSWAP_ADMIN_KEY"

NO_LIMIT = httpx.Timeout(None, connect=10)
"""A load takes as long as it takes: the server says when it is done."""

QUIET_S = 2.0
"""After so many seconds, what the server does is told."""

_MIB = 1 << 20


class RemoteError(HotswapError):
    """The server could not be reached, or refused the call; the message says why."""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands that point at a running server."""
    for name, about in (
        ("load", "bring a model up beside the active one"),
        ("unload", "give back everything of a model"),
        ("wake", "bring a sleeping model up beside the active one"),
    ):
        _command(commands, name, about, _operate)
    switch = _command(commands, "switch", "make a model the active one", _switch)
    switch.add_argument("--drain-timeout", type=float, help="seconds to wait for running requests")
    switch.add_argument(
        "--on-drain-timeout",
        choices=get_args(DrainPolicy),
        help="what becomes of those that still run then",
    )
    sleep = _command(commands, "sleep", "have a model give memory back", _operate)
    sleep.add_argument(
        "--level", type=int, choices=(1, 2), default=1, help="1 keeps the weights, 2 drops them"
    )
    prefetch = _command(commands, "prefetch", "read a model's files into memory", _operate)
    prefetch.add_argument("--cancel", action="store_true", help="stop the reading under way")
    pin = _command(commands, "pin", "keep a model from being moved down", _operate)
    pin.add_argument("--off", action="store_true", help="allow it to be moved down again")
    _command(commands, "plan", "what a switch to a model would do and cost", _plan)
    lease = _command(commands, "lease", "hold a model for a job, once it is active", _lease)
    lease.add_argument("--owner", required=True, help="whose job it is; everybody sees it")
    lease.add_argument("--ttl", type=float, required=True, help="seconds that it is held")
    lease.add_argument("--note", default="", help="what the job is")
    leases = commands.add_parser("leases", help="which model is held for which jobs", **_about())
    _options(leases, _leases)
    release = commands.add_parser("release", help="end a job lease", **_about())
    release.add_argument("id", help="of the lease")
    _options(release, _release)
    _options(commands.add_parser("status", help="where every model is", **_about()), _status)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    about: str,
    run: Callable[[argparse.Namespace, Sequence[str]], int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, **_about())
    parser.add_argument("alias", help="the model")
    _options(parser, run)
    return parser


def _about() -> dict[str, Any]:
    return {"epilog": f"The server is told by --url or {URL_VARIABLE}."}


def _options(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace, Sequence[str]], int]
) -> None:
    url = os.environ.get(URL_VARIABLE, DEFAULT_URL)
    parser.add_argument("--url", default=url, help=f"of the server (default: {DEFAULT_URL})")
    parser.add_argument("--admin-key", help=f"(default: {KEY_VARIABLE})")
    parser.add_argument("--json", action="store_true", help="print the answer as it came")
    parser.set_defaults(run=run)


def _operate(args: argparse.Namespace, _: Sequence[str]) -> int:
    path = f"/admin/models/{quote(args.alias)}/{args.command}"
    return _print(args, call(args, "POST", path, _options_of(args)), told)


def _switch(args: argparse.Namespace, _: Sequence[str]) -> int:
    options = {"drain_timeout": args.drain_timeout, "on_drain_timeout": args.on_drain_timeout}
    given = {name: value for name, value in options.items() if value is not None}
    answer = call(args, "POST", "/v1/models/switch", {"model": args.alias, **given})
    return _print(args, answer, switch_text)


def _lease(args: argparse.Namespace, _: Sequence[str]) -> int:
    body = {"model": args.alias, "owner": args.owner, "ttl": args.ttl, "note": args.note}
    return _print(args, call(args, "POST", "/admin/leases", body), lease_text)


def _leases(args: argparse.Namespace, _: Sequence[str]) -> int:
    return _print(args, call(args, "GET", "/admin/leases"), leases_text)


def _release(args: argparse.Namespace, _: Sequence[str]) -> int:
    answer = call(args, "DELETE", f"/admin/leases/{quote(args.id, safe='')}")
    return _print(args, answer, lambda lease: f"{lease['model']}: {lease['id']} has ended")


def _options_of(args: argparse.Namespace) -> dict[str, Any]:
    match args.command:
        case "sleep":
            return {"level": args.level}
        case "pin":
            return {"pinned": not args.off}
        case "prefetch":
            return {"cancel": args.cancel}
        case _:
            return {}


def _plan(args: argparse.Namespace, _: Sequence[str]) -> int:
    answer = call(args, "GET", f"/admin/plan?model={quote(args.alias, safe='')}")
    return _print(args, answer, plan_text)


def _status(args: argparse.Namespace, _: Sequence[str]) -> int:
    answer = call(args, "GET", "/admin/status")
    return _print(args, answer, status_text)


def _print(
    args: argparse.Namespace,
    answer: Mapping[str, Any],
    describe: Callable[[Mapping[str, Any]], str],
) -> int:
    try:
        print(json.dumps(answer, indent=2) if args.json else describe(answer))
    except (KeyError, TypeError) as error:
        raise RemoteError(
            f"{args.url} gave an answer without {error}; is it vllm-hotswap of this version?"
        ) from error
    return 0


def call(
    args: argparse.Namespace, method: str, path: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The server's answer.

    Raises:
        RemoteError: there is no such server, or it answered with an error.
    """
    key = args.admin_key or split_keys(os.environ.get(KEY_VARIABLE, ""))[0]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    is_over = threading.Event()
    try:
        with httpx.Client(
            base_url=args.url.rstrip("/"), headers=headers, timeout=NO_LIMIT
        ) as client:
            if body is not None:
                threading.Thread(target=_follow, args=(client, is_over), daemon=True).start()
            answer = client.request(method, path, json=body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RemoteError(
            f"no answer from {args.url}: {one_line(error)}; give the server's --url"
        ) from error
    finally:
        is_over.set()
    try:
        content = answer.json()
    except ValueError as error:
        raise RemoteError(
            f"{args.url} answered with status {answer.status_code} and no JSON; is it vllm-hotswap?"
        ) from error
    if answer.is_error or not isinstance(content, dict):
        raise RemoteError(_message(content, answer.status_code))
    return content


def _follow(client: httpx.Client, is_over: threading.Event) -> None:
    """Tell what the server does, once it has taken a while; on a thread."""
    began_s = time.monotonic()
    if is_over.wait(QUIET_S):
        return
    # The connection ends with the process: one that is being read cannot be closed by others.
    with (
        contextlib.suppress(Exception),
        client.stream("GET", "/admin/events") as events,
    ):
        for line in events.iter_lines():
            if is_over.is_set():
                return
            event = json.loads(line[6:]) if line.startswith("data: ") else {}
            what = event.get("stage") or event.get("phase")
            model = event.get("model") or event.get("target")
            if what and model and "models" not in event:
                after_s = time.monotonic() - began_s
                sys.stderr.write(f"{after_s:6.1f} s  {model}: {what}\n")


def _message(content: Any, status: int) -> str:
    try:
        return str(content["error"]["message"])
    except (TypeError, KeyError):
        return f"the server answered with status {status}: {str(content)[:200]}"


def switch_text(answer: Mapping[str, Any]) -> str:
    how = f"active after {answer['duration_ms']} ms" if answer["switched"] else "active already"
    counts = {word: answer[f"requests_{word}"] for word in ("cut", "parked", "lost")}
    requests = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{answer['current_model']}: {how}{f' (requests: {requests})' if requests else ''}"


def lease_text(lease: Mapping[str, Any]) -> str:
    state = "from when it is active, for" if lease["pending"] else "for another"
    note = f" ({lease['note']})" if lease["note"] else ""
    return (
        f"{lease['model']}: held {state} {lease['expires_in_s']:.0f} s for {lease['owner']}{note}, "
        f"lease {lease['id']}"
    )


def leases_text(answer: Mapping[str, Any]) -> str:
    return "\n".join(map(lease_text, answer["leases"])) or "no model is held"


def told(answer: Mapping[str, Any]) -> str:
    """One line about what an operation did."""
    model = answer["model"]
    if "pinned" in answer:
        return f"{model}: {'pinned' if answer['pinned'] else 'not pinned'}"
    if answer.get("cancelled"):
        return f"{model}: prefetch cancelled"
    if "prefetched_bytes" in answer:
        read = answer["prefetched_bytes"] / _MIB
        return f"{model}: {read:.1f} MiB read in {answer['duration_ms']} ms"
    if not answer["changed"]:
        return f"{model}: {answer['residency']} already"
    moved = [f"{move['model']} went to {move['after']}" for move in answer["evicted"]]
    rest = f" ({', '.join(moved)})" if moved else ""
    return (
        f"{model}: {answer['before']} -> {answer['residency']} in {answer['duration_ms']} ms{rest}"
    )


def plan_text(plan: Mapping[str, Any]) -> str:
    """A plan, one line for each move."""
    lines = [f"switch from {plan['active']} to {plan['model']}:"]
    moves = [*plan["evict"], *([plan["bring_up"]] if plan["bring_up"] else [])]
    for move in moves:
        freed = move["frees"]["device_bytes"] / _MIB
        frees = f"frees {freed:.1f} MiB" if freed >= 0 else f"takes {-freed:.1f} MiB"
        lines.append(f"  {move['model']}: {move['before']} -> {move['after']}, {frees}")
    if not moves:
        lines.append("  nothing moves")
    memory = plan["memory"]
    sizes = {name: f"{memory[name]['device_bytes'] / _MIB:.1f} MiB" for name in memory}
    lines.append(
        f"  models hold {sizes['before']} now, {sizes['peak']} at most, "
        f"{sizes['after']} afterwards, of {sizes['budget']}"
    )
    lines.append(f"  about {plan['cost_s']} s to bring {plan['model']} up")
    return "\n".join(lines)


def status_text(status: Mapping[str, Any]) -> str:
    """The server, one line for each model."""
    models = status["models"]
    width = max(len(alias) for alias in [*models, "model"])
    device = status["memory"]["device"]
    memory = f"{device['used'] / _MIB:.1f} of {device['budget'] / _MIB:.1f} MiB"
    lines = [
        f"active: {status['active']}   phase: {status['phase']}   device memory: {memory}",
        f"{'model':<{width}}  residency  in flight  held MiB  cost s",
    ]
    for alias, model in models.items():
        held = (model["held"]["device_bytes"] + model["held"]["host_bytes"]) / _MIB
        pinned = "  pinned" if model["pinned"] else ""
        lines.append(
            f"{alias:<{width}}  {model['residency']:<9}  {model['in_flight']:>9}  {held:>8.1f}  "
            f"{model['switch_cost_s']:>6}{pinned}"
        )
    return "\n".join(lines)
