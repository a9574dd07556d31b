"""vLLM's flags and its configuration of one model. Checked on vLLM 0.32.0.

Relies on: `make_arg_parser`, `validate_parsed_serve_args`, `AsyncEngineArgs.from_cli_args`,
`create_engine_config`, the two managers of parsers, the message about an unknown architecture.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from typing import Any, NoReturn

from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.host import device_of, find


def serve_parser(prog: str) -> argparse.ArgumentParser:
    """Return vLLM's own parser of `vllm serve` flags; it raises `ConfigError`, and never exits."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class RaisingParser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM's types stop here
        def error(self, message: str) -> NoReturn:
            raise ConfigError(plain_value(" ".join(message.split())))

    parser: argparse.ArgumentParser = find("make_arg_parser")(RaisingParser(prog=prog))
    parser.set_defaults(allowed_origins=[])  # which some releases leave open to every web page
    return parser


_KINDS = {
    "human_readable_int": "a size; write 64M, or a number of bytes",
    "human_readable_int_or_auto": "a size; write 64M, a number of bytes, or auto",
    "loads": "JSON",
    "int": "a whole number",
    "float": "a number",
}
"""What vLLM's parser expects, by the name of the function that reads the value."""


def plain_value(message: str) -> str:
    """Return a message of vLLM's parser about a value, without the name of its function."""
    return re.sub(
        r"Value (.*) cannot be converted to <(?:function|class) '?(\w+)'?(?: at \w+)?>\.?",
        lambda found: f"{found[1]!r} is not {_KINDS.get(found[2], f'a valid {found[2]}')}",
        message,
    )


def describing_parser(prog: str) -> argparse.ArgumentParser:
    """Return the same parser with a help text for every flag, which vLLM omits by default.

    vLLM looks for `--help` among the process's arguments when its module is imported; call this
    before anything of vLLM is imported.
    """
    sys.argv.append("--help=all")
    try:
        return serve_parser(prog)
    finally:
        sys.argv.pop()


def nearest_architectures(message: str) -> str:
    """Return vLLM's message with the architectures nearest to the unknown one, not with all."""
    found = re.search(r"\[(.*)\] are not supported for now\. Supported architectures: .*", message)
    if found is None:
        return message
    asked, _, supported = found.group().partition("Supported")
    known = re.findall(r"'(\w+)'", supported)
    near = dict.fromkeys(
        name for word in re.findall(r"'(\w+)'", asked) for name in _nearest(word, known)
    )
    hint = f"the nearest that are: {', '.join(near)}" if near else "none has a similar name"
    return f"{message[: found.start()]}{asked.strip().removesuffix('.')}; {hint}"


def _nearest(word: str, known: list[str]) -> list[str]:
    return difflib.get_close_matches(word, known, n=3)


def engine_config(args: argparse.Namespace) -> Any:
    """Return the `VllmConfig` of one model, whose engine is to be hosted, not launched.

    May start a process that inspects an architecture for the first time on this machine (seconds,
    then cached on disk). So it is called at start-up, never in a switch.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from vllm_hotswap.host import MULTIPROC_QUALIFIED_NAME, QUALIFIED_NAME

    engine_args = AsyncEngineArgs.from_cli_args(args)
    single = engine_args.tensor_parallel_size == 1 and engine_args.pipeline_parallel_size == 1
    if engine_args.distributed_executor_backend in (None, "mp"):
        engine_args.distributed_executor_backend = (
            QUALIFIED_NAME if single else MULTIPROC_QUALIFIED_NAME
        )
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    device_of(config).configure(config)
    return config


def validate_serve_args(args: argparse.Namespace) -> None:
    """Run vLLM's own checks of one model's flags. Raises `ConfigError`."""
    from vllm.tool_parsers import ToolParserManager

    if args.tool_parser_plugin and len(args.tool_parser_plugin) > 3:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin and len(args.reasoning_parser_plugin) > 3:
        from vllm.reasoning import ReasoningParserManager

        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    try:
        find("validate_parsed_serve_args")(args)
    except Exception as error:
        raise ConfigError(one_line(error)) from error
    parsers = ToolParserManager.list_registered()
    if args.tool_call_parser is not None and args.tool_call_parser not in parsers:
        raise ConfigError(
            f"tool_call_parser {args.tool_call_parser!r} is not known; "
            f"known: {', '.join(sorted(parsers))}"
        )
    _check_reasoning_parser(args)


def reasoning_parser(args: argparse.Namespace) -> str | None:
    """Return the name of the reasoning parser, from whichever flag gives it."""
    return args.reasoning_parser or args.structured_outputs_config.reasoning_parser or None


def _check_reasoning_parser(args: argparse.Namespace) -> None:
    """Refuse a name that vLLM would only look up when the model's frontend is made."""
    from vllm.reasoning import ReasoningParserManager

    name = reasoning_parser(args)
    known = ReasoningParserManager.list_registered()
    if name and name not in known:
        raise ConfigError(
            f"reasoning_parser {name!r} is not known; known: {', '.join(sorted(known))}"
        )
