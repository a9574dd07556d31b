"""Checks requests for a model that has no frontend yet, as its frontend would.

A frontend needs an engine to be built. vLLM's server that only renders (`vllm launch render`) needs
none, and checks requests with the same code: every request is sent there first.

Relies on: `build_app` for the task `render`, `init_render_app_state`, and routes `<path>/render`.
Checked on vLLM 0.32.0; without such a server, no request is refused in advance.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import httpx
from starlette.responses import Response

from vllm_hotswap.engines.frontend import complete
from vllm_hotswap.engines.vllm_metrics import without_frontend_metrics
from vllm_hotswap.errors import ConfigError
from vllm_hotswap.host import find
from vllm_hotswap.launch import generates
from vllm_hotswap.models import Previewed

REFUSALS = (400, 422)
"""Other statuses are about this server: for example, it knows no adapters."""


class Preview:
    """A server that only renders, in this process, for one model."""

    def __init__(self, app: Any) -> None:
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://preview",
        )
        self._paths = {getattr(route, "path", "") for route in app.routes}

    def __repr__(self) -> str:
        return f"<Preview paths={sorted(path for path in self._paths if 'render' in path)}>"

    async def check(self, path: str, content_type: str, body: bytes) -> Previewed:
        """Check a request."""
        if f"{path}/render" not in self._paths:
            return Previewed()
        answer = await self._client.post(
            f"{path}/render", content=body, headers={"content-type": content_type}
        )
        if answer.status_code not in REFUSALS:
            return Previewed(is_accepted=answer.is_success)
        content_type = answer.headers.get("content-type")
        return Previewed(Response(answer.content, answer.status_code, media_type=content_type))


def make_preview(args: argparse.Namespace, config: Any) -> Preview | None:
    """Make a model's preview; None if the installed vLLM has none, or none for this model.

    Raises whatever vLLM raises for files that cannot be read. Call it on a thread of its own.
    """
    if not generates(config):
        return None
    try:
        build_app, init_state = find("build_app"), find("init_render_app_state")
    except ConfigError:
        return None
    with without_frontend_metrics():
        app = build_app(args, ("render",))
        asyncio.run(init_state(config, app.state, args))
        complete(app)
        app.middleware_stack = app.build_middleware_stack()
    return Preview(app)
