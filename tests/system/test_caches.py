"""Compiled code is cached where no other user of the machine can write."""

from __future__ import annotations

import logging
import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.system.caches import GIVEN, check_caches, code_caches

INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_it_is_a_folder_of_the_user_alone(tmp_path: Path) -> None:
    """The folder is below vLLM's, private, made if needed; the second start finds it unchanged."""
    root = tmp_path / "cache" / "vllm"
    found = code_caches({"VLLM_CACHE_ROOT": str(root)})

    assert {INDUCTOR: str(root / "vllm-hotswap" / "torchinductor")} == found
    assert 0o700 == mode(Path(found[INDUCTOR]))
    assert found == code_caches({"VLLM_CACHE_ROOT": str(root)})


def test_it_lies_where_caches_of_the_user_lie(tmp_path: Path) -> None:
    """The folder lies where vLLM's own cache of the user lies."""
    found = code_caches({"XDG_CACHE_HOME": str(tmp_path)})

    assert str(tmp_path / "vllm" / "vllm-hotswap" / "torchinductor") == found[INDUCTOR]


def test_a_folder_that_others_may_read_is_closed(tmp_path: Path) -> None:
    """A folder that others may read is closed: its contents belong to the user alone."""
    folder = tmp_path / "vllm-hotswap" / "torchinductor"
    folder.mkdir(parents=True, mode=0o755)
    code_caches({"VLLM_CACHE_ROOT": str(tmp_path)})

    assert 0o700 == mode(folder)


@pytest.mark.parametrize("part", [".", "vllm-hotswap", "vllm-hotswap/torchinductor"])
def test_a_folder_that_everybody_may_write_is_refused(tmp_path: Path, part: str) -> None:
    """A folder that all users may write to is refused in one line with the next step."""
    (tmp_path / "vllm-hotswap" / "torchinductor").mkdir(parents=True)
    (tmp_path / part).chmod(0o777)

    with pytest.raises(ConfigError, match=r"may be written by .*VLLM_CACHE_ROOT") as refused:
        code_caches({"VLLM_CACHE_ROOT": str(tmp_path)})
    assert str(tmp_path / part) in str(refused.value)


@as_root
@pytest.mark.parametrize("part", [".", "vllm-hotswap", "vllm-hotswap/torchinductor"])
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, part: str) -> None:
    """Another user's folder is refused: it could decide what the server runs."""
    (tmp_path / "vllm-hotswap" / "torchinductor").mkdir(parents=True)
    os.chown(tmp_path / part, 65_534, -1)

    with pytest.raises(
        ConfigError,
        match=r"belongs to .*; it must belong to root.*docker run --user 65534.*VLLM_CACHE_ROOT",
    ):
        code_caches({"VLLM_CACHE_ROOT": str(tmp_path)})


@as_root
@pytest.mark.parametrize("name", ["VLLM_CACHE_ROOT", *GIVEN])
def test_a_link_that_somebody_else_can_replace_is_refused(tmp_path: Path, name: str) -> None:
    """Such a link, in a folder with the sticky bit, could point elsewhere tomorrow."""
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    own.mkdir(mode=0o755)
    shared.chmod(0o1777)
    (shared / "cache").symlink_to(own)
    environment = {"VLLM_CACHE_ROOT": str(tmp_path / "root"), name: str(shared / "cache")}
    code_caches(environment)

    os.chown(shared / "cache", 65_534, -1, follow_symlinks=False)

    with pytest.raises(ConfigError, match=rf"through the link .*chown -h 0 .*set {name} to"):
        code_caches(environment)


@pytest.mark.parametrize("name", GIVEN)
def test_a_folder_that_somebody_has_named_is_looked_at(tmp_path: Path, name: str) -> None:
    """A named folder is still used, unless other users may write to it."""
    root, given = tmp_path / "root", tmp_path / "given"
    given.mkdir(mode=0o755)
    environment = {"VLLM_CACHE_ROOT": str(root), name: str(given)}
    assert name not in code_caches(environment)

    given.chmod(0o777)
    with pytest.raises(ConfigError, match=name):
        code_caches(environment)


def test_a_group_may_share_a_cache(tmp_path: Path) -> None:
    """A team's shared folder is intended; torch's compiled code is kept separately."""
    tmp_path.chmod(0o775)

    assert 0o700 == mode(Path(code_caches({"VLLM_CACHE_ROOT": str(tmp_path)})[INDUCTOR]))


def test_without_a_place_there_is_no_variable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a place the start continues: the host's temporary folder is private, too."""
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO):
        assert {} == code_caches({"VLLM_CACHE_ROOT": str(tmp_path / "file" / "cache")})

    assert "event=no_code_cache" in caplog.text


