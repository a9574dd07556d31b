"""The program of a helper: a process that reads grammars for another one, and can be killed.

It is started by its path, with `-I`, and imports nothing of this package: only xgrammar's and
llguidance's native code, without torch. It gets messages over an inherited socket. Each is a
length (four bytes, big-endian) and JSON: `[bytes, what, arguments]`, where `bytes` is by how much
its memory may grow. It answers each with `[true, null]` or `[false, kind, text]`. It also sends
`[true, null]` once it has started. It ends when its parent closes the other end.

Relies on, in xgrammar 0.2.8: `xgrammar.base._core` with `Grammar.from_*`, `TokenizerInfo` and
`GrammarCompiler`, and their loading without the rest of the package; in llguidance 1.7.6:
`LLMatcher.validate_grammar`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import socket
import sys
import threading
import types
from contextlib import suppress
from pathlib import Path
from typing import Any

BEGIN_ABORTED = 3
"""Exit status if xgrammar is not installed that can be loaded in this way."""

COMPILER_THREADS = 2


class Work:
    """The work of a helper. Its state is the compiler of the last tokenizer that it got."""

    def __init__(self) -> None:
        self._core = _native()
        self._compiler: Any = None

    def do(self, what: str, arguments: list[Any]) -> None:
        """Do one piece of work. Raises what the library raises for a grammar that is wrong."""
        getattr(self, f"_{what}")(*arguments)

    def _check(self, maker: str, *arguments: Any) -> None:
        getattr(self._core.Grammar, maker)(*arguments)

    def _guidance(self, grammar: str) -> None:
        from llguidance import LLMatcher

        if error := LLMatcher.validate_grammar(grammar, None):
            raise ValueError(error)

    def _tokenizer(self, text: str) -> None:
        info = self._core.TokenizerInfo.deserialize_json(text)
        self._compiler = self._core.GrammarCompiler(info, COMPILER_THREADS, False, -1)

    def _compile(self, method: str, *arguments: Any) -> None:
        getattr(self._compiler, method)(*arguments)


def _native() -> Any:
    """Load xgrammar's native code: 0.3 s, instead of 4 s and 300 MB with torch, transformers."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # as if there were none
    found = importlib.util.find_spec("xgrammar")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("xgrammar is not installed")
    package = types.ModuleType("xgrammar")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["xgrammar"] = package
    importlib.import_module("xgrammar.load_binding")
    return importlib.import_module("xgrammar.base")._core


def _prepare() -> None:
    """Be the first to be killed if memory runs out; leave no core file; ignore the terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _bound_memory(more_bytes: int) -> None:
    """Bound how much the memory for data may grow: the parent looks only now and then."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmData:"):
                most = int(line.split()[1]) * 1024 + more_bytes
                resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))


def send(channel: socket.socket, message: list[Any]) -> None:
    """Send a message; both ends use this. Raises `OSError`."""
    text = json.dumps(message).encode()
    channel.sendall(len(text).to_bytes(4, "big") + text)


def receive(channel: socket.socket) -> Any:
    """Receive a message; both ends use this. Raises `OSError`; `EOFError`: the other end closed."""
    return json.loads(_exactly(channel, int.from_bytes(_exactly(channel, 4), "big")))


def _exactly(channel: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        if not (part := channel.recv(min(size - len(parts), 1 << 20))):
            raise EOFError
        parts += part
    return bytes(parts)


def _receive(channel: socket.socket) -> Any:
    try:
        return receive(channel)
    except EOFError:
        os._exit(0)  # the parent has ended, or has closed its end


def _answer(channel: socket.socket, answer: list[Any]) -> None:
    with suppress(OSError):
        send(channel, answer)


def main() -> None:
    _prepare()
    channel = socket.socket(fileno=int(sys.argv[1]))
    try:
        work = Work()
    except Exception:  # noqa: BLE001  # whatever it is, nothing can be done here
        os._exit(BEGIN_ABORTED)
    _answer(channel, [True, None])
    while True:
        more_bytes, what, arguments = _receive(channel)
        _bound_memory(more_bytes)
        answer: list[Any] = []

        def do(what: str = what, arguments: Any = arguments, answer: Any = answer) -> None:
            try:
                work.do(what, arguments)
            except BaseException as error:  # noqa: BLE001  # handed on
                answer += [False, type(error).__name__, str(error)[:10_000]]
            else:
                answer += [True, None]

        # On a thread of its own, whose priority the parent lowers if the work takes long.
        doing = threading.Thread(target=do)
        doing.start()
        _wait(doing, channel)
        del arguments
        _answer(channel, answer)


def _wait(doing: threading.Thread, channel: socket.socket) -> None:
    """Wait for the work, and exit at once if the parent closes its end before that."""
    channel.settimeout(0.0)
    pause_s = 0.001
    while doing.is_alive():
        doing.join(pause_s)
        pause_s = min(2 * pause_s, 0.1)
        with suppress(BlockingIOError):
            if not channel.recv(1, socket.MSG_PEEK):
                os._exit(0)
    channel.settimeout(None)


if __name__ == "__main__":
    main()
