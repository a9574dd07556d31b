"""Which other users could have written, or may read, a file that the server depends on."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest

from vllm_hotswap.access.keys import read_key_file
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.system import trusted_files
from vllm_hotswap.system.trusted_files import read_private, read_trusted

MINE, MY_GROUP = 1000, 1000
TEAM, FOREIGN_GROUP, FOREIGN = 2000, 3000, 4000

FOLDER = stat.S_IFDIR

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine where this runs as user 1000, who has a group of its own and is in a team."""
    users = {
        0: ("root", 0, "/bin/bash"),
        5: ("sync", 0, "/bin/sync"),
        11: ("operator", 0, "/sbin/nologin"),
        MINE: ("ann", MY_GROUP, "/bin/sh"),
        FOREIGN: ("eve", FOREIGN, "/bin/sh"),
    }
    groups = {
        0: ("root", []),
        MY_GROUP: ("ann", []),
        TEAM: ("team", ["ann", "eve"]),
        FOREIGN: ("eve", []),
    }

    def user_of(uid: int) -> pwd.struct_passwd:
        name, gid, shell = users[uid]
        return pwd.struct_passwd((name, "x", uid, gid, "", "/", shell))

    def user_named(name: str) -> pwd.struct_passwd:
        return next(user for user in map(user_of, users) if user.pw_name == name)

    def group_of(gid: int) -> grp.struct_group:
        name, members = groups[gid]
        return grp.struct_group((name, "x", gid, members))

    def be(
        uid: int = MINE,
        members: list[str] | None = None,
        gid: int | None = None,
        in_roots_group: Sequence[str] = (),
        accounts: Mapping[int, tuple[str, int, str]] = MappingProxyType({}),
    ) -> None:
        """Run as this user, with more members of its group and of root's, and more accounts."""
        groups[MY_GROUP] = ("ann", members or [])
        groups[0] = ("root", list(in_roots_group))
        users.update(accounts)
        own = users[uid][1] if uid in users else uid
        monkeypatch.setattr(os, "geteuid", lambda: uid)
        monkeypatch.setattr(os, "getegid", lambda: own if gid is None else gid)
        monkeypatch.setattr(os, "getgroups", lambda: [TEAM])
        monkeypatch.setattr(pwd, "getpwuid", user_of)
        monkeypatch.setattr(pwd, "getpwnam", user_named)
        monkeypatch.setattr(pwd, "getpwall", lambda: list(map(user_of, users)))
        monkeypatch.setattr(grp, "getgrgid", group_of)

    monkeypatch.delenv("SUDO_UID", raising=False)
    be()
    return be


def status(mode: int, uid: int = MINE, gid: int = MY_GROUP, kind: int = stat.S_IFREG) -> object:
    return os.stat_result((kind | mode, 1, 1, 1, uid, gid, 1, 0, 0, 0))


@pytest.fixture
def seen_as(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Return a real file whose status, and whose folder's, the test sets."""
    path = tmp_path / "file"
    path.write_text("content")

    root, real = status(0o755, uid=0, gid=0, kind=stat.S_IFDIR), Path.stat

    def as_told(file: object, folder: object = root) -> Path:
        def told(self: Path, *, follow_symlinks: bool = True) -> object:
            if not follow_symlinks:
                return real(self, follow_symlinks=False)
            return folder if self == tmp_path else root

        monkeypatch.setattr(os, "fstat", lambda _: file)
        monkeypatch.setattr(Path, "stat", told)
        return path

    return as_told


@pytest.mark.parametrize(
    "file",
    [
        status(0o600),
        status(0o400),
        status(0o640, uid=0, gid=TEAM),
        status(0o440, uid=0, gid=TEAM),
        status(0o660),
        status(0o640, gid=TEAM),
        status(0o600, gid=FOREIGN_GROUP),
    ],
)
def test_key_file_of_its_owner_and_his_groups_is_read(
    machine: Machine, seen_as: Callable[..., Path], file: object
) -> None:
    """A key file readable by a group of this process is accepted, as secrets of Kubernetes need."""
    assert b"content" == read_private(seen_as(file), "the file")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (
            status(0o600, uid=FOREIGN),
            "belongs to 'eve'; it must belong to root or to 'ann'.*chown 1000 ",
        ),
        (status(0o640, gid=FOREIGN_GROUP), "is open to the group 3000; run: chmod g= "),
        (status(0o660, gid=TEAM), "can be written by the group 'team'; run: chmod g-w "),
        (status(0o620, uid=0, gid=FOREIGN_GROUP), "can be written by the group 3000"),
        (status(0o604), "is open to every user of the machine; run: chmod o= "),
        (status(0o602), "is open to every user of the machine; run: chmod o= "),
    ],
)
def test_key_file_that_somebody_else_may_use_is_refused(
    machine: Machine, seen_as: Callable[..., Path], file: object, expected: str
) -> None:
    """A key file that others may use is refused with the reason and the command that fixes it."""
    with pytest.raises(ConfigError, match=f"^the file {expected}"):
        read_private(seen_as(file), "the file")


