"""The first head of a connection, examined before it is read."""

from __future__ import annotations

import gc

import pytest

from vllm_hotswap.connections.first_head import Malformed, first_head

GET = b"GET /he%61lth?full=1 HTTP/1.1\r\nHost: x\r\nX-API-Key: Right\r\n\r\n"
SHAKE = b"GET /v1/realtime HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n"


@pytest.mark.parametrize("behind", [b"", b"GET /other", GET, b"nonsense\r\n\r\n"])
def test_a_head_is_seen_whatever_is_behind_it(behind: bytes) -> None:
    """A head is seen as by the server, whatever follows: path decoded, without a query."""
    assert {
        "type": "http",
        "method": "GET",
        "path": "/health",
        "root_path": "",
        "headers": [(b"host", b"x"), (b"x-api-key", b"Right")],
    } == first_head(GET + behind)


def test_of_a_request_with_a_body_the_head_is_enough() -> None:
    """The head of a request is enough, although its body arrives later."""
    head = first_head(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")

    assert head is not None
    assert ("POST", "/v1/completions") == (head["method"], head["path"])


@pytest.mark.parametrize("end", range(len(GET)))
def test_a_part_of_a_head_is_none_yet(end: int) -> None:
    """A part of a head is not a head, wherever it ends."""
    assert first_head(GET[:end]) is None


def test_a_websocket_is_told_from_other_requests() -> None:
    """A WebSocket needs both fields; requests for other protocols are answered in HTTP."""
    others = [
        SHAKE.replace(b"Connection: Upgrade\r\n", b""),
        SHAKE.replace(b"WebSocket", b"h2c"),
    ]

    assert ["websocket", "http", "http"] == [
        (first_head(said) or {})["type"] for said in (SHAKE, *others)
    ]


@pytest.mark.parametrize("said", [b"nonsense\r\n\r\n", b"\x16\x03\x01", b"GET /\xff\r\n x"])
def test_what_is_no_head_is_told(said: bytes) -> None:
    """Bytes that can never become a head are reported as such."""
    with pytest.raises(Malformed):
        first_head(said)


def test_nothing_is_left_for_the_collector() -> None:
    """A flood would otherwise keep the garbage collector running."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            first_head(GET)
        assert gc.collect() < 100
    finally:
        gc.enable()
