"""Make, use and destroy gloo groups as workers do, and print the results as JSON.

`python -m tests.helpers.groups_program [stranger]`: with that word, another user connects at the
same time.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

import vllm_hotswap.host.gloo  # noqa: F401
from tests.helpers.faults import wait_until

NOBODY = 65_534


def listening(pid: int) -> list[int]:
    """Return the TCP ports on which a process listens."""
    return [
        connection.laddr.port
        for connection in psutil.Process(pid).net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]


def meet(store: Path, rank: int, size: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)


def use(rank: int, size: int) -> dict[str, object]:
    """Return what this member sees of three groups, before and after they are destroyed."""
    groups = [dist.new_group(range(size), backend="gloo") for _ in range(2)]
    ports = listening(os.getpid())
    told: list[int | None] = [None] * size
    dist.all_gather_object(told, rank, group=groups[1])
    total = torch.ones(1)
    dist.all_reduce(total, group=groups[0])
    del groups
    dist.destroy_process_group()
    return {"listening": ports, "told": told, "total": int(total)}


def main(folder: Path, has_stranger: bool) -> None:
    result: dict[str, object] = {}
    if not has_stranger:
        meet(folder / "alone", 0, 1)
        result["alone"] = use(0, 1)
    first = os.getpid()
    if (second := os.fork()) == 0:
        if has_stranger:
            wait_until(lambda: bool(listening(first)))
            port = listening(first)[0]
            os.seteuid(NOBODY)
            stranger = socket.socket()
            os.seteuid(0)
            stranger.connect(("127.0.0.1", port))
            wait_until(lambda: len(psutil.Process(first).net_connections(kind="tcp")) > 1)
        meet(folder / "two", 1, 2)
        if not has_stranger:
            use(1, 2)
        os._exit(0)
    try:
        meet(folder / "two", 0, 2)
        result["two"] = use(0, 2)
    except ConnectionRefusedError as error:
        result["refused"] = str(error)
    _, status = os.waitpid(second, 0)
    result["second"] = os.waitstatus_to_exitcode(status)
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name), "stranger" in sys.argv)
