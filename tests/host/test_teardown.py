"""Taking an engine apart frees what is its own, and leaves what others use."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from vllm_hotswap.host.teardown import dismantle


class Module:
    """The parts of a torch module that `dismantle` needs."""

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
    """An activation function that vLLM makes once for all models."""


Activation.__module__ = "vllm.model_executor.layers.activation"


def engine_of(model: Module) -> dict[str, Any]:
    runner = SimpleNamespace(model=model)
    worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
    return {"model_executor": SimpleNamespace(driver_worker=worker), "scheduler": None}


def test_everything_of_the_model_is_emptied() -> None:
    """A model's modules are emptied, and so are the objects that hold them."""
    layer = Module(weights=(1,))
    parts = engine_of(Module(layer))

    dismantle(parts)

    assert {} == vars(layer)
    assert {} == vars(parts["model_executor"])


def test_what_models_share_is_left_whole() -> None:
    """An activation function that models share stays whole for the others."""
    shared = Activation()
    other = Module(shared)

    dismantle(engine_of(Module(shared)))

    assert [other, shared] == list(other.modules())


def test_an_activation_with_weights_is_the_models_own() -> None:
    """An activation with weights belongs to its model, and is emptied with it."""
    own = Activation(weights=(1,))

    dismantle(engine_of(Module(own)))

    assert {} == vars(own)
