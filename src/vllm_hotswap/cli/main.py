"""The command line: parse, call one function, print.

Every error is one line on standard error and an exit status: 1, or 2 for a command line that cannot
be understood, 130 after Ctrl-C, and 141 if the reader of the output has closed it (128 plus the
number of the signal, as shells count).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from vllm_hotswap import __version__
from vllm_hotswap.cli import remote
from vllm_hotswap.errors import ConfigError, HotswapError, one_line
from vllm_hotswap.hints import did_you_mean
from vllm_hotswap.system import terminal

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

    from vllm_hotswap.config import Override

# Modules that need pydantic, Starlette or vLLM are imported by the command that uses them.

WITH_FLAGS = ("serve", "check")
"""Commands that take a YAML file and flags of `vllm serve`."""

INTERRUPTED = 130
OUTPUT_CLOSED = 141

MOST_PACE_S = 60

OTHER_WORDS = {
    "activate": "switch",
    "info": "status",
    "list": "status",
    "ls": "status",
    "models": "status",
    "ps": "status",
    "run": "serve",
    "start": "serve",
    "use": "switch",
    "validate": "check",
}
"""Names that other programs use for our commands."""

Fill = Callable[[argparse.ArgumentParser], None]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, which may fill a screen."""

    def error(self, message: str) -> NoReturn:
        text = " ".join(message.split())
        with contextlib.suppress(OSError):
            sys.stderr.write(f"vllm-hotswap: error: {text} (see {self.prog} --help)\n")
        self.exit(2)

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Write a message; unlike argparse, do not hide a failure to write."""
        (file or sys.stderr).write(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; an error is one line on standard error."""
    words = sys.argv[1:] if argv is None else list(argv)
    terminal.prepare()
    try:
        return _flushed(words)
    except HotswapError as error:
        return _refuse(one_line(error))
    except BrokenPipeError:
        terminal.mute()
        return OUTPUT_CLOSED
    except OSError as error:
        terminal.mute()
        return _refuse(one_line(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001  # any error becomes one line
        return _refuse(_unexpected_error(error))


def _flushed(words: Sequence[str]) -> int:
    """Run one command and flush its output, so that a failure to write changes the exit status."""
    try:
        return _run(words)
    finally:
        sys.stdout.flush()


def _run(words: Sequence[str]) -> int:
    if not words:
        make_parser("").print_help()
        return 2
    command = words[0]
    if not command.startswith("-") and command not in COMMANDS:
        make_parser("").error(_unknown_command(command))
    parser = make_parser(command)
    try:
        words = file_first(words)
    except HotswapError as error:
        parser.error(error.message)
    args, rest = parser.parse_known_args(words)
    if rest and command not in WITH_FLAGS:
        args.parser.error(_unknown_arguments(args.parser, rest))
    status: int = args.run(args, rest)
    return status


def _refuse(message: str) -> int:
    with contextlib.suppress(OSError):
        print(f"vllm-hotswap: error: {message}", file=sys.stderr, flush=True)
    return 1


def _unexpected_error(error: Exception) -> str:
    """Describe an unexpected error with its place; `python -X dev` shows the whole trace.

    A missing device has its own message: its error may come from anywhere that vLLM needs one.
    """
    from vllm_hotswap.host import NO_DEVICE, why_not_imported, with_why_no_device

    if sys.flags.dev_mode:
        traceback.print_exc()
    message = one_line(error)
    if NO_DEVICE in message:
        return with_why_no_device(message)
    if isinstance(error, ImportError):
        return why_not_imported(error) or f"{message}; the installation is not complete"
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"unexpected {type(error).__name__} in {where}: {message}; please report it"


def _unknown_command(word: str) -> str:
    hint = did_you_mean(OTHER_WORDS.get(word, word), COMMANDS)
    return f"unknown command {word!r}{hint or '; commands: ' + ', '.join(COMMANDS)}"


def _unknown_arguments(parser: argparse.ArgumentParser, rest: Sequence[str]) -> str:
    flag = rest[0].partition("=")[0]
    hint = did_you_mean(flag, parser._option_string_actions) if flag.startswith("-") else ""
    return f"unrecognized arguments: {' '.join(rest)}{hint}"


def make_parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of one command; of all commands, if `wanted` is None.

    If `wanted` is not a command, the parser knows only the commands' names.
    """
    parser = Parser(
        prog="vllm-hotswap",
        description="Several models in one vLLM engine process, switched over HTTP.",
        epilog="Start with: vllm-hotswap demo",
    )
    parser.add_argument("--version", action="version", version=f"vllm-hotswap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (about, fill) in COMMANDS.items():
        if wanted in COMMANDS and name != wanted:
            continue
        command = commands.add_parser(name, help=about)
        command.set_defaults(parser=command)
        if wanted in (None, name):
            fill(command)
    return parser


def _fill_serve(serve: argparse.ArgumentParser) -> None:
    serve.description = (
        "Serve the models of a YAML file. Flags of `vllm serve` are accepted, too: for the "
        "server, and as the default of every model."
    )
    serve.epilog = (
        "Flags of `vllm serve` include --host, --port (default: 8000), --api-key, --uds and "
        "--ssl-certfile. `vllm serve --help=all` lists them all."
    )
    serve.allow_abbrev = False
    serve.add_argument("config", type=Path, metavar="FILE", help="the YAML file")
    serve.add_argument(
        "--admin-key",
        action="append",
        default=[],
        help="key that may switch models (also VLLM_HOTSWAP_ADMIN_KEY); repeatable",
    )
    for role in ("admin", "api"):
        serve.add_argument(
            f"--{role}-key-file",
            action="append",
            default=[],
            type=Path,
            metavar="FILE",
            help=f"file with keys as of --{role}-key, one per line (also "
            f"VLLM_HOTSWAP_{role.upper()}_KEY_FILE); reloaded on SIGHUP; repeatable",
        )
    serve.add_argument(
        "--audit-log",
        type=Path,
        metavar="FILE",
        help="append one line to this file for each request that changes state, with the "
        "fingerprint of its key (also VLLM_HOTSWAP_AUDIT_LOG); reopened on SIGHUP",
    )
    _add_listening(serve)
    serve.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="write a trace of requests and switches to a new file, for `vllm-hotswap simulate`; "
        "it contains no prompts and no answers",
    )
    serve.add_argument(
        "--fake",
        action="store_true",
        help="without vLLM and without models: fake engines with made-up answers, to write clients "
        "and dashboards against; listens on 127.0.0.1, if no --host is given",
    )
    serve.add_argument(
        "--fake-pace",
        type=_pace,
        metavar="SECONDS",
        help="with --fake: how long a word takes (default: 0.02); a load takes 10 times as long, "
        "a wake 5 times and a sleep twice",
    )
    _add_settings(serve)
    serve.set_defaults(run=_serve)


def _add_listening(serve: argparse.ArgumentParser) -> None:
    """Add the flags of the address that vLLM does not have."""
    serve.add_argument(
        "--uds-mode",
        type=_mode,
        metavar="MODE",
        help="mode of the file of --uds, in octal digits (660: its owner and group may connect); "
        "default: what the umask leaves of 777",
    )
    serve.add_argument(
        "--port-file",
        type=Path,
        metavar="FILE",
        help="write the TCP port to this file once requests are accepted, and remove the file at "
        "exit; for --port 0",
    )
    serve.add_argument(
        "--allowed-hosts",
        action="append",
        default=[],
        metavar="NAME[,NAME]",
        help="additional host names that requests may use in `Host`; without keys, a server on "
        "loopback answers only to this machine's own names; repeatable",
    )
    serve.add_argument(
        "--forwarded-allow-ips",
        action="append",
        default=[],
        metavar="ADDRESS[,ADDRESS]",
        help="proxies, as IP addresses or networks, whose X-Forwarded-For and X-Forwarded-Proto "
        "are trusted; *: any proxy; default: FORWARDED_ALLOW_IPS, else none; repeatable",
    )


def _pace(text: str) -> float:
    """Parse seconds. Raises `ArgumentTypeError`."""
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(text)) <= MOST_PACE_S:
            return seconds
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a pace; give seconds from 0 to {MOST_PACE_S}, such as 0.02"
    )


def _mode(text: str) -> int:
    """Parse a file mode. Raises `ArgumentTypeError`."""
    if not re.fullmatch("[0-7]{3,4}", text) or int(text, 8) > 0o777:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a file mode; write octal digits such as 660"
        )
    return int(text, 8)


def _names(words: Iterable[str]) -> list[str]:
    return [name.strip() for word in words for name in word.split(",") if name.strip()]


def _fill_check(check: argparse.ArgumentParser) -> None:
    check.description = (
        "Check files, configurations, tokenizers, chat templates, parsers and memory of every "
        "model, print a table, and exit with status 1 if anything cannot work. Takes the flags "
        "of `serve`."
    )
    check.allow_abbrev = False
    check.add_argument("config", type=Path, metavar="FILE", help="the YAML file")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_settings(check)
    check.set_defaults(run=_check)


def _fill_schema(schema: argparse.ArgumentParser) -> None:
    schema.description = (
        "Print the JSON schema of the YAML file, for editors: with the flags of the installed "
        "vLLM as keys of a model, or without them where no vLLM is installed."
    )
    schema.set_defaults(run=_schema)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the flags that override settings of the file."""
    from vllm_hotswap.config import ALLOW_VARIABLE, PERMISSIONS, server_settings

    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="WHAT",
        help="allow something that runs code or trusts other users, which the file alone cannot "
        f"allow (also {ALLOW_VARIABLE}): "
        + "; ".join(f"{name}: {meaning}" for name, meaning in PERMISSIONS.items()),
    )
    for setting in server_settings():
        parser.add_argument(
            setting.flag,
            dest=setting.flag,
            metavar="VALUE",
            help=f"{setting.description} (also {setting.variable})".replace("%", "%%"),
        )


def _fill_demo(demo: argparse.ArgumentParser) -> None:
    demo.description = (
        "Without options: start a server with tiny models, run the quickstart's requests against "
        "it, show every answer, stop."
    )
    what = demo.add_mutually_exclusive_group()
    what.add_argument(
        "--write", type=Path, metavar="DIR", help="write the tiny models and a models.yaml to DIR"
    )
    what.add_argument("--serve", action="store_true", help="leave the server running")
    demo.add_argument(
        "--fake",
        action="store_true",
        help="without vLLM: fake engines with made-up answers; the server starts in a second",
    )
    demo.add_argument(
        "--port",
        type=_port,
        help="port (default: 8000; without --serve, a free port if 8000 is taken)",
    )
    demo.set_defaults(run=_demo)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a valid port; give a number from 1 to 65535"
        )
    return int(text)


