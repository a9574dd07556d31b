"""Which tasks a model may have, read from its configuration, before there is an engine to ask.

An engine reports the tasks of the model that it has built. Without one, vLLM's configuration says
which runner the model is for, and the registry what its class can do. That settles it for most
models. For the others, every task is included that the model may turn out to have, so that no
request is refused that it would answer.

Relies on `runner_type`, `convert_type`, `score_type`, `architectures`, `is_multimodal_model` and
`_model_info` of vLLM's `ModelConfig`, and on which routes vLLM mounts for which task
(`register_api_routers`, `register_pooling_api_routers`). Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from vllm_hotswap.models import ForeseenRoutes

EMBEDDING = frozenset(["embed", "token_embed"])
CLASSIFYING = frozenset(["classify", "token_classify"])
OTHER_POOLING = frozenset(["token_classify", "plugin", "embed&token_classify"])
POOLING = EMBEDDING | CLASSIFYING | OTHER_POOLING
SPEECH = frozenset(["transcription", "realtime"])

SCORING = ("/rerank", "/score", "/v1/rerank", "/v1/score", "/v2/rerank")

TASKS_OF_PATH: Mapping[str, frozenset[str]] = MappingProxyType(
    dict.fromkeys(
        [
            "/cohere/v2/chat",
            "/cohere/v2/chat/render",
            "/generative_scoring",
            "/inference/v1/generate",
            "/v1/chat/completions",
            "/v1/chat/completions/batch",
            "/v1/chat/completions/derender",
            "/v1/chat/completions/render",
            "/v1/completions",
            "/v1/completions/derender",
            "/v1/completions/render",
            "/v1/decisions",
            "/v1/messages",
            "/v1/messages/count_tokens",
            "/v1/messages/render",
            "/v1/responses",
            "/v1/responses/render",
        ],
        frozenset(["generate"]),
    )
    | dict.fromkeys(SCORING, EMBEDDING | {"classify"})
    | dict.fromkeys(["/v1/embeddings", "/v2/embed"], EMBEDDING)
    | dict.fromkeys(
        ["/v1/audio/transcriptions", "/v1/audio/translations"], frozenset(["transcription"])
    )
    | {
        "/classify": frozenset(["classify"]),
        "/pooling": POOLING,
        "/v1/realtime": frozenset(["realtime"]),
    }
)
"""Path -> tasks, one of which a model needs to answer it. Any model answers other paths."""


def foresee(config: Any) -> ForeseenRoutes | None:
    """Return what a model's application will answer, and what not; None if its runner is unknown.

    Args:
        config: its `VllmConfig`.
    """
    model = config.model_config
    match str(model.runner_type):
        case "generate":
            tasks, is_certain = _generation(model)
            words = sorted(tasks - {"realtime"})
        case "pooling":
            tasks, is_certain = _pooling(model)
            words = sorted(tasks) if is_certain else ["pooling"]
        case _:
            return None
    absent = (path for path, needed in TASKS_OF_PATH.items() if not needed & tasks)
    present = (path for path, needed in TASKS_OF_PATH.items() if needed & tasks and is_certain)
    return ForeseenRoutes(
        tuple(words), frozenset(absent), frozenset(present) - _optional_paths(tasks)
    )


def _optional_paths(tasks: frozenset[str]) -> frozenset[str]:
    """Return paths that depend on a variable, the version, or a classifier's number of classes."""
    pairs = SCORING if "classify" in tasks else ()
    return frozenset(["/cohere/v2/chat", "/cohere/v2/chat/render", "/v1/decisions", *pairs])


def _generation(model: Any) -> tuple[frozenset[str], bool]:
    """Return the tasks of a model that generates, and whether they are certain.

    Only the model's class says whether it takes part in real-time sessions.
    """
    info = getattr(model, "_model_info", None)
    if getattr(info, "supports_transcription_only", False):
        return SPEECH, False
    if not model.is_multimodal_model and not getattr(info, "supports_transcription", False):
        return frozenset(["generate"]), True
    hears = info is None or info.supports_transcription
    return (SPEECH if hears else SPEECH - {"transcription"}) | {"generate"}, False


def _pooling(model: Any) -> tuple[frozenset[str], bool]:
    """Return the tasks of a pooling model, and whether they are certain.

    Models that are made for pooling choose their tasks; the others get them from vLLM.
    """
    info = getattr(model, "_model_info", None)
    if info is not None and not info.is_pooling_model:
        tasks = {"embed": EMBEDDING, "classify": CLASSIFYING}.get(str(model.convert_type))
        if tasks is not None:
            return tasks, True
    names = " ".join(model.architectures)
    is_cross_encoder = str(model.score_type) == "cross-encoder"
    tasks = OTHER_POOLING
    if not is_cross_encoder and "Classification" not in names:
        tasks |= EMBEDDING
    if is_cross_encoder or any(name in names for name in ("Classification", "Rank", "Reward")):
        tasks |= CLASSIFYING
    return tasks, False
