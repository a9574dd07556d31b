"""Check models on a Gaudi, and write one file of results: `python -m tools.gaudi.check OUT.jsonl`.

For a person with the hardware. Run it in a clone, with the Python of the environment that has
vLLM 0.26, the Gaudi plugin and this package. It takes some minutes, changes nothing, and uses the
tiny models that ship with the package; nothing is downloaded. It starts a server of its own on a
free port of this machine and ends it.

Each line of the file is one result. `ok` is false where something is not as it should be; the rest
is what was seen: versions, bytes, seconds, and the error's last line where there was one. It holds
no host name, no user name and no path but those of the packages.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "src/vllm_hotswap/tiny_models"
PAIR = ("llama", "qwen")
PACKAGES = ("vllm", "vllm-gaudi", "vllm-hotswap", "torch", "habana-torch-plugin", "transformers")
SERVER = "vllm_hotswap.entrypoints.openai.multi_model_api_server"
START_LIMIT_S = 1200
CALL_LIMIT_S = 600
CYCLES = 5


class Results:
    """The file. What goes wrong in a check is a result, and the next one is made."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self.all_well = True

    def check(self, name: str, do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        start = time.monotonic()
        try:
            result = {"check": name, "ok": True, **do()}
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the result
            lines = str(error).strip().splitlines() or [""]
            result = {"check": name, "ok": False, "error": f"{type(error).__name__}: {lines[-1]}"}
        result["seconds"] = round(time.monotonic() - start, 3)
        self.all_well &= bool(result["ok"])
        self._file.write(json.dumps(result) + "\n")
        self._file.flush()
        print(f"{'ok  ' if result['ok'] else 'BAD '} {name}  {result.get('error', '')}", flush=True)
        return result


def facts() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"python": sys.version.split()[0], "versions": versions}


DEVICE = """
import json, torch, habana_frameworks.torch as h

def seen():
    torch.hpu.synchronize()
    free, total = torch.hpu.mem_get_info()
    found = {"free": free, "total": total}
    for name in ("memory_allocated", "memory_reserved"):
        ask = getattr(torch.hpu, name, None)
        found[name] = ask() if ask else None
    return found

torch.ones(1, device="hpu")
before = seen()
some = torch.ones(256 << 20, dtype=torch.uint8, device="hpu")
during = seen()
del some
print(json.dumps({
    "count": torch.hpu.device_count(), "name": torch.hpu.get_device_name(),
    "has_rng_state": hasattr(torch.hpu, "get_rng_state"),
    "before": before, "with_256_mib": during, "after": seen(),
}))
"""
"""Whose numbers follow a tensor that comes and goes is what budgets have to be measured by."""


def device() -> dict[str, Any]:
    """In a process of its own: who asks for a Gaudi holds it until its end."""
    ran = subprocess.run(
        [sys.executable, "-c", DEVICE], capture_output=True, text=True, check=False, timeout=300
    )
    if ran.returncode != 0:
        raise RuntimeError(ran.stderr)
    return dict(json.loads(ran.stdout.strip().splitlines()[-1]))


def platform() -> dict[str, Any]:
    kind = importlib.import_module("vllm.platforms").current_platform
    if kind.device_type != "hpu":
        raise RuntimeError(f"vLLM has chosen the platform {type(kind).__name__}, not the plugin's")
    return {"platform": f"{type(kind).__module__}.{type(kind).__name__}"}


class Server:
    def __init__(self, folder: Path, *, eager: bool) -> None:
        config = folder / "models.yaml"
        lines = ["default_model: llama", "memory: {device: 0.5, host: 2GiB}", "models:"]
        lines += [
            f"  {model}: {{model: {MODELS / model}, max_model_len: 512, max_num_seqs: 2, "
            f"num_gpu_blocks_override: 24, kv_cache_memory_bytes: 64M, "
            f"enforce_eager: {str(eager).lower()}}}"
            for model in PAIR
        ]
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        port = free_port()
        self.log = folder / "server.log"
        variables = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HPU_MULTI_MODEL_CONFIG": str(config)}
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", SERVER, "--host", "127.0.0.1", "--port", str(port)],
                env={**os.environ, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=CALL_LIMIT_S, trust_env=False
        )

    def wait(self) -> dict[str, Any]:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if self._client.get("/health").status_code == 200:
                    return {"held": {model: self.held(model) for model in PAIR}}
            except httpx.TransportError:
                time.sleep(0.5)
        raise RuntimeError("the server did not come up; its log: " + self.last_error())

    def last_error(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        told = [line for line in lines if "Error" in line]
        return (told or lines or [""])[-1]

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        response = self._client.post(path, json=body)
        if response.status_code != 200:
            raise RuntimeError(f"{path}: {response.status_code} {response.text[:500]}")
        return dict(response.json())

    def held(self, model: str) -> dict[str, Any]:
        return dict(self._client.get("/admin/status").json()["models"][model]["held"])

    def tokens(self, model: str) -> list[int]:
        answer = self.post(
            "/v1/completions",
            model=model,
            prompt="The quick brown fox jumps over the lazy dog. " * 6,
            max_tokens=16,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        return list(answer["choices"][0]["token_ids"])

    def switch(self, model: str) -> float:
        start = time.monotonic()
        self.post("/v1/models/switch", model=model, drain_timeout=60)
        return round(time.monotonic() - start, 4)

    def cycle(self, model: str, way: str, expected: list[int]) -> dict[str, Any]:
        """Away and back; what was held before, meanwhile and after."""
        before = self.held(model)
        self.switch(PAIR[model == PAIR[0]])
        if way == "asleep":
            self.post(f"/admin/models/{model}/sleep", level=1)
        if way == "cold":
            self.post(f"/admin/models/{model}/unload")
        away = self.held(model)
        back_s = self.switch(model)
        if self.tokens(model) != expected:
            raise RuntimeError(f"{model} answers otherwise after it was {way}")
        return {"before": before, "away": away, "after": self.held(model), "back_s": back_s}

    def stop(self) -> dict[str, Any]:
        self._process.terminate()
        try:
            status = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        if status != 0:
            raise RuntimeError(f"it ended with status {status}; its log: {self.last_error()}")
        return {}


def check_server(results: Results, *, eager: bool) -> None:
    kind = "eager" if eager else "compiled"
    folder = Path(tempfile.mkdtemp(prefix="check-gaudi-"))
    server = Server(folder, eager=eager)
    try:
        if not results.check(f"{kind}: start", server.wait)["ok"]:
            return
        expected = {}
        for model in PAIR:

            def first(model: str = model) -> dict[str, Any]:
                server.switch(model)
                expected[model] = server.tokens(model)
                return {"tokens": expected[model]}

            if not results.check(f"{kind}: {model}", first)["ok"]:
                return
        for way in ("parked", "asleep", "cold"):
            for number in range(CYCLES):
                for model in PAIR:
                    results.check(
                        f"{kind}: {way} {number} {model}",
                        lambda model=model, way=way: server.cycle(model, way, expected[model]),
                    )
    finally:
        results.check(f"{kind}: end", server.stop)
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gaudi.check", description=__doc__)
    parser.add_argument("out", type=Path, help="the file of results")
    parser.add_argument("--eager-only", action="store_true", help="leave out torch.compile")
    args = parser.parse_args(argv)
    results = Results(args.out)
    results.check("versions", facts)
    results.check("device", device)
    if results.check("platform", platform)["ok"]:
        for eager in (True,) if args.eager_only else (True, False):
            check_server(results, eager=eager)
    print(f"{args.out} has the results; send it back as it is")
    return 0 if results.all_well else 1


if __name__ == "__main__":
    sys.exit(main())