def test_a_parent_that_everybody_may_write_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A parent that all may write to, as in container volumes, is logged: it allows replacing."""
    root = tmp_path / "volume" / "vllm"
    root.mkdir(parents=True)
    root.parent.chmod(0o777)
    code_caches({"VLLM_CACHE_ROOT": str(root)})

    assert f"event=cache_can_be_moved folder={root}" in caplog.text
    assert 1 == caplog.text.count("cache_can_be_moved")


@pytest.fixture
def mask() -> Iterator[None]:
    """A umask that removes no permission."""
    before = os.umask(0)
    yield
    os.umask(before)


def test_nobody_else_may_write_to_what_is_made_whatever_the_umask_is(
    tmp_path: Path, mask: None
) -> None:
    """Folders are made without write permission for others, or the next start would refuse them."""
    root = tmp_path / "cache" / "vllm"

    found = code_caches({"VLLM_CACHE_ROOT": str(root)})

    assert [0o755] * 3 == [mode(root.parent), mode(root), mode(root / "vllm-hotswap")]
    assert found == code_caches({"VLLM_CACHE_ROOT": str(root)})


def test_without_a_home_there_is_no_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A container that runs with an arbitrary user id has no entry and no HOME."""

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with caplog.at_level(logging.INFO):
        assert {} == code_caches({})

    assert "event=no_code_cache" in caplog.text
    assert [] == list(tmp_path.iterdir())


def test_a_look_makes_nothing(tmp_path: Path) -> None:
    """A look at the caches makes and changes no folders, and refuses the same ones."""
    root = tmp_path / "vllm"
    check_caches({"VLLM_CACHE_ROOT": str(root)})
    assert [] == list(tmp_path.iterdir())

    folder = root / "vllm-hotswap" / "torchinductor"
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    check_caches({"VLLM_CACHE_ROOT": str(root)})
    assert 0o755 == mode(folder)

    folder.chmod(0o775)
    with pytest.raises(ConfigError, match=r"may be written by other users; run: chmod go-w"):
        check_caches({"VLLM_CACHE_ROOT": str(root)})


@as_root
def test_the_cache_of_whoever_called_sudo_is_his_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of a command under sudo belongs to the user who called it."""
    for folder in (tmp_path, tmp_path / "vllm-hotswap", tmp_path / "vllm-hotswap/torchinductor"):
        folder.mkdir(exist_ok=True)
        os.chown(folder, 65_534, -1)
    monkeypatch.setenv("SUDO_UID", "65534")

    assert INDUCTOR in code_caches({"VLLM_CACHE_ROOT": str(tmp_path)})


AS_SOMEBODY = """
import logging, os, sys
from vllm_hotswap.system.caches import code_caches
from vllm_hotswap.errors import ConfigError
logging.basicConfig()
os.setgroups([]); os.setgid(4321); os.setuid(4321)
try:
    print(code_caches({"VLLM_CACHE_ROOT": sys.argv[1]}))
except ConfigError as error:
    print("refused:", error)
"""


def as_somebody(folder: Path) -> str:
    command = [sys.executable, "-c", AS_SOMEBODY, str(folder)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def volume() -> Iterator[Path]:
    """A folder of root's that every user may write to: an `emptyDir` of Kubernetes."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        volume = Path(folder) / "volume"
        volume.mkdir()
        volume.chmod(0o777)
        yield volume


@as_root
def test_a_volume_of_all_that_cannot_be_changed_gets_a_folder_for_this_user(volume: Path) -> None:
    """All caches go to a private folder there; the log says that all users could rename it."""
    for _ in range(2):
        told = as_somebody(volume)
        own = volume / "vllm-hotswap"
        variables = {"VLLM_CACHE_ROOT": str(own), INDUCTOR: str(own / "torchinductor")}

        assert str(variables) in told
        assert f"written_by_all={volume}" in told
        assert 0o700 == mode(own)
        assert 4321 == own.stat().st_uid


@as_root
@pytest.mark.parametrize("what", ["foreign", "link"])
def test_what_somebody_else_has_put_there_is_not_used(volume: Path, what: str) -> None:
    """Another user's folder there is not used, nor a link, which can be redirected later."""
    if what == "foreign":
        (volume / "vllm-hotswap").mkdir()
        os.chown(volume / "vllm-hotswap", 65_534, -1)
    else:
        ours = volume / "ours"
        ours.mkdir()
        os.chown(ours, 4321, 4321)
        (volume / "vllm-hotswap").symlink_to(ours)

    assert "refused: the folder" in as_somebody(volume)


def test_what_is_mounted_read_only_is_written_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is mounted read-only is accepted, whatever its mode."""
    given = tmp_path / "given"
    given.mkdir()
    given.chmod(0o777)
    environment = {"VLLM_CACHE_ROOT": str(tmp_path / "vllm"), INDUCTOR: str(given)}
    with pytest.raises(ConfigError, match="below it"):
        check_caches(environment)

    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))

    check_caches(environment)
