"""`vllm-hotswap serve FILE --fake`: the whole server on fake engines.

For people who write clients and dashboards. It reads the same file, listens, checks keys, and
bounds connections, heads and bodies as the real one does. It starts in a second, needs no vLLM, and
reads no checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from typing import NoReturn

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.listen import DEFAULT_PORT
from vllm_hotswap.server import Prepared, Start
from vllm_hotswap.testing.fake_engine import FakeHost, FakeSettings

log = logging.getLogger("vllm_hotswap")

VERSION = "fake"
"""In place of vLLM's."""

TOKEN_S = 0.001


class FakeEngines:
    """Of every model of the file, one that says the same few words."""

    def __init__(self, token_s: float = TOKEN_S) -> None:
        self._token_s = token_s

    def check(self, flags: Sequence[str]) -> None:
        parse_flags(flags)

    def look_at_environment(self) -> None:
        pass

    def prepare(self, start: Start) -> Prepared:
        args, unused = parse_flags(start.flags)
        log.warning("event=fake_engines reason='--fake: answers are made up, no model is loaded'")
        if unused:
            log.warning("event=ignored flags=%r reason='fake engines have no use for them'", unused)
        models = start.config.models
        host = FakeHost(
            start.config.aliases,
            {model.alias: FakeSettings(token_s=self._token_s) for model in models},
            further={model.alias: tuple(model.aliases) for model in models},
        )
        default = start.config.default_model
        load = [m.alias for m in models if m.load == "startup" or m.alias == default]
        return Prepared(host, start.bind(args), load, VERSION)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_flags(flags: Sequence[str]) -> tuple[argparse.Namespace, str]:
    """The server's flags, named as vLLM's and with its defaults, and those that are none of them.

    Only the address differs: 127.0.0.1, if none is given.

    Raises:
        ConfigError: a value is not what the flag takes.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=DEFAULT_PORT)
    add("--uds")
    add("--api-key", nargs="*")
    add("--root-path")
    add("--uvicorn-log-level", default="info")
    add("--disable-uvicorn-access-log", action="store_true")
    add("--shutdown-timeout", type=int, default=0)
    add("--h11-max-incomplete-event-size", type=int, default=4 << 20)
    add("--h11-max-header-count", type=int, default=256)
    for name in ("keyfile", "certfile", "ca-certs", "ciphers"):
        add(f"--ssl-{name}")
    add("--ssl-cert-reqs", type=int, default=0)
    add("--allow-credentials", action="store_true")
    for name in ("methods", "headers"):
        add(f"--allowed-{name}", type=json.loads, default=["*"])
    add("--allowed-origins", type=json.loads, default=[])
    parser.set_defaults(enable_ssl_refresh=False)
    args, unused = parser.parse_known_args([*flags])
    return args, " ".join(unused)
