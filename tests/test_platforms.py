"""The engine host's environment: what it gets, what it must not get, and which cores."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from vllm_hotswap import platforms
from vllm_hotswap.platforms import BIND_VARIABLE, host_environment, is_cpu_build, parse_cores

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="cores are bound on Linux only")


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("3", [3]),
        ("0-3", [0, 1, 2, 3]),
        ("5,2-4", [2, 3, 4, 5]),
        ("1,1,0-1", [0, 1]),
    ],
)
def test_core_list_is_read(text: str, cores: list[int]) -> None:
    """Single cores and ranges, sorted, each once."""
    assert cores == parse_cores(text)


@pytest.mark.parametrize("text", ["", "a", "1-x", "1,", "-3"])
def test_text_that_is_no_core_list_is_refused(text: str) -> None:
    """A mistake is not taken for a core."""
    with pytest.raises(ValueError, match="invalid literal"):
        parse_cores(text)


@pytest.mark.parametrize("variable", ["VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION"])
def test_host_is_not_told_to_open_development_routes(variable: str) -> None:
    """What opens vLLM's development routes or its pickling never reaches the host."""
    assert variable not in host_environment({variable: "1"})


def test_rest_of_the_environment_is_passed_on() -> None:
    """The host sees what the server sees, and the server's own environment is left alone."""
    environment = {"HF_HOME": "/models", "VLLM_SERVER_DEV_MODE": "1"}

    assert "/models" == host_environment(environment)["HF_HOME"]
    assert {"HF_HOME": "/models", "VLLM_SERVER_DEV_MODE": "1"} == environment


@on_linux
def test_threads_are_bound_to_the_cores_that_are_named() -> None:
    """One OpenMP thread per core of the first rank's list."""
    bound = platforms._thread_binding({BIND_VARIABLE: "0-1|2-3"})

    assert {"OMP_NUM_THREADS": "2", "GOMP_CPU_AFFINITY": "0 1"} == bound


@on_linux
def test_threads_are_not_bound_on_request() -> None:
    """`nobind` leaves OpenMP to its own devices."""
    assert {} == platforms._thread_binding({BIND_VARIABLE: "nobind"})


@on_linux
def test_threads_are_bound_to_allowed_cores_by_default() -> None:
    """The automatic choice stays within what this process may use."""
    bound = platforms._thread_binding({})

    cores = {int(core) for core in bound["GOMP_CPU_AFFINITY"].split()}
    assert cores <= os.sched_getaffinity(0)
    assert len(cores) == int(bound["OMP_NUM_THREADS"]) > 0


@on_linux
def test_reserved_cores_are_left_but_never_all() -> None:
    """Somebody else may get cores, but one is kept."""
    bound = platforms._thread_binding({"VLLM_CPU_NUM_OF_RESERVED_CPU": "100000"})

    assert "1" == bound["OMP_NUM_THREADS"]


@on_linux
def test_libraries_that_are_preloaded_already_are_kept() -> None:
    """What the user preloads stays, and is not loaded a second time."""
    preload = "/x/libtcmalloc.so:/x/libiomp5.so"

    assert {"LD_PRELOAD": preload} == platforms._preload({"LD_PRELOAD": preload})


@on_linux
@pytest.mark.skipif(not is_cpu_build(), reason="only a CPU build of vLLM preloads libraries")
def test_host_preloads_openmp_on_a_cpu() -> None:
    """Torch's OpenMP runtime is loaded before torch."""
    libraries = [Path(library) for library in host_environment({})["LD_PRELOAD"].split(":")]

    assert all(library.is_file() for library in libraries)
    assert libraries[-1].name.startswith("libgomp")
