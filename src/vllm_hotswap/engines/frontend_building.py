"""Building the frontend of one model: vLLM's, with what this package adds to it.

The client reads in turns, stamps are checked, grammars are tried aside, and the application may
get a filter of sampling parameters.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from starlette.types import ASGIApp

from vllm_hotswap.engines import frontend
from vllm_hotswap.engines.daemon_thread import on_daemon_thread
from vllm_hotswap.engines.engine_share import EngineShare
from vllm_hotswap.engines.sampling_filter import SamplingFilter
from vllm_hotswap.engines.spread import read_in_turns, spread
from vllm_hotswap.engines.stamps import StampedCore
from vllm_hotswap.engines.vllm_metrics import adopting_frontend_metrics
from vllm_hotswap.host import SocketPaths, grammars
from vllm_hotswap.launch import ModelLaunch
from vllm_hotswap.models import pace_tasks
from vllm_hotswap.system import Helpers
from vllm_hotswap.tasks import FairPool

SPARE_CHECKS = 3
"""More threads for checks of grammars, one for each check that takes very long."""

REHEARSALS = 2
"""Grammars of one model that are tried in processes at a time; as many more if some are stuck."""

_helpers = Helpers()
"""Of all models. They end with this process."""
atexit.register(_helpers.close)


async def make_client(launch: ModelLaunch, sockets: SocketPaths) -> Any:
    """Return vLLM's client of a loaded engine, as vLLM makes it. Cannot be cancelled."""
    config, args = launch.vllm_config, launch.args
    # The constructor blocks until the engine's ready message, hence the thread.
    return await on_daemon_thread(lambda: frontend.make_client(config, sockets, args))


async def build(
    launch: ModelLaunch, client: Any, exits: AsyncExitStack, on_broken: Callable[[], None]
) -> tuple[frontend.Frontend, Any]:
    """Return the frontend around a new client, and the list of models that adapters go to.

    Args:
        launch: the model.
        client: from `make_client`; it is changed.
        exits: gets what must be closed.
        on_broken: called once the client reads no more outputs.
    """
    pace = pace_tasks()
    _bound(launch, client, pace)
    checks = _grammar_checks(launch.alias)
    exits.callback(checks.shutdown)
    grammars.check_aside(client, checks)
    with adopting_frontend_metrics(launch.alias):
        made = await frontend.make_frontend(client, launch.args)
        app = made.app
        spread(client, app, pace)
        frontend.watch_outputs(client, on_broken)
        # Built now, so that its metrics are adopted; vLLM's SageMaker part may have done so.
        app.middleware_stack = app.middleware_stack or app.build_middleware_stack()
    await exits.enter_async_context(app.router.lifespan_context(app))
    return replace(made, app=_filtered(app, launch)), app.state.openai_serving_models


def _bound(launch: ModelLaunch, client: Any, pace: Any) -> None:
    """Have the client read in turns, and give requests to the engine stamped and in fair shares."""
    read_in_turns(client.engine_core)
    scheduling = launch.vllm_config.scheduler_config
    share = EngineShare(scheduling.max_num_seqs, scheduling.max_num_batched_tokens, time.monotonic)
    client.engine_core = StampedCore(launch.alias, client.engine_core, pace, share)


def _grammar_checks(alias: str) -> grammars.Checks:
    return grammars.Checks(
        FairPool(1, f"grammars of {alias}", SPARE_CHECKS),
        FairPool(
            REHEARSALS,
            f"rehearsals of {alias}",
            REHEARSALS,
            long_s=grammars.LONG_REHEARSAL_S,
        ),
        _helpers,
    )


def _filtered(app: Any, launch: ModelLaunch) -> ASGIApp:
    """The application behind what the configuration says of sampling."""
    if launch.sampling.is_empty:
        return app  # type: ignore[no-any-return]
    return SamplingFilter(app, launch.sampling, frontend.request_keys(app, launch.args))
