"""Taking an engine apart frees what is its own, and leaves what others use."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from vllm_hotswap.host.teardown import dismantle


class Module:
    """What `dismantle` needs of a torch module."""

    def __init__(self, *children: Module, weights: tuple[object, ...] = ()) -> None:
        self.children = children
        self.weights = weights

    def modules(self) -> Iterator[Module]:
        yield self
        for child in self.children:
            yield from child.modules()

    def parameters(self) -> Iterator[object]:
        return iter(self.weights)


class Activation(Module):
    """One of those that vLLM makes once for all models."""


Activation.__module__ = "vllm.model_executor.layers.activation"


def engine_of(model: Module) -> dict[str, Any]:
    runner = SimpleNamespace(model=model)
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    return {"model_executor": SimpleNamespace(driver_worker=worker), "scheduler": None}


def test_everything_of_the_model_is_emptied() -> None:
    """Its modules, and those who hold them."""
    layer = Module(weights=(1,))
    parts = engine_of(Module(layer))

    dismantle(parts)

    assert {} == vars(layer)
    assert {} == vars(parts["model_executor"])


def test_what_models_share_is_left_whole() -> None:
    """Another model goes on with the same activation function."""
    shared = Activation()
    other = Module(shared)

    dismantle(engine_of(Module(shared)))

    assert [other, shared] == list(other.modules())


def test_an_activation_with_weights_is_the_models_own() -> None:
    """It is emptied like the rest."""
    own = Activation(weights=(1,))

    dismantle(engine_of(Module(own)))

    assert {} == vars(own)
