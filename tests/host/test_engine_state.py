"""Each engine finds vLLM's process-wide state as if it had its own process."""

from __future__ import annotations

import os
import random
import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.config

from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host import gaudi
from vllm_hotswap.host.hashing import with_own_globals
from vllm_hotswap.host.randomness import Randomness, drawing_nothing
from vllm_hotswap.host.state import (
    CONTAINERS,
    MISSING,
    Attribute,
    EngineState,
    Item,
    ProcessState,
    absent,
    cells,
    in_own_state,
)
from vllm_hotswap.host.vllm_state import STATE, Owner, State, is_known, of_owner

pytestmark = pytest.mark.slow


@dataclass
class ModelConfig:
    is_moe: bool = False
    enforce_eager: bool = True


@dataclass
class ParallelConfig:
    enable_eplb: bool = False


@dataclass
class Config:
    model_config: ModelConfig = field(default_factory=ModelConfig)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)


DENSE = Config()
EXPERTS = Config(ModelConfig(is_moe=True))
COMPILED = Config(ModelConfig(enforce_eager=False))


@pytest.fixture
def module() -> Any:
    """A stand-in for a vLLM module: a backend that a load chooses, a table, and parallel groups."""
    return types.SimpleNamespace(backend=None, table={}, group=None, experts=None)


@pytest.fixture
def process(module: Any) -> Iterator[ProcessState]:
    before = Randomness.now()
    values = [Attribute(module, "backend"), Attribute(module, "table")]
    yield ProcessState(values, [Attribute(module, "group"), Attribute(module, "experts")])
    before.restore()
    torch.compiler.set_stance("default")
    torch.set_default_dtype(torch.float32)


def load(process: ProcessState, module: Any, name: str, config: Config = DENSE) -> EngineState:
    """Do what vLLM does at a load."""
    state = process.begin(config)
    process.put_in_place(state)
    module.backend = name
    module.table[name] = True
    if module.group is None:
        module.group = f"group of {name}"
        module.experts = f"experts of {name}" if config.model_config.is_moe else None
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # as vLLM does
    process.loaded(state)
    return state


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), random.random(), np.random.random()  # noqa: S311


def test_an_engine_finds_what_it_left(process: ProcessState, module: Any) -> None:
    """An engine finds the state that it left, and nothing that another engine has set."""
    first = load(process, module, "first")
    second = load(process, module, "second")
    module.backend = "second, later"

    process.put_in_place(first)
    assert ("first", {"first": True}) == (module.backend, module.table)
    process.put_in_place(second)
    assert ("second, later", {"second": True}) == (module.backend, module.table)


def test_while_one_engine_is_worked_with_nothing_is_moved(
    process: ProcessState, module: Any
) -> None:
    """Consecutive steps of one engine read and write no state."""
    state = load(process, module, "first")
    del module.backend, module.table  # reading them fails

    process.put_in_place(state)

    assert not hasattr(module, "backend")


def test_a_load_begins_as_in_a_new_process(process: ProcessState, module: Any) -> None:
    """A load starts as in a new process, whatever was loaded before."""
    load(process, module, "first")

    process.put_in_place(process.begin(DENSE))

    assert (None, {}) == (module.backend, module.table)


def test_a_load_that_failed_changes_nothing_for_others(process: ProcessState, module: Any) -> None:
    """A failed load leaves the others' state and random numbers as they were."""
    first = load(process, module, "first")
    with drawing_nothing():
        expected = draw()
    failing = process.begin(DENSE)
    process.put_in_place(failing)
    module.backend = "failing"
    draw()

    process.end(failing)
    assert (None, {}) == (module.backend, module.table)
    process.put_in_place(first)

    assert ("first", {"first": True}) == (module.backend, module.table)
    assert expected == draw()


def test_a_load_that_failed_leaves_the_default_type_of_numbers(process: ProcessState) -> None:
    """A failed load restores the default dtype, which vLLM does only after a good one."""
    failing = process.begin(DENSE)
    process.put_in_place(failing)
    torch.set_default_dtype(torch.bfloat16)

    process.end(failing)

    assert torch.float32 == torch.get_default_dtype()


def test_models_of_one_kind_share_their_parallel_groups(process: ProcessState, module: Any) -> None:
    """Dense models share parallel groups, and so do mixtures of experts; none makes them again."""
    dense = load(process, module, "dense")
    experts = load(process, module, "experts", EXPERTS)
    assert ("group of experts", "experts of experts") == (module.group, module.experts)
    load(process, module, "dense too")
    assert ("group of dense", None) == (module.group, module.experts)
    process.end(experts)
    load(process, module, "experts again", EXPERTS)
    assert ("group of experts", "experts of experts") == (module.group, module.experts)

    process.put_in_place(dense)

    assert ("group of dense", None) == (module.group, module.experts)


