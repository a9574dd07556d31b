"""Which stage the load on the compute thread has reached.

vLLM builds executors itself, so `HostedExecutor` cannot be given a callback; loads run one at
a time on one thread, so a module variable is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_report: Callable[[str], None] | None = None


@contextmanager
def reporting_to(report: Callable[[str], None]) -> Iterator[None]:
    """Make `reached` call `report` inside this context."""
    global _report  # noqa: PLW0603  # one load at a time; see the module's docstring
    _report = report
    try:
        yield
    finally:
        _report = None


def reached(stage: str) -> None:
    """Report that the current load has started `stage`; do nothing without a listener."""
    if _report is not None:
        _report(stage)
