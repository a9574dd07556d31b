"""Phase `kernels`: what vLLM's libraries compute on this GPU, against the same on the CPU.

Relies on, in vLLM 0.26 to 0.33: `vllm._custom_ops.rms_norm`, `torch.ops._C.silu_and_mul`,
`vllm._custom_ops.reshape_and_cache_flash` and `vllm.vllm_flash_attn.flash_attn_varlen_func`. A
version that lacks one of them fails that check only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.gpu.results import Say
from tools.gpu.task import Task

WORST = 1e-2
"""Relative error of bfloat16 results, by their norms."""

TOKENS, WIDTH = 33, 512
HEADS, KV_HEADS, BLOCK = 8, 2, 16
HEAD_SIZES = (64, 128)
AMPERE, HOPPER = 8, 9


def run(_task: Task, say: Say) -> None:
    import torch

    torch.manual_seed(0)
    major, _ = torch.cuda.get_device_capability()
    checks: dict[str, Callable[[], tuple[Any, Any]]] = {
        "linear layer (cuBLAS)": _linear,
        "rms_norm": _rms_norm,
        "silu_and_mul": _silu_and_mul,
    }
    version = 3 if major == HOPPER else 2
    if major < AMPERE:
        told = "not checked: it needs compute capability 8.0; vLLM uses another attention here"
        say.fact("FlashAttention", "FlashAttention", told)
    for size in HEAD_SIZES if major >= AMPERE else ():
        checks[f"FlashAttention {version}, heads of {size}"] = _attention(size, version)
    for name, compute in checks.items():
        _compare(say, name, compute)


def _compare(say: Say, name: str, compute: Callable[[], tuple[Any, Any]]) -> None:
    key = name.split(maxsplit=1)[0] + name.rsplit(maxsplit=1)[-1]
    try:
        found, wanted = compute()
    except Exception as error:  # noqa: BLE001  # the next kernel may work
        say.check(key, name, False, f"{type(error).__name__}: {str(error)[:300]}")
        return
    off = relative_error(found.float().cpu(), wanted.float())
    say.check(key, f"{name}, relative error", off < WORST, off, by_kernels=True)


def relative_error(found: Any, wanted: Any) -> float:
    """Return the error; infinite where something is not a number, or all that is wanted is zero."""
    size = float(wanted.norm())
    error = float((found - wanted).norm())
    return error / size if size > 0 and error == error else float("inf")  # noqa: PLR0124  # NaN


def _made(*shape: int) -> tuple[Any, Any]:
    """Return the same random bfloat16 numbers on the CPU, as float32, and on the device."""
    import torch

    made = torch.randn(*shape).to(torch.bfloat16)
    return made.float(), made.to("cuda")


def _unset(*shape: int) -> Any:
    import torch

    return torch.full(shape, float("nan"), dtype=torch.bfloat16).to("cuda")


def _linear() -> tuple[Any, Any]:
    import torch

    (x, x_there), (w, w_there) = _made(TOKENS, WIDTH), _made(WIDTH, WIDTH)
    return torch.nn.functional.linear(x_there, w_there), torch.nn.functional.linear(x, w)


def _rms_norm() -> tuple[Any, Any]:
    import torch
    from vllm import _custom_ops as ops

    (x, x_there), (w, w_there) = _made(TOKENS, WIDTH), _made(WIDTH)
    out = _unset(TOKENS, WIDTH)
    ops.rms_norm(out, x_there, w_there, 1e-6)
    return out, torch.nn.functional.rms_norm(x, (WIDTH,), w, 1e-6)


def _silu_and_mul() -> tuple[Any, Any]:
    import torch
    from vllm import _custom_ops

    assert _custom_ops, "its import registers what follows"
    x, x_there = _made(TOKENS, WIDTH)
    out = _unset(TOKENS, WIDTH // 2)
    torch.ops._C.silu_and_mul(out, x_there)
    gate, up = x.chunk(2, -1)
    return out, torch.nn.functional.silu(gate) * up


def _attention(size: int, version: int) -> Callable[[], tuple[Any, Any]]:
    def compute() -> tuple[Any, Any]:
        import torch
        from vllm import _custom_ops as ops
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        made = [_made(TOKENS, heads, size) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        (q, q_there), (k, k_there), (v, v_there) = made
        blocks = -(-TOKENS // BLOCK)
        cache = torch.zeros(2, blocks + 1, BLOCK, KV_HEADS, size, dtype=torch.bfloat16).to("cuda")
        slots = (torch.arange(TOKENS) + BLOCK).to("cuda")  # the first block stays empty
        one = torch.ones(1).to("cuda")
        ops.reshape_and_cache_flash(k_there, v_there, cache[0], cache[1], slots, "auto", one, one)
        numbers = torch.arange(1, blocks + 1, dtype=torch.int32)
        found = flash_attn_varlen_func(
            q=q_there,
            k=cache[0],
            v=cache[1],
            max_seqlen_q=TOKENS,
            max_seqlen_k=TOKENS,
            causal=True,
            fa_version=version,
            cu_seqlens_q=torch.tensor([0, TOKENS], dtype=torch.int32).to("cuda"),
            seqused_k=torch.tensor([TOKENS], dtype=torch.int32).to("cuda"),
            block_table=numbers.unsqueeze(0).to("cuda"),
        )
        heads_first = [t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)]
        wanted = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=True, enable_gqa=True
        )
        return found, wanted.squeeze(0).transpose(0, 1)

    return compute
