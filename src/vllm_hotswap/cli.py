"""The command line: parse, call one function, print."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_hotswap import __version__, remote
from vllm_hotswap.access import KeyFlags
from vllm_hotswap.compat.versions import is_installed, require_vllm
from vllm_hotswap.errors import ConfigError, HotswapError, one_line
from vllm_hotswap.security import ALLOW_VARIABLE, DANGERS, parse_allowed
from vllm_hotswap.settings import Override, overrides, server_settings
from vllm_hotswap.simulate import command as simulate

WITH_FLAGS = ("serve", "check")
"""Commands that take a YAML file and flags of `vllm serve`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; errors are one line on standard error."""
    parser = make_parser()
    try:
        argv = file_first(sys.argv[1:] if argv is None else argv)
    except HotswapError as error:
        parser.error(error.message)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in WITH_FLAGS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status: int = args.run(args, rest)
    except HotswapError as error:
        message = one_line(error) if args.command in WITH_FLAGS else error.message
        print(f"vllm-hotswap: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-hotswap",
        description="Several models in one vLLM engine process, switched over HTTP.",
    )
    parser.add_argument("--version", action="version", version=f"vllm-hotswap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_check(commands)
    _add_schema(commands)
    _add_demo(commands)
    simulate.add_command(commands)
    remote.add_commands(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve the models of a YAML file",
        description="Serve the models of a YAML file. Flags of `vllm serve` are accepted, too: for "
        "the server, and as the default of every model.",
        allow_abbrev=False,
    )
    serve.add_argument("config", type=Path, help="the YAML file")
    serve.add_argument(
        "--admin-key",
        action="append",
        default=[],
        help="key that may switch models (also VLLM_HOTSWAP_ADMIN_KEY); may be given again",
    )
    for role in ("admin", "api"):
        serve.add_argument(
            f"--{role}-key-file",
            action="append",
            default=[],
            type=Path,
            metavar="FILE",
            help=f"file with keys as of --{role}-key, one a line (also "
            f"VLLM_HOTSWAP_{role.upper()}_KEY_FILE); read again on SIGHUP; may be given again",
        )
    serve.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="write a trace of requests and switches to a new file, for `vllm-hotswap simulate`; "
        "it holds no prompts and no answers",
    )
    _add_settings(serve)
    serve.set_defaults(run=_serve)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check",
        help="find out what is wrong with a YAML file, without loading a model",
        description="Look at files, configurations, tokenizers, chat templates, parsers and memory "
        "of every model, print a table, and end with 1 if anything cannot work. Takes the "
        "flags of `serve`.",
        allow_abbrev=False,
    )
    check.add_argument("config", type=Path, help="the YAML file")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_settings(check)
    check.set_defaults(run=_check)


def _add_schema(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    schema = commands.add_parser(
        "schema",
        help="print the JSON schema of the YAML file",
        description="Print the JSON schema of the YAML file, for editors: with the flags of the "
        "installed vLLM as keys of a model, or without them where no vLLM is installed.",
    )
    schema.set_defaults(run=_schema)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """What may be said of the file's settings on the command line."""
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="WHAT",
        help="accept something that runs code or trusts others, and that the file alone cannot "
        f"permit (also {ALLOW_VARIABLE}): "
        + "; ".join(f"{name}: {meaning}" for name, meaning in DANGERS.items()),
    )
    for setting in server_settings():
        parser.add_argument(
            setting.flag,
            dest=setting.flag,
            metavar="VALUE",
            help=f"{setting.description} (also {setting.variable})".replace("%", "%%"),
        )


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="the quickstart on tiny models that ship with the package",
        description="Without options: start a server with tiny models, run the quickstart's "
        "requests against it, show every answer, stop.",
    )
    what = demo.add_mutually_exclusive_group()
    what.add_argument(
        "--write", type=Path, metavar="DIR", help="write the tiny models and a models.yaml to DIR"
    )
    what.add_argument("--serve", action="store_true", help="leave the server running")
    demo.add_argument("--port", type=int, default=8080, help="port for --serve (default: 8080)")
    demo.set_defaults(run=_demo)


def file_first(argv: Sequence[str]) -> list[str]:
    """The arguments with the YAML file in front of the flags of vLLM, wherever it was given.

    Only vLLM's parser knows which flags take a value, and to import it takes seconds. So a file
    behind flags is told by its name.

    Raises:
        ConfigError: there is no such name, or more than one.
    """
    command, *words = argv or [""]
    is_clear = not words or not words[0].startswith("-") or {"-h", "--help"} & set(words)
    if command not in WITH_FLAGS or is_clear:
        return list(argv)
    files = [
        number
        for number, (word, before) in enumerate(zip(words, ["", *words], strict=False))
        if word.endswith((".yaml", ".yml")) and word[0] != "-" and before != "--config"
    ]
    if len(files) != 1:
        raise ConfigError(
            f"name the YAML file before the flags: vllm-hotswap {command} FILE [FLAGS]"
        )
    return [command, words.pop(files[0]), *words]


def given(args: argparse.Namespace) -> tuple[list[Override], frozenset[str]]:
    """What flags and variables add to the file: settings, and dangers that are accepted."""
    allowed = parse_allowed([os.environ.get(ALLOW_VARIABLE, ""), *args.allow])
    return overrides(os.environ, vars(args)), allowed


def _serve(args: argparse.Namespace, flags: Sequence[str]) -> int:
    from vllm_hotswap.flags import load_with_flags
    from vllm_hotswap.progress import configure_logging

    configure_logging()
    config = load_with_flags(args.config, *given(args))
    from vllm_hotswap import server

    keys = KeyFlags(args.admin_key, args.admin_key_file, args.api_key_file)
    return server.run(config, flags, keys, args.record)


def _check(args: argparse.Namespace, flags: Sequence[str]) -> int:
    from vllm_hotswap.config import read_config

    read = read_config(args.config, *given(args))
    require_vllm()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the table is what counts
    from vllm_hotswap import check

    return check.run(read, flags, args.json)


def _schema(*_: object) -> int:
    from vllm_hotswap.schema import json_schema

    with contextlib.redirect_stdout(sys.stderr):  # where vLLM logs
        flags = described_flags()
    print(json.dumps(json_schema(flags), indent=1))
    return 0


def described_flags() -> Mapping[str, argparse.Action] | None:
    """The flags of the installed vLLM that may be keys of a model; None where there is none."""
    if not is_installed():
        return None
    from vllm_hotswap.compat.configuration import describing_parser

    parser = describing_parser("vllm-hotswap schema")
    from vllm_hotswap.flags import model_flags

    return model_flags(parser)


def _demo(args: argparse.Namespace, _: Sequence[str]) -> int:
    from vllm_hotswap import demo

    if args.write is not None:
        print(demo.write(args.write))
        return 0
    return demo.serve(args.port) if args.serve else demo.run()


if __name__ == "__main__":
    sys.exit(main())
