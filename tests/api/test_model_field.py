"""Finding `model` in a body: correct for every body, fast for hostile ones, never raising."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given, strategies as st

from vllm_hotswap.api.media import FORM_PIECE_BYTES
from vllm_hotswap.api.model_name import SMALL_BYTES, form_fields, from_json, from_query, json_fields
from vllm_hotswap.tasks.turns import at_once
from vllm_hotswap.text.json_scan import MAX_TEXT_BYTES, PIECE_BYTES, TooLong, TooManyValues, scan
from vllm_hotswap.text.surrogates import HalfSurrogate

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
    """Return the JSON string of `text` with every character escaped."""
    units = text.encode("utf-16-be", "surrogatepass")
    return (
        '"' + "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2)) + '"'
    )


KEYS = ("model", "previous_response_id", "stream")
ENCODINGS = [
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32",
    "utf-32-le",
    "utf-32-be",
]


def scanned(body: bytes, piece_bytes: int = 7) -> str | None:
    """Return the `model` that a scan finds, in pieces that are far smaller than a server's."""
    found = at_once(scan(body, KEYS, piece_bytes)).found.get("model")
    return found if isinstance(found, str) else None


def from_form(body: bytes, content_type: str) -> str | None:
    return at_once(form_fields(body, content_type)).model


both_ways = pytest.mark.parametrize("find", [from_json, scanned], ids=["parsed", "scanned"])
"""Small bodies are parsed and larger ones scanned, with the same result."""

Find = Callable[[bytes], str | None]


# --- JSON -----------------------------------------------------------------------------------


@given(bodies, st.booleans(), st.sampled_from([None, 0, 2]), st.sampled_from(ENCODINGS))
def test_scan_finds_what_parsing_finds(
    body: dict[str, Any], ensure_ascii: bool, indent: int | None, encoding: str
) -> None:
    """A scan finds what `json.loads` finds, for any object and encoding, wherever a piece ends."""
    text = json.dumps(body, ensure_ascii=ensure_ascii, indent=indent)
    raw = text.encode(encoding, "surrogatepass")
    model = json.loads(raw).get("model")

    expected = model if isinstance(model, str) else None
    assert [expected] * 3 == [from_json(raw), *(scanned(raw, size) for size in (1, 7))]


@given(st.lists(st.tuples(st.sampled_from((*KEYS, "x")), values), max_size=6), st.integers(1, 99))
def test_the_last_of_equal_keys_counts(items: list[tuple[str, Any]], piece_bytes: int) -> None:
    """The last of equal keys counts, as in `json.loads`, which vLLM uses, so both agree."""
    raw = ("{" + ", ".join(f'"{key}": {json.dumps(value)}' for key, value in items) + "}").encode()

    read = json.loads(raw)
    expected = {
        key: read[key] if isinstance(read[key], str) or read[key] is True else None
        for key in KEYS
        if key in read
    }
    assert expected == at_once(scan(raw, KEYS, piece_bytes)).found


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [0, 2 * SMALL_BYTES])
def test_encoding_does_not_hide_the_model(encoding: str, size: int) -> None:
    """The model is found in UTF-8, -16 and -32, with or without a byte order mark, at any size."""
    body = json.dumps({"prompt": "é" * size, "model": "模型"}, ensure_ascii=False).encode(encoding)

    assert "模型" == json.loads(body)["model"] == from_json(body)


def test_fields_of_one_body_are_found_together() -> None:
    """The model, the previous response and `stream` are found together in one body."""
    large = {"input": "x" * SMALL_BYTES}
    body = {"stream": True, "previous_response_id": "r", "model": "a"}

    fields = at_once(json_fields(json.dumps(body).encode()))
    assert ("a", "r", True) == (fields.model, fields.previous_response_id, fields.stream)
    assert replace(fields, values=4) == at_once(json_fields(json.dumps(large | body).encode()))


def test_text_beyond_all_bounds_is_refused() -> None:
    """A name beyond every limit is refused; it is neither ignored nor repeated in a message."""
    body = json.dumps({"model": "a" * MAX_TEXT_BYTES}).encode()

    with pytest.raises(TooLong, match=r"^model$"):
        at_once(json_fields(body))


