"""One phase, in a process of its own: `python -m tools.gpu.phase NAME TASK`.

The check interrupts a phase that takes too long by SIGINT, so that servers are stopped properly.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

from tools.gpu.results import Results, Say
from tools.gpu.task import RESULTS, Task


def main(argv: Sequence[str]) -> int:
    # A shell that starts programs in the background makes them ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    name, orders = argv

    task = Task.read(orders)
    say = Say(name, Results(task.out / RESULTS), task.is_rehearsal)
    importlib.import_module(f"tools.gpu.{name}").run(task, say)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
