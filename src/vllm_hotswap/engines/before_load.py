"""What is checked of a model before it has a frontend: its tokenizer, and requests for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from vllm_hotswap.engines.daemon_thread import on_daemon_thread
from vllm_hotswap.engines.preview import Preview, make_preview
from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.launch import ModelLaunch, rehearsal
from vllm_hotswap.models import Previewed
from vllm_hotswap.system import value_text

log = logging.getLogger("vllm_hotswap")

REHEARSAL_S = 120.0
"""Seconds in which a tokenizer must be there, its download included."""


class BeforeLoad:
    """Rehearses the frontend of one model, and checks requests as it would.

    The mutable state is `_preview` and `_has_tried_preview`. The first preview makes it, under the
    lock of frontends; `end` gives it up.
    """

    def __init__(
        self,
        launch: ModelLaunch,
        one_frontend_at_a_time: asyncio.Lock,
        has_frontend: Callable[[], bool],
    ) -> None:
        self._launch = launch
        self._one_frontend_at_a_time = one_frontend_at_a_time
        self._has_frontend = has_frontend
        self._preview: Preview | None = None
        self._has_tried_preview = False

    def __repr__(self) -> str:
        return f"<BeforeLoad {self._launch.alias} has_preview={self._preview is not None}>"

    async def rehearse(self) -> None:
        """Make what the frontend will need, without an engine.

        Raises:
            ConfigError: it could not be built; the message says why.
        """
        alias, args, config = self._launch.alias, self._launch.args, self._launch.vllm_config
        async with self._one_frontend_at_a_time:
            try:
                async with asyncio.timeout(REHEARSAL_S):
                    await on_daemon_thread(lambda: rehearsal.rehearse(args, config))
            except TimeoutError:
                raise ConfigError(
                    f"model {alias!r}: its tokenizer was not read within {REHEARSAL_S:g} s"
                ) from None
            except ConfigError as error:
                raise ConfigError(f"model {alias!r}: {error.message}") from error

    async def preview(self, path: str, content_type: str, body: bytes) -> Previewed:
        """Return what the frontend would answer to a POST, if that can be known."""
        if not self._has_tried_preview:
            async with self._one_frontend_at_a_time:
                await self._try_preview()
        preview = self._preview
        return await preview.check(path, content_type, body) if preview else Previewed()

    def end(self) -> None:
        """Check no more requests: there is a frontend."""
        self._preview = None

    async def _try_preview(self) -> None:
        # Asked under the lock: a frontend, or a preview, may have been made meanwhile.
        if not self._has_frontend() and not self._has_tried_preview:
            self._preview = await self._make_preview()
            self._has_tried_preview = True

    async def _make_preview(self) -> Preview | None:
        args, config = self._launch.args, self._launch.vllm_config
        if not self._launch.sampling.is_empty:
            return None  # a parameter may be wrong that its frontend will never see
        try:
            return await on_daemon_thread(lambda: make_preview(args, config))
        except Exception as error:  # noqa: BLE001  # the load will tell what is wrong
            alias = value_text(self._launch.alias)
            log.warning("event=no_preview model=%s cause=%r", alias, one_line(error))
            return None
