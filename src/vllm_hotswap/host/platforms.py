"""The engine host's environment: what it must have before its first import, and must never have.

Preloaded libraries and OpenMP's thread binding are read when a process starts. So the process that
starts the host decides them, without importing torch (that alone takes seconds). On the CPU
platform this mirrors `vllm.platforms.cpu` and `vllm.utils.ompmultiprocessing` (0.32.0), with one
difference: no core is set aside for a scheduler process, because here the worker runs inside
the host. Other platforms need nothing.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from vllm_hotswap.errors import ConfigError

BIND_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
_RESERVED_VARIABLE = "VLLM_CPU_NUM_OF_RESERVED_CPU"

PASS_ON_VARIABLE = "VLLM_HOTSWAP_PASS_ON"  # noqa: S105  # a name

MEETING_PLACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

OF_THE_SERVER = frozenset(
    {
        "VLLM_SERVER_DEV_MODE",
        "VLLM_ALLOW_INSECURE_SERIALIZATION",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_API_KEY",
        "VLLM_HPU_MULTI_MODEL_CONFIG",
    }
)
"""Variables that a host never gets, besides our own `VLLM_HOTSWAP_*`."""

OF_NO_USE = frozenset(
    {
        # These make gloo groups that the constructor of their class does not make and connect.
        "TORCH_GLOO_LAZY_INIT",
        "VLLM_DISTRIBUTED_USE_SPLIT_GROUP",
        # Ways to other programs of the user who started the server.
        "DBUS_SESSION_BUS_ADDRESS",
        "GPG_AGENT_INFO",
        "NOTIFY_SOCKET",
        "SSH_AGENT_PID",
        "SSH_AUTH_SOCK",
        "XAUTHORITY",
    }
)
OF_NO_USE_PREFIXES = ("LISTEN_", "SUDO_")

FOR_MODELS = (
    "AWS_",
    "AZURE_",
    "GOOGLE_",
    "HF_",
    "HUGGING_FACE_",
    "LMCACHE_",
    "MODELSCOPE_",
    "MOONCAKE_",
    "RUNAI_STREAMER_",
    "S3_",
)
"""Prefixes of variables by which the host reaches weights or KV memory, secrets among them."""

_SECRET = re.compile(
    r"(^|_)(API_?KEY|ACCESS_?KEY|KEY|KEYS|TOKEN|SECRET|SECRETS|PASS|PASSPHRASE|CREDENTIALS?|COOKIE)$"
    r"|(PASSWORD|PASSWD|._PWD|APIKEY)$",
    re.IGNORECASE,
)
"""Names that variables with secrets have."""

_SECRET_IN_ADDRESS = re.compile(r"://[^/@\s]*:[^/@\s]+@")


def is_cpu_build() -> bool:
    """Whether the installed vLLM is a CPU build, by its distribution, as vLLM tells it."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return name == "vllm-cpu" or "cpu" in metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return False


MOST_CACHED_MB = 64
"""Megabytes of compiled grammars that each engine keeps, unless the variable is set. vLLM's default
is 512, for one engine in a process; a host has many."""


def host_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Make the host's environment from the server's.

    Variables are left out that open vLLM's development routes or its pickle serialisation, or that
    make gloo connect later than `host.gloo` expects. So are secrets, and ways into the user's
    session, that a host has no use for. The host, and processes that it starts, do not import from
    their start folder.
    """
    further = re.split(r"[,\s]+", environment.get(PASS_ON_VARIABLE, ""))
    result = {
        name: value
        for name, value in environment.items()
        if is_for_host(name, value) or (name in further and not _is_the_servers(name))
    }
    # A forked worker would inherit other models' threads and distributed groups.
    result["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    result["PYTHONSAFEPATH"] = "1"
    result.setdefault("VLLM_XGRAMMAR_CACHE_MB", str(MOST_CACHED_MB))
    result.update(_loopback(result))
    if is_cpu_build():
        result.update(_preload(result))
        result.update(_thread_binding(result))
    return result


def is_for_host(name: str, value: str) -> bool:
    """Whether a variable of the server is passed on to the engine host without being named.

    All are, except those known to be of no use there. A list of those that are needed would have to
    know the variables of every platform, plugin, driver and library.
    """
    if _is_the_servers(name) or name in OF_NO_USE or name.startswith(OF_NO_USE_PREFIXES):
        return False
    if name.startswith(FOR_MODELS) or name.lower().endswith("_proxy"):
        return True
    return not (_SECRET.search(name) or _SECRET_IN_ADDRESS.search(value))


def _is_the_servers(name: str) -> bool:
    return name in OF_THE_SERVER or name.startswith("VLLM_HOTSWAP_")


def _loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the interfaces on which a model's workers meet: all are on this machine."""
    if not Path("/sys/class/net/lo").exists():
        return {}
    return {name: "lo" for name in MEETING_PLACES if not environment.get(name)}


