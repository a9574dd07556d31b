"""`${NAME}` in the values of the YAML file: filled from the environment, and never shown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm_hotswap.config.written import Keys, Source, Surprising, read_scalar, shown
from vllm_hotswap.errors import ConfigError, ConfigMistakes, Mistake

SECRET_LENGTH = 8
"""A shorter value does not count as a secret: it may be a word of any message."""

# `$${` stands for a plain `${`.
_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")


class References:
    """Fills the references of one document, and remembers which values must not be shown."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self._secrets: dict[str, str] = {}
        """Values, in every form in which a message may show them, and the reference of each."""
        self.unset: list[Mistake] = []
        """Variables that are needed but not set. A reference to one is left as it is."""

    def fill(self, value: Any, source: Source, *keys: str | int) -> Any:
        """Return the value with every `${NAME}` and `${NAME:-default}` in it replaced.

        A text that is nothing but one reference may become a number, a boolean or null. Clients'
        keys stay text. A variable that is not set is added to `unset`.
        """
        if isinstance(value, dict):
            return {key: self.fill(item, source, *keys, str(key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.fill(item, source, *keys, n) for n, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        filled = _REFERENCE.sub(lambda match: self._value(match, source, keys), value)
        is_one = (whole := _REFERENCE.fullmatch(value)) and whole[1]
        return read_scalar(filled) if is_one and not _is_client_key(keys) else filled

    def hide(self, text: str) -> str:
        """Return the text with references in place of the values of their variables."""
        for value in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(value, self._secrets[value])
        return text

    @contextmanager
    def hidden_in_errors(self) -> Iterator[None]:
        """Hide values from the environment in every `ConfigError` that passes."""
        try:
            yield
        except ConfigMistakes as error:
            hidden = (
                Mistake(mistake.line, self.hide(mistake.message)) for mistake in error.mistakes
            )
            raise ConfigMistakes(hidden) from None
        except ConfigError as error:
            raise ConfigError(self.hide(error.message)) from None

    def _value(self, match: re.Match[str], source: Source, keys: Keys) -> str:
        name, default = match.groups()
        if name is None:
            return "${"
        value = self._environment.get(name)
        is_given = bool(value) or default is None
        value = value if is_given else default
        if value is None:
            place = source.place(*keys)
            message = (
                f"{place}: the environment variable {name!r} is not set; set it, "
                f"give a default with ${{{name}:-default}}, or write $${{ for a plain ${{"
            )
            self.unset.append(Mistake(place.line, message))
            return match.group()
        if is_given:
            forms = {form: match.group() for form in _forms(value) if len(form) >= SECRET_LENGTH}
            self._secrets.update(forms)
        return value


def _is_client_key(keys: Keys) -> bool:
    return keys[:1] == ("rights",) and keys[2:3] == ("keys",)


def _forms(value: str) -> tuple[str, ...]:
    """Return the value as it is, quoted by Python and by JSON, on one line, and as a number."""
    quoted, as_json = repr(value)[1:-1], json.dumps(value)[1:-1]
    read = read_scalar(value)
    read = read.value if isinstance(read, Surprising) else read
    number = value if isinstance(read, str) else shown(read)
    return value, quoted, as_json, " ".join(value.split()), number