def test_each_engine_draws_its_own_random_numbers(process: ProcessState, module: Any) -> None:
    """Each engine draws the random numbers that it would draw without other engines."""
    load(process, module, "alone")
    expected = [draw() for _ in range(4)]

    first = load(process, module, "first")
    drawn = [draw()]
    second = load(process, module, "second")
    of_second = [draw()]
    process.put_in_place(first)
    drawn += [draw(), draw()]
    process.put_in_place(second)
    of_second += [draw()]
    process.put_in_place(first)
    drawn += [draw()]

    assert expected == drawn
    assert expected[:2] == of_second


def test_the_end_of_an_engine_tells_what_it_would_have_drawn(
    process: ProcessState, module: Any
) -> None:
    """The end of an engine returns its random state, from which it can continue later."""
    first = load(process, module, "first")
    with drawing_nothing():
        expected = draw()
    load(process, module, "second")

    process.end(first).restore()

    assert expected == draw()


def test_only_a_model_that_is_compiled_may_compile(process: ProcessState, module: Any) -> None:
    """An eager model runs functions that vLLM has decorated, without compiling them."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError("compiled")

    @torch.compile(backend=refuse)
    def decorated(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    eager = load(process, module, "eager")
    compiled = load(process, module, "compiled", COMPILED)
    with pytest.raises(Exception, match="compiled"):
        decorated(torch.zeros(2))

    process.put_in_place(eager)
    assert [1, 1] == decorated(torch.zeros(2)).tolist()

    process.put_in_place(compiled)
    with pytest.raises(Exception, match="compiled"):
        decorated(torch.zeros(3))


def test_methods_of_an_engine_find_its_state(
    monkeypatch: pytest.MonkeyPatch, process: ProcessState, module: Any
) -> None:
    """Methods of an engine find its state, except before its load and after its end."""
    monkeypatch.setattr("vllm_hotswap.host.state.process_state", lambda: process)

    @dataclass
    class Engine:
        state: EngineState | None

        @in_own_state
        def backend(self) -> Any:
            return module.backend

    first, second = (Engine(load(process, module, name)) for name in ("first", "second"))

    assert ("first", "second") == (first.backend(), second.backend())
    assert "second" == Engine(None).backend()


@pytest.mark.parametrize("container", CONTAINERS)
def test_each_engine_has_containers_of_its_own(module: Any, container: type[Any]) -> None:
    """In every container that is changed in place, an engine finds only its own additions."""
    module.value = container()
    process = ProcessState([Attribute(module, "value")], [])
    added = ModelConfig()

    process.put_in_place(process.begin(DENSE))
    add_to(module.value, added)
    process.put_in_place(process.begin(DENSE))

    assert (container, 0) == (type(module.value), len(module.value))


def add_to(container: Any, thing: Any) -> None:
    if isinstance(container, weakref.WeakKeyDictionary):
        container[ModelConfig] = thing
    elif isinstance(container, dict | weakref.WeakValueDictionary):
        container["thing"] = thing
    else:
        (container.add if hasattr(container, "add") else container.append)(ModelConfig)


def test_groups_that_this_vllm_does_not_have_are_neither_made_nor_counted(module: Any) -> None:
    """Groups that this vLLM lacks are not made, nor destroyed after a load that failed early."""
    process = ProcessState([], [Attribute(module, "group"), Attribute(module, "of_later_vllm")])

    state = process.begin(DENSE)
    process.put_in_place(state)
    process.end(state)  # fails if it takes a missing group for one that was made

    assert not hasattr(module, "of_later_vllm")


@dataclass
class Refusing:
    """A place that cannot be set at present."""

    refuses: bool = False
    value: Any = None

    def get(self) -> Any:
        return self.value

    def set(self, value: Any) -> None:
        if self.refuses:
            raise RuntimeError("refused")
        self.value = value


def test_state_that_could_not_be_put_in_place_is_no_engines(module: Any) -> None:
    """After a failure neither engine stores a mixture, and each can be put in place later."""
    refusing = Refusing()
    process = ProcessState([Attribute(module, "backend"), refusing], [])
    first, second = (load(process, module, name) for name in ("first", "second"))
    refusing.refuses = True
    with pytest.raises(RuntimeError, match="refused"):
        process.put_in_place(first)
    refusing.refuses = False

    process.put_in_place(second)
    assert "second" == module.backend
    process.put_in_place(first)
    assert "first" == module.backend


class Environment(dict[str, str]):
    """Counts writes."""

    written = 0

    def __setitem__(self, name: str, value: str) -> None:
        self.written += 1
        super().__setitem__(name, value)


def test_a_variable_is_written_only_where_it_differs() -> None:
    """Variables are written only if they differ: another thread may read the environment."""
    environment = Environment(NAME="1")
    variable = Item(environment, "NAME")

    variable.set("1")
    assert 0 == environment.written
    variable.set("2")
    assert (1, "2") == (environment.written, environment["NAME"])


ROOT = "that of the module"


def hash_of_first_block(tokens: str) -> str:
    return joined(tokens)


def joined(tokens: str, *, sign: str = "+") -> str:
    return f"{ROOT}{sign}{tokens}"


def test_hashes_begin_at_the_root_of_their_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash starts at its engine's root, whatever root is in place at that time."""
    monkeypatch.setattr(f"{__name__}.ROOT", "of the first")
    bound = with_own_globals(hash_of_first_block)
    monkeypatch.setattr(f"{__name__}.ROOT", "of the second")

    assert "of the first+tokens" == bound("tokens")
    assert "of the second+tokens" == hash_of_first_block("tokens")