def _fill_simulate(simulate: argparse.ArgumentParser) -> None:
    from vllm_hotswap.simulation import command

    command.fill(simulate)


COMMANDS: Mapping[str, tuple[str, Fill]] = {
    "serve": ("serve the models of a YAML file", _fill_serve),
    "check": ("validate a YAML file without loading a model", _fill_check),
    "schema": ("print the JSON schema of the YAML file", _fill_schema),
    "demo": ("the quickstart on tiny models that ship with the package", _fill_demo),
    "simulate": ("simulate scheduling policies on a recorded or generated trace", _fill_simulate),
    **remote.COMMANDS,
}
"""Help of each command, and the function that adds its arguments to a parser."""


def file_first(argv: Sequence[str]) -> list[str]:
    """Return the arguments with the YAML file before vLLM's flags, wherever it was given.

    Only vLLM's parser knows which flags take a value, and importing it takes seconds. So a file
    behind flags is recognised by its name.

    Raises:
        ConfigError: no argument has such a name, or more than one has.
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
    """Return what flags and variables add to the file: settings, and accepted dangers."""
    from vllm_hotswap.config import ALLOW_VARIABLE, overrides, parse_allowed

    allowed = parse_allowed([os.environ.get(ALLOW_VARIABLE, ""), *args.allow])
    return overrides(os.environ, vars(args)), allowed


def _serve(args: argparse.Namespace, flags: Sequence[str]) -> int:
    from vllm_hotswap.config import FORWARDED_VARIABLE
    from vllm_hotswap.launch import load_with_flags
    from vllm_hotswap.system import configure_logging

    if args.fake_pace is not None and not args.fake:
        args.parser.error("--fake-pace needs --fake")
    configure_logging()
    with _nearest_flags(args, flags):
        config = load_with_flags(args.config, *given(args), args.fake)
        from vllm_hotswap.access import KeyFlags
        from vllm_hotswap.connections import ListenFlags
        from vllm_hotswap.server import run as server

        keys = KeyFlags(args.admin_key, args.admin_key_file, args.api_key_file)
        forwarded = args.forwarded_allow_ips or [os.environ.get(FORWARDED_VARIABLE, "")]
        listen = ListenFlags(
            args.uds_mode, args.port_file, _names(args.allowed_hosts), _names(forwarded)
        )
        engines: server.Engines | None = None
        if args.fake:
            from vllm_hotswap.testing import WORD_S, FakeEngines

            engines = FakeEngines(WORD_S if args.fake_pace is None else args.fake_pace)
        return server.run(config, flags, keys, args.record, listen, args.audit_log, engines)


def _check(args: argparse.Namespace, flags: Sequence[str]) -> int:
    from vllm_hotswap.config import read_config

    with _nearest_flags(args, flags):
        read = read_config(args.config, *given(args))
        from vllm_hotswap.host import require_vllm

        require_vllm()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the table is the output
        from vllm_hotswap.system import shut_out_others_without_cache

        shut_out_others_without_cache()
        from vllm_hotswap.cli import check

        return check.run(read, flags, args.json)


@contextlib.contextmanager
def _nearest_flags(args: argparse.Namespace, flags: Sequence[str]) -> Iterator[None]:
    """Suggest the nearest flag for an unknown one, before vLLM is imported or from its error."""
    from vllm_hotswap.launch import explained, refuse_misspelt

    refuse_misspelt(flags, args.parser._option_string_actions)
    try:
        yield
    except ConfigError as error:
        error.message = explained(error.message)
        error.args = (error.message,)
        raise


def _schema(*_: object) -> int:
    from vllm_hotswap.launch import json_schema

    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs to stdout
        flags = described_flags()
    print(json.dumps(json_schema(flags), indent=1))
    return 0


def described_flags() -> Mapping[str, argparse.Action] | None:
    """Return the installed vLLM's flags that may be keys of a model; None without a vLLM."""
    from vllm_hotswap.host import is_installed

    if not is_installed():
        return None
    from vllm_hotswap.launch import describing_parser

    parser = describing_parser("vllm-hotswap schema")
    from vllm_hotswap.launch import model_flags

    return model_flags(parser)


def _demo(args: argparse.Namespace, _: Sequence[str]) -> int:
    from vllm_hotswap.demo import quickstart as demo

    if args.write is not None:
        print(demo.write(args.write))
        return 0
    if args.serve:
        return demo.serve(args.port or demo.PORT, args.fake)
    return demo.run(args.port, args.fake)


if __name__ == "__main__":
    sys.exit(main())
