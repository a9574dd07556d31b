"""Files of models that are named by their place on the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path

from vllm_hotswap.checkpoint import weight_files_bytes
from vllm_hotswap.errors import one_line

log = logging.getLogger("vllm_hotswap")


def local_folder(name: str, revision: str | None) -> Path | None:
    """Where a model's files are: the folder itself, or its place in the hub's cache, or None."""
    from huggingface_hub import snapshot_download

    if Path(name).is_absolute():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:  # noqa: BLE001  # whatever it raises, there is a way on
        log.debug("event=not_in_cache model=%s cause=%r", name, error)
        return None


def hub_weights_bytes(name: str, revision: str | None) -> int:
    """Size of a hub model's weight files, from the local cache or the hub's list; 0 if unknown."""
    from huggingface_hub import HfApi

    if folder := local_folder(name, revision):
        return weight_files_bytes({f.name: f.stat().st_size for f in folder.iterdir()})
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=10)
        return weight_files_bytes({f.rfilename: f.size or 0 for f in info.siblings or ()})
    except Exception as error:  # noqa: BLE001  # a size that is not known must not end the start
        log.warning("event=weights_size_unknown model=%s cause=%r", name, one_line(error))
        return 0
