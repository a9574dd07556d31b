"""A helper that runs given Python code in place of a native library."""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_hotswap.system import helpers

PROGRAM = """
import sys

sys.path.insert(0, sys.argv.pop(1))
import helper_process


class Work:
    def do(self, what, arguments):
        exec(what)


helper_process.Work = Work
helper_process.main()
"""

SCRIPTED = [sys.executable, "-c", PROGRAM, str(Path(helpers.__file__).parent)]
"""Return the command for `Helpers`."""
