"""Commands for a running server: one HTTP request each, printed for people or as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import quote, urlsplit

from vllm_hotswap.access import check_sendable, plain_keys, split_keys
from vllm_hotswap.errors import HotswapError, one_line
from vllm_hotswap.hints import program
from vllm_hotswap.states import DrainAction
from vllm_hotswap.system import interruptible, is_loopback

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "VLLM_HOTSWAP_URL"
KEY_VARIABLE = "VLLM_HOTSWAP_ADMIN_KEY"
KEY_FILE_VARIABLE = "VLLM_HOTSWAP_ADMIN_KEY_FILE"
USER_KEY_VARIABLE = "VLLM_API_KEY"
USER_KEY_FILE_VARIABLE = "VLLM_HOTSWAP_API_KEY_FILE"

ROLES = (
    ("admin", KEY_VARIABLE, KEY_FILE_VARIABLE),
    ("api", USER_KEY_VARIABLE, USER_KEY_FILE_VARIABLE),
)
"""Roles whose keys may be sent, in that order: the start of the flags, and the variables."""

CONNECT_S = 10.0
READ_S = 60.0
"""For requests that change nothing."""

QUIET_S = 2.0
"""Time after which a command shows what the server is doing."""

_MIB = 1 << 20

Run = Callable[[argparse.Namespace, Sequence[str]], int]


class RemoteError(HotswapError):
    """The server could not be reached, or refused the call; the message says why."""


def _fill_model(run: Run) -> Callable[[argparse.ArgumentParser], None]:
    """Return what adds the arguments of a command for one model."""

    def fill(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("alias", help="the model")
        _options(parser, run)

    return fill


def _fill_plain(run: Run) -> Callable[[argparse.ArgumentParser], None]:
    return lambda parser: _options(parser, run)


def _fill_switch(switch: argparse.ArgumentParser) -> None:
    _fill_model(_switch)(switch)
    switch.add_argument(
        "--drain-timeout", type=seconds, help="seconds to wait for running requests"
    )
    switch.add_argument(
        "--on-drain-timeout",
        choices=get_args(DrainAction),
        help="what to do with requests still running then",
    )


def _fill_sleep(sleep: argparse.ArgumentParser) -> None:
    _fill_model(_operate)(sleep)
    sleep.add_argument(
        "--level", type=int, choices=(1, 2), default=1, help="1 keeps the weights, 2 drops them"
    )


def _fill_prefetch(prefetch: argparse.ArgumentParser) -> None:
    _fill_model(_operate)(prefetch)
    prefetch.add_argument("--cancel", action="store_true", help="cancel a running prefetch")


def _fill_pin(pin: argparse.ArgumentParser) -> None:
    _fill_model(_operate)(pin)
    pin.add_argument("--off", action="store_true", help="unpin it")


def _fill_lease(lease: argparse.ArgumentParser) -> None:
    _fill_model(_lease)(lease)
    lease.add_argument("--owner", required=True, help="owner of the job; visible to everyone")
    lease.add_argument(
        "--ttl", type=seconds, required=True, help="how long to lease it, in seconds"
    )
    lease.add_argument("--note", default="", help="what the job is")


def _fill_release(release: argparse.ArgumentParser) -> None:
    release.add_argument("id", help="id of the lease")
    _options(release, _release)


def _options(parser: argparse.ArgumentParser, run: Run) -> None:
    parser.epilog = f"Name the server with --url or {URL_VARIABLE}."
    parser.add_argument(
        "--url",
        help=f"address of the server, also as HOST:PORT, unix:PATH or with /v1 "
        f"(default: {DEFAULT_URL})",
    )
    parser.add_argument("--admin-key", metavar="KEY", help=f"(default: {KEY_VARIABLE})")
    parser.add_argument(
        "--admin-key-file",
        type=Path,
        metavar="FILE",
        help=f"file whose first key is sent (default: {KEY_FILE_VARIABLE})",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="a user key, for read-only commands (default, without an admin key: "
        f"{USER_KEY_VARIABLE})",
    )
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file with a user key (default: {USER_KEY_FILE_VARIABLE})",
    )
    parser.add_argument("--json", action="store_true", help="print the response as JSON")
    parser.set_defaults(run=run)


def seconds(text: str) -> float:
    """Parse a time in seconds from a command line. Raises `ArgumentTypeError`."""
    with contextlib.suppress(ValueError):
        value = float(text)
        if math.isfinite(value) and value >= 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a valid number of seconds")


def _operate(args: argparse.Namespace, _: Sequence[str]) -> int:
    path = f"/admin/models/{_quoted(args.alias)}/{args.command}"
    return _print(args, call(args, "POST", path, _options_of(args)), operation_text)


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
    if not args.id or "/" in args.id:
        raise RemoteError(f"{args.id!r} is not the id of a lease; {program()} leases lists them")
    answer = call(args, "DELETE", f"/admin/leases/{_quoted(args.id)}")
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
    answer = call(args, "GET", f"/admin/plan?model={_quoted(args.alias)}")
    return _print(args, answer, plan_text)


def _status(args: argparse.Namespace, _: Sequence[str]) -> int:
    answer = call(args, "GET", "/admin/status")
    return _print(args, answer, status_text)


COMMANDS: Mapping[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "load": ("load a model without activating it", _fill_model(_operate)),
    "unload": ("unload a model and free its memory", _fill_model(_operate)),
    "wake": ("wake a sleeping model without activating it", _fill_model(_operate)),
    "switch": ("make a model the active one", _fill_switch),
    "sleep": ("put a model to sleep, to free memory", _fill_sleep),
    "prefetch": ("read a model's files into memory", _fill_prefetch),
    "pin": ("pin a model in memory", _fill_pin),
    "plan": ("show what a switch to a model would do and cost", _fill_model(_plan)),
    "lease": ("lease a model for a job, once it is active", _fill_lease),
    "leases": ("list job leases", _fill_plain(_leases)),
    "release": ("end a job lease", _fill_release),
    "status": ("show where each model is", _fill_plain(_status)),
}
"""The commands for a running server: what each is for, and what adds its arguments."""

LOOKING = ("leases", "plan", "status")
"""Commands for which a user's key is enough."""