@pytest.mark.parametrize(
    ("name", "since", "is_told"),
    [("Owner", "", False), ("Renamed", "", True), ("Renamed", "999.0", False)],
)
def test_a_place_that_was_renamed_is_told(name: str, since: str, is_told: bool) -> None:
    """A place that exists only in later versions is not reported; its value does not matter."""
    state = State(f"vllm_hotswap.host.vllm_state:{name}", Owner.ENGINE, "a reason", since)

    assert is_told == bool(absent([state]))


def test_what_is_not_set_stays_as_it_is_unless_it_is_a_variable() -> None:
    """Missing attributes stay, since a thread may read them; missing variables are removed."""
    module, environment = types.SimpleNamespace(name=1), {"NAME": "1"}

    assert MISSING is Attribute(module, "other").get()
    Attribute(module, "other").set(2)
    Attribute(module, "name").set(MISSING)
    Item(environment, "NAME").set(MISSING)

    assert ({"name": 1}, {}) == (vars(module), environment)
    assert MISSING is Item(environment, "NAME").get()


def test_places_are_found() -> None:
    """Variables, attributes and all values of a table are found, and none without a module."""
    (variable,) = cells("os:environ[HOME]")
    (attribute,) = cells("os.path:sep")
    (inner,) = cells("vllm_hotswap.host.vllm_state:Owner.ENGINE._value_")
    several = list(cells("vllm_hotswap.host.vllm_state:Owner._member_map_.*._value_"))

    assert os.environ.get("HOME", MISSING) == variable.get()
    assert ("/", "engine") == (attribute.get(), inner.get())
    assert [owner.value for owner in Owner] == [cell.get() for cell in several]
    assert [] == list(cells("vllm_hotswap.no_such_module:name"))
    assert [] == list(cells("vllm_hotswap.host.vllm_state:nothing.name"))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The Gaudi plugin's module, with the configuration that it makes once."""
    package, extension = types.ModuleType("vllm_gaudi"), types.ModuleType("vllm_gaudi.extension")
    runtime = types.ModuleType("vllm_gaudi.extension.runtime")
    vars(runtime).update(RUNTIME_CONFIG={"model_type": "left over"})
    vars(runtime).update(clear_config=lambda: vars(runtime).update(RUNTIME_CONFIG=None))
    for module in (package, extension, runtime):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # Torch's limits are for the whole process.
    monkeypatch.setitem(sys.modules, "torch._dynamo.config", types.ModuleType("config"))
    return runtime


LIMITS = ("recompile_limit", "accumulated_recompile_limit")
RUNTIME_CONFIG = "vllm_gaudi.extension.runtime:RUNTIME_CONFIG"


