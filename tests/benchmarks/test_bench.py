"""The benchmark's own arithmetic, texts and files. No server."""

from __future__ import annotations

import asyncio
import json
import math
import time
from itertools import islice
from pathlib import Path

import psutil
import pytest

from benchmarks import medium, report
from benchmarks.__main__ import choose, parse
from benchmarks.client import BadAnswer, Connection, dechunk, last_event
from benchmarks.load import prompts
from benchmarks.servers import Model, Server, ServerFailed, flags, hotswap_config, log_tail
from benchmarks.stats import (
    Bar,
    alternate,
    pair_ratios,
    percentile,
    ratio,
    summarize,
)
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.demo import quickstart as demo
from vllm_hotswap.errors import ConfigError

pytestmark = pytest.mark.slow

USAGE = {"prompt_tokens": 3, "completion_tokens": 2}
EVENTS = (
    b'data: {"model": "qwen", "choices": [{"text": "a"}]}\n\n'
    b'data: {"model": "qwen", "choices": [], "usage": ' + json.dumps(USAGE).encode() + b"}\n\n"
    b"data: [DONE]\n\n"
)


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


def some_part() -> report.Part:
    table = report.Table("Times, ms", ("", "p50"), (("a call", "1.50"), ("b", "12.00")))
    bars = (Bar("call, ms", 1.5, 3.0), Bar("tok/s ratio", 0.9, 1.0, at_least=True))
    return report.Part("switch", (table,), bars, {"call_ms": [1.4999999999, 2.0]})


# --- figures ----------------------------------------------------------------------------


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 2.5), (95, 3.85), (100, 4.0)])
def test_percentiles_are_interpolated(percent: float, expected: float) -> None:
    """Percentiles are interpolated between the nearest samples, whatever their order."""
    assert expected == pytest.approx(percentile([4.0, 1.0, 3.0, 2.0], percent))


def test_one_sample_is_every_percentile() -> None:
    """One sample is every percentile, and has no spread."""
    summary = summarize([7.0])

    assert (7.0, 7.0, 7.0, 0.0) == (summary.p50, summary.p99, summary.minimum, summary.spread)


def test_no_samples_have_no_percentile() -> None:
    """Without samples there is an error, instead of a figure that was not measured."""
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_spread_is_relative_to_the_median() -> None:
    """The spread is the whole range relative to the median."""
    assert math.isclose(0.5, summarize([8.0, 10.0, 13.0]).spread)


def test_ratios_are_of_medians_and_of_neighbours() -> None:
    """One slow run changes neither the ratio of medians nor the other pairs."""
    assert 2.0 == ratio([2.0, 4.0, 90.0], [1.0, 2.0, 3.0])
    assert [2.0, 0.5] == pair_ratios([2.0, 2.0], [1.0, 4.0])


def test_sides_take_turns_and_none_is_always_first() -> None:
    """The order is A B, B A, A B: each side has as many turns."""
    turns = list(alternate(3))

    assert ["hotswap", "plain", "plain", "hotswap", "hotswap", "plain"] == turns


@pytest.mark.parametrize(
    ("bar", "met"),
    [
        (Bar("", 3.0, 3.0), True),
        (Bar("", 3.1, 3.0), False),
        (Bar("", 1.0, 1.0, at_least=True), True),
        (Bar("", 0.9, 1.0, at_least=True), False),
    ],
)
def test_a_bar_is_met_at_its_limit(bar: Bar, met: bool) -> None:
    """A bar is met at exactly its limit, in both directions."""
    assert met is bar.met


# --- report -----------------------------------------------------------------------------


def test_a_part_is_shown_with_its_tables_and_bars() -> None:
    """A part is shown as Markdown with aligned columns."""
    assert (
        "### Times, ms\n"
        "\n"
        "|        |   p50 |\n"
        "| ------ | ----: |\n"
        "| a call |  1.50 |\n"
        "| b      | 12.00 |\n"
        "\n"
        "### switch: targets\n"
        "\n"
        "| target      | measured | wanted |        |\n"
        "| ----------- | -------: | -----: | -----: |\n"
        "| call, ms    |     1.50 |   <= 3 |    met |\n"
        "| tok/s ratio |     0.90 |   >= 1 | MISSED |"
    ) == report.render(some_part())