def _quoted(name: str) -> str:
    """Quote a name as part of a path, also where `.` or `..` in it would lead to another path."""
    parts = quote(_text(name)).split("/")
    return "/".join(part.replace(".", "%2E") if part in (".", "..") else part for part in parts)


def _text(word: str) -> str:
    """Return a word of the command line. Raises `RemoteError` if it is not UTF-8, as JSON needs."""
    try:
        word.encode()
    except UnicodeEncodeError:
        raise RemoteError(f"{word!a} is not UTF-8 text; write it in UTF-8") from None
    return word


def _print(
    args: argparse.Namespace,
    answer: Mapping[str, Any],
    describe: Callable[[Mapping[str, Any]], str],
) -> int:
    try:
        text = json.dumps(answer, indent=2) if args.json else describe(answer)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RemoteError(
            f"{Address.of(args)} gave a response that this command does not understand "
            f"({one_line(error)}); is it vllm-hotswap {_version()}?"
        ) from error
    print(text)
    return 0


def _version() -> str:
    from vllm_hotswap import __version__

    return __version__


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is: a URL without a path that belongs to one API."""

    url: str
    is_loopback: bool
    is_default: bool
    """Whether it was not named on the command line."""
    uds: str = ""
    """The path of a Unix domain socket, if that is where it listens."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> Address:
        """The address from `--url`, else from the variable, else the default.

        Raises:
            RemoteError: it is not a valid address; the message says what one looks like.
        """
        given = args.url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        try:
            return cls._parse(given.strip(), not args.url)
        except ValueError:
            origin = "--url" if args.url else URL_VARIABLE
            shown = ascii(given)[1:-1]
            hint = f"unix:{shown.strip()}" if _is_path(given) else "http://HOST:PORT or unix:PATH"
            raise RemoteError(
                f"{origin} {shown} is not a valid server address; give {hint}"
            ) from None

    @classmethod
    def _parse(cls, text: str, is_default: bool) -> Address:
        kind, _, path = text.partition(":")
        if kind == "unix" and not path.isdecimal():  # `unix:80` is a port of a host
            return cls("http://localhost", True, is_default, _path_of_socket(path))
        if _is_path(text):
            raise ValueError(text)
        if "://" not in text:
            text = f"http://{text}"
        parts = urlsplit(text)
        host = parts.hostname
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise ValueError(text)
        if parts.port == 0 or not text.isprintable() or " " in text:
            raise ValueError(text)
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        url = f"{parts.scheme}://{parts.netloc}{path}"
        return cls(url, _is_this_machine(host), is_default)

    def __str__(self) -> str:
        """Return it without a password that may be in it."""
        if self.uds:
            return "unix:" + ascii(self.uds)[1:-1]
        return re.sub(r"//[^/]*@", "//", self.url)


