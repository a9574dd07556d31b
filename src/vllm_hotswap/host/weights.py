"""Drops a model's weights on CPU, and puts them back where they were.

Compiled code, tied layers and views hold on to tensors, so the objects stay, and only the memory
behind them goes: a tensor's storage is emptied, and a oneDNN matrix multiplication (which keeps
its own packed copy of a weight) is freed. New memory comes from a second model, loaded
the ordinary way: vLLM itself repeats what quantisation or packing does to weights.
Both models are searched for weights in the same way, so their weights match by name.

What is not a parameter stays: buffers (rotary caches, masks), the KV cache, LoRA adapters.

Relies on, in vLLM 0.32.0: layers keeping packed weights in the closure of `cpu_linear`, or in a
`CPUDNNLGEMMHandler` on the object that multiplies; that handler's pointer being read, at each
multiplication, from `handler_tensor`, compiled or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from vllm._custom_ops import CPUDNNLGEMMHandler

LORA_WRAPPING = ".base_layer"
"""What LoRA adds to the names of layers that it wraps, after they have been loaded."""

PACKED_BY_LAYER = ".cpu_linear."
"""Marks the names of what an unquantised layer multiplies by, which is a copy of its own."""

DEEPEST_HANDLER = 3
"""Attributes from a layer to its handler: quantisation scheme, kernel, handler."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Every place of one model that holds memory of its weights, by name.

    A quantised handler reads the scales of its layer through a pointer. So `read_by` has, for each
    handler, the tensors that it may read: they must live as long as it does.
    """

    tensors: Mapping[str, torch.Tensor]
    handlers: Mapping[str, Any]
    read_by: Mapping[str, Mapping[str, torch.Tensor]]
    packed: Mapping[str, int]
    """Bytes of each handler's copy, 0 once it is freed; without padding, which oneDNN hides."""

    @classmethod
    def of(cls, model: Any) -> Weights:
        tensors: dict[str, torch.Tensor] = {}
        handlers: dict[str, Any] = {}
        read_by: dict[str, Mapping[str, torch.Tensor]] = {}
        packed: dict[str, int] = {}
        for layer_name, layer in model.named_modules():
            prefix = layer_name.replace(LORA_WRAPPING, "")
            holders = {f"{prefix}.{name}": value for name, value in _holders(layer)}
            own = {name: value for name, value in holders.items() if _is_emptiable(value)}
            tensors |= own
            for name, value in holders.items():
                if isinstance(value, CPUDNNLGEMMHandler):
                    handlers[name] = value
                    is_plain = PACKED_BY_LAYER in name
                    read_by[name] = {} if is_plain else own
                    # What is quantised is packed as 8-bit integers.
                    itemsize = layer.weight.dtype.itemsize if is_plain else 1
                    is_live = value.handler_tensor is not None
                    packed[name] = value.n * value.k * itemsize if is_live else 0
        return cls(tensors, handlers, read_by, packed)

    @property
    def nbytes(self) -> int:
        """The bytes that dropping them gives back. Weights that layers share count once."""
        storages = [tensor.untyped_storage() for tensor in self.tensors.values()]
        shared = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return int(sum(shared.values()) + sum(self.packed.values()))


def find_undroppable(model: Any) -> str | None:
    """Return the name and type of a weight that cannot be dropped; None if there is none."""
    for name, tensor in Weights.of(model).tensors.items():
        if is_traceable_wrapper_subclass(tensor) or not tensor.untyped_storage().resizable():
            return f"{name} ({type(tensor).__name__})"
    return None


