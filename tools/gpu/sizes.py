"""Which models the phase `large` makes, so that they fit the device, the host and the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import medium
from tools.gpu.device import GIB, MIB
from vllm_hotswap.host.devices import reserve_bytes

BIG: Mapping[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}
"""The shape of Qwen3-8B: 8.2 billion weights, 16.4 GB of bfloat16."""

MID: Mapping[str, Any] = {
    **BIG,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "vocab_size": 32768,
}
"""The shape of Qwen3-4B, with a smaller vocabulary: 3.8 billion weights."""

SMALL: Mapping[str, Any] = {
    **BIG,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 32768,
}
"""For a rehearsal."""

LAYERS = (36, 24, 16, 8, 4)
MID_LAYERS = (36, 18, 8, 2)
CONTEXT_BYTES = GIB
RESIDUE_BYTES = GIB
"""Graphs, input buffers and workspaces of a model, awake or asleep. An estimate."""

KV_BYTES = (8 * GIB, 2 * GIB, GIB // 2)
HOST_LEFT_BYTES = 4 * GIB
COPIES = 3
"""The larger model's copies in host memory: ours, vLLM's, and what vLLM rounds up."""

DISK_LEFT_BYTES = 2 * GIB


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that are free."""

    device: int
    device_total: int
    host: int
    disk: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Two models, and the KV memory of each."""

    big: Mapping[str, Any]
    mid: Mapping[str, Any]
    kv_bytes: int

    @property
    def big_bytes(self) -> int:
        return weights_bytes(self.big)

    @property
    def mid_bytes(self) -> int:
        return weights_bytes(self.mid)

    @property
    def is_8b(self) -> bool:
        """Return whether the larger one has all layers."""
        return self.big == BIG

    @property
    def device_bytes(self) -> int:
        """Return the bytes of both awake, with a context."""
        each = RESIDUE_BYTES + self.kv_bytes
        return CONTEXT_BYTES + self.big_bytes + self.mid_bytes + 2 * each

    @property
    def host_bytes(self) -> int:
        return HOST_LEFT_BYTES + COPIES * self.big_bytes + self.mid_bytes

    @property
    def disk_bytes(self) -> int:
        return DISK_LEFT_BYTES + self.big_bytes + self.mid_bytes

    def fits(self, room: Room) -> bool:
        reserve = reserve_bytes(room.device_total)
        return (
            self.device_bytes + reserve <= room.device
            and self.host_bytes <= room.host
            and self.disk_bytes <= room.disk
        )


REHEARSAL = Sizes(SMALL, {**SMALL, "num_hidden_layers": 1}, 64 * MIB)


def weights_bytes(shape: Mapping[str, Any]) -> int:
    """Return the bytes of a checkpoint in bfloat16."""
    return 2 * medium.parameters(shape)


def candidates() -> Iterator[Sizes]:
    """Yield the largest first: a smaller second model rather than a smaller first one."""
    for layers in LAYERS:
        for kv_bytes in KV_BYTES:
            for mid_layers in (n for n in MID_LAYERS if n <= layers):
                yield Sizes(
                    {**BIG, "num_hidden_layers": layers},
                    {**MID, "num_hidden_layers": mid_layers},
                    kv_bytes,
                )


def choose(room: Room) -> Sizes | None:
    """Return the largest models for which there is room; None if there are none."""
    return next((sizes for sizes in candidates() if sizes.fits(room)), None)
