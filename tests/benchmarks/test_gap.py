"""The service gap's arithmetic, on handmade replies. No server."""

from __future__ import annotations

import json

import pytest

from benchmarks.gap import Fates, Gaps, ends, fates, split
from benchmarks.wire import End, Reply

GOLDEN = "one two"


def reply(*events: tuple[float, str], end: End = End.COMPLETE) -> Reply:
    """Return a stream whose events came at these times."""
    made = Reply(end=end, status=200, is_stream=True)
    for at_s, event in events:
        made.body += f"{event}\n\n".encode()
        made.arrivals.append((len(made.body), at_s))
    return made


def token(text: str) -> str:
    choice = {"text": text, "finish_reason": None}
    return f"data: {json.dumps({'model': 'llama', 'choices': [choice]})}"


ERROR = 'data: {"error": {"message": "cut", "type": "t", "code": "drain_timeout"}}'
DONE = "data: [DONE]"


def test_the_gap_is_from_the_last_token_of_a_to_the_first_of_b() -> None:
    """The gap ignores ends of streams, errors, comments, and A's later tokens."""
    of_a = [
        reply((1.0, token("one")), (2.0, token(" two")), (2.5, DONE)),
        reply((1.5, token("one")), (2.2, ": parked"), (9.0, token(" two")), (9.1, DONE)),
        reply((1.8, token("one")), (2.6, ERROR)),
    ]
    of_b = [reply((4.0, token("x"))), reply((3.0, token("")), (3.5, token("x")))]

    assert (2.0, 3.5) == ends(of_a, of_b)


def test_the_parts_of_a_gap_add_up_to_it() -> None:
    """The parts add up to the gap, whatever the switch waited for before A's last token."""
    of_a, of_b = [reply((2.0, token("one")))], [reply((2.5, token("x")))]
    phases = {"validate": 10.0, "drain": 90.0, "bring_up": 150.0, "activate": 40.0, "verify": 5.0}
    gaps = Gaps()
    split(gaps, of_a, of_b, 2.0, {"phases": phases, "duration_ms": 300.0})

    assert 500.0 == pytest.approx(sum(sum(values) for values in gaps.parts_ms.values()))
    assert [100.0] == [
        pytest.approx(v) for v in gaps.parts_ms["last token to the end of the drain"]
    ]
    assert [5.0] == [pytest.approx(v) for v in gaps.parts_ms["between phases"]]
    assert [200.0] == [pytest.approx(v) for v in gaps.parts_ms["admission to first token"]]
    assert {"validate": [10.0], "drain": [90.0]} == gaps.before_ms


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (reply((1, token("one")), (2, token(" two")), (3, DONE)), Fates(identical=1)),
        (
            reply((1, token("one")), (2, ": parked"), (3, token(" two")), (4, DONE)),
            Fates(identical=1, resumed=1),
        ),
        (reply((1, token("one")), (2, ERROR)), Fates(failed=1)),
        (reply((1, token("one")), end=End.LOST), Fates(lost=1)),
        (reply((1, token("one")), (2, token(" 2")), (3, DONE)), Fates(wrong=1)),
        (reply((1, token("one")), (2, DONE)), Fates(wrong=1)),
        (reply((1, token("two")), (2, ERROR)), Fates(wrong=1)),
        (reply((1, token("one")), (2, ": parked"), (3, token(" 2")), (4, DONE)), Fates(wrong=1)),
    ],
)
def test_a_stream_has_one_fate(stream: Reply, expected: Fates) -> None:
    """A stream is resumed or cut; its tokens are compared with its model's undisturbed answer."""
    assert expected == fates([stream], [GOLDEN])
