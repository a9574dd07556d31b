"""vLLM's frontend of one model, and parts of vLLM's server. Checked on vLLM 0.32.0.

Relies on: `AsyncLLM(client_addresses=...)` and its `engine_core.input_socket`, on which an engine
first reports that it is ready; its `_run_output_handler` and `output_handler`; `build_app`,
`init_app_state`, `vllm.parser.metrics`, `get_uvicorn_log_config`, `SSLCertRefresher`,
`EngineGenerateError`, which vLLM raises for every failure of a generation; `app.state.server`,
which the handlers of that error read; the names of `HANDLERS` in the application's state.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import typing
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import uvicorn
from starlette.middleware.exceptions import ExceptionMiddleware

from vllm_hotswap.engines.kept_responses import KeptResponses
from vllm_hotswap.engines.sendable import refusal_of
from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.host import SocketPaths, executor_class, find
from vllm_hotswap.models import ModelRoutes

HANDLERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "/classify": ("serving_classification",),
        "/generative_scoring": ("serving_generative_scoring",),
        "/pooling": ("serving_pooling",),
        "/rerank": ("serving_scores",),
        "/score": ("serving_scores",),
        "/v1/decisions": ("openai_serving_decisions",),
        "/v1/embeddings": ("serving_embedding", "serving_token_embedding"),
        "/v1/rerank": ("serving_scores",),
        "/v1/score": ("serving_scores",),
        "/v1/systemone": ("serving_structured_decisions",),
        "/v2/embed": ("serving_embedding",),
        "/v2/rerank": ("serving_scores",),
    }
)
"""Path -> the names in the state of vLLM's application that are None if a model cannot answer.

Which of several names is set depends on the model's task; a version may know only some of them.
"""

TOOL_KEYS = frozenset(["tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"])


def prepare_frontends() -> None:
    """Import what `make_client` and `make_frontend` need, and compile nothing in this process.

    Some of vLLM's processors for images and speech would make all models wait for a compiler.
    """
    import torch

    importlib.import_module("vllm.v1.engine.async_llm")
    find("build_app")
    find("init_app_state")
    torch.compiler.set_stance("force_eager")


def make_client(config: Any, sockets: SocketPaths, args: argparse.Namespace) -> Any:
    """Return an `AsyncLLM` for a loaded engine of the host. Blocks until the engine answers."""
    import zmq
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_hotswap.engines.vllm_metrics import shared_stat_logger

    client = AsyncLLM(
        vllm_config=config,
        executor_class=executor_class(config),
        log_stats=not args.disable_log_stats,
        log_requests=args.enable_log_requests,
        stat_loggers=[] if args.disable_log_stats else [shared_stat_logger()],
        client_addresses={"input_address": sockets.input, "output_address": sockets.output},
    )
    # After the host has died, its next engine connects under the same identity. Without handover,
    # ZeroMQ would refuse it until the socket has noticed that the previous one is gone.
    client.engine_core.input_socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    return client


def watch_outputs(client: Any, ended: Callable[[], None]) -> None:
    """Call `ended` once a client reads no more outputs. Needs a running loop.

    An error while it reads one, such as a detokenizer's, ends the reading for good: the client
    starts the task that reads once, and never again.
    """
    client._run_output_handler()

    def on_ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled():  # as it is when the client is shut down
            ended()

    client.output_handler.add_done_callback(on_ended)


async def forget_engine(client: Any) -> None:
    """Read, and drop, what an engine has sent that has died since."""
    socket = client.engine_core.input_socket
    while await socket.poll(0):
        await socket.recv_multipart()


async def await_engine(client: Any) -> None:
    """Wait until a new engine reports that it is ready: what is sent to it before is lost."""
    await client.engine_core.input_socket.recv_multipart()


@dataclass(frozen=True, slots=True)
class Frontend:
    """vLLM's complete API server for one engine client, ready to be called."""

    app: Any
    routes: ModelRoutes
    responses: KeptResponses | None


async def make_frontend(client: Any, args: argparse.Namespace) -> Frontend:
    tasks = await client.get_supported_tasks()
    app = find("build_app")(args, tasks, client.model_config)
    await find("init_app_state")(client, app.state, args, tasks)
    complete(app)
    # A pooler's tasks are a set: sorted, so that messages name them in one order.
    routes = ModelRoutes.of(sorted(tasks), app.routes, without=_unwanted_paths(app.state))
    serving = getattr(app.state, "openai_serving_responses", None)
    return Frontend(app, routes, KeptResponses(serving) if serving is not None else None)


class NoServer:
    """Stands in for the HTTP server of one model, which does not exist.

    vLLM asks it to exit when an engine has died. Here recovery decides what becomes of the server.
    """

    should_exit = False


