"""The environment of this process: variables that it is to forget, and what it hands on. Its umask.

Linux shows the variables with which a process was started to its user and to root, in
`/proc/PID/environ`, whatever becomes of them afterwards. What is shown is the process's own
memory, so that it can be overwritten.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from vllm_hotswap.caches import code_caches, look_at_caches
from vllm_hotswap.errors import ConfigError

log = logging.getLogger("vllm_hotswap")

STAT = Path("/proc/self/stat")
_ENV_START, _ENV_END = 50, 51
"""Fields of `/proc/PID/stat`, counted from 1: proc_pid_stat(5)."""


WRITE_BY_OTHERS = 0o022


def shut_out_writers() -> int:
    """Have nobody else write to what this process makes, and what it starts, from now on.

    Libraries make folders of compiled code with whatever the umask leaves. It only gets stricter.

    Returns: the umask from before.
    """
    before = os.umask(0o077)
    os.umask(before | WRITE_BY_OTHERS)
    return before


def forget(names: Iterable[str]) -> None:
    """Remove variables, and overwrite the values with which this process was started.

    Whatever reads them by other means than `os.environ` must have done so. Elsewhere than on Linux
    they are removed only.
    """
    found = {name for name in names if os.environ.pop(name, None) is not None}
    if found:
        _overwrite(found)


def _overwrite(names: Iterable[str]) -> None:
    block = _block()
    if block is None:
        return
    start, text = block
    wanted = b"|".join(re.escape(os.fsencode(name)) for name in names)
    for entry in re.finditer(rb"(?:^|\0)(?:" + wanted + rb")=([^\0]+)", text):
        ctypes.memset(start + entry.start(1), 0, len(entry[1]))


def _block() -> tuple[int, bytes] | None:
    """Address and content of the variables as the kernel shows them; None if that is unknown."""
    with suppress(OSError, ValueError, IndexError):
        # The second field is the program's name, in parentheses; it may hold anything.
        fields = STAT.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        start, end = (int(fields[number - 3]) for number in (_ENV_START, _ENV_END))
        if 0 < start < end:
            return start, ctypes.string_at(start, end - start)
    return None


def shut_out_others() -> None:
    """Have this process, and what it starts, run no code that other users can put in its way.

    Compiled code is kept where nobody else can write; modules are not looked for in the start
    folder by Python processes from now on.

    Raises:
        ConfigError: a folder of compiled code belongs to another user, or others may write to it.
    """
    os.environ.update(code_caches(os.environ), PYTHONSAFEPATH="1")


def shut_out_others_for_a_look() -> None:
    """The same for a process that keeps no compiled code: it makes no folder.

    A folder for which a server would not start is told in the log.
    """
    shut_out_writers()
    try:
        look_at_caches(os.environ)
    except ConfigError as error:
        log.warning("event=cache_refused cause=%r then='serve will not start'", str(error))
    os.environ["PYTHONSAFEPATH"] = "1"


def use_temporary_folder(folder: Path) -> None:
    """Have this process, and what it starts, put temporary files into a folder.

    In the one that all users share, torch and vLLM use names that everybody can foresee.
    """
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
