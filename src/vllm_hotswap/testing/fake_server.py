"""`python -m vllm_hotswap.testing.fake_server FILE`: the whole server on fake engines.

It listens, checks keys, and bounds connections, heads and bodies as the real one does, and starts
in a second, without vLLM: for trying out what is to be measured.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from vllm_hotswap import event_loop
from vllm_hotswap.access import Access
from vllm_hotswap.app import HotswapApp
from vllm_hotswap.config import load_config
from vllm_hotswap.listen import Listener
from vllm_hotswap.progress import EventLog, StartupProgress, configure_logging
from vllm_hotswap.server import serve
from vllm_hotswap.testing.fake_engine import FakeHost, FakeSettings

TOKEN_S = 0.001

FLAGS: Mapping[str, object] = MappingProxyType(
    {
        "host": "127.0.0.1",
        "port": 0,
        "uds": None,
        "uvicorn_log_level": "warning",
        "disable_uvicorn_access_log": True,
        "root_path": None,
        "h11_max_incomplete_event_size": 1 << 22,
        "h11_max_header_count": 256,
        "ssl_keyfile": None,
        "ssl_certfile": None,
        "ssl_ca_certs": None,
        "ssl_cert_reqs": 0,
        "ssl_ciphers": None,
        "enable_ssl_refresh": False,
        "allowed_origins": [],
        "allowed_methods": ["*"],
        "allowed_headers": ["*"],
        "allow_credentials": False,
        "shutdown_timeout": 0,
    }
)
"""Of the server, as vLLM's parser gives them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m vllm_hotswap.testing.fake_server")
    parser.add_argument("file", type=Path, help="the models file; the checkpoints are not read")
    parser.add_argument("--port", type=int, required=True, help="of 127.0.0.1")
    args = parser.parse_args(argv)
    configure_logging()
    config = load_config(args.file)
    settings = {alias: FakeSettings(token_s=TOKEN_S) for alias in config.aliases}
    app = HotswapApp(
        FakeHost(config.aliases, settings),
        Access.from_environment(os.environ, None, config.rights),
        config.switching,
        observers=(EventLog(),),
        limits=config.limits,
        recovery=config.recovery,
        isolation=config.isolation,
    )
    listener = Listener.open(argparse.Namespace(**{**FLAGS, "port": args.port}))
    progress = StartupProgress(list(config.aliases))
    serving = serve(app, listener, config.aliases, config.default_model, progress)
    return event_loop.run(serving)


if __name__ == "__main__":
    sys.exit(main())
