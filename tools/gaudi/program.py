"""What is checked, in its order."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from tools.gaudi import facts
from tools.gaudi.answers import PROMPTS, Answer, compare, load
from tools.gaudi.interrupts import held_back
from tools.gaudi.judge import (
    EXPECTED_TOLERANCE,
    OWN_TOLERANCE,
    Cycle,
    Way,
    cycle_faults,
    growth,
    notes,
)
from tools.gaudi.results import Results, Unwritable, say
from tools.gaudi.server import OWN_ERROR, PAIR, Server

UNUSABLE, INTERRUPTED = 2, 130
WAYS: tuple[Way, ...] = get_args(Way)
QUANTISATION = "QUANT_CONFIG"
REFUSED = re.compile(
    rf"has ended with status 1; its log: {OWN_ERROR}.*\b{QUANTISATION} is .*there is no such file"
)
NO_LEVEL_2 = "has no sleep level 2"
"""Part of our own refusal's message."""

TMP = "/tmp"  # noqa: S108  # a folder of its own is made there, which others can't read
CYCLES, LEAST_CYCLES = 20, 6
AGAIN = slice(0, 2)
"""Those of `PROMPTS` that are sent after each cycle."""


class Unusable(Exception):
    """The check can't start; the message says why and what to do, in one line."""


class Kind:
    """A server whose models are all eager, or all compiled, through every check."""

    def __init__(
        self,
        results: Results,
        server: Server,
        name: str,
        cycles: int = CYCLES,
        ways: Sequence[Way] = WAYS,
        *,
        judges_weights: bool = True,
    ) -> None:
        self._results, self._server, self._name = results, server, name
        self._cycles, self._ways, self._judges_weights = cycles, ways, judges_weights
        self._first: dict[str, list[Answer]] = {}

    def run(self) -> None:
        if not self._results.check(f"{self._name}: start", self._server.wait)["ok"]:
            return
        for model in PAIR:
            first = partial(self.first, model)
            if not self._results.check(f"{self._name}: {model}", first)["ok"]:
                return
        self._results.check(f"{self._name}: no level 2", self.no_level_2)
        for way in self._ways:
            self.all_of(way)

    def first(self, model: str) -> dict[str, Any]:
        """Compare what a model answers before anything has moved with what is expected."""
        self._server.switch(model)
        answers = self._first[model] = self._server.ask(model)
        return compared(load()[model], answers, EXPECTED_TOLERANCE) | {
            "tokens": [answer.tokens for answer in answers]
        }

    def no_level_2(self) -> dict[str, Any]:
        """Check that our refusal comes first, since the plugin's worker would take level 2 for
        level 1, and that the model stays where it is."""
        self._server.switch(PAIR[0])
        before = self._server.residency(PAIR[1])
        told = self._server.refused(f"/admin/models/{PAIR[1]}/sleep", level=2)
        after = self._server.residency(PAIR[1])
        wrong = []
        if told["status"] != 400:
            wrong.append("a sleep of level 2 is not refused")
        elif NO_LEVEL_2 not in told["body"]:
            wrong.append(f"a sleep of level 2 is refused for another reason: {told['body']}")
        if after != before:
            wrong.append(f"a sleep of level 2 must change nothing, but {PAIR[1]} is {after}")
        return {**told, "wrong": wrong}

    def all_of(self, way: Way) -> None:
        """Run cycles of one way, models in turns, and check whether anything has grown by them."""
        done: list[Cycle] = []
        for number in range(self._cycles):
            if not self._server.is_running:
                break
            model = PAIR[number % len(PAIR)]
            name = f"{self._name}: {way} {number + 1} {model}"
            self._results.check(name, partial(self.one, model, way, done))
        whole = partial(grown, done, self._cycles)
        self._results.check(f"{self._name}: {way}: growth", whole)

    def one(self, model: str, way: Way, done: list[Cycle]) -> dict[str, Any]:
        """Run a cycle; then check that the answers are the expected ones, and as before."""
        self._server.switch(model)
        cycle, answers = self._server.cycle(model, way, PROMPTS[AGAIN])
        done.append(cycle)
        expected = compared(load()[model][AGAIN], answers, EXPECTED_TOLERANCE)
        own = compared(self._first[model][AGAIN], answers, OWN_TOLERANCE)
        return {
            **cycle.written(),
            "furthest_logprob": expected["furthest_logprob"],
            "furthest_of_its_own": own["furthest_logprob"],
            "wrong": [
                *cycle_faults(cycle, judges_weights=self._judges_weights),
                *expected["wrong"],
                *(f"different than before: {fault}" for fault in own["wrong"]),
            ],
            "notes": [*notes(cycle), *expected["notes"]],
        }


def compared(
    expected: Sequence[Answer], found: Sequence[Answer], tolerance: float
) -> dict[str, Any]:
    """Compare all answers of a model with the expected ones."""
    each = [compare(*pair, tolerance) for pair in zip(expected, found, strict=True)]
    return {
        "furthest_logprob": round(max(one.furthest for one in each), 4),
        "steps_compared": [one.steps for one in each],
        "wrong": [f"prompt {n}: {fault}" for n, one in enumerate(each) for fault in one.wrong],
        "notes": [f"prompt {n}: {note}" for n, one in enumerate(each) for note in one.notes],
    }