def _preload(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `LD_PRELOAD` with torch's OpenMP runtime and vLLM's tcmalloc, where they ship."""
    if sys.platform != "linux":
        return {}
    present = environment.get("LD_PRELOAD", "")
    wanted = []
    if "libtcmalloc" not in present:
        wanted += _first_library("vllm", ["libs/libtcmalloc_minimal*.so*", "libs/libtcmalloc.so*"])
    if present:
        wanted.append(present)
    if not any(name in present for name in ("libomp", "libgomp", "libiomp")):
        wanted += _first_library("torch", ["../torch.libs/libgomp*.so*", "lib/libgomp*.so*"])
    return {"LD_PRELOAD": ":".join(wanted)} if wanted else {}


def _first_library(package: str, patterns: Iterable[str]) -> list[str]:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for pattern in patterns:
            parent = (Path(folder) / pattern).parent.resolve()
            if found := sorted(parent.glob(Path(pattern).name)):
                return [str(found[0])]
    return []


def _thread_binding(environment: Mapping[str, str]) -> dict[str, str]:
    """Return OpenMP variables that bind one thread to each core of the list."""
    bind = environment.get(BIND_VARIABLE, "auto")
    if bind == "nobind" or sys.platform != "linux":
        return {}
    try:
        cores = _auto_cores(environment) if bind == "auto" else parse_cores(bind.split("|")[0])
    except ValueError as error:
        raise ConfigError(
            f"{BIND_VARIABLE}={bind!r} or {_RESERVED_VARIABLE} cannot be used: {error}; "
            "give auto, nobind, or cores such as 0-3,8"
        ) from error
    return {
        "OMP_NUM_THREADS": str(len(cores)),
        "GOMP_CPU_AFFINITY": " ".join(map(str, cores)),
    }


def binding_for_ranks(environment: Mapping[str, str], ranks: int) -> str | None:
    """Return `VLLM_CPU_OMP_THREADS_BIND` for one model's workers: the host's cores, divided.

    None if nothing is to be bound, or if the user has said which worker gets which cores.
    """
    bind = environment.get(BIND_VARIABLE, "auto")
    cores = environment.get("GOMP_CPU_AFFINITY", "").split()
    if bind == "nobind" or not cores or bind.count("|") + 1 == ranks > 1:
        return None
    size = max(1, len(cores) // ranks)
    parts = [cores[rank * size : (rank + 1) * size] or cores for rank in range(ranks)]
    return "|".join(",".join(part) for part in parts)


def parse_cores(text: str) -> list[int]:
    """Return the core numbers of a list such as "5,2-4", sorted. Raises ValueError for others."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high:
            raise ValueError(f"the range {part!r} is empty")
        cores.update(range(low, high + 1))
    return sorted(cores)


def _auto_cores(environment: Mapping[str, str]) -> list[int]:
    """Return one logical CPU of each allowed physical core on the first NUMA node with any."""
    allowed = os.sched_getaffinity(0)
    on_node = next((cpus for cpus in _numa_nodes() if cpus & allowed), allowed) & allowed
    smt = platform.machine() in ("x86_64", "AMD64", "s390x")
    cores = sorted({max(_siblings(cpu) & allowed) if smt else cpu for cpu in on_node})
    reserved = int(environment.get(_RESERVED_VARIABLE) or 0)
    return cores[: max(1, len(cores) - reserved)]


def _numa_nodes() -> list[set[int]]:
    lists = sorted(Path("/sys/devices/system/node").glob("node[0-9]*/cpulist"))
    return [set(parse_cores(text)) for path in lists if (text := path.read_text().strip())]


def _siblings(cpu: int) -> set[int]:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return set(parse_cores(path.read_text().strip()))
    except OSError:
        return {cpu}
