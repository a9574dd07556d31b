"""Environment variables that models need, each with its own values.

`quant_config` is one: Gaudi's quantisation reads `QUANT_CONFIG` when a model is loaded and while
it runs. What a model gets depends on its own configuration and on the environment in which the
process started, never on which models were used before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

Environment = Mapping[str, str | None]
"""Variables by name; None for one that must not be set."""


class Variables:
    """The variables of one process. Not thread-safe.

    The mutable state is `_by_model` of each model, `_base` (the values before the first wish for a
    variable) and `_active`, whose wishes apply while no other model is used.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        self._environment = environment
        self._by_model: dict[str, Environment] = {}
        self._base: dict[str, str | None] = {}
        self._active: str | None = None

    def register(self, alias: str, environment: Environment) -> None:
        """Remember which variables a model needs."""
        self._by_model[alias] = environment
        for name in environment:
            self._base.setdefault(name, self._environment.get(name))

    def activate(self, alias: str) -> None:
        """Set the variables of this model, from now on."""
        self._active = alias
        self._set(alias)

    @contextmanager
    def applied(self, alias: str) -> Iterator[None]:
        """Set the variables of this model inside the block, and the active one's again after it."""
        self._set(alias)
        try:
            yield
        finally:
            self._set(self._active)

    def _set(self, alias: str | None) -> None:
        environment = {} if alias is None else self._by_model.get(alias, {})
        for name, value in {**self._base, **environment}.items():
            if value is None:
                self._environment.pop(name, None)
            else:
                self._environment[name] = value
