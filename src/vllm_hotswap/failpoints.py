"""Failpoints: named places in the code at which a test makes this server fail, wait or die.

They do nothing, and cost one comparison, unless the process's `main` calls `enable`. Their rules
are described in `docs/internals/reliability.md`.

The mutable state is `_armed`, set once per process. It has the rules, which are read again when
their file changes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")

VARIABLE = "VLLM_HOTSWAP_FAILPOINTS"

PLACES = (
    "switch.validate",
    "switch.drain",
    "switch.make_room",
    "switch.bring_up",
    "switch.activate",
    "switch.verify",
    "switch.rollback",
    "frontend.build",
    "host.load",
    "host.load.weights",
    "host.load.kv_cache",
    "host.load.warm_up",
    "host.activate",
    "host.sleep",
    "host.wake",
    "host.wake_slice",
    "host.unload",
    "host.step",
)
"""Every failpoint. The `host` ones are in the engine host, the others in the API process."""

ACTIONS = ("raise", "sleep", "hang", "kill", "segv", "stop", "exit")

RULE = re.compile(
    r"(?P<place>[\w.]+)(@(?P<alias>[^=]+))?="
    r"((?P<limit>\d+)\*)?(?P<action>\w+)(\((?P<argument>[^()]*)\))?"
)
FORM = "NAME[@ALIAS]=[N*]ACTION[(ARGUMENT)]"

FOREVER_S = 1e6


class InjectedFault(RuntimeError):
    """Raised by the action `raise`: unexpected in our code, like an exception of a library."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens at one place, for one model or for all, and how often."""

    text: str
    place: str
    alias: str | None
    limit: int | None
    action: str
    argument: str

    def covers(self, place: str, alias: str | None) -> bool:
        return self.place == place and self.alias in (None, alias)

    @property
    def number(self) -> float:
        return float(self.argument or 1)


def enable(specification: str) -> None:
    """Arm the failpoints of this process with rules, or with `@PATH`, a file that contains rules.

    Raises:
        ConfigError: the specification cannot be understood; the message names the part.
    """
    global _armed  # noqa: PLW0603  # one specification per process
    is_file = specification.startswith("@")
    rules = FileRules(Path(specification[1:])) if is_file else Rules(specification)
    rules.check()
    _armed = rules


def disable() -> None:
    """Disarm all failpoints."""
    global _armed  # noqa: PLW0603
    _armed = None


def enabled() -> str | None:
    """Return the specification that they were armed with; None if they are not armed."""
    return None if _armed is None else _armed.specification


def failpoint(place: str, alias: str | None = None) -> None:
    """Mark a failpoint in synchronous code. `hang` and `sleep` block the thread."""
    if _armed is None or (rule := _armed.take(place, alias)) is None:
        return
    match rule.action:
        case "sleep":
            time.sleep(rule.number)
        case "hang":
            while True:
                time.sleep(FOREVER_S)
        case _:
            _act(rule)


async def async_failpoint(place: str, alias: str | None = None) -> None:
    """Mark a failpoint in a coroutine. `hang` and `sleep` hold up this task alone."""
    if _armed is None or (rule := _armed.take(place, alias)) is None:
        return
    match rule.action:
        case "sleep":
            await asyncio.sleep(rule.number)
        case "hang":
            await asyncio.Event().wait()
        case _:
            _act(rule)


def _act(rule: Rule) -> None:
    match rule.action:
        case "raise":
            raise InjectedFault(rule.argument or f"failpoint {rule.place}")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            _exit(int(rule.number))


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Rules:
    """Rules that do not change. Each process counts how often each has been followed."""

    def __init__(self, specification: str) -> None:
        self.specification = specification
        self._rules: list[Rule] = []
        self._followed: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.specification!r}>"

    def check(self) -> None:
        """Read the rules. Raises `ConfigError` if they cannot be understood."""
        self._rules = list(parse(self.specification))

    def take(self, place: str, alias: str | None) -> Rule | None:
        """Return the first rule for this place that is not used up, and count it as followed."""
        for rule in self._rules:
            if rule.covers(place, alias) and self._is_left(rule):
                log.warning("event=failpoint model=%s rule=%r", value_text(alias), rule.text)
                self._note(rule)
                return rule
        return None

    def _is_left(self, rule: Rule) -> bool:
        return rule.limit is None or self._count(rule) < rule.limit

    def _count(self, rule: Rule) -> int:
        return self._followed[rule.text]

    def _note(self, rule: Rule) -> None:
        self._followed[rule.text] += 1


class FileRules(Rules):
    """Rules of a file, which is read again when it is replaced.

    Each rule followed is a line in `PATH.hits`. So a limit holds for all processes that read the
    file, a restarted host among them. A test can also see that a place was reached.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"@{path}")
        self._path = path
        self._hits = path.with_name(path.name + ".hits")
        self._version: int | None = None

    def check(self) -> None:
        try:
            self._version = self._path.stat().st_mtime_ns
            self._rules = list(parse(self._path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{VARIABLE}: the file {str(self._path)!r} cannot be read: {error}; "
                "create it before the start; an empty file means no failpoints"
            ) from error

    def take(self, place: str, alias: str | None) -> Rule | None:
        if self._has_changed():
            self._read_again()
        return super().take(place, alias)

    def _has_changed(self) -> bool:
        try:
            return self._path.stat().st_mtime_ns != self._version
        except OSError:
            return True

    def _read_again(self) -> None:
        """Read the file again. If it cannot be understood, continue without failpoints."""
        self._rules = []
        try:
            self.check()
        except ConfigError as error:
            log.error("event=failpoints_unreadable cause=%r", error.message)

    def _count(self, rule: Rule) -> int:
        try:
            return self._hits.read_text(encoding="utf-8").splitlines().count(self._line(rule))
        except FileNotFoundError:
            return 0

    def _note(self, rule: Rule) -> None:
        with self._hits.open("a", encoding="utf-8") as file:
            file.write(self._line(rule) + "\n")

    def _line(self, rule: Rule) -> str:
        return f"{self._version} {rule.text}"


def parse(text: str) -> Iterator[Rule]:
    """Yield the rules of a specification, which are separated by `;` or by line ends.

    Raises:
        ConfigError: a rule cannot be understood; the message names it.
    """
    for part in re.split(r"[;\n]", text):
        if part.strip():
            yield _rule(part.strip())


def _rule(text: str) -> Rule:
    found = RULE.fullmatch(text)
    if found is None:
        raise _refused(text, f"it must be {FORM}")
    place, action, argument = found["place"], found["action"], found["argument"] or ""
    if place not in PLACES:
        raise _refused(text, f"unknown failpoint {place!r}; known: {', '.join(PLACES)}")
    if action not in ACTIONS:
        raise _refused(text, f"unknown action {action!r}; known: {', '.join(ACTIONS)}")
    limit = int(found["limit"]) if found["limit"] else None
    _check_argument(text, action, argument)
    return Rule(text, place, found["alias"], limit, action, argument)


def _check_argument(text: str, action: str, argument: str) -> None:
    if not argument or action == "raise":
        return
    if action == "sleep" and not re.fullmatch(r"\d+(\.\d*)?", argument):
        raise _refused(text, "sleep takes a number of seconds")
    if action == "exit" and not re.fullmatch(r"\d{1,2}", argument):
        raise _refused(text, "exit takes a status of one or two digits")
    if action not in ("sleep", "exit"):
        raise _refused(text, f"{action} takes no argument")


def _refused(text: str, why: str) -> ConfigError:
    return ConfigError(f"{VARIABLE}: {text!r} cannot be understood: {why}")


_armed: Rules | None = None
