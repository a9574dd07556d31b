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

from vllm_hotswap.config import ServerConfig
from vllm_hotswap.connections import DEFAULT_PORT
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.launch import check_names, refuse_unknown
from vllm_hotswap.models import Adapter, AdapterFiles
from vllm_hotswap.server import Prepared, Start
from vllm_hotswap.testing.fake_host import FakeHost
from vllm_hotswap.testing.fake_models import adapters_of, budget_of, check_keys, settings_of

log = logging.getLogger("vllm_hotswap")

VERSION = "fake"
"""In place of vLLM's."""

WORD_S = 0.02
"""Seconds of a word, as of a real model."""


class FakeEngines:
    """Of every model of the file, one that says the same few words."""

    def __init__(self, word_s: float = WORD_S) -> None:
        """`word_s` are the seconds that a word takes; loads, wakes and sleeps take longer."""
        self._word_s = word_s

    def check(self, flags: Sequence[str]) -> None:
        parse_flags(flags)

    def check_environment(self) -> None:
        pass

    def prepare(self, start: Start) -> Prepared:
        config = start.config
        args, unused = parse_flags(start.flags)
        check_keys(config)
        log.warning("event=fake_engines reason='--fake: answers are made up, no model is loaded'")
        if unused:
            log.info("event=ignored flags=%r reason='fake engines do not use them'", unused)
        host = fake_host(config, self._word_s)
        default = config.default_model
        load = [m.alias for m in config.models if m.load == "startup" or m.alias == default]
        return Prepared(host, start.bind(args), load, VERSION)


def fake_host(config: ServerConfig, word_s: float) -> FakeHost:
    """Fake engines of all models of a file, their adapters among them.

    Raises:
        ConfigError: two models or adapters have one name.
    """
    host = FakeHost(
        config.aliases,
        {model.alias: settings_of(model, word_s) for model in config.models},
        budget_of(config.memory),
        further={model.alias: tuple(model.aliases) for model in config.models},
    )
    for model in config.models:
        for name, path, rank in adapters_of(model):
            adapter = Adapter(AdapterFiles(name, path, rank), next(host.adapter_ids))
            host.engines[model.alias].adapters[name] = adapter
    engines = host.engines.values()
    check_names(config, {e.alias: [a.files for a in e.adapters.values()] for e in engines})
    return host


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
    refuse_unknown(unused)
    return args, " ".join(unused)
