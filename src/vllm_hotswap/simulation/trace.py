"""Traces: when requests came, and what became of them; one JSON value per line.

The first line has the models and the settings of switching. Then come requests and switches, in
the order in which they ended. A generated trace has requests only, without their outcome; a
request may come `after` another one's end instead of at a fixed time.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Literal, TextIO

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vllm_hotswap.config import STRICT, Count, Priority, Seconds, SecondsAboveZero, Text
from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.states import Residency

log = logging.getLogger("vllm_hotswap")

END_S = 1e9
"""Every time is below this."""

Moment = Annotated[float, Field(ge=0, lt=END_S, allow_inf_nan=False)]
"""Seconds since the recording started."""


@dataclass(frozen=True, slots=True, config=STRICT)
class TracedModel:
    """How a model takes its turn, as the configuration says."""

    priority: Priority = 0
    max_wait_s: Seconds = 30.0
    weight: SecondsAboveZero = 1.0


@dataclass(frozen=True, slots=True, config=STRICT)
class TracedSwitching:
    """The settings of switching; keys are those of the configuration."""

    policy: Text = "batch"
    min_active: Seconds = 0.0
    slice: SecondsAboveZero = 2.0
    drain_timeout: Seconds = 60.0


@dataclass(frozen=True, slots=True, config=STRICT)
class Head:
    """The first line."""

    models: Annotated[dict[str, TracedModel], Field(min_length=1)]
    active: str | None = None
    switching: TracedSwitching = TracedSwitching()
    version: Literal[1] = 1
    kind: Literal["trace"] = "trace"


@dataclass(frozen=True, slots=True, config=STRICT)
class TracedRequest:
    """A request, and its outcome if that is known."""

    id: Count
    model: str
    arrived_s: Moment | None = None
    """When it arrived; None if it comes after another one."""
    after: Count | None = None
    """The request whose end it waits for: its client continues with the response to that one."""
    think_s: Seconds = 0.0
    """Seconds between that one's end and its arrival."""
    priority: Priority | None = None
    """None: its model's."""
    max_wait_s: Seconds | None = None
    """None: its model's."""
    prompt_tokens: Count = 0
    output_tokens: Count = 0
    prepared_s: Seconds = 0.0
    """Seconds from its arrival until it asked for its turn; they are part of `waited_s`."""
    waited_s: Seconds | None = None
    service_s: Seconds | None = None
    switched: Count | None = None
    """Switches during its wait."""
    result: Text | None = None
    kind: Literal["request"] = "request"

    @property
    def was_served(self) -> bool:
        """Whether it is known how long it waited and ran."""
        return self.result == "served" and None not in (self.waited_s, self.service_s)


@dataclass(frozen=True, slots=True, config=STRICT)
class TracedSwitch:
    """A switch of the recorded server."""

    at_s: Moment
    """When it started."""
    source: str | None
    target: str
    residency: Annotated[Residency | None, Field(strict=False)]
    """The target's, before the switch."""
    cost_s: Seconds
    """Without draining."""
    drain_s: Seconds = 0.0
    result: Text = "switched"
    automatic: bool = True
    kind: Literal["switch"] = "switch"


Line = Head | TracedRequest | TracedSwitch

LINES: TypeAdapter[Line] = TypeAdapter(
    Annotated[Head | TracedRequest | TracedSwitch, Field(discriminator="kind")]
)


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole trace."""

    head: Head
    requests: tuple[TracedRequest, ...] = ()
    switches: tuple[TracedSwitch, ...] = field(default=())

    @property
    def is_recorded(self) -> bool:
        """Whether it has the outcome of requests."""
        return any(request.was_served for request in self.requests)


def read(path: Path) -> Trace:
    """Return the trace in a file. An incomplete last line is left out, with a warning.

    Raises:
        ConfigError: it cannot be read, or is not a trace; the message names file and line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            texts = _whole(path, list(_numbered(file)))
        lines = [(number, _parse(path, number, text)) for number, text in texts]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {str(path)!r} cannot be read: {_cause(error)}") from error
    if not lines or not isinstance(lines[0][1], Head):
        raise _wrong(path, 1, 'the first line must be {"kind": "trace", "version": 1, ...}')
    head = lines[0][1]
    _check(path, head, lines[1:])
    return Trace(
        head,
        tuple(line for _, line in lines if isinstance(line, TracedRequest)),
        tuple(line for _, line in lines if isinstance(line, TracedSwitch)),
    )


