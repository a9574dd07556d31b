"""`python -m tools.demo_picture`: the picture in the README, recorded from a server that runs.

It starts `vllm-hotswap serve models.yaml --fake`, sends what is shown as typed, and draws both the
commands and the answers as an SVG. The recorded fields of the answers hold no time and no id, so
every recording gives the same file. Fake engines are as fast as they are told, so no time is shown.

The picture is complete without its animation: lines only start hidden where a viewer plays it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape

from vllm_hotswap.demo import quickstart as demo

PICTURE = "docs/images/demo.svg"
SVG = "http://www.w3.org/2000/svg"

START_TIMEOUT_S = 60.0

ADDRESS = f"localhost:{demo.PORT}"
JSON = "-H 'Content-Type: application/json'"

COLUMN, ROW = 7.83, 20
"""Pixels; a column is the width of a character in the widest of the fonts below, at 13 pixels."""
MARGIN, BAR = 20, 38
"""Pixels around the text, and of the bar at the top of the window."""

TYPED_S, ANSWER_S, PAUSE_S = 0.25, 0.5, 1.4
"""Seconds of the animation: after a typed line, before an answer, and after an answer."""

STYLE = """\
    text {
      font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
      white-space: pre;
      fill: #24292f;
    }
    .window { fill: #ffffff; stroke: #8c959f }
    .bar { fill: #eaeef2 }
    .dot { fill: #8c959f }
    .note { fill: #57606a }
    .answer { fill: #116329 }
    .prompt { fill: #0550ae; font-weight: bold }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 }
      .window { fill: #0d1117; stroke: #6e7681 }
      .bar { fill: #21262d }
      .dot { fill: #6e7681 }
      .note { fill: #9198a1 }
      .answer { fill: #7ee787 }
      .prompt { fill: #79c0ff }
    }
    @media (prefers-reduced-motion: no-preference) {
      text { animation: show 0.2s backwards }
    }
    @keyframes show { from { opacity: 0 } }"""

TITLE = "vllm-hotswap: a chat with one model, a switch, a chat with another, one server process"


@dataclass(frozen=True, slots=True)
class Call:
    """A command with the note above it; `show` does what the `jq` at its end would do."""

    note: str
    command: str
    jq: str
    show: Callable[[Any], list[str]]

    def typed(self) -> list[str]:
        return [*f"$ {self.command} |".split("\n"), f"    jq {self.jq}"]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the picture."""

    kind: Literal["note", "typed", "answer"]
    text: str


def chat(alias: str) -> str:
    body = {"model": alias, "messages": [{"role": "user", "content": "Who are you?"}]}
    return f"curl -s {ADDRESS}/v1/chat/completions {JSON} \\\n    -d '{json.dumps(body)}'"


def switch(alias: str) -> str:
    body = json.dumps({"model": alias})
    return f"curl -s {ADDRESS}/v1/models/switch {JSON} \\\n    -d '{body}'"


def names(answer: Any) -> list[str]:
    return [json.dumps([model["id"] for model in answer["data"]], separators=(",", ":"))]


def content(answer: Any) -> list[str]:
    return [json.dumps(answer["choices"][0]["message"]["content"])]


def outcome(answer: Any) -> list[str]:
    fields = ("previous_model", "current_model", "switched", "requests_cut")
    return [json.dumps({name: answer[name] for name in fields}, separators=(",", ":"))]


START = "VLLM_SERVER_DEV_MODE=1 vllm-hotswap serve models.yaml --fake"

CALLS = (
    Call("one server, three models", f"curl -s {ADDRESS}/v1/models", "-c '[.data[].id]'", names),
    Call("llama is active", chat("llama"), "'.choices[0].message.content'", content),
    Call(
        "make another model active: nothing restarts",
        switch("qwen"),
        "-c '{previous_model, current_model, switched, requests_cut}'",
        outcome,
    ),
    Call("the same server, another model", chat("qwen"), "'.choices[0].message.content'", content),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_picture")
    parser.add_argument("--out", type=Path, default=Path(PICTURE), help=f"default: {PICTURE}")
    out: Path = parser.parse_args(argv).out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(picture(record()), encoding="utf-8")
    print(f"{out}: {out.stat().st_size} bytes")
    return 0


def record() -> list[Line]:
    """Start a server on fake engines, send every call, and return what is typed and answered."""
    lines = [Line("typed", f"$ {START} &")]
    with running_server() as address:
        for call in CALLS:
            lines.append(Line("note", f"# {call.note}"))
            lines += [Line("typed", text) for text in call.typed()]
            lines += [Line("answer", text) for text in call.show(sent(call.command, address))]
    return lines


def sent(command: str, address: str) -> Any:
    """Run a command against the server at `address`, and return the JSON that it prints."""
    line = command.replace(ADDRESS, address)
    ran = subprocess.run(["/bin/sh", "-c", line], capture_output=True, check=True, timeout=60)
    return json.loads(ran.stdout)


@contextmanager
def running_server() -> Iterator[str]:
    """Serve the demo's models on fake engines; give the address, and stop at the end."""
    with tempfile.TemporaryDirectory(prefix="demo-picture-") as name:
        folder = Path(name)
        path = demo.write(folder / "models")
        port_file = folder / "port"
        command = [sys.executable, "-m", "vllm_hotswap", "serve", str(path), "--fake"]
        command += ["--fake-pace", "0", "--port", "0", "--port-file", str(port_file)]
        with (folder / "server.log").open("wb") as log:
            process = subprocess.Popen(
                command, env={**os.environ, "VLLM_SERVER_DEV_MODE": "1"}, stdout=log, stderr=log
            )
        try:
            yield f"127.0.0.1:{port_of(port_file, process)}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def port_of(port_file: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait until the server accepts requests, which is when its port file appears."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not port_file.exists():
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError("the server did not start")
        time.sleep(0.05)
    return int(port_file.read_text())


def picture(lines: Sequence[Line]) -> str:
    """Draw the lines as a terminal, a blank row above each note."""
    rows: list[str] = []
    row, at_s = 0, 0.0
    for line in lines:
        row += 2 if line.kind == "note" else 1
        at_s += {"note": PAUSE_S, "typed": TYPED_S, "answer": ANSWER_S}[line.kind]
        y = BAR + MARGIN + row * ROW - ROW // 2
        rows.append(drawn(line, y, at_s))
    width = round(2 * MARGIN + max(len(line.text) for line in lines) * COLUMN)
    height = BAR + 2 * MARGIN + row * ROW
    dots = "".join(f'<circle class="dot" cx="{x}" cy="19" r="6"/>' for x in (24, 44, 64))
    size = f'width="{width}" height="{height}"'
    inner = f'width="{width - 1}" height="{height - 1}"'
    bar = f"M1 {BAR}V8.5A7.5 7.5 0 0 1 8.5 1H{width - 8.5}A7.5 7.5 0 0 1 {width - 1} 8.5V{BAR}Z"
    head = [
        f'<svg xmlns="{SVG}" viewBox="0 0 {width} {height}" {size} role="img">',
        f"  <title>{escape(TITLE)}</title>",
        f"  <style>\n{STYLE}\n  </style>",
        f'  <rect class="window" x="0.5" y="0.5" {inner} rx="8"/>',
        f'  <path class="bar" d="{bar}"/>',
        f"  {dots}",
    ]
    return "\n".join([*head, *rows, "</svg>", ""])


def drawn(line: Line, y: int, at_s: float) -> str:
    """Return one line as a `text`; the prompt of a command has a colour of its own."""
    text = escape(line.text)
    if line.text.startswith("$ "):
        text = f'<tspan class="prompt">$</tspan>{text[1:]}'
    return (
        f'  <text class="{line.kind}" x="{MARGIN}" y="{y}" xml:space="preserve" '
        f'style="animation-delay: {at_s:.2f}s">{text}</text>'
    )


def texts(drawing: str) -> list[str]:
    """Return the lines of text in a picture that `picture` has drawn, escaped as they are there."""
    found = re.findall(r"<text [^>]*>(.*)</text>", drawing)
    return [re.sub(r"</?tspan[^>]*>", "", text) for text in found]


if __name__ == "__main__":
    sys.exit(main())
