"""Caches of compiled code: in folders that other users of the machine cannot write to.

A user who can write into such a folder can make the server run code: torch loads libraries and
Python from there, vLLM loads pickles. By default, torch uses a folder with a predictable name in
the temporary folder of all users, and does not check its owner.
"""

from __future__ import annotations

import logging
import os
import shlex
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.system.trusted_files import foreign_link, foreign_owner, is_read_only, is_trusted

log = logging.getLogger("vllm_hotswap")

ROOT_VARIABLE = "VLLM_CACHE_ROOT"
INDUCTOR_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
GIVEN = (
    INDUCTOR_VARIABLE,
    "TRITON_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
    "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR",
)
"""Other variables that name a folder of code; checked if they are set."""

OWN = "vllm-hotswap"
"""Our folder below vLLM's."""

PRIVATE = stat.S_IRWXU
READ_BY_ALL = 0o755
OTHERS_WRITE = stat.S_IWOTH
NOT_OURS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def code_caches(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables that keep compiled code in a folder of this user alone; make that folder.

    Variables that are set already stay. The exception is a root that every user may write to and
    this user cannot change, such as an `emptyDir` of Kubernetes: our own folder below it replaces
    it. Triton needs no variable: its files go into torch's or vLLM's folder, or the user's home.
    No folder may be possible, for example without a home or with a read-only one. Then there is no
    variable for it: code goes into the temporary folder of the engine host, and is not kept long.

    Raises:
        ConfigError: a folder belongs to another user, or others may write to it.
    """
    check_caches(environment)
    root = _cache_root(environment)
    own = root / OWN
    found = {ROOT_VARIABLE: _made_below(root)} if _is_left_open(root) else {}
    if environment.get(INDUCTOR_VARIABLE):
        return found
    folder = own / "torchinductor"
    try:
        if str(root).startswith("~"):
            raise FileNotFoundError("the user has no home")
        make_folder(own)
        make_folder(folder, PRIVATE)
        _check_private(folder)
        if stat.S_IMODE(folder.stat().st_mode) != PRIVATE:
            folder.chmod(PRIVATE)
    except OSError as error:
        log.info("event=no_code_cache folder=%s cause=%r", folder, error.strerror or str(error))
        return found
    return {**found, INDUCTOR_VARIABLE: str(folder)}


def check_caches(environment: Mapping[str, str]) -> None:
    """Check that no other user may write to existing folders of code. Creates nothing.

    Raises:
        ConfigError: a folder belongs to another user, or others may write to it.
    """
    root = _cache_root(environment)
    if not _is_left_open(root):
        _check_shared(root, ROOT_VARIABLE)
    _check_shared(root / OWN, ROOT_VARIABLE)
    _log_owners(root / OWN)
    if not environment.get(INDUCTOR_VARIABLE):
        _check_private(root / OWN / "torchinductor")
    for name in GIVEN:
        if given := environment.get(name):
            _check_shared(_expanded(given), name)
            _log_owners(_expanded(given))


def _cache_root(environment: Mapping[str, str]) -> Path:
    """Return vLLM's cache root, as `vllm.envs` finds it."""
    caches = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return _expanded(environment.get(ROOT_VARIABLE) or os.path.join(caches, "vllm"))  # noqa: PTH118


def _expanded(folder: str) -> Path:
    """Expand `~`; unlike `Path.expanduser`, return the path unchanged if the user has no home."""
    return Path(os.path.expanduser(folder))  # noqa: PTH111


def _is_left_open(root: Path) -> bool:
    """Whether every user may write to a trusted user's folder, and this user cannot change it."""
    with suppress(OSError):
        found = root.stat()
        is_changeable = os.geteuid() in (0, found.st_uid)
        return _is_written_by_all(root) and is_trusted(found.st_uid) and not is_changeable
    return False


def _made_below(root: Path) -> str:
    """Make our own folder, in place of a root that every user may write to.

    It must not be a link: the user who made the link could redirect it later.
    """
    own = root / OWN
    try:
        make_folder(own, PRIVATE)
        if own.is_symlink():
            raise FileExistsError("a link of this name exists")
        _check_private(own)
        own.chmod(PRIVATE)
    except OSError as error:
        why = f"is writable by every user of the machine, and {str(own)!r} cannot be created"
        cause = error.strerror or str(error)
        raise _refused(root, f"{why}: {cause}", _elsewhere(ROOT_VARIABLE)) from None
    return str(own)


def make_folder(folder: Path, mode: int = READ_BY_ALL) -> None:
    """Make a folder, and its parents, in which no other user may write, whatever the umask is.

    Raises:
        OSError: it cannot be made, or nothing can be written to it.
    """
    for parent in reversed(folder.parents):
        if not parent.exists():
            parent.mkdir(READ_BY_ALL, exist_ok=True)
    folder.mkdir(mode, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError("it is read-only")


def _check_shared(folder: Path, name: str) -> None:
    """Refuse an existing folder that any user of the machine may write to. Raises `ConfigError`.

    A folder of the administrator is as good as an own one; group members may write. A link on the
    way to it that another user could replace is as bad as a folder of that user.
    """
    if problem := foreign_link(folder):
        raise _refused(folder, problem, f"or {_elsewhere(name)}")
    with suppress(OSError):  # it is not there, and will be made, or cannot be
        if not is_trusted(uid := folder.stat().st_uid):
            raise _foreign(folder, name, uid)
        if _is_written_by_all(folder):
            raise _open(folder, name, "every user of the machine", "o-w")


def _check_private(folder: Path) -> None:
    """Refuse an existing folder that any other user may write to. Raises `ConfigError`."""
    _check_shared(folder, ROOT_VARIABLE)
    with suppress(OSError):
        if folder.stat().st_mode & NOT_OURS_WRITE:
            raise _open(folder, ROOT_VARIABLE, "other users", "go-w")


def _is_written_by_all(folder: Path) -> bool:
    return bool(folder.stat().st_mode & OTHERS_WRITE) and not is_read_only(folder)


def _foreign(folder: Path, name: str, uid: int) -> ConfigError:
    as_he = f"run as that user (docker run --user {uid}), or " if os.geteuid() == 0 else ""
    return _refused(folder, foreign_owner(uid), as_he + _elsewhere(name))


def _open(folder: Path, name: str, who: str, change: str) -> ConfigError:
    command = f"run: chmod {change} {shlex.quote(str(folder))}"
    return _refused(folder, f"may be written by {who}", f"{command}, or {_elsewhere(name)}")


def _elsewhere(name: str) -> str:
    return f"set {name} to a folder of your own, such as a new one below it"


def _refused(folder: Path, why: str, way_out: str) -> ConfigError:
    return ConfigError(
        f"the folder {shlex.quote(str(folder))}, from which compiled code is run, {why}; {way_out}"
    )


def _log_owners(folder: Path) -> None:
    """Warn about parents in which any user may replace this folder by another one."""
    for parent in folder.resolve().parents:
        with suppress(OSError):
            mode = parent.stat().st_mode
            if mode & OTHERS_WRITE and not mode & stat.S_ISVTX and not is_read_only(parent):
                log.warning("event=cache_can_be_moved folder=%s written_by_all=%s", folder, parent)