def _is_path(text: str) -> bool:
    """Whether an address is the path of a socket, without `unix:` before it."""
    text = text.strip()
    is_named = text.endswith((".sock", ".socket")) and ":" not in text
    return is_named or (text.startswith(("/", "./", "../")) and not text.startswith("//"))


def _path_of_socket(text: str) -> str:
    """Return the path of `unix:PATH`, or of a URL with an absolute path. Raises `ValueError`."""
    path = text.removeprefix("//") if text.startswith("///") else text
    if not path or path.startswith("//"):
        raise ValueError(text)
    return path


def _is_this_machine(host: str) -> bool:
    return host == "localhost" or host.endswith(".localhost") or is_loopback(host)


def _key(args: argparse.Namespace) -> tuple[str, str]:
    """Return the key to send, and where it is from; two empty texts if there is none.

    Raises:
        ConfigError: a file cannot be used, or the key cannot be sent.
    """
    for is_named in (True, False):
        for role, variable, file_variable in ROLES:
            if found := _key_of(args, role, variable, file_variable, is_named):
                check_sendable(*found)
                return found
    return "", ""


def _key_of(
    args: argparse.Namespace, role: str, variable: str, file_variable: str, is_named: bool
) -> tuple[str, str] | None:
    """Return one role's key: the one named on the command line, or the one of its variables."""
    key, file = getattr(args, f"{role}_key"), getattr(args, f"{role}_key_file")
    origin = f"--{role}-key"
    if not is_named:
        key, origin = split_keys(os.environ.get(variable, ""))[0], variable
        file = os.environ.get(file_variable, "")
    if key:
        return key, origin
    return (plain_keys(Path(file))[0], f"key file {str(file)!r}") if file else None