@pytest.mark.parametrize(
    "file", [status(0o644), status(0o664), status(0o644, uid=0, gid=0), status(0o664, uid=0, gid=0)]
)
def test_configuration_may_be_read_by_all_and_written_by_its_owners_own_group(
    machine: Machine, seen_as: Callable[..., Path], file: object
) -> None:
    """0664, the result of umask 002 where every user has a group of its own, is accepted."""
    folder = status(0o775, kind=stat.S_IFDIR)

    assert b"content" == read_trusted(seen_as(file, folder), "the file")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (status(0o644, uid=FOREIGN, gid=FOREIGN), "belongs to 'eve'"),
        (status(0o664, gid=TEAM), "can be written by the group 'team'; run: chmod g-w "),
        (status(0o664, gid=FOREIGN), "can be written by the group 'eve'"),
        (status(0o646), "can be written by every user of the machine; run: chmod o-w "),
    ],
)
def test_configuration_that_somebody_else_may_write_is_refused(
    machine: Machine, seen_as: Callable[..., Path], file: object, expected: str
) -> None:
    """Configuration that others may write is refused unless the operator permits it."""
    path = seen_as(file)

    with pytest.raises(ConfigError, match=f"^the file {expected}.*, or else$"):
        read_trusted(path, "the file", hatch=", or else")

    assert b"content" == read_trusted(path, "the file", is_checked=False)


def test_own_group_with_a_second_member_is_nobodys_own(
    machine: Machine, seen_as: Callable[..., Path]
) -> None:
    """A file is refused if its owner's group has a second member, who could write it."""
    machine(members=["eve"])

    with pytest.raises(ConfigError, match="can be written by the group 'ann'"):
        read_trusted(seen_as(status(0o664)), "the file")


@pytest.mark.parametrize("shell", ["/bin/sh", "/sbin/nologin"])
def test_own_group_in_which_another_account_begins_is_nobodys_own(
    machine: Machine, seen_as: Callable[..., Path], shell: str
) -> None:
    """Another account with this primary group counts, listed or not, and even without a login."""
    machine(accounts={1001: ("worker", MY_GROUP, shell)})

    with pytest.raises(ConfigError, match="can be written by the group 'ann'"):
        read_trusted(seen_as(status(0o664)), "the file")


ROOTS = status(0o664, uid=0, gid=0)
EVE_IS_ROOTS = {FOREIGN: ("eve", 0, "/bin/sh")}


@pytest.mark.parametrize(
    "others", [{"in_roots_group": ["root", "eve"]}, {"accounts": EVE_IS_ROOTS}]
)
def test_what_roots_group_may_write_is_refused_where_somebody_else_is_in_it(
    machine: Machine, seen_as: Callable[..., Path], others: dict[str, object]
) -> None:
    """If root's group has other members or accounts, a file that it may write is refused."""
    path = seen_as(ROOTS)
    assert b"content" == read_trusted(path, "the file")

    machine(**others)

    with pytest.raises(ConfigError, match="can be written by the group 'root'; run: chmod g-w "):
        read_trusted(path, "the file")
    with pytest.raises(ConfigError, match="the group 'root'"):
        read_trusted(seen_as(status(0o644), status(0o770, gid=0, kind=FOLDER)), "the file")


