"""`python -m tests.serving`: the whole server on fake engines, in a process of its own.

Its model answers nothing until it is told to stop, and it would wait a minute for its requests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_hotswap import event_loop
from vllm_hotswap.access import Access
from vllm_hotswap.app import HotswapApp
from vllm_hotswap.engines.fake import FakeHost, FakeSettings
from vllm_hotswap.listen import Listener
from vllm_hotswap.progress import EventLog, StartupProgress, configure_logging
from vllm_hotswap.server import serve


def flags(**given: object) -> argparse.Namespace:
    """Flags of the server as vLLM's parser gives them, on 127.0.0.1."""
    defaults: dict[str, object] = {
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
    return argparse.Namespace(**{**defaults, **given})


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--uds")
    parser.add_argument("--alias", default="llama")
    args = parser.parse_args(argv)
    configure_logging()
    host = FakeHost((args.alias,), {args.alias: FakeSettings(token_s=3600)})
    app = HotswapApp(host, Access(), observers=(EventLog(),))
    given = flags(host=args.host, port=args.port, uds=args.uds, shutdown_timeout=60)
    listener = Listener.open(given)
    progress = StartupProgress([args.alias])
    return event_loop.run(serve(app, listener, [args.alias], args.alias, progress))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
