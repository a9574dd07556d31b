"""A plugin of vLLM that tells the check what the engine host's process has of the device.

Only that process can ask: it holds the device, and no other process gets it. vLLM loads the plugin
by its entry point (group `vllm.general_plugins`), as it does with others. Each connection to the
Unix socket that `CHECK_GAUDI_SOCKET` names is answered with one line of JSON.

This file is put on the host's path. It imports nothing of this repository.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from typing import Any

VARIABLE = "CHECK_GAUDI_SOCKET"
HOST = "vllm_hotswap.host.__main__"
NAMES = ("memory_allocated", "memory_reserved")

_lock = threading.Lock()
_listening: list[socket.socket] = []


def register() -> None:
    """Start to listen, once, in the engine host; do nothing in any other process.

    A path that can't be listened on is reported on stderr, and no connection is answered.
    """
    path = os.environ.get(VARIABLE)
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if path is None or getattr(spec, "name", None) != HOST:
        return
    with _lock:
        if _listening:
            return
        listening = socket.socket(socket.AF_UNIX)
        try:
            listening.bind(path)
            listening.listen()
        except OSError as error:  # the host serves without the check
            listening.close()
            print(f"check-gaudi: {path} can't be listened on: {error}", file=sys.stderr, flush=True)
            return
        _listening.append(listening)
    threading.Thread(target=_answer, args=(listening,), name="check-gaudi", daemon=True).start()


def _answer(listening: socket.socket) -> None:
    while True:
        connection, _ = listening.accept()
        with connection:
            try:
                told = seen()
            except Exception as error:  # noqa: BLE001  # whatever it is, the check tells it
                told = {"error": f"{type(error).__name__}: {error}"}
            connection.sendall(json.dumps(told).encode() + b"\n")


def seen() -> dict[str, Any]:
    """Return bytes of the device: free, in all, and what torch says that this process has."""
    import torch

    device = torch.get_device_module("hpu")
    device.synchronize()
    free, total = device.mem_get_info()
    found: dict[str, Any] = {"free": int(free), "total": int(total)}
    for name in NAMES:
        ask = getattr(device, name, None)
        found[name] = None if ask is None else int(ask())
    return found
