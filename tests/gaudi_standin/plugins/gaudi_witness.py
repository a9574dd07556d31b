"""A plugin of vLLM's that writes down how the Gaudi plugin finds each decode step's bucket.

`tests.gaudi_standin.witness` reads it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def register() -> None:
    """Register once, however often vLLM calls it."""
    from vllm_gaudi.extension import runtime
    from vllm_gaudi.extension.bucketing.common import HPUBucketingManager

    found = HPUBucketingManager.find_decode_bucket
    if getattr(found, "is_witnessed", False):
        return
    steps = Path(os.environ["GAUDI_WITNESS"])

    def find_decode_bucket(self: Any, *args: Any, **more: Any) -> Any:
        step = {
            "model_type": runtime.get_config().model_type,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "blocks": self.num_hpu_blocks,
            "is_active": HPUBucketingManager._active_instance is self,
        }
        with steps.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(step) + "\n")
        return found(self, *args, **more)

    find_decode_bucket.is_witnessed = True  # type: ignore[attr-defined]
    HPUBucketingManager.find_decode_bucket = find_decode_bucket
