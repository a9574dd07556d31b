"""The OpenAPI description of our own routes, made from the table of routes.

https://spec.openapis.org/oas/v3.1.0. vLLM's routes are described by vLLM, at `/openapi.json`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from vllm_hotswap import __version__
from vllm_hotswap.access import Role
from vllm_hotswap.api.schemas import ErrorAnswer
from vllm_hotswap.api.vllm_routes import Route, RouteDoc
from vllm_hotswap.errors import (
    CrossOriginRefused,
    HostRefused,
    HotswapError,
    SwitchNotAllowed,
    Unauthorized,
)

SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
ROLE_ERRORS: Mapping[Role, tuple[type[HotswapError], ...]] = {
    Role.PUBLIC: (),
    Role.USER: (Unauthorized,),
    Role.ADMIN: (Unauthorized, SwitchNotAllowed),
}
ALIAS = {"type": "string", "pattern": "^([^/\\s]|[^/\\s][^\\s]*[^/\\s])$"}

_PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")

Json = dict[str, Any]


def describe(routes: Iterable[Route]) -> Json:
    """Describe the routes that have an `doc`."""
    schemas = _Schemas()
    paths: dict[str, Json] = defaultdict(dict)
    for route in routes:
        if route.doc is not None:
            path = _PARAMETER.sub(r"{\1}", route.path)
            paths[path][route.method.lower()] = _operation(route, route.doc, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vllm-hotswap",
            "version": __version__,
            "description": "The routes of vllm-hotswap itself; every GET route also answers "
            "HEAD. Routes of models are described at /openapi.json.",
        },
        "paths": dict(paths),
        "components": {"schemas": schemas.definitions, "securitySchemes": SCHEMES},
    }


class _Schemas:
    """Makes references to schemas of types, and collects the schemas."""

    def __init__(self) -> None:
        self.definitions: Json = {}

    def of(self, kind: Any) -> Json:
        schema = TypeAdapter(kind).json_schema(
            mode="validation",
            ref_template="#/components/schemas/{model}",
            schema_generator=_NoTitles,
        )
        self.definitions.update(schema.pop("$defs", {}))
        name = getattr(kind, "__name__", None)
        if name is None:  # a union, say
            return schema
        self.definitions[name] = schema
        return {"$ref": f"#/components/schemas/{name}"}


class _NoTitles(GenerateJsonSchema):
    """A generator without titles, which would only repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _operation(route: Route, doc: RouteDoc, schemas: _Schemas) -> Json:
    operation: Json = {
        "summary": doc.summary,
        "operationId": _operation_id(route),
        "tags": [route.role.value],
        "parameters": [*_path_parameters(route.path), *_query_parameters(doc)],
        "responses": {"200": _response("Success.", doc.media_type, doc.answer, schemas)},
    }
    if doc.body is not None:
        schema = schemas.of(doc.body)
        operation["requestBody"] = {
            "required": doc.needs_body,
            "content": {"application/json": {"schema": schema}},
        }
    if route.role is not Role.PUBLIC:
        operation["security"] = [{name: []} for name in SCHEMES]
    operation["responses"].update(_error_responses(route, doc, schemas))
    return operation


def _operation_id(route: Route) -> str:
    path = re.sub(rf"{_PARAMETER.pattern}$", r"by_\1", route.path)
    words = re.findall(r"\w+", _PARAMETER.sub("", path))
    return "_".join([route.method.lower(), *words])


def _path_parameters(path: str) -> list[Json]:
    return [
        {"name": name, "in": "path", "required": True, "schema": ALIAS}
        for name in _PARAMETER.findall(path)
    ]


def _query_parameters(doc: RouteDoc) -> list[Json]:
    if doc.query is None:
        return []
    schema = doc.query.model_json_schema(schema_generator=_NoTitles)
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": field}
        for name, field in schema["properties"].items()
    ]


def _response(description: str, media_type: str, kind: Any, schemas: _Schemas) -> Json:
    if media_type == "":
        return {"description": description}
    content = {} if kind is None else {"schema": schemas.of(kind)}
    return {"description": description, "content": {media_type: content}}


def _error_responses(route: Route, doc: RouteDoc, schemas: _Schemas) -> Json:
    """Return a response for each error status, with every code that it may have."""
    codes: dict[int, list[str]] = defaultdict(list)
    pages = (CrossOriginRefused,) if route.is_kept_from_other_sites else ()
    for kind in (*ROLE_ERRORS[route.role], *pages, HostRefused, *doc.errors):
        codes[kind.status].append(f"`{kind.code}`")
    return {
        str(status): _response(" or ".join(codes[status]), "application/json", ErrorAnswer, schemas)
        for status in sorted(codes)
    }
