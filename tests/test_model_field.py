"""Finding `model` in a body: right for every body, quick for hostile ones, never raising."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given, strategies as st

from vllm_hotswap.model_field import from_form, from_json, from_query

TWO_MB = 2 << 20
MANY = 64 << 10

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["model", "a", ""]) | st.text(), inner, max_size=4)
    ),
    max_leaves=5,
)
bodies = st.dictionaries(st.sampled_from(["model", "messages", ""]) | st.text(), values, max_size=6)


def with_escapes(text: str) -> str:
    """The JSON string of `text` with every character escaped."""
    units = text.encode("utf-16-be", "surrogatepass")
    return (
        '"' + "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)) + '"'
    )


# --- JSON -----------------------------------------------------------------------------------


@given(bodies, st.booleans(), st.sampled_from([None, 0, 2]))
def test_json_gives_what_parsing_would_give(
    body: dict[str, Any], ensure_ascii: bool, indent: int | None
) -> None:
    """For any JSON object: its `model` if that is a string, None otherwise."""
    model = body.get("model")
    raw = json.dumps(body, ensure_ascii=ensure_ascii, indent=indent)

    assert (model if isinstance(model, str) else None) == from_json(
        raw.encode("utf-8", "surrogatepass")
    )


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.integers(0, 3), bodies)
def test_model_is_found_at_any_position(model: str, position: int, body: dict[str, Any]) -> None:
    """It does not matter what comes before it or after it."""
    items = [item for item in body.items() if item[0] != "model"]
    items.insert(position, ("model", model))

    assert model == from_json(json.dumps(dict(items)).encode())


@given(st.text())
def test_escaped_key_and_value_are_found(model: str) -> None:
    """`model` written with escapes is `model`."""
    body = f"{{{with_escapes('model')}: {with_escapes(model)}}}".encode()

    assert json.loads(body)["model"] == from_json(body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model": "a"}', "a"),
        (b' \r\n\t{ "model" \n:\t "a" }', "a"),
        (b'{"mod\\u0065l": "a"}', "a"),
        (b'{"model": "\\u00e9\\n\\""}', 'é\n"'),
        (b'{"x": {"model": "b"}, "model": "a"}', "a"),
        (b'{"x": [{"model": "b"}], "model": "a"}', "a"),
        (b'{"x": "\\"model\\": \\"b\\"", "model": "a"}', "a"),
        (b'{"x": "model", "model": "a"}', "a"),
        (b'{"x": "}{][", "model": "a"}', "a"),
        (b'{"x": "\\\\", "model": "a"}', "a"),
        (b'{"model": "a", "broken": ', "a"),
        (b'{"Model": "a"}', None),
        (b'{"model": 5}', None),
        (b'{"model": null}', None),
        (b'{"model": ["a"]}', None),
        (b'{"model": {"model": "a"}}', None),
        (b'{"x": {"model": "a"}}', None),
        (b'{"x": 1} {"model": "a"}', None),
        (b'[{"model": "a"}]', None),
        (b'"model"', None),
        (b"{}", None),
        (b"", None),
        (b"{", None),
        (b'{"model"', None),
        (b'{"model":', None),
        (b'{"model": "a', None),
        (b'{"model": "\\x"}', None),
        (b'{"model": "\xff"}', None),
        (b'{"\xff": 1, "model": "a"}', "a"),
        (b'{"x": "\\', None),
    ],
)
def test_json_by_example(body: bytes, expected: str | None) -> None:
    """Space, escapes, nesting, look-alikes, other types, and bodies that are no JSON object."""
    assert expected == from_json(body)


@given(st.binary() | st.text(alphabet='{}[]",:\\ model').map(str.encode))
def test_json_never_raises(body: bytes) -> None:
    """Whatever the bytes are, the answer is a string or None."""
    assert isinstance(from_json(body), str | None)


@pytest.mark.parametrize(
    "body",
    [
        b'{"x": "' + b"\\" * TWO_MB,
        b'{"' + b'\\"' * (TWO_MB // 2),
        b'{"x": "' + b'\\"' * (TWO_MB // 2) + b"\\",
        b'{"x": ' + b"[" * MANY,
        b'{"x": ' + b"[]" * MANY,
        b"{" + b" " * TWO_MB,
        b'{"x"' + b" " * TWO_MB + b"!",
        b"{" + b'"' * MANY,
        b'{"x": [' + b"1," * (TWO_MB // 2),
    ],
    ids=["backslashes", "quotes", "odd", "open", "pairs", "space", "no colon", "empty", "numbers"],
)
def test_hostile_json_is_read_once(body: bytes) -> None:
    """Megabytes that would take a careless scan hours end like any other test."""
    assert None is from_json(body)


def test_huge_string_before_the_model_is_stepped_over() -> None:
    """Images and long prompts in front of `model` do not hide it."""
    body = json.dumps({"image": '\\"' * (TWO_MB // 4), "model": "a"}).encode()

    assert "a" == from_json(body)


# --- forms ----------------------------------------------------------------------------------


def multipart(*parts: tuple[str, bytes], boundary: str = "b") -> bytes:
    """A multipart body of parts, each with its header and its content."""
    written = [
        f"--{boundary}\r\n{header}\r\n\r\n".encode() + content + b"\r\n"
        for header, content in parts
    ]
    return b"".join(written) + f"--{boundary}--\r\n".encode()


MULTIPART = "multipart/form-data; boundary=b"
URLENCODED = "application/x-www-form-urlencoded"
MODEL = 'Content-Disposition: form-data; name="model"'
FILE = 'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav'


@pytest.mark.parametrize(
    "body",
    [
        multipart((MODEL, b"whisper")),
        multipart((FILE, b"RIFF"), (MODEL, b"whisper")),
        multipart((MODEL, b"whisper"), (FILE, b"RIFF")),
        multipart((MODEL.replace("Content-Disposition", "content-disposition"), b"whisper")),
        multipart((MODEL + "\r\nContent-Type: text/plain", b"whisper")),
        multipart(("X-Other: 1\r\n" + MODEL, b"whisper")),
        multipart((MODEL, b"whisper"), (MODEL, b"second")),
        multipart((FILE, b'name="model"\r\n\r\nno'), (MODEL, b"whisper")),
    ],
)
def test_multipart_field_is_found(body: bytes) -> None:
    """Before or after a file, with other headers, the first one of two."""
    assert "whisper" == from_form(body, MULTIPART)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (multipart((FILE, b"RIFF")), MULTIPART),
        (multipart((MODEL + '; filename="model"', b"whisper")), MULTIPART),
        (multipart((MODEL, b"whisper")), "multipart/form-data"),
        (multipart((MODEL, b"whisper")), "multipart/form-data; boundary=other"),
        (multipart((MODEL, b"whisper"))[:-12], MULTIPART),
        (b"", MULTIPART),
        (b"no form at all", MULTIPART),
    ],
)
def test_multipart_without_the_field_gives_none(body: bytes, content_type: str) -> None:
    """No field, a file of that name, no or another boundary, a body that is cut or no form."""
    assert None is from_form(body, content_type)


@given(st.integers(0, 200))
def test_multipart_field_is_found_wherever_a_chunk_ends(before: int) -> None:
    """The body is fed in chunks of 64 KiB; one may end inside the field's header or value."""
    file = b"x" * ((64 << 10) - 300 + before)

    assert "whisper" == from_form(multipart((FILE, file), (MODEL, b"whisper")), MULTIPART)