class DroppedWeights:
    """A model without its weights: what is needed to put them back."""

    def __init__(self, model: Any) -> None:
        weights = Weights.of(model)
        self._tensors = weights.tensors
        self._sizes = {
            name: tensor.untyped_storage().nbytes() for name, tensor in weights.tensors.items()
        }
        self._handlers = {
            name: (handler, _free(handler)) for name, handler in weights.handlers.items()
        }
        for tensor in self._tensors.values():
            tensor.untyped_storage().resize_(0)

    def __repr__(self) -> str:
        return f"<DroppedWeights tensors={len(self._tensors)} handlers={len(self._handlers)}>"

    def put_back(self, fresh_model: Any) -> None:
        """Take the memory of another model of the same structure, which is useless afterwards.

        Raises:
            ValueError: the structure is not the same; nothing has been changed.
        """
        fresh = Weights.of(fresh_model)
        self._check(fresh)
        read_by_pointer = {name for tensors in fresh.read_by.values() for name in tensors}
        for name, tensor in self._tensors.items():
            source = fresh.tensors[name].untyped_storage()
            _fill(tensor.untyped_storage(), source)
            if name not in read_by_pointer:
                source.resize_(0)  # at once, so that the peak stays low
        for name, (handler, pointer) in self._handlers.items():
            _adopt(fresh.handlers[name], handler, pointer)
            handler.reads = fresh.read_by[name]

    def _check(self, fresh: Weights) -> None:
        different = {*self._tensors} ^ {*fresh.tensors} | {*self._handlers} ^ {*fresh.handlers}
        different |= {
            name
            for name, tensor in self._tensors.items()
            if name in fresh.tensors
            and _layout(tensor, self._sizes[name]) != _layout(fresh.tensors[name])
        }
        different |= {
            name
            for name, (handler, _) in self._handlers.items()
            if name in fresh.handlers
            and (handler.n, handler.k) != (fresh.handlers[name].n, fresh.handlers[name].k)
        }
        if different:
            raise ValueError(f"the weights differ from before: {', '.join(sorted(different)[:3])}")


def _holders(layer: Any) -> Iterator[tuple[str, Any]]:
    """Yield a layer's parameters, what its `cpu_linear` has captured, and oneDNN handlers."""
    yield from layer._parameters.items()
    closure = getattr(vars(layer).get("cpu_linear"), "__closure__", None) or ()
    for number, cell in enumerate(closure):
        yield f"cpu_linear.{number}", cell.cell_contents
    yield from _handlers(layer, "", DEEPEST_HANDLER)


def _handlers(owner: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield handlers among attributes of vLLM's objects; modules are searched anyway."""
    for name, value in vars(owner).items():
        if isinstance(value, CPUDNNLGEMMHandler):
            yield f"{prefix}{name}", value
        elif depth > 1 and _may_hold_handlers(value):
            yield from _handlers(value, f"{prefix}{name}.", depth - 1)


def _may_hold_handlers(value: Any) -> bool:
    kind = type(value)
    return (
        kind.__module__.startswith("vllm.model_executor.")
        and hasattr(value, "__dict__")
        and not isinstance(value, torch.nn.Module)
    )


def _is_emptiable(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "cpu"
        and value.untyped_storage().nbytes() > 0
    )


def _layout(tensor: torch.Tensor, size: int | None = None) -> tuple[Any, ...]:
    nbytes = tensor.untyped_storage().nbytes() if size is None else size
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), nbytes


def _fill(target: Any, source: Any) -> None:
    """Copy a storage, unless it has been copied for another weight that shares it."""
    if source.nbytes() > 0:
        target.resize_(source.nbytes())
        target.copy_(source)


def _free(handler: Any) -> torch.Tensor:
    """Free a handler's memory; return the tensor that holds, and will hold, its pointer.

    Without that tensor, the handler frees nothing when it is deleted.
    """
    pointer: torch.Tensor = handler.handler_tensor
    handler.dtor(pointer.item())
    handler.handler_tensor = None
    handler.reads = {}
    return pointer


def _adopt(source: Any, target: Any, pointer: torch.Tensor) -> None:
    """Give `target` the memory of `source`, in the very tensor that compiled code knows."""
    pointer.untyped_storage().copy_(source.handler_tensor.untyped_storage())
    source.handler_tensor = None
    target.handler_tensor = pointer
