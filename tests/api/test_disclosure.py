"""Redaction: what clients see of messages that the server did not write itself."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from vllm_hotswap.api.redaction import MAX_REDACTED, redact
from vllm_hotswap.errors import UnknownRoute


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the folder '/srv/models/llama' does not exist", "the folder '.../llama' does not exist"),
        ("the folder '/srv/my models/llama 3' is gone", "the folder '.../llama 3' is gone"),
        ('no "/srv/models/llama/" there', 'no ".../llama" there'),
        ("open /srv/models/a.safetensors: denied", "open .../a.safetensors: denied"),
        ("(/srv/a/b), [/srv/c], x=/srv/d/e", "(.../b), [.../c], x=.../e"),
        ("[Errno 2] No such file: '/a/b'", "[Errno 2] No such file: '.../b'"),
        (
            'failed: Traceback (most recent call last):\n  File "/a/b.py", line 1',
            "failed: (the server's log has more)",
        ),
    ],
)
def test_folders_and_stack_traces_are_left_out(text: str, expected: str) -> None:
    """Folders and stack traces are left out; the last part of a path stays for operators."""
    assert expected == redact(text)


@pytest.mark.parametrize(
    "text",
    [
        'an admin can switch with POST /v1/models/switch {"model": "qwen"}',
        UnknownRoute("POST", "/some/where").message,
        "the query parameter model is missing or empty; send /admin/plan?model=ALIAS",
        "unknown route: WEBSOCKET /a/b",
        "model 'org/llama' is not configured; configured: org/qwen, a/b",
        "401 from https://host.example/api/models/x",
        "3/4 of 1 GiB/s",
    ],
)
def test_what_is_no_path_of_the_machine_stays(text: str) -> None:
    """Routes, addresses and aliases are not redacted."""
    assert text == redact(text)


names = st.text("abcdefgh0123456789-_. é", min_size=1).map(str.strip).filter(bool)


@given(st.lists(names, min_size=1, max_size=4), st.sampled_from(["'{}'", '"{}"']))
def test_no_folder_is_left_of_a_path_in_quotes(folders: list[str], quotes: str) -> None:
    """Folders are redacted in quoted paths, whatever characters their names have."""
    text = redact("cannot read " + quotes.format("/".join(["", "canary", *folders, "file"])))

    assert "canary" not in text
    assert "file" in text


@pytest.mark.parametrize("hostile", ["'/a", "'/a/", "/", "/a", "file:/", "'file:/"])
def test_no_text_takes_long(hostile: str) -> None:
    """A million characters that provoke rescanning take little time; messages are cut, too."""
    assert len(redact(hostile * 1_000_000)) <= 2 * MAX_REDACTED


@pytest.mark.parametrize("url", ["file:///data/secret/x", "ipc:///tmp/secret/x"])
@pytest.mark.parametrize("text", ["open {}: no", "open '{}': no", "{}"])
def test_urls_of_the_machine_are_paths(url: str, text: str) -> None:
    """URLs of files and of sockets are redacted like paths."""
    assert "secret" not in redact(text.format(url))
    assert "x" in redact(text.format(url))
