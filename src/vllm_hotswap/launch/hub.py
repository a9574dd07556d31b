"""Files of models that are named as on the Hugging Face hub."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.launch.checkpoint import weight_files_bytes
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")

TIMEOUT_S = 10

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""A model's name on the hub. A colon or a scheme names other places, which vLLM knows."""


def local_folder(name: str, revision: str | None) -> Path | None:
    """Return where a model's files are: its folder, its place in the hub's cache, or None."""
    from huggingface_hub import snapshot_download

    if Path(name).is_absolute():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:  # noqa: BLE001  # whatever it raises, the callers have a way on
        log.debug("event=not_in_cache model=%s cause=%r", value_text(name), error)
        return None


def require_known(name: str, revision: str | None) -> None:
    """Check with one request that a hub name can be found, in the hub's cache or on the hub.

    vLLM asks for each of several files, and again for each that it cannot get. Without a network
    that takes half a minute.

    Raises:
        ConfigError: the hub cannot be reached, or does not know the name or the revision.
    """
    if (
        not _NAME.fullmatch(name)
        or os.environ.get("VLLM_USE_MODELSCOPE")
        or _is_cached(name, revision)
    ):
        return
    from huggingface_hub import HfApi, errors

    unknown = f"there is no folder {name!r} beside the file, and"
    try:
        HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S)
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{name!r} has no revision {revision!r} on the model hub") from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{unknown} no such model on the model hub; check the name, or set HF_TOKEN if the "
            "model is private"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        log.debug(
            "event=hub_has_no_answer model=%s cause=%r", value_text(name), error
        )  # vLLM says why
    except Exception as error:  # of whichever HTTP client the hub's package uses
        raise ConfigError(
            f"{unknown} it is not in the hub's cache, and the hub cannot be reached "
            f"({one_line(error)}); name a folder, or fill the cache with `hf download {name}`"
        ) from error


def _is_cached(name: str, revision: str | None) -> bool:
    folder = local_folder(name, revision)
    return folder is not None and folder.is_dir()


def hub_weights_bytes(name: str, revision: str | None) -> int:
    """Size of a hub model's weight files, from the local cache or the hub's list; 0 if unknown."""
    from huggingface_hub import HfApi

    if folder := local_folder(name, revision):
        return weight_files_bytes({f.name: f.stat().st_size for f in folder.iterdir()})
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=10)
        return weight_files_bytes({f.rfilename: f.size or 0 for f in info.siblings or ()})
    except Exception as error:  # noqa: BLE001  # an unknown size must not end the start
        log.warning(
            "event=weights_size_unknown model=%s cause=%r", value_text(name), one_line(error)
        )
        return 0
