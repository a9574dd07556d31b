"""A server on a machine with a network, by whose address the machine's name is known."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from vllm_hotswap.demo.quickstart import MODELS

LOOPBACK, OUTSIDE = "127.0.0.1", "10.99.99.2"
LISTEN = "0A"
START_TIMEOUT_S = 240.0

MACHINE = f"""\
set -e
ip link set lo up
ip link add outside type dummy 2>/dev/null || ip link add outside type veth peer name inside
ip addr add {OUTSIDE}/24 dev outside
ip link set outside up
hostname gpuserver
mount --bind "$1" /etc/hosts
shift
exec "$@"
"""
"""What becomes a machine of its own inside namespaces, before it becomes the program."""


def machine(folder: Path, command: list[str]) -> list[str]:
    """Return the command that runs `command` on such a machine."""
    script, hosts = folder / "machine.sh", folder / "hosts"
    script.write_text(MACHINE)
    hosts.write_text(f"{LOOPBACK} localhost\n{OUTSIDE} gpuserver\n")
    own_user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", "-n", "-u", "-m", *own_user, "sh", str(script), str(hosts), *command]


def address(text: str) -> str:
    """Return `0100007F:4E20` of `/proc/net/tcp` as `127.0.0.1`; IPv6 as it is."""
    number = text.partition(":")[0]
    if len(number) != 8:
        return number
    return ".".join(str(byte) for byte in reversed(bytes.fromhex(number)))


@dataclass
class Machine:
    """A server on it, reached by its socket, with the addresses that accepted connections."""

    process: subprocess.Popen[bytes]
    sock: Path
    client: httpx.Client
    log: Path
    seen: set[str] = field(default_factory=set)

    def listening(self) -> set[str]:
        """Return addresses with a port on which some process of the machine listens."""
        found = set()
        for name in ("tcp", "tcp6"):
            lines = Path(f"/proc/{self.process.pid}/net/{name}").read_text().splitlines()[1:]
            rows = [line.split() for line in lines]
            found |= {address(row[1]) for row in rows if row[3] == LISTEN}
        self.seen |= found
        return found

    def _takes_connections(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(str(self.sock))
            except OSError:
                return False
        return True

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self.listening()
            if self._takes_connections() and self.client.get("/health").status_code == 200:
                return
            time.sleep(0.01)
        raise AssertionError(f"it did not come up:\n{self.log.read_text()[-5000:]}")


@pytest.fixture(scope="module")
def with_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    tried = subprocess.run(machine(folder, ["true"]), capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no network of its own is permitted here: {tried.stderr.strip()}")
    config, sock, log = folder / "models.yaml", folder / "s", folder / "server.log"
    config.write_text(
        f"models: {{llama: {{model: {shlex.quote(str(MODELS / 'llama'))}, max_model_len: 512, "
        "enforce_eager: true, kv_cache_memory_bytes: 16M}}\n"
    )
    command = [sys.executable, "-m", "vllm_hotswap", "serve", str(config), "--uds", str(sock)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            machine(folder, command), stdout=output, stderr=subprocess.STDOUT
        )
    transport = httpx.HTTPTransport(uds=str(sock))
    client = httpx.Client(transport=transport, base_url="http://server")
    running = Machine(process, sock, client, log)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.client.close()
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.mark.wide
def test_a_server_on_a_socket_listens_on_no_network(with_network: Machine) -> None:
    """A server on a socket listens on no network once loaded; before, briefly on loopback."""
    body = {"model": "llama", "prompt": "Hello", "max_tokens": 2}
    assert 200 == with_network.client.post("/v1/completions", json=body, timeout=60).status_code

    assert set() == with_network.listening()
    assert with_network.seen <= {LOOPBACK}
