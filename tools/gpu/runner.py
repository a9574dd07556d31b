"""The course of a check: phases one after the other, and what is reported at the end.

Every phase is a process of its own, with a limit of time; its results are written as they come, and
a phase that fails does not stop the others. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.environment import describe
from benchmarks.report import write
from benchmarks.servers import log_tail
from tools.gpu import phases, report
from tools.gpu.check import UNUSABLE
from tools.gpu.device import Unusable, check_device, check_packages
from tools.gpu.phases import Phase
from tools.gpu.report import Done, Report
from tools.gpu.results import Results, Row, line
from tools.gpu.task import RESULTS, REVISION, Task

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "benchmarks" / "gpu"
RUNNER = ["-m", "tools.gpu.phase"]
MODELS = "check-gpu-models"
"""A folder of our own, wherever it is placed: its content is deleted."""

GRACE_S = 15.0
"""For a phase that is being stopped: its servers stop in that time."""

WRONG, MISSED, INTERRUPTED = 1, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    began_s = time.monotonic()
    try:
        chosen = phases.chosen(args.phases)
        check_device(os.environ)
        check_packages()
        check_budget(chosen[0], args.budget_s)

    except (ValueError, Unusable) as error:
        print(f"check-gpu: error: {error}", file=sys.stderr)
        return UNUSABLE
    check = Check(args.out, (args.models or args.out) / MODELS, args.rehearsal)
    status = 0
    try:
        for phase in chosen:
            left_s = None if args.budget_s is None else began_s + args.budget_s - time.monotonic()
            check.run(phase, left_s)
    except KeyboardInterrupt:
        status = INTERRUPTED
    finally:
        if not args.keep_models:
            shutil.rmtree(check.models, ignore_errors=True)
    found = check.report([f"--phases={','.join(p.name for p in chosen)}"])
    tell(found, args.out, args.docs)
    return status or exit_status(found)


class OutOfTime(Exception):
    """A phase exceeded its time; the message says what time, and where its log is."""


class Check:
    """One run: its folder, and how each phase has ended."""

    def __init__(self, out: Path, models: Path, is_rehearsal: bool) -> None:
        self.out, self.models = out.resolve(), models.resolve()
        self._is_rehearsal = is_rehearsal
        self.done: list[Done] = []
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / RESULTS).unlink(missing_ok=True)
        self._results = Results(self.out / RESULTS)

    def run(self, phase: Phase, left_s: float | None) -> None:
        """Run a phase, if there is time for it. Raises no error of the phase."""
        limit_s = phases.limit_s(phase, left_s)
        if limit_s is None:
            self._ended(phase, f"not started: it takes at least {phase.least_s} s", 0.0)
            return
        print(f"--- {phase.name}: {phase.what} (usually {phase.usual_s} s)", flush=True)
        before_s = time.monotonic()
        task = Task(self.out, self.models, self._is_rehearsal, before_s + limit_s)
        log = self.out / f"{phase.name}.log"
        state = "done"
        try:
            if (failure := run_alone(phase, task, log, limit_s)) is not None:
                state = failure
                self._tell(Row(phase.name, "failed", "the phase failed", failure, right=False))
        except OutOfTime as error:
            if limit_s < phase.limit_s:  # the budget's end, which says nothing of the phase
                state = f"cut: out of time after {limit_s:.0f} s"
                self._tell(Row(phase.name, "cut", "the phase was cut", state))
            else:
                state = str(error)
                self._tell(Row(phase.name, "failed", "the phase failed", state, right=False))
        self._ended(phase, state, time.monotonic() - before_s)

    def _tell(self, row: Row) -> None:
        self._results.add(row)
        print(line(row), flush=True)

    def _ended(self, phase: Phase, state: str, seconds: float) -> None:
        self.done.append(Done(phase.name, state.partition("\n")[0], round(seconds, 1)))

    def report(self, arguments: Sequence[str]) -> Report:
        about = describe(arguments)
        if about["git_revision"] is None and (ROOT / REVISION).is_file():
            about["git_revision"] = (ROOT / REVISION).read_text(encoding="ascii").strip()
        return Report(about, self._is_rehearsal, self.done, self._results.rows())


def check_budget(first: Phase, budget_s: float | None) -> None:
    """Raise ValueError if there is no time for anything."""
    if phases.limit_s(first, budget_s) is None:
        raise ValueError(
            f"--budget-s {budget_s:g} is too short: {first.name} takes {first.least_s} s, "
            f"and the end {phases.END_S:g} s"
        )


def run_alone(phase: Phase, task: Task, log: Path, limit_s: float) -> str | None:
    """Run a phase in a process. Returns why it has failed; None if it has not.

    Raises:
        OutOfTime: it was not done in `limit_s`, and has been ended.
    """
    command = [sys.executable, *RUNNER, phase.name, task.write()]
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stderr=errors, env=environment, start_new_session=True)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            end(process)
            why = f"it was not finished within {limit_s:.0f} s; {log.name} has its log"
            raise OutOfTime(why) from None
        except BaseException:
            end(process)
            raise
    if status == 0:
        return None
    return f"status {status}; {log.name}: {cause(log.read_text(errors='replace'))}"


def cause(log: str) -> str:
    """Return the line of a log that says why, and the lines before it."""
    lines = [text for text in log_tail(log).splitlines() if text.strip()]
    return "\n".join([lines[-1].strip(), *lines[:-1]]) if lines else "its log is empty"


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt it, so that it stops its servers; then kill what is left of its family."""
    family = []
    with suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    process.kill()
    process.wait()
    for member in family:
        with suppress(psutil.Error):
            member.kill()