def test_a_table_of_texts_is_aligned_to_the_left() -> None:
    """A table of texts is aligned to the left, without spaces at the ends of its lines."""
    table = report.Table("Environment", ("", "value"), (("cpu", "EPYC"),), is_text=True)

    assert (
        "### Environment\n\n|     | value |\n| --- | ----- |\n| cpu | EPYC  |"
    ) == report.render_table(table)


def test_the_file_has_environment_options_and_every_sample(tmp_path: Path) -> None:
    """One JSON object has environment, options, every sample, and whether each bar was met."""
    path = tmp_path / "new" / "bench.json"
    report.write(path, report.document({"cpu": "EPYC"}, {"runs": 3}, [some_part()]))
    content = json.loads(path.read_text())

    assert {"format", "environment", "options", "parts"} == set(content)
    part = content["parts"]["switch"]
    assert {"call_ms": [1.5, 2.0]} == part["samples"]
    assert [True, False] == [bar["met"] for bar in part["bars"]]
    assert ["", "p50"] == part["tables"][0]["columns"]


# --- client -----------------------------------------------------------------------------


def test_chunks_are_joined() -> None:
    """Chunks are joined, wherever the server cuts them."""
    assert b"data: a\n\ndata: b\n\n" == dechunk(chunked(b"data: a\n", b"\ndata: b\n\n"))


def test_the_usage_is_in_the_last_event() -> None:
    """The usage comes from the event before the end of the stream."""
    assert last_event(EVENTS)["usage"] == USAGE


@pytest.mark.parametrize("events", [b"", EVENTS[:-15], b'data: {"error": {}}\n\ndata: [DONE]\n\n'])
def test_a_stream_that_was_cut_is_no_sample(events: bytes) -> None:
    """A cut stream is not a sample: counting it would make a broken server look fast."""
    with pytest.raises(BadAnswer, match="ended early"):
        last_event(events)


async def answer_with(answer: bytes) -> tuple[asyncio.Server, int]:
    """Run a server that answers every request with the same bytes, then closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for cut in range(0, len(answer), 40):
            writer.write(answer[cut : cut + 40])
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


async def test_a_streamed_answer_is_timed_and_counted() -> None:
    """A streamed answer is timed, and its tokens are those that the server reports."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    server, port = await answer_with(head + chunked(EVENTS[:60], EVENTS[60:]))
    async with server, Connection(port) as connection:
        stream = await connection.stream({"model": "qwen", "prompt": "a"})

    assert ("qwen", 3, 2) == (stream.model, stream.prompt_tokens, stream.output_tokens)
    assert 0 < stream.ttft_s <= stream.duration_s


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nbusy", "/health answered 503: busy"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhal", "closed the connection"),
    ],
)
async def test_any_other_answer_is_an_error(answer: bytes, message: str) -> None:
    """Any other answer is an error that includes the answer."""
    server, port = await answer_with(answer)
    async with server, Connection(port) as connection:
        with pytest.raises(BadAnswer, match=message):
            await connection.get("/health")


# --- servers ----------------------------------------------------------------------------


def test_both_servers_get_the_same_settings(tmp_path: Path) -> None:
    """Both servers get equal settings, as YAML keys on one side and as flags on the other."""
    settings = {"max_model_len": 512, "enforce_eager": True, "enable_x": False, "o": {"a": 1}}
    model = Model("qwen", tmp_path, settings)

    config = hotswap_config([model])
    assert {"qwen": {"model": str(tmp_path), **settings}} == config["models"]
    assert ["--max-model-len=512", "--enforce-eager", "--no-enable-x", '--o={"a": 1}'] == flags(
        settings
    )


def test_the_end_of_a_log_is_what_the_server_said() -> None:
    """The end of a log leaves out what libraries print while the process exits."""
    noise = 'nanobind: leaked 2 functions!\n - leaked function "f"\n - ... skipped remainder\n\n'

    assert "    INFO: a\n    error: port taken" == log_tail(f"INFO: a\nerror: port taken\n{noise}")


