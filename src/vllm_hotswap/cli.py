"""The command line: parse, call one function, print."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_hotswap import __version__, remote
from vllm_hotswap.errors import ConfigError, HotswapError, one_line
from vllm_hotswap.security import ALLOW_VARIABLE, DANGERS, parse_allowed
from vllm_hotswap.settings import Override, overrides, server_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status; errors are one line on standard error."""
    parser = make_parser()
    try:
        argv = file_first(sys.argv[1:] if argv is None else argv)
    except HotswapError as error:
        parser.error(error.message)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status: int = args.run(args, rest)
    except HotswapError as error:
        message = one_line(error) if args.command == "serve" else error.message
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
    _add_demo(commands)
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
    _add_settings(serve)
    serve.set_defaults(run=_serve)


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
    """The arguments with the YAML file of `serve` in front of the flags, wherever it was given.

    Only vLLM's parser knows which flags take a value, and to import it takes seconds. So a file
    behind flags is told by its name.

    Raises:
        ConfigError: there is no such name, or more than one.
    """
    command, *words = argv or [""]
    is_clear = not words or not words[0].startswith("-") or {"-h", "--help"} & set(words)
    if command != "serve" or is_clear:
        return list(argv)
    files = [
        number
        for number, (word, before) in enumerate(zip(words, ["", *words], strict=False))
        if word.endswith((".yaml", ".yml")) and word[0] != "-" and before != "--config"
    ]
    if len(files) != 1:
        raise ConfigError("name the YAML file before the flags: vllm-hotswap serve FILE [FLAGS]")
    return [command, words.pop(files[0]), *words]


def given(args: argparse.Namespace) -> tuple[list[Override], frozenset[str]]:
    """What flags and variables add to the file: settings, and dangers that are accepted."""
    allowed = parse_allowed([os.environ.get(ALLOW_VARIABLE, ""), *args.allow])
    return overrides(os.environ, vars(args)), allowed


def _serve(args: argparse.Namespace, flags: Sequence[str]) -> int:
    from vllm_hotswap.config import load_config
    from vllm_hotswap.progress import configure_logging

    configure_logging()
    config = load_config(args.config, *given(args))
    from vllm_hotswap import server

    return server.run(config, flags, args.admin_key)


def _demo(args: argparse.Namespace, _: Sequence[str]) -> int:
    from vllm_hotswap import demo

    if args.write is not None:
        print(demo.write(args.write))
        return 0
    return demo.serve(args.port) if args.serve else demo.run()


if __name__ == "__main__":
    sys.exit(main())
