"""What this process hands on to those that it starts: caches, folders, its umask."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from vllm_hotswap.caches import code_caches, look_at_caches
from vllm_hotswap.errors import ConfigError

log = logging.getLogger("vllm_hotswap")

WRITE_BY_OTHERS = 0o022


def shut_out_writers() -> int:
    """Have nobody else write to what this process makes, and what it starts, from now on.

    Libraries make folders of compiled code with whatever the umask leaves. It only gets stricter.

    Returns: the umask from before.
    """
    before = os.umask(0o077)
    os.umask(before | WRITE_BY_OTHERS)
    return before


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
