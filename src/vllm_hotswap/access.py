"""Who may call what: keys, roles, which routes of vLLM are reached, and whether switching is open.

`--api-key` (or `VLLM_API_KEY`) is the user key. `--admin-key` (or `VLLM_HOTSWAP_ADMIN_KEY`) is
the admin key; it may do what the user key may, too. Without an admin key, the quickstart's
`VLLM_SERVER_DEV_MODE=1` opens switching to whoever may use the server, and nothing else.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from starlette.datastructures import Headers

from vllm_hotswap.errors import SwitchNotAllowed, Unauthorized


class Role(Enum):
    """What a route asks of its caller."""

    PUBLIC = "public"
    USER = "user"
    ADMIN = "admin"


VLLM_INFERENCE_PATHS = frozenset(
    [
        "/classify",
        "/cohere/v2/chat",
        "/cohere/v2/chat/render",
        "/detokenize",
        "/generative_scoring",
        "/inference/v1/generate",
        "/invocations",
        "/pooling",
        "/rerank",
        "/score",
        "/tokenize",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/derender",
        "/v1/chat/completions/render",
        "/v1/completions",
        "/v1/completions/derender",
        "/v1/completions/render",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/messages/render",
        "/v1/rerank",
        "/v1/responses",
        "/v1/responses/render",
        "/v1/responses/{response_id}/cancel",
        "/v1/score",
        "/v1/systemone",
        "/v2/embed",
        "/v2/rerank",
    ]
)
"""Routes of vLLM 0.32.0's applications that take a body, answer it, and change nothing else.

A part in braces stands for any one segment of a path.
"""

VLLM_ADMIN_PATHS = frozenset(
    [
        "/abort_requests",
        "/adapters",
        "/adapters/{adapter_name}",
        "/collective_rpc",
        "/fault_tolerance/apply",
        "/finish_weight_update",
        "/inference/v1/abort_requests",
        "/init_weight_transfer_engine",
        "/is_scaling_elastic_ep",
        "/pause",
        "/release_kv_cache_memory",
        "/reset_encoder_cache",
        "/reset_mm_cache",
        "/reset_prefix_cache",
        "/resume",
        "/scale_elastic_ep",
        "/shutdown_weight_transfer_engine",
        "/sleep",
        "/start_draft_weight_update",
        "/start_profile",
        "/start_weight_update",
        "/stop_profile",
        "/update_weight_version",
        "/update_weights",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/wake_up",
        "/weight_checker",
    ]
)
"""Routes of vLLM 0.32.0's applications that change state. Most are never mounted here."""

_READING_METHODS = frozenset(["GET", "HEAD", "OPTIONS"])


def vllm_role(method: str, path: str) -> Role | None:
    """What a route of vLLM's applications asks of its caller; None if it is not reached at all.

    A route that only reads is any user's. Of the others, those are reached that are known.
    """
    if path in VLLM_INFERENCE_PATHS:
        return Role.USER
    if path in VLLM_ADMIN_PATHS or _is_like_any(path, _ADMIN_PATTERNS):
        return Role.ADMIN
    if method in _READING_METHODS or _is_like_any(path, _INFERENCE_PATTERNS):
        return Role.USER
    return None


def _patterns(paths: Iterable[str]) -> tuple[re.Pattern[str], ...]:
    with_parts = sorted(path for path in paths if "{" in path)
    return tuple(re.compile(re.sub(r"\{\w+\}", "[^/]+", path)) for path in with_parts)


def _is_like_any(path: str, patterns: Iterable[re.Pattern[str]]) -> bool:
    return any(pattern.fullmatch(path) for pattern in patterns)


_INFERENCE_PATTERNS = _patterns(VLLM_INFERENCE_PATHS)
_ADMIN_PATTERNS = _patterns(VLLM_ADMIN_PATHS)


@dataclass(frozen=True, slots=True)
class Access:
    """The keys of a server. Empty tuples: no key is asked for."""

    user_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    dev_mode: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], admin_keys: Iterable[str]) -> Access:
        """Flags win over the environment; empty keys count as none."""
        user = _given([environment.get("VLLM_API_KEY", "")])
        admin = _given(admin_keys) or _given([environment.get("VLLM_HOTSWAP_ADMIN_KEY", "")])
        return cls(user, admin, _is_on(environment.get("VLLM_SERVER_DEV_MODE", "")))

    def with_user_keys(self, keys: Iterable[str] | None) -> Access:
        """The same with the keys of `--api-key`, where there are any."""
        given = _given(keys or ())
        return replace(self, user_keys=given) if given else self

    def check(self, role: Role, headers: Headers) -> None:
        """Let the caller pass.

        Raises:
            Unauthorized: no valid key was sent.
            SwitchNotAllowed: the key is no admin key, or nobody may change state.
        """
        if role is Role.PUBLIC:
            return
        key = _key(headers)
        is_admin = _matches(key, self.admin_keys)
        if self.user_keys and not is_admin and not _matches(key, self.user_keys):
            raise Unauthorized("a valid API key is needed; send Authorization: Bearer <key>")
        if role is Role.ADMIN and not is_admin:
            self._check_admin()

    def _check_admin(self) -> None:
        if self.admin_keys:
            raise SwitchNotAllowed("this route changes the server's state and needs an admin key")
        if not self.dev_mode:
            raise SwitchNotAllowed(
                "switching is closed: start the server with --admin-key (or "
                "VLLM_HOTSWAP_ADMIN_KEY), or with VLLM_SERVER_DEV_MODE=1 on a trusted network"
            )


def _is_on(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")


def _given(keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(key for key in keys if key)


def _key(headers: Headers) -> bytes:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip().encode()
    return headers.get("x-api-key", "").encode()


def _matches(key: bytes, known: Iterable[str]) -> bool:
    """Compares with every key, in constant time each."""
    matches = [secrets.compare_digest(key, other.encode()) for other in known]
    return any(matches)
