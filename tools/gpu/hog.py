"""A process that takes memory of the device, until its input ends: `python -m tools.gpu.hog LEFT`.

It leaves LEFT bytes free, and prints how many it has taken. It needs neither torch nor vLLM.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vllm_hotswap.host.cuda_driver import Driver, DriverError, check_driver

CHUNK = 256 << 20


def main(argv: Sequence[str]) -> int:
    driver = Driver(0, check_driver(os.environ))
    driver.ensure_context()
    print(take(driver, int(argv[0])), flush=True)
    sys.stdin.read()  # the driver gives back what a process has taken, once that has ended
    return 0


def take(driver: Driver, left: int) -> int:
    """Take all but `left` bytes of what is free. Returns how many have been taken."""
    return sum(nbytes for _, nbytes in pieces(driver, left))


def pieces(driver: Driver, left: int) -> list[tuple[int, int]]:
    """Do the same in pieces: return the handle of each, and its bytes.

    Where a piece cannot be had (another process was quicker, or the driver counts as free what it
    does not give away), smaller ones are tried.
    """
    taken: list[tuple[int, int]] = []
    most = CHUNK
    while True:
        free, _ = driver.memory_info()
        nbytes = min(most, free - left) // driver.step * driver.step
        if nbytes <= 0:
            return taken
        try:
            taken.append((driver.create(nbytes), nbytes))
        except DriverError:
            most = nbytes // 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