def write(path: Path, trace: Trace) -> None:
    """Write a whole trace to a new file.

    Raises:
        ConfigError: the file exists or cannot be written.
    """
    with create(path) as file:
        lines: tuple[Line, ...] = (trace.head, *trace.requests, *trace.switches)
        file.writelines(f"{as_text(line)}\n" for line in lines)


def create(path: Path) -> TextIO:
    """Create the file of a trace, open for writing.

    Raises:
        ConfigError: it exists or cannot be written.
    """
    try:
        return path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise ConfigError(
            f"trace {str(path)!r} exists and is not overwritten; name another file"
        ) from error
    except OSError as error:
        raise ConfigError(f"trace {str(path)!r} cannot be written: {_cause(error)}") from error


def as_text(line: Line) -> str:
    """Return one line, without its end; unknown values are left out."""
    values = {name: _plain(value) for name, value in asdict(line).items()}
    kind = values.pop("kind")
    known = {name: value for name, value in values.items() if _is_written(line, name, value)}
    return json.dumps({"kind": kind, **known})


def _is_written(line: Line, name: str, value: object) -> bool:
    if isinstance(line, TracedRequest):
        is_set = {"think_s": line.after is not None, "prepared_s": line.prepared_s > 0}
        return value is not None and is_set.get(name, True)
    return True


def _plain(value: object) -> object:
    """Round times to microseconds: more is noise, and makes files twice as long."""
    if not isinstance(value, float):
        return value
    rounded = round(value, 6)
    return value if value < END_S <= rounded else rounded


def _numbered(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    return ((number, text) for number, text in enumerate(lines, 1) if text.strip())


def _whole(path: Path, texts: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Leave out an incomplete last line, which a killed server or a full disk may leave."""
    if len(texts) < 2 or not _is_cut(texts[-1][1]):
        return texts
    log.warning("event=trace_cut path=%r line=%d: left out", str(path), texts[-1][0])
    return texts[:-1]


def _is_cut(text: str) -> bool:
    if text.endswith("\n"):
        return False
    try:
        json.loads(text)
    except ValueError:
        return True
    return False


def _parse(path: Path, number: int, text: str) -> Line:
    try:
        return LINES.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        message = f"{where}: {first['msg']}" if where else first["msg"]
        raise _wrong(path, number, message) from error


def _check(path: Path, head: Head, lines: Iterable[tuple[int, Line]]) -> None:
    """Check what a single line cannot show."""
    if head.active is not None and head.active not in head.models:
        raise _wrong(path, 1, f"active model {head.active!r} is not among the models")
    seen: dict[int, int] = {}
    after: list[tuple[int, TracedRequest]] = []
    for number, line in lines:
        match line:
            case Head():
                raise _wrong(path, number, "a second head; one file holds one trace")
            case TracedSwitch():
                _check_models(path, number, head.models, line.source, line.target)
            case TracedRequest():
                _check_models(path, number, head.models, line.model)
                if line.id in seen:
                    raise _wrong(
                        path, number, f"id {line.id} is already used in line {seen[line.id]}"
                    )
                seen[line.id] = number
                if (line.arrived_s is None) == (line.after is None):
                    raise _wrong(path, number, "either arrived_s or after must be given")
                if line.after is not None:
                    after.append((number, line))
    _check_after(path, seen, after)


def _check_models(
    path: Path, number: int, models: Mapping[str, TracedModel], *aliases: str | None
) -> None:
    for alias in aliases:
        if alias is not None and alias not in models:
            known = ", ".join(models)
            raise _wrong(
                path, number, f"model {alias!r} is not in the first line, which has {known}"
            )


def _check_after(
    path: Path, seen: Mapping[int, int], later: Iterable[tuple[int, TracedRequest]]
) -> None:
    for number, request in later:
        assert request.after is not None
        if seen.get(request.after, number) >= number:
            raise _wrong(
                path, number, f"after: there is no request {request.after} before this line"
            )


def _wrong(path: Path, number: int, message: str) -> ConfigError:
    return ConfigError(f"trace {str(path)!r}, line {number}: {one_line(ValueError(message))}")


def _cause(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or one_line(error)) if isinstance(error, OSError) else "it is not UTF-8"