@pytest.mark.parametrize(
    "unit",
    [b"[],", b'"",', b'{"a":"b"},', b'"word",', b"1,", b"[1,2,3],", b'"\\",', b" ", b'"model",'],
)
def test_large_body_is_looked_at_in_pieces(unit: bytes) -> None:
    """A large body is scanned in pieces, and other tasks get a turn between two pieces."""
    items = unit * (TWO_MB // len(unit)) + b"1"

    pieces = sum(1 for _ in json_fields(b'{"input": [' + items + b'], "model": "a"}'))

    assert pieces >= TWO_MB // PIECE_BYTES


@pytest.mark.parametrize("unit", [b"1,", b"[],"])
def test_no_shape_costs_more_turns_than_its_size(unit: bytes) -> None:
    """A scan takes one turn per piece, and one to spare, whatever the shape of the body."""
    body = b'{"input": [' + unit * MANY + b'1], "model": "a"}'

    assert sum(1 for _ in json_fields(body)) <= len(body) // PIECE_BYTES + 1


@pytest.mark.parametrize(
    "unit",
    [
        b'"m":1,',
        b'"model":1,',
        b'"model" :1,',
        b'"a":"model",',
        b'"a":"model" ,',
        b'"mode\\u006c":1,',
        b'"\\u006d":1,',
        b'"\\":1,',
        b'"stream":"model",',
    ],
)
def test_no_key_costs_more_than_another(unit: bytes) -> None:
    """Wanted keys and keys that resemble them cost neither more turns nor a loop over them.

    The test counts the calls that the interpreter makes; they are as many for each piece.
    """
    body = b"{" + unit * MANY + b'"model": "a"}'
    plain = b"{" + b'"x":1,' * (len(body) // 6) + b'"model": "a"}'

    assert "a" == from_json(body)
    assert sum(1 for _ in json_fields(body)) <= len(body) // PIECE_BYTES + 1
    assert calls_of(body) < 3 * calls_of(plain)


@given(
    st.lists(
        st.sampled_from(
            [
                "\\ud83d",
                "\\uDE00",
                "\\\\",
                "ud83d",
                "\\n",
                '\\"',
                "\\u00e9",
                "a" * 70,
                "\ud55c",
                "\ud83d",
            ]
        )
    ),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-le"]),
)
def test_halves_of_surrogate_pairs_are_found(parts: list[str], encoding: str) -> None:
    """Halves of surrogate pairs are found wherever `json.loads` reads one, and nowhere else."""
    raw = f'{{"prompt": ["{"".join(parts)}"]}}'.encode(encoding, "surrogatepass")
    is_whole = "".join(json.loads(raw)["prompt"]).encode("utf-8", "replace").count(b"?") == 0

    if is_whole:
        at_once(json_fields(raw))
    else:
        with pytest.raises(HalfSurrogate, match=r"\\u[dD]"):
            at_once(json_fields(raw))


def calls_of(body: bytes) -> int:
    """Count the functions, of Python or of C, that are called to find the fields of a body."""
    calls = 0

    def count(_frame: object, _event: str, _of: object) -> None:
        nonlocal calls
        calls += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        at_once(json_fields(body))
    finally:
        sys.setprofile(before)
    return calls


spaces = st.sampled_from(["", " ", "\t\n", " " * 20])
written_keys = st.sampled_from(
    [
        *(f'"{key}"' for key in (*KEYS, "m", "mode", "models", "Model", "stream_options", "")),
        *(with_escapes(key) for key in (*KEYS, "m", "modem")),
        with_escapes("model").upper().replace("\\U", "\\u"),
        '"mod\\u0065l"',
        '"\\u006Dodel"',
        '"\\u006dode\\u006C"',
        '"\\u016dodel"',
        '"model\\\\"',
        '"\\"model"',
        '"\\\\model"',
    ]
)
written_values = st.sampled_from(
    ['"model"', '"stream"', "true", "1", '"a"', '{"model": "b"}', '["model"]', '"\\"model"', '""']
)


@given(
    st.lists(st.tuples(spaces, written_keys, spaces, spaces, written_values, spaces), max_size=6),
    st.integers(1, 99),
)
def test_keys_are_told_from_values_however_they_are_written(
    items: list[tuple[str, ...]], piece_bytes: int
) -> None:
    """Keys and values are told apart as by `json.loads`, despite escapes, space and cut pieces."""
    written = (f"{a}{key}{b}:{c}{value}{d}" for a, key, b, c, value, d in items)
    raw = ("{" + ",".join(written) + "}").encode()

    read = json.loads(raw)
    expected = {
        key: read[key] if isinstance(read[key], str) or read[key] is True else None
        for key in KEYS
        if key in read
    }
    assert expected == at_once(scan(raw, KEYS, piece_bytes)).found


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.integers(0, 3), bodies)
def test_model_is_found_at_any_position(model: str, position: int, body: dict[str, Any]) -> None:
    """The model is found whatever comes before it or after it."""
    items = [item for item in body.items() if item[0] != "model"]
    items.insert(position, ("model", model))

    raw = json.dumps(dict(items)).encode()
    assert [model] * 2 == [from_json(raw), scanned(raw)]


@given(st.text())
def test_escaped_key_and_value_are_found(model: str) -> None:
    """`model` written with escapes is `model`."""
    body = f"{{{with_escapes('model')}: {with_escapes(model)}}}".encode()

    assert [json.loads(body)["model"]] * 2 == [from_json(body), scanned(body)]


@both_ways
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
        (b'{"Model": "a"}', None),
        (b'{"model": 5}', None),
        (b'{"model": null}', None),
        (b'{"model": ["a"]}', None),
        (b'{"model": {"model": "a"}}', None),
        (b'{"x": {"model": "a"}}', None),
        (b'{"x": 1} {"model": "a"}', None),
        (b'{"model": "b", "model": "a"}', "a"),
        (b'{"model": "b", "model": 5}', None),
        (b'{"temperature": NaN, "x": -Infinity, "model": "a"}', "a"),
        (b'{"stop": ["\\ud83d"], "model": "a"}', "a"),
        (b'{"x": "\\\\", "y": "\\\\\\"", "model": "a"}', "a"),
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
        (b'{"x": "\\', None),
    ],
)
def test_json_by_example(find: Find, body: bytes, expected: str | None) -> None:
    """Space, escapes, nesting, look-alikes, other types and non-objects give the right model."""
    assert expected == find(body)