def test_state_of_a_plugin_counts_where_the_plugin_is_in_use(
    plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin's state counts only in use: it may be installed for another platform."""
    state = State(RUNTIME_CONFIG, Owner.ENGINE, "a reason")
    assert [plugin.RUNTIME_CONFIG] == [cell.get() for cell in cells(RUNTIME_CONFIG)]
    assert [] == absent([state])
    del plugin.RUNTIME_CONFIG
    assert [RUNTIME_CONFIG] == absent([state])

    monkeypatch.delitem(sys.modules, "vllm_gaudi")
    assert [] == list(cells(RUNTIME_CONFIG))
    assert [] == absent([state])


def test_each_model_makes_the_gaudi_plugins_configuration(
    plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model makes the plugin's configuration, of which the plugin would keep the first."""
    said = []
    platform = HpuPlatform()
    monkeypatch.setattr(HpuPlatform, "set_compile_env_defaults", lambda _: said.append("defaults"))
    monkeypatch.setenv("VLLM_DISABLE_SHARED_EXPERTS_STREAM", "0")
    gaudi.prepare(platform)
    process = ProcessState(list(cells(RUNTIME_CONFIG)), [])

    def model(kind: str) -> EngineState:
        state = process.begin(DENSE)
        process.put_in_place(state)
        plugin.RUNTIME_CONFIG = plugin.RUNTIME_CONFIG or {"model_type": kind}
        return state

    llama, qwen = model("llama"), model("qwen3")
    assert {"model_type": "qwen3"} == plugin.RUNTIME_CONFIG
    process.put_in_place(llama)
    assert {"model_type": "llama"} == plugin.RUNTIME_CONFIG
    assert ["defaults"] == said
    assert "1" == os.environ["VLLM_DISABLE_SHARED_EXPERTS_STREAM"]
    process.end(qwen)


class HpuPlatform:
    device_type = "hpu"

    def set_compile_env_defaults(self) -> None: ...


def test_code_of_all_models_of_a_kind_is_kept(plugin: types.ModuleType) -> None:
    """Code of all models of a kind is kept, although the plugin sets the limit for one of them."""
    gaudi.prepare(HpuPlatform())
    dynamo = sys.modules["torch._dynamo.config"]
    assert [gaudi.CODE_LIMIT] * 2 == [getattr(dynamo, limit) for limit in LIMITS]


def test_other_platforms_are_left_alone(
    plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HpuPlatform, "device_type", "cpu")
    gaudi.prepare(HpuPlatform())
    assert {"model_type": "left over"} == plugin.RUNTIME_CONFIG
    assert {*LIMITS}.isdisjoint(vars(sys.modules["torch._dynamo.config"]))


def test_what_the_gaudi_plugin_decides_at_its_import_each_model_decides(
    plugin: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each model decides by its quantisation. No calibration ends by chance. Files may go."""
    file = tmp_path / "quant.json"
    file.write_text("{}", encoding="utf-8")
    ops = types.ModuleType("vllm_gaudi.extension.ops")
    vars(ops).update(USING_INC=False)
    runner = types.ModuleType("vllm_gaudi.v1.worker.hpu_model_runner")
    for module in (types.ModuleType("vllm_gaudi.v1"), types.ModuleType("vllm_gaudi.v1.worker")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(sys.modules["vllm_gaudi.v1.worker"]).update(hpu_model_runner=runner)
    for module in (ops, runner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    gaudi.prepare(HpuPlatform())
    assert {"shutdown_inc_called": True}.items() <= vars(runner).items()
    process = ProcessState(list(cells("vllm_gaudi.extension.ops:USING_INC")), [])
    on_hpu = types.SimpleNamespace(device_config=types.SimpleNamespace(device_type="hpu"))

    def model(quant_config: str | None) -> EngineState:
        with monkeypatch.context() as patch:
            patch.delenv("QUANT_CONFIG", raising=False)
            if quant_config is not None:
                patch.setenv("QUANT_CONFIG", quant_config)
            state = process.begin(DENSE)
            process.put_in_place(state)
            gaudi.prepare_load(on_hpu)
            return state

    plain, quantised = model(None), model(str(file))
    assert vars(ops)["USING_INC"]
    process.put_in_place(plain)
    assert not vars(ops)["USING_INC"]
    process.end(quantised)
    file.unlink()
    with pytest.raises(ConfigError, match="there is no such file"):
        model(str(file))


def test_each_place_is_listed_once_with_a_reason() -> None:
    """Each place is listed once with a reason, and can be looked up, also by a pattern."""
    places = [state.place for state in STATE]

    assert len(places) == len({*places})
    assert all(state.reason for state in STATE)
    assert all(is_known(place) for place in places)
    assert is_known("vllm.ir.op:IrOp.registry.rms_norm._priority_impls")
    assert not is_known("vllm.ir.op:SOMETHING_NEW")
    assert {*Owner} == {state.owner for state in STATE}
    assert 9 == len(list(of_owner(Owner.KIND)))


@pytest.mark.parametrize(
    "place",
    [
        "vllm.platforms:current_platform.__class__._global_graph_pool",
        "vllm.utils.jit_monitor:_active",
        "vllm.utils.gpu_sync_debug:_sync_check_enabled",
        "vllm.v1.worker.workspace:_manager",
        "vllm.model_executor.layers.mamba.ops.ssu_dispatch:_mamba_ssu_backend",
        "vllm.compilation.cuda_graph:CUDAGraphWrapper._all_instances",
        "vllm.model_executor.layers.rotary_embedding:_ROPE_DICT",
    ],
)
def test_what_a_gpu_worker_keeps_for_the_process_is_each_engines(place: str) -> None:
    """One pool of graphs for all would keep those of unloaded models, a monitor of compilations
    would blame later loads, and a step would find another model's scratch memory and kernels.
    """
    assert place in {state.place for state in of_owner(Owner.ENGINE)}
