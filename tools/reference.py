"""`python -m tools.reference`: the pages about settings and commands, made from the code.

`--write DIR` writes the pages, the JSON schema and the table of vLLM's state to their places in a
clone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from vllm_hotswap.cli.main import described_flags, make_parser
from vllm_hotswap.config.permissions import PERMISSIONS
from vllm_hotswap.config.sampling import SamplingPolicy
from vllm_hotswap.config.settings import (
    SECTIONS,
    TOP_LEVEL,
    VARIABLES,
    GroupConfig,
    ModelKeys,
    describe,
    server_settings,
)
from vllm_hotswap.host import vllm_state as state
from vllm_hotswap.launch.schema import json_schema

PAGE = "docs/reference/settings.md"
COMMANDS_PAGE = "docs/reference/cli.md"
STATE_PAGE = "docs/internals/vllm-state.md"
FLAGS_ANCHOR = "flags-and-environment-variables-for-settings-of-the-file"
SCHEMA = "src/vllm_hotswap/config/models.schema.json"

INTRODUCTION = """\
# Settings

Generated from the code by `make reference`; do not edit. The guide to
[configuration](../guides/configuration.md) explains the settings. [Commands](cli.md) have a page of
their own.
"""

COMMANDS_INTRODUCTION = """\
# Commands

Generated from the code by `make reference`; do not edit.

Exit status: 0 if it worked; 1 after an error, which is one line on standard error; 2 for a command
line that cannot be understood; 130 after Ctrl-C; 141 if the output is closed (a broken pipe).
`python -X dev -m vllm_hotswap ...` shows the traceback of an unexpected error.
"""


def page() -> str:
    """Return the page about settings, in Markdown."""
    return "\n".join(_lines()) + "\n"


def commands_page() -> str:
    """Return the page about commands, in Markdown."""
    return "\n".join((COMMANDS_INTRODUCTION, *_commands())) + "\n"


def _lines() -> Iterator[str]:
    yield INTRODUCTION
    yield "## The YAML file\n"
    yield from _table(("key", "meaning"), ((f"`{k}`", v) for k, v in TOP_LEVEL.items()))
    yield "\n### Keys of a model\n"
    yield "Every other key of a model is a flag of `vllm serve`, with underscores.\n"
    yield from _settings(ModelKeys)
    yield "\n### Keys of `sampling` of a model\n"
    yield from _settings(SamplingPolicy)
    for section, kind in SECTIONS.items():
        yield f"\n### Keys of `{section}`\n"
        yield from _settings(kind)
    yield "\n### Keys of a group under `rights`\n"
    yield from _settings(GroupConfig)
    yield "\n## Flags and environment variables for settings of the file\n"
    yield "A flag overrides its variable, and a variable overrides the file.\n"
    yield from _table(
        ("key", "flag", "variable"),
        (
            (f"`{'.'.join(filter(None, (s.section, s.key)))}`", f"`{s.flag}`", f"`{s.variable}`")
            for s in server_settings()
        ),
    )
    yield "\n## Other environment variables\n"
    yield from _table(("variable", "meaning"), ((f"`{k}`", v) for k, v in VARIABLES.items()))
    yield "\n## What `--allow` accepts\n"
    yield from _table(("word", "accepts"), ((f"`{k}`", v) for k, v in PERMISSIONS.items()))


def _settings(kind: type[Any]) -> Iterator[str]:
    known = kind.__pydantic_fields__
    rows = ((f"`{name}`", _default(known[name]), describe(kind, name)) for name in known)
    yield from _table(("key", "default", "meaning"), rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    default = field.get_default(call_default_factory=True)
    is_plain = isinstance(default, bool | int | float | str)
    return f"`{json.dumps(default)}`" if is_plain else "none"


def _commands() -> Iterator[str]:
    parser = make_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    about = {action.dest: action.help for action in commands._choices_actions}
    for name, command in commands.choices.items():
        yield f"## `vllm-hotswap {name}`\n"
        yield _sentence(command.description or about[name] or "") + "\n"
        shown = [a for a in command._actions if a.dest != "help" and not _is_setting(a)]
        if shown:
            yield from _table(("argument", "meaning"), ((_name(a), _help(a)) for a in shown))
        if len(shown) + 1 < len(command._actions):
            yield f"\nAnd the [flags for settings of the file](settings.md#{FLAGS_ANCHOR})."
        yield ""


def _is_setting(action: argparse.Action) -> bool:
    return action.dest in {setting.flag for setting in server_settings()}


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.dest}`"
    value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return ", ".join(f"`{name}{value}`" for name in action.option_strings)


def _help(action: argparse.Action) -> str:
    return (action.help or "").replace("%%", "%")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def schema_text() -> str:
    """Return the JSON schema with the installed vLLM's flags."""
    return json.dumps(json_schema(described_flags()), indent=1) + "\n"


def with_state_table(text: str) -> str:
    """Return a page about vLLM's state with its table, at the end, made again."""
    return text[: text.index("\n| state |") + 1] + state.table()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the pages, or write everything that is made from the code."""
    parser = argparse.ArgumentParser(prog="tools.reference")
    parser.add_argument("--write", type=Path, metavar="DIR", help="the clone to write to")
    args = parser.parse_args(argv)
    if args.write is None:
        print(page(), commands_page(), sep="\n", end="")
        return 0
    (args.write / PAGE).write_text(page(), encoding="utf-8")
    (args.write / COMMANDS_PAGE).write_text(commands_page(), encoding="utf-8")
    (args.write / SCHEMA).write_text(schema_text(), encoding="utf-8")
    state_page = args.write / STATE_PAGE
    state_text = with_state_table(state_page.read_text(encoding="utf-8"))
    state_page.write_text(state_text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