@given(st.binary() | st.text(alphabet='{}[]",:\\ model').map(str.encode))
def test_json_never_raises(body: bytes) -> None:
    """Whatever the bytes are, the answer is a string or None."""
    assert isinstance(from_json(body), str | None)
    if json.detect_encoding(body).startswith("utf-8"):
        assert isinstance(scanned(body), str | None)


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
    """Megabytes of hostile JSON are read once, not in the hours of a careless scan."""
    assert None is from_json(body)


def test_huge_string_before_the_model_is_stepped_over() -> None:
    """Images and long prompts in front of `model` do not hide it."""
    body = json.dumps({"image": '\\"' * (TWO_MB // 4), "model": "a"}).encode()

    assert "a" == from_json(body)


# --- forms ----------------------------------------------------------------------------------


def multipart(*parts: tuple[str, bytes], boundary: str = "b") -> bytes:
    """Return a multipart body of parts, each with its header and its content."""
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
        multipart((MODEL, b"first"), (MODEL, b"whisper")),
        multipart((FILE, b'name="model"\r\n\r\nno'), (MODEL, b"whisper")),
    ],
)
def test_multipart_field_is_found(body: bytes) -> None:
    """A multipart field is found beside files and other headers; of two, the last, as in vLLM."""
    assert "whisper" == from_form(body, MULTIPART)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (multipart((FILE, b"RIFF")), MULTIPART),
        (multipart((MODEL + '; filename="model"', b"whisper")), MULTIPART),
        (multipart((MODEL, b"whisper")), "multipart/form-data"),
        (multipart((MODEL, b"whisper")), "multipart/form-data; boundary=other"),
        (multipart((MODEL, b"whisper")), f"multipart/form-data; boundary={'b' * 257}"),
        (multipart((MODEL, b"whisper"))[:-12], MULTIPART),
        (b"", MULTIPART),
        (b"no form at all", MULTIPART),
    ],
)
def test_multipart_without_the_field_gives_none(body: bytes, content_type: str) -> None:
    """A multipart body that is cut or lacks a boundary or the field gives None; so does a file."""
    assert None is from_form(body, content_type)


@given(st.integers(0, 200))
def test_multipart_field_is_found_wherever_a_chunk_ends(before: int) -> None:
    """A multipart field is found wherever a chunk ends, also inside its header or value."""
    file = b"x" * (FORM_PIECE_BYTES - 300 + before)

    assert "whisper" == from_form(multipart((FILE, file), (MODEL, b"whisper")), MULTIPART)


def test_huge_file_before_the_field_is_stepped_over() -> None:
    """An upload in front of `model` does not hide it."""
    body = multipart((FILE, b"\r\n--" * (TWO_MB // 4)), (MODEL, b"whisper"))

    assert "whisper" == from_form(body, MULTIPART)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_urlencoded_field_is_found(model: str) -> None:
    """Percent signs, plus signs and any character of a urlencoded value are decoded."""
    body = urlencode({"prompt": "a&b", "model": model}).encode()

    assert model == from_form(body, URLENCODED)


def test_urlencoded_field_is_found_as_vllm_reads_it() -> None:
    """The last of two urlencoded fields counts, escaped or not, wherever a piece ends."""
    before = urlencode({"prompt": "&" * FORM_PIECE_BYTES, "model": "first"})

    for more in range(9):
        body = f"{before}{'x' * more}&m%6fdel=wh%69sper".encode()
        assert "whisper" == from_form(body, URLENCODED)


@pytest.mark.parametrize("body", [b"", b"prompt=model", b"\xff\xff=%ff"])
def test_urlencoded_without_the_field_gives_none(body: bytes) -> None:
    """A urlencoded body without the field gives None."""
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
    """The first `model` of the query is found and decoded; without one the answer is None."""
    assert expected == from_query(query)


@given(st.binary().map(lambda noise: b"model=" + noise))
def test_query_never_raises(query: bytes) -> None:
    """Whatever bytes are in the query, the answer is a string or None."""
    assert isinstance(from_query(query), str | None)


@pytest.mark.parametrize(
    ("body", "values"),
    [
        ({"input": ["a,b", "[[{{"] * 5000}, 10_001),
        ({"input": [[1, 2, 3]] * 5000}, 20_001),
        ({"input": [{"a": {"b": []}}] * 5000}, 20_001),
    ],
)
def test_values_are_counted_at_every_depth_and_not_in_texts(body: object, values: int) -> None:
    """Parsed values count at every depth, not inside texts; only more than the limit is refused."""
    raw = json.dumps(body).encode()

    at_once(scan(raw, ("model",), 1000, values))
    with pytest.raises(TooManyValues):
        at_once(scan(raw, ("model",), 1000, values - 1))
