"""Files that decide what the server does: which other users could have written or may read them.

A file is opened once, and that open file is both checked and read: nothing can be put in its place
in between. Its owner, its mode and its group are checked. So are the folders on the way to it: a
user who may write to one of them may put another file in place. Links are followed, as Kubernetes
mounts secrets through them. The folders of each link count, too, and so does its owner, if he may
replace it.

The rules are OpenSSH's `StrictModes`. These are allowed as exceptions:

- the group that a user has alone, the default of distributions with a umask of 002;
- root's group, without other members;
- folders with the sticky bit, in which users cannot replace each other's files (inode(7));
- root's folders that a group may write to, such as `/var/log`, as only root has made them so;
- write permissions on what is mounted read-only, where they have no effect.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from vllm_hotswap.errors import ConfigError

ROOT = 0

OVERFLOW_UID = Path("/proc/sys/kernel/overflowuid")
UID_MAP = Path("/proc/self/uid_map")

ACCESS_LIST = "system.posix_acl_access"
"""The attribute of a file that has its access control list, where it has one."""

MAX_LINKS = 40
"""Links on the way to one file: path_resolution(7)."""

NO_LOGIN = frozenset(["false", "halt", "nologin", "shutdown", "sync"])
"""Programs that stand in the place of a shell for accounts that cannot log in."""

_OTHERS = stat.S_IRWXO


def read_private(path: Path, what: str) -> bytes:
    """Return the content of a file that holds secrets.

    Only its owner, and members of groups that this process is also in, may read it. Only its
    owner may write it. Its owner is root, or the user of this process.

    Args:
        path: of a regular file, or a link to one.
        what: what it is, for messages.

    Raises:
        ConfigError: a rule is broken; the message has the command that fixes it.
        OSError: it cannot be opened or read.
    """
    return _read(path, what, is_private=True, is_checked=True)


def read_trusted(path: Path, what: str, hatch: str = "", is_checked: bool = True) -> bytes:
    """Return the content of a file that any user may read, but no other user may write.

    Args:
        path: of the file, a link to it, or a pipe.
        what: what it is, for messages.
        hatch: added to messages: a way around the rules.
        is_checked: whether the rules apply.

    Raises:
        ConfigError: another user may write or replace it; the message has the command to run.
        OSError: it cannot be opened or read.
    """
    return _read(path, what, is_private=False, is_checked=is_checked, hatch=hatch)


def doubt(path: Path) -> str | None:
    """Return why `read_private` would refuse a file that other code reads; None if it would not.

    Raises:
        OSError: it does not exist, or cannot be checked.
    """
    found = path.stat()
    return next(chain(_of_file(found, path, path, is_private=True), _of_way(path)), None)


def foreign_link(path: Path) -> str | None:
    """Return what is wrong with a link on the way to a path: another user may replace the link.

    None where there is no such link, or the way cannot be checked.
    """
    with suppress(OSError):
        for step in _way_to(path):
            if step.is_symlink() and (problem := _of_link(step)):
                return problem
    return None


def is_trusted(uid: int) -> bool:
    """Whether it is root, this process's user, or the user who became root with sudo for it."""
    return (
        uid == os.geteuid()
        or _is_root(uid)
        or (os.geteuid() == ROOT and str(uid) == os.environ.get("SUDO_UID", ""))
    )


def foreign_owner(uid: int) -> str:
    """Describe the owner of a file or a folder who is not trusted."""
    return (
        f"belongs to {_user(uid)}; it must belong to root or to {_user(os.geteuid())}, the user "
        "of this process"
    )


def is_read_only(place: int | Path) -> bool:
    """Whether an open file, or a path, is mounted read-only: statvfs(3).

    The kubelet mounts a ConfigMap so; by its mode alone, every user may write to its folder.
    """
    with suppress(OSError):
        return bool(os.statvfs(place).f_flag & os.ST_RDONLY)
    return False


