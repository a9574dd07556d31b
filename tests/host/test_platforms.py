"""The engine host's environment: what it gets, what it must not get, and which cores."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from vllm_hotswap.host import platforms
from vllm_hotswap.host.platforms import BIND_VARIABLE, host_environment, is_cpu_build, parse_cores

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
    """A core list is read as sorted single cores and ranges, each core once."""
    assert cores == parse_cores(text)


@pytest.mark.parametrize("text", ["", "a", "1-x", "1,", "-3"])
def test_text_that_is_no_core_list_is_refused(text: str) -> None:
    """Text that is not a core list is refused, not taken for a core."""
    with pytest.raises(ValueError, match="invalid literal"):
        parse_cores(text)


@pytest.mark.parametrize(
    "variable",
    [
        "VLLM_SERVER_DEV_MODE",
        "VLLM_ALLOW_INSECURE_SERIALIZATION",
        "VLLM_API_KEY",
        "VLLM_HOTSWAP_ADMIN_KEY",
    ],
)
def test_host_is_not_told_what_is_the_servers_alone(variable: str) -> None:
    """Settings for vLLM's development routes or pickling never reach the host, nor do keys."""
    environment = {variable: "1", "VLLM_HOTSWAP_PASS_ON": variable}

    assert variable not in host_environment(environment)


def test_rest_of_the_environment_is_passed_on() -> None:
    """The host gets the rest of the environment; the server's own is unchanged."""
    environment = {"HF_HOME": "/models", "VLLM_SERVER_DEV_MODE": "1"}

    assert "/models" == host_environment(environment)["HF_HOME"]
    assert {"HF_HOME": "/models", "VLLM_SERVER_DEV_MODE": "1"} == environment


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPENAI_API_KEY", "sk"),
        ("GITHUB_TOKEN", "sk"),
        ("PGPASSWORD", "sk"),
        ("MYSQL_PWD", "sk"),
        ("APP_SECRET", "sk"),
        ("DATABASE_URL", "postgres://user:sk@db/app"),
        ("SSH_AUTH_SOCK", "/run/agent"),
        ("SUDO_USER", "me"),
        ("TORCH_GLOO_LAZY_INIT", "1"),
        ("VLLM_DISTRIBUTED_USE_SPLIT_GROUP", "1"),
    ],
)
def test_what_a_host_has_no_use_for_is_kept_from_it(name: str, value: str) -> None:
    """Secrets by name or value, and doors to other programs, are removed unless asked for."""
    assert name not in host_environment({name: value})
    assert name in host_environment({name: value, "VLLM_HOTSWAP_PASS_ON": f"OTHER, {name}"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "hf"),
        ("AWS_SECRET_ACCESS_KEY", "s3"),
        ("HTTPS_PROXY", "http://user:word@proxy:3128"),
        ("PWD", "/home/me"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("VLLM_MAX_TOKENS", "5"),
        ("HF_ENDPOINT", "https://hub.example"),
    ],
)
def test_what_reads_models_is_passed_on(name: str, value: str) -> None:
    """The host keeps what fetches weights; a token in a name does not make it a secret."""
    assert value == host_environment({name: value})[name]


@on_linux
def test_workers_meet_on_loopback() -> None:
    """Workers meet on loopback unless the environment says otherwise."""
    given = {"GLOO_SOCKET_IFNAME": "eth7"}

    assert "lo" == host_environment({})["GLOO_SOCKET_IFNAME"]
    assert "lo" == host_environment({})["NCCL_SOCKET_IFNAME"]
    assert "eth7" == host_environment(given)["GLOO_SOCKET_IFNAME"]


@on_linux
def test_threads_are_bound_to_the_cores_that_are_named() -> None:
    """OpenMP gets one thread per core of the first rank's list."""
    bound = platforms._thread_binding({BIND_VARIABLE: "0-1|2-3"})

    assert {"OMP_NUM_THREADS": "2", "GOMP_CPU_AFFINITY": "0 1"} == bound


@on_linux
def test_threads_are_not_bound_on_request() -> None:
    """`nobind` leaves OpenMP's threads unbound."""
    assert {} == platforms._thread_binding({BIND_VARIABLE: "nobind"})


@on_linux
def test_threads_are_bound_to_allowed_cores_by_default() -> None:
    """By default, threads are bound only to cores that this process may use."""
    bound = platforms._thread_binding({})

    cores = {int(core) for core in bound["GOMP_CPU_AFFINITY"].split()}
    assert cores <= os.sched_getaffinity(0)
    assert len(cores) == int(bound["OMP_NUM_THREADS"]) > 0


@on_linux
def test_reserved_cores_are_left_but_never_all() -> None:
    """Reserved cores are left to other programs, but one core is always kept."""
    bound = platforms._thread_binding({"VLLM_CPU_NUM_OF_RESERVED_CPU": "100000"})

    assert "1" == bound["OMP_NUM_THREADS"]


@on_linux
def test_libraries_that_are_preloaded_already_are_kept() -> None:
    """A library that is already preloaded stays, and is not loaded a second time."""
    preload = "/x/libtcmalloc.so:/x/libiomp5.so"

    assert {"LD_PRELOAD": preload} == platforms._preload({"LD_PRELOAD": preload})


@on_linux
@pytest.mark.skipif(not is_cpu_build(), reason="only a CPU build of vLLM preloads libraries")
def test_host_preloads_openmp_on_a_cpu() -> None:
    """On a CPU, the host loads torch's OpenMP runtime before torch."""
    libraries = [Path(library) for library in host_environment({})["LD_PRELOAD"].split(":")]

    assert all(library.is_file() for library in libraries)
    assert libraries[-1].name.startswith("libgomp")


def test_each_engine_keeps_few_compiled_grammars_unless_told_otherwise() -> None:
    """Each engine caches few compiled grammars by default: vLLM's own default is for one engine."""
    assert "64" == host_environment({})["VLLM_XGRAMMAR_CACHE_MB"]
    assert "512" == host_environment({"VLLM_XGRAMMAR_CACHE_MB": "512"})["VLLM_XGRAMMAR_CACHE_MB"]
