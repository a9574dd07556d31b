"""What the device does where a CPU kernel refuses.

The plugin pads positions with -1 and looks their sines up. A Gaudi reads something there, and
nobody looks at it; the nearest row is read here. It pads slots with -1, too, and writes KV there:
the last row here, which is of the block that it keeps for padding.
"""

from __future__ import annotations

import torch

LIBRARY = torch.library.Library("aten", "IMPL")


def index_select(data: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    with torch._C._AutoDispatchBelowADInplaceOrView():
        inside = index.clamp(0, data.shape[dim] - 1)
        return torch.ops.aten.index.Tensor(data, [None] * (dim % data.dim()) + [inside])


def index_copy_(
    data: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor
) -> torch.Tensor:
    with torch._C._AutoDispatchBelowADInplaceOrView():
        rows = index.remainder(data.shape[dim])
        return torch.ops.aten.index_put_(data, [None] * (dim % data.dim()) + [rows], source)


LIBRARY.impl("index_copy_", index_copy_, "HPU")
LIBRARY.impl("index_select", index_select, "HPU")
