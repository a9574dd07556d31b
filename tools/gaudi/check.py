"""Check models on a Gaudi, and write one file of results: `python -m tools.gaudi.check OUT.jsonl`.

For a person with the hardware. Run it in the root of a clone, with the Python of the environment
that has vLLM 0.26 and the Gaudi plugin. It starts servers of its own on a free port of this
machine, with the tiny models that ship with the package, and stops them. Nothing is downloaded.
What a server compiles goes with its temporary folder: nothing is left but the file, and a few files
of Python's own in `__pycache__`. docs/guides/gaudi.md says how long it takes, and how to read it.

Each line of the file is one result: `ok`, what is `wrong`, and what was seen (versions, bytes,
seconds). Names of users and hosts, folders, addresses and values of secrets are removed from it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tools.gaudi import interrupts


def main(argv: Sequence[str] | None = None) -> int:
    try:
        from tools.gaudi import program
    except ModuleNotFoundError as error:
        print(
            f"check-gaudi: error: {error.name} is not installed in {sys.executable}; use the "
            "Python that has vLLM and the Gaudi plugin: make check-gaudi PYTHON=...",
            file=sys.stderr,
        )
        return 2
    return program.main(argv)


if __name__ == "__main__":
    interrupts.take()
    sys.dont_write_bytecode = True
    sys.exit(main())