def _read(path: Path, what: str, is_private: bool, is_checked: bool, hatch: str = "") -> bytes:
    # Reading keys must not wait for a pipe; a configuration may come through one.
    flags = os.O_NONBLOCK if is_private else 0
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        found = os.fstat(descriptor)
        if is_private and not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{what} is not a regular file")
        if is_checked:
            _refuse(found, descriptor, path, what, is_private, hatch)
        try:
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read()
        except OSError as error:
            error.filename = str(path)  # in place of the descriptor's number
            raise
    finally:
        os.close(descriptor)


def refuse_foreign(descriptor: int, path: Path, what: str) -> None:
    """Refuse an open file that others may write or replace. Raises `ConfigError`, `OSError`."""
    _refuse(os.fstat(descriptor), descriptor, path, what, is_private=False)


def _refuse(
    found: os.stat_result,
    descriptor: int,
    path: Path,
    what: str,
    is_private: bool,
    hatch: str = "",
) -> None:
    file = _of_file(found, descriptor, path, is_private)
    if problem := next(chain(file, _of_way(path)), None):
        raise ConfigError(f"{what} {problem}{hatch}")


def _of_file(
    found: os.stat_result, place: int | Path, path: Path, is_private: bool
) -> Iterator[str]:
    """Yield what is wrong with a file, and the fix. `place` is its descriptor or its path."""
    mode, name = found.st_mode, shlex.quote(str(path))
    if not is_trusted(found.st_uid):
        yield _foreign(found.st_uid, name)
    if is_private and mode & _OTHERS:
        yield f"is open to every user of the machine; run: chmod o= {name}"
    if mode & stat.S_IWOTH and not is_read_only(place):
        yield f"can be written by every user of the machine; run: chmod o-w {name}"
    is_shared = mode & stat.S_IWGRP and not is_read_only(place)
    if (is_shared or (is_private and mode & stat.S_IRWXG)) and _has_list(place):
        yield f"has an access control list that lets others in; run: setfacl -b {name}"
    if is_shared and not _is_alone(found):
        yield f"can be written by the group {_group(found.st_gid)}; run: chmod g-w {name}"
    if is_private and mode & stat.S_IRWXG and not _is_member(found):
        yield f"is open to the group {_group(found.st_gid)}; run: chmod g= {name}"


def _of_way(path: Path) -> Iterator[str]:
    """Yield what is wrong with the folders and the links on the way to a file."""
    for step in dict.fromkeys(_way_to(path)):
        if not step.is_symlink():
            yield from _of_folder(step.stat(), step)
        elif problem := _of_link(step):
            yield problem


def _way_to(path: Path) -> Iterator[Path]:
    """Yield every folder in which a name is looked up on the way to a file, and every link there.

    Raises:
        OSError: there are more links than the system follows.
    """
    folder, names, links = Path("/"), list(path.absolute().parts[1:]), 0
    while names:
        yield folder
        name = names.pop(0)
        if name == "..":
            folder = folder.parent
        elif (entry := folder / name).is_symlink():
            yield entry
            links += 1
            if links > MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            target = entry.readlink()
            folder = Path("/") if target.is_absolute() else folder
            names = [part for part in target.parts if part != "/"] + names
        else:
            folder = entry


def _of_folder(found: os.stat_result, folder: Path) -> Iterator[str]:
    mode, name = found.st_mode, shlex.quote(str(folder))
    where = f"lies below {str(folder)!r}, which"
    if not is_trusted(found.st_uid):
        yield f"{where} {_foreign(found.st_uid, name)}"
    if mode & stat.S_ISVTX or not mode & (stat.S_IWOTH | stat.S_IWGRP) or is_read_only(folder):
        return
    if mode & stat.S_IWOTH:
        yield f"{where} every user of the machine may write to; run: chmod o-w {name}"
    if mode & stat.S_IWGRP and not _is_root(found.st_uid) and _has_list(folder):
        yield f"{where} has an access control list that lets others write; run: setfacl -b {name}"
    if mode & stat.S_IWGRP and not _is_root(found.st_uid) and not _is_alone(found):
        yield f"{where} the group {_group(found.st_gid)} may write to; run: chmod g-w {name}"


