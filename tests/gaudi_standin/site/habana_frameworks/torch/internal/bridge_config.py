"""Settings of the bridge. Steps of a warm-up that only compiles are run in full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_settings: dict[str, object] = {"PT_COMPILE_ONLY_MODE": False}


@contextlib.contextmanager
def env_setting(name: str, value: object) -> Iterator[None]:
    """Return a setting. Raises `KeyError` for an unknown one."""
    before = _settings[name]
    _settings[name] = value
    try:
        yield
    finally:
        _settings[name] = before


def get_pt_compile_only_mode() -> bool:
    return bool(_settings["PT_COMPILE_ONLY_MODE"])
