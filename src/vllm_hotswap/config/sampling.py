"""How a model's configuration changes the sampling parameters of a request.

vLLM takes defaults for a few parameters from `generation_config.json` and
`override_generation_config`; clients may override them. Here every parameter may have a default or
be forced, and parameters that a model has no use for may be dropped. A model without such settings
is served without any of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

GENERATING_PATHS = frozenset(
    [
        "/cohere/v2/chat",
        "/invocations",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
    ]
)
"""Routes whose body has sampling parameters at its top level."""

LIMITS = frozenset(["max_tokens", "max_completion_tokens", "max_output_tokens"])
"""One parameter that has several names; which one counts depends on the route."""

NOT_SAMPLING = frozenset(["model", "messages", "prompt", "input", "stream"])
"""What a request is about; the configuration may not set it."""


def _only_sampling(names: Any) -> Any:
    for name in names:
        if name in NOT_SAMPLING:
            raise ValueError(f"{name!r} is not a sampling parameter")
    return names


Parameters = Annotated[dict[str, Any], AfterValidator(_only_sampling)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class SamplingPolicy:
    """The `sampling` section of a model."""

    defaults: Annotated[
        Parameters,
        Field(description="parameters set on a request where its client sends none of that name"),
    ] = Field(default_factory=dict)
    force: Annotated[
        Parameters,
        Field(description="parameters set on every request, whatever its client sends"),
    ] = Field(default_factory=dict)
    drop: Annotated[
        list[str],
        AfterValidator(_only_sampling),
        Field(description="parameters removed from every request"),
    ] = Field(default_factory=list)
    drop_unsupported: Annotated[
        bool,
        Field(
            description="remove parameters that the route does not know, and tools where the "
            "model has no tool parser; vLLM would ignore the former and refuse the latter"
        ),
    ] = False

    @property
    def is_empty(self) -> bool:
        return not (self.defaults or self.force or self.drop or self.drop_unsupported)

    def apply(
        self, body: Mapping[str, Any], known: frozenset[str] | None, limit: str = "max_tokens"
    ) -> dict[str, Any]:
        """Return the body of a request as the model gets it.

        Args:
            body: what the client sent.
            known: what the route knows and the model supports; None if that is unknown.
            limit: what the route calls `max_tokens`.
        """
        defaults, force = _renamed(self.defaults, limit), _renamed(self.force, limit)
        dropped = set(self.drop)
        if self.drop_unsupported and known is not None:
            dropped |= body.keys() - known
        if limit in force:
            dropped |= LIMITS
        kept = {name: value for name, value in body.items() if name not in dropped}
        if LIMITS & kept.keys():
            defaults.pop(limit, None)
        return {**defaults, **kept, **force}


def _renamed(parameters: Mapping[str, Any], limit: str) -> dict[str, Any]:
    return {limit if name in LIMITS else name: value for name, value in parameters.items()}
