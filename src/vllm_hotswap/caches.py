"""Where compiled code is kept: in folders that other users of the machine cannot write to.

Whoever can write into such a folder has their code run by the server: torch loads libraries and
Python from there, vLLM pickles. By itself torch takes a folder of a name that everybody knows in
the temporary folder of all users, and does not look whose it is.
"""

from __future__ import annotations

import logging
import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from vllm_hotswap.errors import ConfigError

log = logging.getLogger("vllm_hotswap")

ROOT_VARIABLE = "VLLM_CACHE_ROOT"
INDUCTOR_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
GIVEN = (
    INDUCTOR_VARIABLE,
    "TRITON_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
    "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR",
)
"""Variables that name a folder of code, where somebody has set them."""

PRIVATE = stat.S_IRWXU
OTHERS_WRITE = stat.S_IWOTH
NOT_OURS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def code_caches(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that keep compiled code in a folder of this user alone, which is made if need be.

    Folders that are named already stay. Triton needs none: what it makes goes into torch's or
    vLLM's folder, or the user's home. Empty where no folder can be made, such as with a home that
    is read-only: then code is kept in the temporary folder of the engine host, and not for long.

    Raises:
        ConfigError: a folder belongs to another user, or others may write to it.
    """
    root = _cache_root(environment)
    _check_shared(root, ROOT_VARIABLE)
    for name in GIVEN:
        if given := environment.get(name):
            _check_shared(Path(given).expanduser(), name)
    if environment.get(INDUCTOR_VARIABLE):
        return {}
    own = root / "vllm-hotswap"
    folder = own / "torchinductor"
    try:
        own.mkdir(parents=True, exist_ok=True)
        _check_shared(own, ROOT_VARIABLE)
        folder.mkdir(mode=PRIVATE, exist_ok=True)
        _check_private(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        log.info("event=no_code_cache folder=%s cause=%r", folder, error.strerror or str(error))
        return {}
    return {INDUCTOR_VARIABLE: str(folder)}


def _cache_root(environment: Mapping[str, str]) -> Path:
    """vLLM's, as `vllm.envs` finds it."""
    caches = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(environment.get(ROOT_VARIABLE) or Path(caches, "vllm")).expanduser()


def _check_shared(folder: Path, name: str) -> None:
    """Raises `ConfigError` if a folder that is there may be written by any user of the machine.

    One of the administrator's is as good as an own one; so is a group's that may write.
    """
    with suppress(OSError):  # it is not there, and will be made, or cannot be
        found = folder.stat()
        if found.st_uid not in (0, os.geteuid()):
            raise _refused(folder, name, f"belongs to the user {found.st_uid}")
        if found.st_mode & OTHERS_WRITE:
            raise _refused(folder, name, "may be written by every user of the machine")
        for parent in _open_to_all(folder):
            log.warning("event=cache_can_be_moved folder=%s written_by_all=%s", folder, parent)


def _check_private(folder: Path) -> None:
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise _refused(folder, ROOT_VARIABLE, f"belongs to the user {found.st_uid}")
    if found.st_mode & NOT_OURS_WRITE:
        raise _refused(folder, ROOT_VARIABLE, "may be written by other users")
    folder.chmod(PRIVATE)


def _refused(folder: Path, name: str, why: str) -> ConfigError:
    return ConfigError(
        f"the folder {shlex.quote(str(folder))}, from which compiled code is run, {why}; remove "
        f"it, or have {name} name a folder of your own"
    )


def _open_to_all(folder: Path) -> Iterator[Path]:
    """Parents in which anybody may put another folder in the place of this one."""
    for parent in folder.resolve().parents:
        with suppress(OSError):
            mode = parent.stat().st_mode
            if mode & OTHERS_WRITE and not mode & stat.S_ISVTX:
                yield parent
