"""`python -m tests.helpers.serving`: the whole server on fake engines, in a separate process.

Its model answers nothing until the server is stopped, which would wait a minute for its requests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_hotswap.access.roles import Access
from vllm_hotswap.api.app import HotswapApp
from vllm_hotswap.connections.listen import Listener
from vllm_hotswap.server.run import serve
from vllm_hotswap.system.log_lines import configure_logging
from vllm_hotswap.tasks import event_loop
from vllm_hotswap.telemetry.progress import EventLog, StartupProgress
from vllm_hotswap.testing.fake_host import FakeHost
from vllm_hotswap.testing.fake_server import parse_flags
from vllm_hotswap.testing.fake_settings import FakeSettings


def flags(**given: object) -> argparse.Namespace:
    """Return the server's flags as vLLM's parser gives them, on 127.0.0.1."""
    quiet = {"uvicorn_log_level": "warning", "disable_uvicorn_access_log": True}
    parsed, _ = parse_flags(["--port", "0"])
    return argparse.Namespace(**{**vars(parsed), **quiet, **given})


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