def test_huge_file_before_the_field_is_stepped_over() -> None:
    """An upload in front of `model` does not hide it."""
    body = multipart((FILE, b"\r\n--" * (TWO_MB // 4)), (MODEL, b"whisper"))

    assert "whisper" == from_form(body, MULTIPART)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_urlencoded_field_is_found(model: str) -> None:
    """Percent signs, plus signs and any character of a value come back as they were."""
    body = urlencode({"prompt": "a&b", "model": model}).encode()

    assert model == from_form(body, URLENCODED)


@pytest.mark.parametrize("body", [b"", b"prompt=model", b"model=", b"\xff\xff=%ff"])
def test_urlencoded_without_the_field_gives_none(body: bytes) -> None:
    """No field, or an empty one."""
    assert None is from_form(body, URLENCODED + "; charset=utf-8")


@given(
    st.binary() | st.text(alphabet='-b\r\n:;="modelname').map(str.encode),
    st.sampled_from([MULTIPART, "multipart/form-data; boundary=", URLENCODED])
    | st.binary().map(lambda header: header.decode("latin-1")),
)
def test_form_never_raises(body: bytes, content_type: str) -> None:
    """Whatever bytes are sent as whatever form, the answer is a string or None."""
    assert isinstance(from_form(body, content_type), str | None)


# --- query ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"model=llama", "llama"),
        (b"a=1&model=org%2Fllama&b=2", "org/llama"),
        (b"model=a&model=b", "a"),
        (b"submodel=a", None),
        (b"model=", None),
        (b"", None),
    ],
)
def test_query_parameter_is_found(query: bytes, expected: str | None) -> None:
    """The first `model`, decoded; None without one."""
    assert expected == from_query(query)


@given(st.binary().map(lambda noise: b"model=" + noise))
def test_query_never_raises(query: bytes) -> None:
    """Whatever bytes are in the query, the answer is a string or None."""
    assert isinstance(from_query(query), str | None)
