"""What the plugin imports of Intel's bridge. Importing it makes the device `hpu`."""

import torch

from habana_frameworks.torch import _device

_device.load()

from habana_frameworks.torch import core, hpex, hpu, internal, lenient, utils  # noqa: E402
from habana_frameworks.torch.distributed import hccl  # noqa: E402

__all__ = ["core", "hccl", "hpex", "hpu", "internal", "lenient", "torch", "utils"]
