"""vLLM's LoRA: which adapters it accepts, how a frontend serves them. Checked on vLLM 0.32.0.

Relies on: `MaxLoRARanks`, `LoRAConfig.max_lora_rank`, `PEFTHelper.validate_legal`, `LoRARequest`,
`AsyncLLM.add_lora`, `OpenAIServingModels.lora_requests`, in which a frontend looks names up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from vllm_hotswap.errors import ConfigError, one_line


def allowed_ranks() -> tuple[int, ...]:
    """Return the values that `max_lora_rank` may have."""
    from vllm.config.lora import MaxLoRARanks

    return tuple(int(rank) for rank in get_args(MaxLoRARanks))


def default_rank() -> int:
    from vllm.config.lora import LoRAConfig

    return int(LoRAConfig.max_lora_rank)


def ids_of_vllm(vllm_config: Any) -> int:
    """Return how many adapters vLLM's frontend numbers by itself, from 1: `default_mm_loras`."""
    lora = vllm_config.lora_config
    return 0 if lora is None else len(lora.default_mm_loras or {})


def check_adapter(name: str, path: Path, vllm_config: Any) -> None:
    """Run vLLM's own check of an adapter's configuration: its rank, and unsupported features.

    Raises:
        ConfigError: vLLM would not load it; the message contains no path.
    """
    from vllm.lora.peft_helper import PEFTHelper

    if vllm_config.lora_config is None:
        raise ConfigError(
            f"adapter {name!r} cannot be used: its model is served without adapters; "
            "give it enable_lora: true, or lora_modules"
        )
    try:
        PEFTHelper.from_local_dir(str(path), None).validate_legal(vllm_config.lora_config)
    except Exception as error:
        # The type depends on the values in the file.
        reason = one_line(error).replace(str(path), "its folder")
        raise ConfigError(f"adapter {name!r} cannot be used: {reason}") from error


def adapter_request(name: str, number: int, path: Path, is_3d: bool) -> Any:
    """Return the `LoRARequest` that vLLM needs with every request for an adapter."""
    from vllm.lora.request import LoRARequest

    # Not every version knows the last argument.
    extra = {"is_3d_lora_weight": True} if is_3d else {}
    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(path), **extra)


async def load_adapter(client: Any, request: Any) -> None:
    """Load an adapter into an engine now; the engine may be parked.

    Raises:
        ConfigError: it cannot be loaded; nothing of it is left, and the engine continues.
    """
    try:
        await client.add_lora(request)
    except Exception as error:
        # The engine's reason is the message of what its client raises.
        reason = one_line(error).removeprefix("Call to add_lora method failed: ")
        reason = reason.replace(request.lora_path, "its folder")
        raise ConfigError(f"adapter {request.lora_name!r} cannot be loaded: {reason}") from error


def serve_adapter(models: Any, request: Any) -> None:
    """Make a frontend, by its list of models, answer requests that name the adapter."""
    models.lora_requests[request.lora_name] = request


def stop_serving(models: Any, name: str) -> None:
    """Remove an adapter from a frontend; requests that run with it continue."""
    models.lora_requests.pop(name, None)