async def test_a_server_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    """A server that exits at once is reported in one line, followed by the end of its log."""
    log = tmp_path / "plain-1.log"
    server = Server("plain", ["sh", "-c", "echo port taken; exit 3"], 1, log)
    with pytest.raises(ServerFailed) as caught:
        await server.ready()
    await server.stop()

    assert str(caught.value) == (
        "the plain server ended with status 3 before it was ready; "
        "the end of plain-1.log:\n    port taken"
    )


@pytest.mark.parametrize("then", ["wait", "exit 3"])
async def test_a_server_is_ended_with_all_that_it_started(tmp_path: Path, then: str) -> None:
    """A server is stopped with all its processes, even those that outlive it, even if frozen."""
    note = tmp_path / "child"
    command = ["sh", "-c", f"sleep 60 & echo $! > {note}; {then}"]
    server = Server("plain", command, 1, tmp_path / "log")
    child = await asyncio.to_thread(noted_process, note)
    server.freeze()
    await server.stop()

    assert not runs(child)


def noted_process(note: Path) -> psutil.Process:
    while not note.exists() or not note.read_text().strip():
        time.sleep(0.01)
    return psutil.Process(int(note.read_text()))


def runs(process: psutil.Process) -> bool:
    try:
        process.wait(timeout=5)
    except psutil.TimeoutExpired:
        return True
    return False


# --- models and options -----------------------------------------------------------------


def test_prompts_share_no_beginning_and_are_repeatable() -> None:
    """Prompts are the same for both sides, and give the prefix cache nothing."""
    first = list(islice(prompts("a", 4), 50))

    assert first == list(islice(prompts("a", 4), 50))
    assert 50 == len({prompt.split()[0] for prompt in first})


def test_the_demo_models_are_measured_by_default(tmp_path: Path) -> None:
    """The demo models measured by default are the first two, with equal cache memory."""
    models = choose(load_config(demo.write(tmp_path)), None)

    assert ["llama", "qwen"] == [model.alias for model in models]
    assert 1 == len({model.settings["kv_cache_memory_bytes"] for model in models})


def test_an_alias_that_is_not_configured_is_refused(tmp_path: Path) -> None:
    """An unconfigured alias is refused before any server is started."""
    with pytest.raises(ConfigError, match="'gpt' is not configured"):
        choose(load_config(demo.write(tmp_path)), ("llama", "gpt"))


def test_quick_means_one_run_of_small_loads() -> None:
    """`--quick` means one run of small loads, unless an option says otherwise."""
    quick = parse(["--quick"])

    assert (1, ("tiny",), 40) == (quick.runs, quick.sizes, quick.switches)
    assert (3, ("tiny",), 200) == (parse([]).runs, parse([]).sizes, parse([]).switches)
    assert ("tiny", "medium") == parse(["--size", "both"]).sizes


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown part is refused with a list of the parts that exist."""
    with pytest.raises(SystemExit):
        parse(["--only", "swich"])

    assert "unknown part swich; parts: switch,steady" in capsys.readouterr().err


def test_the_medium_model_can_be_made_from_the_embedded_qwen() -> None:
    """The medium model's size is the one that the documentation gives."""
    assert medium.is_source(demo.MODELS / "qwen")
    assert not medium.is_source(demo.MODELS / "llama")
    assert 0.1e9 < medium.parameters() < 0.5e9


def test_the_medium_model_is_a_complete_checkpoint(tmp_path: Path) -> None:
    """Each tensor is where the header says; unknown tokens score 0; it is made only once."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 2}
    sizes = {**medium.SIZES, **small}
    folder = medium.make(demo.MODELS / "qwen", tmp_path / "medium", sizes)
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    head = header["lm_head.weight"]

    assert len(data) == 8 + size + max(
        t["data_offsets"][1] for t in header.values() if "dtype" in t
    )
    assert [32768, 8] == head["shape"]
    known = medium.known_tokens(demo.MODELS / "qwen")
    rows = data[8 + size + head["data_offsets"][0] :]
    assert any(rows[: known * 16])
    assert not any(rows[known * 16 : 32768 * 16])

    made = (folder / "model.safetensors").stat().st_mtime_ns
    medium.make(demo.MODELS / "qwen", folder, sizes)
    assert made == (folder / "model.safetensors").stat().st_mtime_ns
