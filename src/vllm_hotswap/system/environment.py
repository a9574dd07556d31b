"""What this process hands on to the processes that it starts: caches, folders, its umask."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.system.caches import check_caches, code_caches

log = logging.getLogger("vllm_hotswap")

WRITE_BY_OTHERS = 0o022


def shut_out_writers() -> int:
    """Keep other users from writing to what this process, and those it starts, make from now on.

    Libraries make folders of compiled code with the rights that the umask leaves. The umask only
    gets stricter.

    Returns: the umask from before.
    """
    before = os.umask(0o077)
    os.umask(before | WRITE_BY_OTHERS)
    return before


def shut_out_others() -> None:
    """Keep this process, and those that it starts, from running code that other users provide.

    Compiled code is kept where other users cannot write. Python processes that start from now on
    do not look for modules in the folder that they start in.

    Raises:
        ConfigError: a folder of compiled code belongs to another user, or others may write to it.
    """
    os.environ.update(code_caches(os.environ), PYTHONSAFEPATH="1")


def shut_out_others_without_cache() -> None:
    """Do the same for a process that keeps no compiled code: it makes no folder.

    A folder that would keep a server from starting is logged.
    """
    shut_out_writers()
    try:
        check_caches(os.environ)
    except ConfigError as error:
        log.warning("event=cache_refused cause=%r then='serve will not start'", str(error))
    os.environ["PYTHONSAFEPATH"] = "1"


def use_temporary_folder(folder: Path) -> None:
    """Make this process, and those that it starts, put temporary files into a folder.

    In the folder that all users share, torch and vLLM use names that other users can predict.
    """
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