def call(
    args: argparse.Namespace, method: str, path: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Send a request; return the JSON of the response.

    Raises:
        RemoteError: there is no such server, or it answered with an error.
        ConfigError: a key cannot be sent.
    """
    import httpx

    address, (key, origin) = Address.of(args), _key(args)
    content = None if body is None else _body(body)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    changes = content is not None
    if changes:
        headers["Content-Type"] = "application/json"
    try:
        with _client(address, headers, changes) as client, _followed(client, address, changes):
            answer = interruptible(lambda: client.request(method, path, content=content))
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        raise RemoteError(f"no response from {address}: {one_line(error)}; check --url") from error
    try:
        found = answer.json()
    except (ValueError, RecursionError) as error:
        raise RemoteError(
            f"{address} answered with status {answer.status_code} and no JSON; is it vllm-hotswap?"
        ) from error
    if not answer.is_success or not isinstance(found, dict):
        raise RemoteError(Refusal(args, address, origin).explain(found, answer.status_code))
    return found


def _body(body: Mapping[str, Any]) -> bytes:
    """Return the JSON of a body. Raises `RemoteError` if a text in it is not UTF-8."""
    for value in body.values():
        if isinstance(value, str):
            _text(value)
    return json.dumps(body).encode()


def _client(address: Address, headers: Mapping[str, str], changes: bool) -> httpx.Client:
    """Return an HTTP client; for this machine, it ignores the proxies that the environment names.

    A change has no read timeout: the server says when it is done.

    Raises:
        RemoteError: a proxy or a certificate file of the environment cannot be used.
    """
    import httpx

    try:
        # A transport of its own keeps httpx from reading proxies, and from nothing else.
        verify = address.url.startswith("https")  # reading certificates takes a while
        uds = address.uds or None
        transport = httpx.HTTPTransport(verify=verify, uds=uds) if address.is_loopback else None
        return httpx.Client(
            base_url=address.url,
            headers=headers,
            timeout=httpx.Timeout(None if changes else READ_S, connect=CONNECT_S),
            transport=transport,
        )
    except (ValueError, ImportError, OSError) as error:
        raise RemoteError(
            f"the environment (ALL_PROXY, HTTP_PROXY, HTTPS_PROXY, SSL_CERT_FILE) prevents "
            f"requests to {address}: {one_line(error)}"
        ) from error


@contextlib.contextmanager
def _followed(client: httpx.Client, address: Address, changes: bool) -> Iterator[None]:
    """Show what the server is doing, once the request has taken a while."""
    is_over = threading.Event()
    threading.Thread(target=_follow, args=(client, address, changes, is_over), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _follow(
    client: httpx.Client, address: Address, changes: bool, is_over: threading.Event
) -> None:
    """On a thread: print that the command waits; for a change, print its progress, too."""
    began_s = time.monotonic()
    if is_over.wait(QUIET_S):
        return
    # Left open until the process ends: another thread cannot close a connection that is being read.
    with contextlib.suppress(Exception):
        sys.stderr.write(f"{QUIET_S:6.1f} s  waiting for {address}\n")
        if not changes:
            return
        with client.stream("GET", "/admin/events") as events:
            for line in events.iter_lines():
                if is_over.is_set():
                    return
                event = json.loads(line[6:]) if line.startswith("data: ") else {}
                what = event.get("stage") or event.get("phase")
                model = event.get("model") or event.get("target")
                if what and model and "models" not in event:
                    after_s = time.monotonic() - began_s
                    sys.stderr.write(f"{after_s:6.1f} s  {model}: {what}\n")


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error of the server, explained for a user of the command line."""

    args: argparse.Namespace
    address: Address
    key_origin: str
    """Where the key that was sent is from; empty if none was sent."""

    def explain(self, answer: Any, status: int) -> str:
        """Return one line with the reason and the next step."""
        try:
            message, code = str(answer["error"]["message"]), answer["error"].get("code")
        except (LookupError, TypeError, AttributeError):
            return f"{self.address} answered with status {status}: {_plain(str(answer))[:200]}"
        if code == "invalid_api_key" or status == 401:
            return self._unauthorized()
        if code == "switch_not_allowed" and "start the server" not in message:
            return f"this needs an admin key; {_GIVE_KEY}"
        return self._as_commands(_plain(message))

    def _unauthorized(self) -> str:
        give = _GIVE_ANY_KEY if self.args.command in LOOKING else _GIVE_KEY
        if self.key_origin:
            return f"the server does not accept the key of {self.key_origin}; {give}"
        return f"the server requires a key; {give}"

    def _as_commands(self, message: str) -> str:
        """Return the message with requests to our own routes as commands."""
        for pattern, template in _CALLS:
            message = re.sub(pattern, partial(self._command, template), message)
        return message

    def _command(self, template: Sequence[str], call: re.Match[str]) -> str:
        words = [call.expand(word) for word in template]
        url = [] if self.address.is_default else ["--url", str(self.address)]
        files = [
            (f"--{role}-key-file", getattr(self.args, f"{role}_key_file")) for role, *_ in ROLES
        ]
        key = [word for flag, file in files if file for word in (flag, str(file))]
        return f"{program()} {shlex.join([*words, *url, *key])}"


_GIVE_KEY = f"give --admin-key-file FILE or --admin-key KEY, or set {KEY_VARIABLE}"
_GIVE_ANY_KEY = (
    f"give --api-key-file FILE or --api-key KEY, or set {USER_KEY_VARIABLE}; "
    "an admin key works, too (--admin-key-file)"
)

_CALLS: Sequence[tuple[str, Sequence[str]]] = (
    (r'POST /admin/models/(\S+)/pin \{"pinned": false\}', ("pin", r"\1", "--off")),
    (r'POST /v1/models/switch \{"model": "([^"]+)"\}', ("switch", r"\1")),
    (r"DELETE /admin/leases/(\S+)", ("release", r"\1")),
    (r"GET /admin/leases\b", ("leases",)),
)
"""Requests that the server's errors name, and the commands that send them."""


def _plain(text: str) -> str:
    """Return a server's text on one line, without characters that control a terminal."""
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def switch_text(answer: Mapping[str, Any]) -> str:
    how = f"active after {answer['duration_ms']} ms" if answer["switched"] else "already active"
    counts = {word: answer[f"requests_{word}"] for word in ("cut", "parked", "lost")}
    requests = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{answer['current_model']}: {how}{f' (requests: {requests})' if requests else ''}"


def lease_text(lease: Mapping[str, Any]) -> str:
    rest = f"{lease['expires_in_s']:.0f} s"
    period = f"{rest} from its activation" if lease["pending"] else f"another {rest}"
    note = f" ({lease['note']})" if lease["note"] else ""
    return f"{lease['model']}: leased for {period} to {lease['owner']}{note}, lease {lease['id']}"


def leases_text(answer: Mapping[str, Any]) -> str:
    return "\n".join(map(lease_text, answer["leases"])) or "no model is leased"


def operation_text(answer: Mapping[str, Any]) -> str:
    """Describe in one line what an operation did."""
    model = answer["model"]
    if "pinned" in answer:
        return f"{model}: {'pinned' if answer['pinned'] else 'not pinned'}"
    if answer.get("cancelled"):
        return f"{model}: prefetch cancelled"
    if "prefetched_bytes" in answer:
        read = answer["prefetched_bytes"] / _MIB
        return f"{model}: {read:.1f} MiB read in {answer['duration_ms']} ms"
    if not answer["changed"]:
        return f"{model}: already {answer['residency']}"
    moved = [f"{move['model']} went to {move['after']}" for move in answer["evicted"]]
    rest = f" ({', '.join(moved)})" if moved else ""
    return (
        f"{model}: {answer['before']} -> {answer['residency']} in {answer['duration_ms']} ms{rest}"
    )


def plan_text(plan: Mapping[str, Any]) -> str:
    """Describe a plan, one line for each move."""
    lines = [f"switch from {plan['active']} to {plan['model']}:"]
    lines += [f"  {alias}: waking is cancelled" for alias in plan["give_up_wake"]]
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
        f"  models hold {sizes['before']} now, up to {sizes['peak']} during the switch, "
        f"{sizes['after']} after it; the budget is {sizes['budget']}"
    )
    lines.append(f"  about {plan['cost_s']} s to bring {plan['model']} up")
    return "\n".join(lines)


def _waking_text(waking: Mapping[str, int] | None) -> str:
    if waking is None:
        return ""
    done, total = (waking[name] / _MIB for name in ("done_bytes", "total_bytes"))
    return f"  waking: {done:.1f} of {total:.1f} MiB"


def status_text(status: Mapping[str, Any]) -> str:
    """Describe the server, one line for each model."""
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
        pinned = ("  pinned" if model["pinned"] else "") + _waking_text(model["waking"])
        lines.append(
            f"{alias:<{width}}  {model['residency']:<9}  {model['in_flight']:>9}  {held:>8.1f}  "
            f"{model['switch_cost_s']:>6}{pinned}"
        )
    return "\n".join(lines)
