"""Model names on the hub: errors are reported at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.helpers.ports import free_port

ASK = """
import sys
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.launch.hub import require_known
try:
    require_known(sys.argv[1], sys.argv[2] or None)
except ConfigError as error:
    print(error.message)
"""


def ask(endpoint: str, cache: Path, name: str, revision: str = "", **environment: str) -> str:
    """Return the error for a name, from a process that uses this hub and this cache."""
    ended = subprocess.run(
        [sys.executable, "-c", ASK, name, revision],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), **environment},
    )
    return ended.stdout.strip()


@contextmanager
def hub(code: str) -> Iterator[str]:
    """A hub that finds nothing, and answers with this error code."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_hub_that_cannot_be_reached_is_told(tmp_path: Path) -> None:
    """A hub that cannot be reached is reported with a remedy."""
    said = ask(f"http://127.0.0.1:{free_port()}", tmp_path, "org/gone")

    assert said.startswith(
        "there is no folder 'org/gone' beside the file, and it is not in the hub's cache, and the "
        "hub cannot be reached ("
    )
    assert said.endswith("; name a folder, or fill the cache with `hf download org/gone`")


def test_a_hub_that_may_not_be_asked_is_told(tmp_path: Path) -> None:
    """A hub that `HF_HUB_OFFLINE` forbids is reported as not reachable."""
    said = ask("http://127.0.0.1:9", tmp_path, "org/gone", HF_HUB_OFFLINE="1")

    assert "the hub cannot be reached (" in said


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("RepoNotFound", "there is no folder 'org/gone' beside the file, and no such model on the"),
        ("RevisionNotFound", "'org/gone' has no revision 'v9' on the model hub"),
    ],
)
def test_a_name_that_the_hub_does_not_know_is_told(
    tmp_path: Path, code: str, expected: str
) -> None:
    """A name or a revision that the hub does not know is reported."""
    with hub(code) as endpoint:
        assert ask(endpoint, tmp_path, "org/gone", "v9").startswith(expected)


def test_a_model_in_the_cache_is_not_asked_for(tmp_path: Path) -> None:
    """A model in the cache needs no request, since there may be no network."""
    repository = tmp_path / "hub" / "models--org--here"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "config.json").write_text("{}")

    assert "" == ask("http://127.0.0.1:9", tmp_path, "org/here")


@pytest.mark.parametrize("name", ["s3://bucket/model", "org/model:Q4_K_M"])
def test_names_of_other_places_are_left_to_vllm(tmp_path: Path, name: str) -> None:
    """Names of other places are left to vLLM, which supports several."""
    assert "" == ask("http://127.0.0.1:9", tmp_path, name)