def grown(cycles: Sequence[Cycle], wanted: int) -> dict[str, Any]:
    """Compare the first cycles with the last."""
    if len(cycles) < wanted:
        return {"wrong": [f"{wanted - len(cycles)} of {wanted} cycles failed"]}
    found = growth(cycles)
    return {"cycles": len(cycles), **found.written(), "wrong": found.faults()}


def short_folder() -> str | None:
    """Return a folder for a socket, whose path has 107 bytes at most (unix(7)); `TMPDIR` may be
    longer. None if there is no such folder, and the default has to do."""
    return TMP if os.access(TMP, os.W_OK | os.X_OK) else None


def own_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a server's folder; it is removed with all that is in it."""
    return tempfile.TemporaryDirectory(
        prefix="check-gaudi-", dir=short_folder(), ignore_cleanup_errors=True
    )


def check_server(
    results: Results,
    *,
    eager: bool,
    cycles: int,
    ways: Sequence[Way],
    judges_weights: bool = True,
) -> None:
    kind = "eager" if eager else "compiled"
    with own_folder() as folder, ExitStack() as at_the_end:
        with held_back():
            server = Server(Path(folder), eager=eager)
            at_the_end.callback(results.check, f"{kind}: end", server.stop)
        Kind(results, server, kind, cycles, ways, judges_weights=judges_weights).run()


def refusal(server: Server) -> dict[str, Any]:
    """Return the error of a server that is started with a `QUANT_CONFIG` that names no file.

    It has to end with status 1 and our own error, which names the variable and what is wrong. A
    crash is not such an error, whatever its log has.
    """
    try:
        server.wait()
    except RuntimeError as error:
        told = str(error)
    else:
        return {"wrong": [f"a server starts, although {QUANTISATION} does not name a file"]}
    wrong = [f"it is not refused because of {QUANTISATION}: {told}"]
    return {"told": told, "wrong": [] if REFUSED.search(told) else wrong}


def check_refusal(results: Results) -> None:
    with own_folder() as folder, ExitStack() as at_the_end:
        gone = Path(folder, "gone.json")
        with held_back():
            server = Server(Path(folder), eager=True, more={QUANTISATION: str(gone)})
            at_the_end.callback(server.end)
        results.check(f"refused: {QUANTISATION}", lambda: refusal(server))


def check_packages() -> None:
    """Raise `Unusable` if this Python has no vLLM or no plugin for Gaudi."""
    for package in ("vllm", "vllm-gaudi"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            raise Unusable(
                f"{package} is not installed in {sys.prefix}; use the Python that has it: "
                "make check-gaudi PYTHON=..."
            ) from None


def opened(path: Path) -> Results:
    """Open the file. Raises `Unusable`, also if it is not empty: `make check-gaudi` gives the same
    name each time, and it may be the results of an earlier run."""
    try:
        if path.exists() and path.stat().st_size:
            raise Unusable(
                f"{path} already exists, perhaps with results of an earlier run; name another "
                "file, or move it away"
            )
        return Results(path)
    except OSError as error:
        raise Unusable(f"{path} can't be written: {error.strerror}; name another file") from error


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.gaudi.check")
    parser.add_argument("out", type=Path, help="the file of results")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--eager-only", action="store_true", help="only eager, without torch.compile")
    only.add_argument(
        "--compiled-only", action="store_true", help="only torch.compile, without eager"
    )
    parser.add_argument(
        "--cycles",
        type=int,
        default=CYCLES,
        help=f"cycles of each way, 6 or more (default: {CYCLES})",
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=WAYS,
        help="only these ways; without cold, no model is unloaded (default: all)",
    )
    args = parser.parse_args(argv)
    if args.cycles < LEAST_CYCLES:
        parser.error(
            f"--cycles must be at least {LEAST_CYCLES}, three for each model: the first two fill "
            "caches, and the others show growth"
        )
    return args


def check(results: Results, args: argparse.Namespace) -> None:
    """Run all requested checks in order."""
    results.check("versions", facts.facts)
    follows = results.check("device", facts.device).get("follows", {})
    if not results.check("platform", facts.platform)["ok"]:
        return
    check_refusal(results)
    kinds = [True] * (not args.compiled_only) + [False] * (not args.eager_only)
    for eager in kinds:
        check_server(
            results,
            eager=eager,
            cycles=args.cycles,
            ways=args.ways,
            judges_weights=follows.get("memory_allocated", True),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0: all is well. 1: something is not. 2: the check can't start, or can't write.

    130: it was interrupted.
    """
    args = arguments(argv)
    try:
        check_packages()
        results = opened(args.out)
    except Unusable as error:
        print(f"check-gaudi: error: {error}", file=sys.stderr)
        return UNUSABLE
    try:
        check(results, args)
    except KeyboardInterrupt:
        print(f"check-gaudi: interrupted; {args.out} has the results so far", file=sys.stderr)
        return INTERRUPTED
    except Unwritable as error:
        print(f"check-gaudi: error: {error}", file=sys.stderr)
        return UNUSABLE
    told = "all checks passed" if results.all_well else "some checks failed"
    say(f"check-gaudi: {told}; {args.out} has the results, send it back unchanged")
    return 0 if results.all_well else 1
