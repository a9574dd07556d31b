"""The routes of vLLM's applications, and the names of their handlers, read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tools.vllm_seams.tree import Tree

METHODS = frozenset(["get", "post", "put", "delete", "patch", "head"])
PACKAGE = "vllm.entrypoints"


def routes_in(tree: Tree) -> dict[str, str]:
    """Return `METHOD /path` -> the module that adds it; sockets have the method `WEBSOCKET`."""
    return {
        line: module.name
        for module in tree.modules(PACKAGE)
        for node in module.walk()
        if isinstance(node, ast.Call)
        for line in _lines(node)
    }


def handlers_in(tree: Tree) -> frozenset[str]:
    """Return names that are set on the state of an application."""
    return frozenset(
        node.attr
        for module in tree.modules(PACKAGE)
        for node in module.walk()
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and re.fullmatch(r"(app\.)?state", ast.unparse(node.value))
    )


def _lines(call: ast.Call) -> Iterator[str]:
    """Yield routes that a call such as `router.post("/path")` adds."""
    if not isinstance(call.func, ast.Attribute) or not (path := _path(call)):
        return
    kind = call.func.attr
    if kind in METHODS:
        yield f"{kind.upper()} {path}"
    elif kind == "websocket":
        yield f"WEBSOCKET {path}"
    elif kind in {"api_route", "route", "add_api_route", "add_route"}:
        yield from (f"{method.upper()} {path}" for method in _methods(call) or ["GET"])


def _path(call: ast.Call) -> str:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "path"]
    for value in [*call.args[:1], *named]:
        if isinstance(value, ast.Constant) and str(value.value).startswith("/"):
            return str(value.value)
    return ""


def _methods(call: ast.Call) -> list[str]:
    for keyword in call.keywords:
        if keyword.arg == "methods":
            return [str(value) for value in ast.literal_eval(keyword.value)]
    return []
