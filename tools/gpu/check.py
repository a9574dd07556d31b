"""`python -m tools.gpu.check`: see `tools.gpu.runner`; or it prints why it cannot even start."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

UNUSABLE = 2


def main(argv: Sequence[str] | None = None) -> int:
    try:
        from tools.gpu import runner
    except ModuleNotFoundError as error:
        print(
            f"check-gpu: error: {error.name} is not installed in {sys.executable}; name the "
            "Python that has vLLM's CUDA build: make check-gpu PYTHON=...",
            file=sys.stderr,
        )
        return UNUSABLE
    return runner.main(argv)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell ignores them
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