def complete(app: Any) -> None:
    """Give an application what vLLM's launcher gives it, and make it answer all errors alike.

    vLLM answers fastapi's HTTP errors with an error object, but not those that starlette raises
    itself, for example for a body that cannot be parsed. And it raises the failure of a generation
    again without a message, which hides the cause.
    """
    from fastapi import HTTPException as FastApiError
    from starlette.exceptions import HTTPException
    from vllm.v1.engine.exceptions import EngineGenerateError

    app.state.server = NoServer()
    handlers = app.exception_handlers
    if FastApiError in handlers:
        _set_handler(app, HTTPException, handlers[FastApiError])
    known = next((kind for kind in EngineGenerateError.__mro__ if kind in handlers), None)
    if known is not None:
        _set_handler(app, EngineGenerateError, _naming_cause(handlers[known]))
    for kind in (TypeError, ValueError):  # from a tokenizer, before there is a generation
        if kind in handlers:
            _set_handler(app, kind, _naming_cause(handlers[kind]))


def _set_handler(app: Any, kind: type[Exception], handler: Callable[..., Any]) -> None:
    """Set a handler, even if vLLM's SageMaker part has built the application's layers already."""
    app.exception_handlers[kind] = handler
    layer = app.middleware_stack
    while layer is not None and not isinstance(layer, ExceptionMiddleware):
        layer = getattr(layer, "app", None)
    if layer is not None:
        layer.add_exception_handler(kind, handler)


def _naming_cause(answer: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def handler(request: Any, error: Exception) -> Any:
        error = refusal_of(error.__cause__ or error) or error
        if not str(error) and error.__cause__ is not None:
            cause = error.__cause__
            error.args = (f"{type(cause).__name__}: {one_line(cause)}",)
        return await answer(request, error)

    return handler


def _unwanted_paths(state: Any) -> set[str]:
    """Return the paths that are mounted although the model must not answer them.

    Without a handler, vLLM would answer 501. And vLLM's router of tokenizers belongs to the
    process: what one model's flag adds to it is there for every model that is made later.
    """
    unwanted = {path for path, names in HANDLERS.items() if _is_unanswered(state, names)}
    if not getattr(state.args, "enable_tokenizer_info_endpoint", False):
        unwanted.add("/tokenizer_info")
    return unwanted


def _is_unanswered(state: Any, names: tuple[str, ...]) -> bool:
    """Whether vLLM knows handlers of these names, and has set none of them."""
    known = [getattr(state, name) for name in names if hasattr(state, name)]
    return bool(known) and all(handler is None for handler in known)


def request_keys(app: Any, args: argparse.Namespace) -> dict[str, frozenset[str]]:
    """Return the keys that bodies of a model's routes may have at their top level, by path.

    Tools are left out if the model has no tool parser.
    """
    without = frozenset() if args.tool_call_parser else TOOL_KEYS
    return {
        route.path: keys - without
        for route in app.routes
        if (keys := _body_keys(route)) and "POST" in getattr(route, "methods", ())
    }


def _body_keys(route: Any) -> frozenset[str]:
    """Return all names of the fields of pydantic models that a FastAPI route takes as its body."""
    body = getattr(route, "body_field", None)
    kinds = [body.field_info.annotation] if body is not None else []
    kinds += typing.get_args(kinds[0]) if kinds else ()
    return frozenset(
        name
        for kind in kinds
        for key, field in getattr(kind, "model_fields", {}).items()
        for name in (key, field.alias)
        if name
    )


def name_in_parser_metrics(alias: str) -> None:
    """Make vLLM's tool parser counter, which keeps one label per process, count for `alias`."""
    from vllm.parser import metrics

    if metrics._model_name is not None:
        metrics._model_name = alias


def uvicorn_log_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return uvicorn's log configuration by vLLM's flags; None for uvicorn's own.

    Raises:
        ConfigError: `--log-config-file` cannot be used, of which vLLM itself would only warn.
    """
    given = getattr(args, "logging_config", None)
    path = given.pylogging_config_file if given else getattr(args, "log_config_file", None)
    if path:
        _check_log_config(Path(path))
    config: dict[str, Any] | None = find("get_uvicorn_log_config")(args)
    if config is not None:
        config.setdefault("disable_existing_loggers", False)  # ours is among them
    return config


def _check_log_config(path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--log-config-file cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--log-config-file: {str(path)!r} must hold a JSON object")


def certificate_refresher(config: uvicorn.Config) -> Any:
    """Return vLLM's watcher of the TLS files for `--enable-ssl-refresh`; its `stop` ends it."""
    return find("SSLCertRefresher")(
        ssl_context=config.ssl,
        key_path=config.ssl_keyfile,
        cert_path=config.ssl_certfile,
        ca_path=config.ssl_ca_certs,
    )