@pytest.mark.parametrize("accounts", [{}, {12345: ("12345", 0, "/sbin/nologin")}])
def test_in_a_container_of_openshift_roots_group_is_the_servers(
    machine: Machine, seen_as: Callable[..., Path], accounts: dict[int, tuple[str, int, str]]
) -> None:
    """OpenShift runs containers as an unknown number in root's group; users of the image are fine.

    https://docs.redhat.com/en/documentation/openshift_container_platform/4.18/html/images/creating-images#use-uid_create-images
    """
    machine(12345, gid=0, accounts={**EVE_IS_ROOTS, **accounts})

    folder = status(0o775, uid=0, gid=0, kind=FOLDER)
    assert b"content" == read_private(seen_as(status(0o660, uid=0, gid=0), folder), "the file")

    machine(12345, gid=0, in_roots_group=["eve"])
    with pytest.raises(ConfigError, match="can be written by the group 'root'"):
        read_trusted(seen_as(ROOTS), "the file")


def test_who_shares_roots_group_with_the_server_is_somebody_else(
    machine: Machine, seen_as: Callable[..., Path]
) -> None:
    """If the server's user can log in, another account in root's group is a stranger."""
    machine(accounts={MINE: ("ann", 0, "/bin/sh"), **EVE_IS_ROOTS})

    with pytest.raises(ConfigError, match="can be written by the group 'root'"):
        read_trusted(seen_as(status(0o664, gid=0)), "the file")


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (status(0o777, uid=0, gid=0, kind=stat.S_IFDIR), "every user of the machine may write to"),
        (status(0o775, gid=TEAM, kind=stat.S_IFDIR), "the group 'team' may write to"),
        (status(0o755, uid=FOREIGN, kind=stat.S_IFDIR), "belongs to 'eve'"),
        (status(0o1777, uid=FOREIGN, kind=stat.S_IFDIR), "belongs to 'eve'"),
    ],
)
def test_folder_in_which_somebody_else_may_replace_the_file_is_refused(
    machine: Machine, seen_as: Callable[..., Path], folder: object, expected: str
) -> None:
    """A folder where others can replace either kind of file is refused and named, at any mode."""
    path = seen_as(status(0o600), folder)

    for read in (read_private, read_trusted):
        with pytest.raises(ConfigError, match=f"the file lies below '{path.parent}', .*{expected}"):
            read(path, "the file")


@pytest.mark.parametrize("mode", [0o1777, 0o1775, 0o3777])
def test_folder_with_the_sticky_bit_is_fine(
    machine: Machine, seen_as: Callable[..., Path], mode: int
) -> None:
    """A sticky folder, as of Kubernetes' secrets, is accepted: others cannot replace its files."""
    folder = status(mode, uid=0, gid=TEAM, kind=stat.S_IFDIR)

    assert b"content" == read_private(seen_as(status(0o440, uid=0, gid=TEAM), folder), "the file")


def test_file_of_whoever_called_sudo_is_his_own(
    machine: Machine, seen_as: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, a user's file is refused unless that user started the server through sudo."""
    machine(uid=0)
    path = seen_as(status(0o644))
    with pytest.raises(ConfigError, match="belongs to 'ann'; it must belong to root"):
        read_trusted(path, "the file")

    monkeypatch.setenv("SUDO_UID", str(MINE))

    assert b"content" == read_trusted(path, "the file")


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        (status(0o444, uid=0, gid=0), status(0o777, uid=0, gid=0, kind=FOLDER)),
        (status(0o446), status(0o777, kind=FOLDER)),
        (status(0o664, gid=TEAM), status(0o775, gid=TEAM, kind=FOLDER)),
    ],
)
def test_what_is_mounted_read_only_is_written_by_nobody(
    machine: Machine,
    seen_as: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    file: object,
    folder: object,
) -> None:
    """A read-only mount cannot be written, as a ConfigMap's folder of mode 0777 by the kubelet."""
    path = seen_as(file, folder)
    with pytest.raises(ConfigError, match=r"write|written"):
        read_trusted(path, "the file")

    mounted = SimpleNamespace(f_flag=os.ST_RDONLY | os.ST_NOSUID)
    monkeypatch.setattr(os, "statvfs", lambda _: mounted)

    assert b"content" == read_trusted(path, "the file")