def _of_link(link: Path) -> str | None:
    """Return what is wrong with a link: an owner who may write to its folder can redirect it."""
    found, folder = link.lstat(), link.parent.stat()
    is_shared = folder.st_mode & stat.S_IWOTH or (
        folder.st_mode & stat.S_IWGRP and (_has_list(link.parent) or not _is_alone(folder))
    )
    if not is_shared or is_trusted(found.st_uid):
        return None
    foreign = _foreign(found.st_uid, shlex.quote(str(link)), "chown -h")
    return f"is found through the link {str(link)!r}, which {foreign}"


def _foreign(uid: int, name: str, command: str = "chown") -> str:
    own = os.geteuid()
    way_out = f"{foreign_owner(uid)}; run: {command} {own} {name}"
    return f"{way_out}, or run as that user (docker run --user {uid})" if own == ROOT else way_out


def _is_root(uid: int) -> bool:
    """Whether it is root, or what stands for root in a user namespace without root.

    There, the kernel shows all owners without a number in the namespace as one user, `nobody`:
    user_namespaces(7). Root is among them; which others are is unknown.
    """
    return uid == ROOT or (uid == _overflow_uid() and not _has_root())


def _overflow_uid() -> int | None:
    with suppress(OSError, ValueError):
        return int(OVERFLOW_UID.read_bytes())
    return None


def _has_root() -> bool:
    """Whether root has a number in this user namespace; also true where there are none."""
    with suppress(OSError, ValueError):
        lines = UID_MAP.read_bytes().splitlines()
        return any(int(line.split()[0]) == ROOT for line in lines) or not lines
    return True


def _has_list(place: int | Path) -> bool:
    """Whether there is a list: then the mode's group bits bound what it allows anyone: acl(5)."""
    try:
        return bool(os.getxattr(place, ACCESS_LIST))
    except OSError:  # there is none, or the file system has no lists
        return False


def _is_member(found: os.stat_result) -> bool:
    """Whether this process is in the group, or the group has no other member."""
    return found.st_gid in (os.getegid(), *os.getgroups()) or _is_alone(found)


def _is_alone(found: os.stat_result) -> bool:
    """Whether the owner is the group's only member, and shares its name; or only root is in it."""
    if found.st_gid == ROOT:
        return _is_roots_alone()
    try:
        user, group = pwd.getpwuid(found.st_uid), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    is_own = user.pw_gid == group.gr_gid and user.pw_name == group.gr_name
    names = {*group.gr_mem, *(account.pw_name for account in _accounts_of(group.gr_gid))}
    return is_own and names <= {user.pw_name}


def _is_roots_alone() -> bool:
    """Whether root's group has no members except root and this process's user.

    Red Hat's systems, and images made from them, have accounts there that cannot log in. OpenShift
    runs a container as a user with any number, and in root's group: the accounts of its image say
    nothing about the users of the machine.
    """
    with suppress(KeyError):  # a container may lack the file
        if not all(map(_is_own_name, grp.getgrgid(ROOT).gr_mem)):
            return False
    others = (each for each in _accounts_of(ROOT) if not is_trusted(each.pw_uid))
    return _is_lent_a_number() or not any(map(_can_log_in, others))


def _is_lent_a_number() -> bool:
    """Whether this user is in root's group, is not root, and cannot log in."""
    if os.getegid() != ROOT or os.geteuid() == ROOT:
        return False
    try:
        return not _can_log_in(pwd.getpwuid(os.geteuid()))
    except KeyError:
        return True


def _accounts_of(gid: int) -> list[pwd.struct_passwd]:
    """Return the accounts whose first group this is, as far as the system lists accounts."""
    return [account for account in pwd.getpwall() if account.pw_gid == gid]


def _is_own_name(name: str) -> bool:
    """Whether it is the name of root, or of the user of this process."""
    try:
        return is_trusted(pwd.getpwnam(name).pw_uid)
    except KeyError:
        return False


def _can_log_in(account: pwd.struct_passwd) -> bool:
    return Path(account.pw_shell).name not in NO_LOGIN


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name!r}"
    except KeyError:
        return f"user {uid}"


def _group(gid: int) -> str:
    try:
        return f"{grp.getgrgid(gid).gr_name!r}"
    except KeyError:
        return str(gid)
