"""Compiled code is kept where no other user of the machine can put any."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from vllm_hotswap.caches import GIVEN, code_caches
from vllm_hotswap.errors import ConfigError

INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_it_is_a_folder_of_the_user_alone(tmp_path: Path) -> None:
    """Below vLLM's, which is made if need be; the second start finds it as it is."""
    root = tmp_path / "cache" / "vllm"
    found = code_caches({"VLLM_CACHE_ROOT": str(root)})

    assert {INDUCTOR: str(root / "vllm-hotswap" / "torchinductor")} == found
    assert 0o700 == mode(Path(found[INDUCTOR]))
    assert found == code_caches({"VLLM_CACHE_ROOT": str(root)})


def test_it_lies_where_caches_of_the_user_lie(tmp_path: Path) -> None:
    """As vLLM's own cache does."""
    found = code_caches({"XDG_CACHE_HOME": str(tmp_path)})

    assert str(tmp_path / "vllm" / "vllm-hotswap" / "torchinductor") == found[INDUCTOR]


def test_a_folder_that_others_may_read_is_closed(tmp_path: Path) -> None:
    """What is in it is the user's own all the same."""
    folder = tmp_path / "vllm-hotswap" / "torchinductor"
    folder.mkdir(parents=True, mode=0o755)
    code_caches({"VLLM_CACHE_ROOT": str(tmp_path)})

    assert 0o700 == mode(folder)


@pytest.mark.parametrize("part", [".", "vllm-hotswap", "vllm-hotswap/torchinductor"])
def test_a_folder_that_everybody_may_write_is_refused(tmp_path: Path, part: str) -> None:
    """In one line, with the folder and the next step."""
    (tmp_path / "vllm-hotswap" / "torchinductor").mkdir(parents=True)
    (tmp_path / part).chmod(0o777)

    with pytest.raises(ConfigError, match=r"may be written by .*VLLM_CACHE_ROOT") as refused:
        code_caches({"VLLM_CACHE_ROOT": str(tmp_path)})
    assert str(tmp_path / part) in str(refused.value)


@as_root
@pytest.mark.parametrize("part", [".", "vllm-hotswap", "vllm-hotswap/torchinductor"])
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, part: str) -> None:
    """Whoever makes it first has no say in what the server runs."""
    (tmp_path / "vllm-hotswap" / "torchinductor").mkdir(parents=True)
    os.chown(tmp_path / part, 65_534, -1)

    with pytest.raises(ConfigError, match="belongs to the user 65534"):
        code_caches({"VLLM_CACHE_ROOT": str(tmp_path)})


@pytest.mark.parametrize("name", GIVEN)
def test_a_folder_that_somebody_has_named_is_looked_at(tmp_path: Path, name: str) -> None:
    """It stays the one that is used, unless others may write to it."""
    root, given = tmp_path / "root", tmp_path / "given"
    given.mkdir(mode=0o755)
    environment = {"VLLM_CACHE_ROOT": str(root), name: str(given)}
    assert name not in code_caches(environment)

    given.chmod(0o777)
    with pytest.raises(ConfigError, match=name):
        code_caches(environment)


def test_a_group_may_share_a_cache(tmp_path: Path) -> None:
    """A team's folder is one on purpose; what torch compiles is apart from it."""
    tmp_path.chmod(0o775)

    assert 0o700 == mode(Path(code_caches({"VLLM_CACHE_ROOT": str(tmp_path)})[INDUCTOR]))


def test_without_a_place_there_is_no_variable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The start goes on; the host's temporary folder is private, too."""
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO):
        assert {} == code_caches({"VLLM_CACHE_ROOT": str(tmp_path / "file" / "cache")})

    assert "event=no_code_cache" in caplog.text


def test_a_parent_that_everybody_may_write_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else could put another folder there: a volume of a container is often so."""
    root = tmp_path / "volume" / "vllm"
    root.mkdir(parents=True)
    root.parent.chmod(0o777)
    code_caches({"VLLM_CACHE_ROOT": str(root)})

    assert f"event=cache_can_be_moved folder={root}" in caplog.text