def test_a_file_of_somebody_else_is_his_on_a_read_only_mount_too(
    machine: Machine, seen_as: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a read-only mount too, another owner or a key that all may read is refused."""
    mounted = SimpleNamespace(f_flag=os.ST_RDONLY)
    monkeypatch.setattr(os, "statvfs", lambda _: mounted)

    with pytest.raises(ConfigError, match="belongs to 'eve'"):
        read_trusted(seen_as(status(0o644, uid=FOREIGN)), "the file")
    with pytest.raises(ConfigError, match="is open to every user"):
        read_private(seen_as(status(0o604)), "the file")


@pytest.mark.parametrize("mode", [0o775, 0o2775])
def test_folder_of_root_that_a_group_may_write_to_is_fine(
    machine: Machine, seen_as: Callable[..., Path], mode: int
) -> None:
    """A folder of root's that a group may write is accepted: `/var/log`, Debian's `/var/local`."""
    folder = status(mode, uid=0, gid=TEAM, kind=FOLDER)

    assert b"content" == read_private(seen_as(status(0o600), folder), "the file")


def test_root_is_told_both_ways_out_of_a_file_of_somebody_else(
    machine: Machine, seen_as: Callable[..., Path]
) -> None:
    """Root gets both ways out for a user's file, as one mounted into a container from its host."""
    machine(uid=0)

    with pytest.raises(ConfigError, match=r"chown 0 .*--user 1000\), or else"):
        read_trusted(seen_as(status(0o644)), "the file", hatch=", or else")


@pytest.mark.parametrize(
    ("uid_map", "is_fine"),
    [
        ("      1000       1000          1\n", True),
        ("         0       1000          1\n", False),
        ("         0          0 4294967295\n", False),
        ("      1000       1000          1\n         0     100000          1\n", False),
        (None, False),
    ],
)
def test_nobody_stands_for_root_where_there_is_no_root(
    machine: Machine,
    seen_as: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    uid_map: str | None,
    is_fine: bool,
) -> None:
    """In a user namespace of one user, root's files appear as nobody's and are trusted."""
    kernel, mapped = tmp_path / "overflowuid", tmp_path / "uid_map"
    kernel.write_text(f"{FOREIGN}\n")
    if uid_map is not None:
        mapped.write_text(uid_map)
    monkeypatch.setattr(trusted_files, "OVERFLOW_UID", kernel)
    monkeypatch.setattr(trusted_files, "UID_MAP", mapped)
    path = seen_as(status(0o644), status(0o755, uid=FOREIGN, gid=FOREIGN, kind=FOLDER))

    if is_fine:
        assert b"content" == read_trusted(path, "the file")
    else:
        with pytest.raises(ConfigError, match="belongs to 'eve'"):
            read_trusted(path, "the file")


# --- real files -------------------------------------------------------------------------------


def secret_volume(folder: Path, mode: int) -> Path:
    """Make a secret as the kubelet mounts it: two links in a folder with the sticky bit.

    https://kubernetes.io/docs/concepts/configuration/secret/#using-secrets-as-files-from-a-pod
    """
    volume, data = folder / "volume", folder / "volume" / "..2026_01_01_00_00_00.1"
    data.mkdir(parents=True)
    volume.chmod(0o1777)
    (data / "keys").write_text("sk-one\n")
    (data / "keys").chmod(mode)
    (volume / "..data").symlink_to(data.name)
    (volume / "keys").symlink_to("..data/keys")
    return volume / "keys"


def test_secret_of_kubernetes_is_read_through_its_links(tmp_path: Path) -> None:
    """A Kubernetes secret with `defaultMode: 0440` is read through its links; the default fails."""
    assert 1 == len(read_key_file(secret_volume(tmp_path / "a", 0o440)))

    with pytest.raises(ConfigError, match="is open to every user of the machine"):
        read_key_file(secret_volume(tmp_path / "b", 0o644))


def test_what_is_read_is_what_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that takes over the path after the check is not read."""
    path, other = tmp_path / "keys", tmp_path / "other"
    path.write_text("sk-own")
    other.write_text("sk-foreign")
    path.chmod(0o600)
    real = os.fstat

    def swapped(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        if other.exists() and stat.S_ISREG(found.st_mode):
            other.rename(path)
        return found

    monkeypatch.setattr(trusted_files.os, "fstat", swapped)

    assert b"sk-own" == read_private(path, "the file")
    assert "sk-foreign" == path.read_text()


@pytest.mark.parametrize("name", ["models.yaml", "link/models.yaml"])
def test_folder_that_everybody_may_write_to_is_refused_with_the_command_to_run(
    tmp_path: Path, name: str
) -> None:
    """A world-writable folder is refused with a working command, by its name or through a link."""
    folder = tmp_path / "open to all"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    (folder / "models.yaml").write_text("models: {a: {model: org/a}}")
    path = (folder if name == "models.yaml" else tmp_path) / name
    folder.chmod(0o777)

    with pytest.raises(ConfigError, match="every user of the machine may write to") as refused:
        load_config(path)
    assert ("a",) == load_config(path, allowed=frozenset(["world_writable"])).aliases
    command = refused.value.message.partition("run: ")[2].partition(", or start")[0]
    subprocess.run(["/bin/sh", "-c", command], check=True)

    assert ("a",) == load_config(path).aliases


@pytest.mark.parametrize("name", ["shared/keys", "own/link", "own/up/keys"])
def test_link_in_an_open_folder_is_refused(tmp_path: Path, name: str) -> None:
    """Links in an open folder are refused anywhere on the way: replacing one chooses the file."""
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir(mode=0o700)
    shared.mkdir()
    shared.chmod(0o777)
    (own / "keys").write_text("sk-one")
    (own / "keys").chmod(0o600)
    (shared / "keys").symlink_to("../own/keys")
    (own / "link").symlink_to(shared / "keys")
    (shared / "own").symlink_to(own)
    (own / "up").symlink_to("../shared/own")

    assert 1 == len(read_key_file(own / "keys"))
    with pytest.raises(ConfigError, match=f"'{shared}', which every user of the machine may write"):
        read_key_file(tmp_path / name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give links away")
@pytest.mark.parametrize("mode", [0o1775, 0o1777])
@pytest.mark.parametrize("name", ["shared/keys", "link", "shared/own/keys"])
def test_link_of_somebody_else_in_a_folder_with_the_sticky_bit_is_refused(
    tmp_path: Path, mode: int, name: str
) -> None:
    """A stranger's link in a sticky folder is refused, because its owner can change its target."""
    own, shared = tmp_path / "own", tmp_path / "shared"
    own.mkdir(mode=0o700)
    shared.mkdir()
    (own / "keys").write_text("sk-one\n")
    (own / "keys").chmod(0o600)
    (shared / "keys").symlink_to("../own/keys")
    (shared / "own").symlink_to(own)
    (tmp_path / "link").symlink_to("shared/keys")
    os.chown(shared, 0, 65534)
    shared.chmod(mode)
    path = tmp_path / name
    assert 1 == len(read_key_file(path))

    for link in (shared / "keys", shared / "own"):
        os.chown(link, 65534, 65534, follow_symlinks=False)

    # Where such links are not followed (protected_symlinks), the file cannot be opened.
    by_system = "|Permission denied" if mode == 0o1777 else ""
    refused = "is found through the link .*; run: chown -h 0 "
    with pytest.raises(ConfigError, match=refused + by_system) as caught:
        read_key_file(path)
    if command := caught.value.message.partition("run: ")[2].partition(", or run")[0]:
        subprocess.run(["/bin/sh", "-c", command], check=True)
        assert 1 == len(read_key_file(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give links away")
def test_link_of_somebody_else_in_a_folder_that_only_root_writes_to_is_fine(tmp_path: Path) -> None:
    """A stranger's link in a folder that only root can write is accepted: it cannot be changed."""
    (tmp_path / "keys").write_text("sk-one\n")
    (tmp_path / "keys").chmod(0o600)
    (tmp_path / "link").symlink_to("keys")
    os.chown(tmp_path / "link", 65534, 65534, follow_symlinks=False)

    assert 1 == len(read_key_file(tmp_path / "link"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_file_that_belongs_to_somebody_else_is_refused(tmp_path: Path, mode: int) -> None:
    """A file of another user is refused, because its owner can write it at any time."""
    path = tmp_path / "file"
    path.write_text("models: {a: {model: org/a}}")
    path.chmod(mode)
    os.chown(path, 65534, 65534)

    with pytest.raises(ConfigError, match=r"belongs to .*; run: chown 0 .* --allow world_writable"):
        load_config(path)
    with pytest.raises(ConfigError, match="belongs to"):
        read_key_file(path)


def test_configuration_may_come_through_a_pipe(tmp_path: Path) -> None:
    """Configuration may come through a pipe, `serve <(template models.yaml)`; keys may not."""
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o600)
    with subprocess.Popen(["/bin/sh", "-c", f"echo content > {path}"]):
        assert b"content\n" == read_trusted(path, "the file")

    with pytest.raises(ConfigError, match="is not a regular file"):
        read_private(path, "the file")


def with_list(path: Path, *entries: tuple[int, int, int]) -> Path:
    """Give the path a list of tag, permissions and number each: linux/posix_acl.h."""
    packed = b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", struct.pack("<I", 2) + packed)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this file system has no access control lists")
    return path


def let_in(uid: int, permissions: int) -> list[tuple[int, int, int]]:
    """Return a list of the owner and a user; the mode's group bits show the mask that it needs."""
    nobody = 2**32 - 1
    return [
        (0x01, 7, nobody),
        (0x02, permissions, uid),
        (0x04, 0, nobody),
        (0x10, permissions, nobody),
        (0x20, 0, nobody),
    ]


@pytest.mark.parametrize("permissions", [4, 6])
def test_key_file_whose_list_lets_others_in_is_refused(tmp_path: Path, permissions: int) -> None:
    """A key file whose list admits others is refused: its mode does not show the group's rights."""
    path = tmp_path / "keys"
    path.write_text("a-key")
    with_list(path, *let_in(FOREIGN, permissions))

    with pytest.raises(ConfigError, match=r"has an access control list .* setfacl -b "):
        read_private(path, "the file")


def test_a_list_that_lets_others_read_a_key_counts_where_nobody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a read-only mount, too, a list that lets others read a key file is refused."""
    path = tmp_path / "keys"
    path.write_text("a-key")
    with_list(path, *let_in(FOREIGN, 6))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))

    with pytest.raises(ConfigError, match="has an access control list"):
        read_private(path, "the file")


def test_configuration_that_a_list_lets_others_write_is_refused(tmp_path: Path) -> None:
    """Configuration may be readable through a list, but not writable."""
    path = tmp_path / "models.yaml"
    path.write_text("content")
    with_list(path, *let_in(FOREIGN, 4))
    assert b"content" == read_trusted(path, "the file")

    with_list(path, *let_in(FOREIGN, 6))
    with pytest.raises(ConfigError, match="has an access control list"):
        read_trusted(path, "the file")


def test_the_way_to_a_pipe_is_looked_at_too(tmp_path: Path) -> None:
    """The path to a pipe is checked too: others could replace the pipe."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    os.mkfifo(folder / "pipe")
    other_end = os.open(folder / "pipe", os.O_RDWR)
    os.write(other_end, b"content")

    with pytest.raises(ConfigError, match=r"lies below .* which every user of the machine may"):
        read_trusted(folder / "pipe", "the file")
    os.close(other_end)