def tell(found: Report, out: Path, docs: str | None) -> None:
    """Print the tables, and write the files."""
    print(f"\n{report.terminal(found)}\n", flush=True)
    folders = [(out, "check")]
    if docs:
        folders.append((DOCS, docs))
    for folder, name in folders:
        title = f"Check of {name}" if folder == DOCS else "Check of a GPU"
        write(folder / f"{name}.json", report.document(found))
        (folder / f"{name}.md").write_text(report.markdown(found, title), encoding="utf-8")
        print(f"{folder / name}.json, .md")


def exit_status(found: Report) -> int:
    """Return 0: all is right, and every goal that was measured is met."""
    if found.is_wrong:
        return WRONG
    return MISSED if found.misses else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="check-gpu",
        description="Check whether vllm-hotswap works on this machine's NVIDIA GPU, and how fast.",
        epilog="Exit status: 0 if everything is right; 1 if something is wrong; 2 if it cannot run "
        "here; 3 if everything is right, but a goal of speed is missed.",
    )
    parser.add_argument(
        "--phases",
        type=lambda text: text.split(","),
        default=list(phases.NAMES),
        metavar="NAME,...",
        help=f"default: all of {','.join(phases.NAMES)}",
    )
    parser.add_argument("--out", type=Path, default=Path("check-gpu-results"))
    parser.add_argument(
        "--models", type=Path, help="where large models are made: 25 GB (default: below --out)"
    )
    parser.add_argument("--keep-models", action="store_true", help="keep them for the next run")
    parser.add_argument(
        "--budget-s",
        type=float,
        metavar="SECONDS",
        help="finish within this time: the most important phases first, as many as fit",
    )
    parser.add_argument(
        "--docs", metavar="NAME", help="write docs/benchmarks/gpu/NAME.json and .md, too"
    )
    parser.add_argument(
        "--rehearsal",
        action="store_true",
        help="on a stand-in for the driver: small sizes, without checks that need real kernels",
    )
    args = parser.parse_args(argv)
    if args.docs and args.rehearsal:
        parser.error("--docs: a rehearsal has no figures of a GPU")
    if args.docs and not re.fullmatch(r"[\w.-]+", args.docs):
        parser.error(f"--docs: {args.docs!r} is not a file name; name the GPU, such as h200")
    return args
