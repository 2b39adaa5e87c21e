"""The routes, and their OpenAPI description."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.schemas import BaseSchemaGenerator
from starlette.types import ASGIApp

from .. import demo
from .._version import __version__
from . import overview
from .answers import answer, wait_for
from .body import read_json
from .faults import Fault, internal
from .guard import guarded
from .models import Models
from .schema import ChatRequest, CompletionRequest, ErrorBody
from .settings import Settings

PAGE = files(__package__) / "page"
TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# Pages that other servers have.
NOT_HERE = {
    "embeddings": "this server's models write text and have no embeddings to give",
    "responses": "this server has no Responses API: use /v1/chat/completions",
    "messages": "this server has no Anthropic API: use /v1/chat/completions",
}
EVENT = {
    "type": "object",
    "description": "A server-sent event: a chunk as JSON; the last one is [DONE].",
    "required": ["data"],
    "properties": {"data": {"type": "string"}},
}


def build(settings: Settings, served: Models) -> ASGIApp:
    """Return the ASGI application."""
    limits = settings.limits
    pages = _page_files()

    async def complete(
        request: Request, kind: type[ChatRequest] | type[CompletionRequest]
    ) -> Response:
        asked = await read_json(request, kind, limit=limits.body, seconds=limits.idle)
        return await answer(served, request, asked, ping=limits.ping)

    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await complete(request, ChatRequest)

    async def text_completions(request: Request) -> Response:
        """Continue a text."""
        return await complete(request, CompletionRequest)

    async def models(request: Request) -> Response:
        """List the models and their steered presets."""
        return JSONResponse(served.listing())

    async def model(request: Request) -> Response:
        """Return one model, listed or not."""
        name = request.path_params["name"]
        base = served.name_of(name)
        if "@" not in name and served.several and served.states().get(base) != "loaded":
            return JSONResponse(overview.entry(base, loaded=False))
        with served.lease(name) as lease:
            await wait_for(lease, request)
            return JSONResponse(overview.model(lease.served.vectors, name))

    async def steering(request: Request) -> Response:
        """List the vectors and presets of one model, with their defaults and measurements."""
        with served.lease(request.query_params.get("model")) as lease:
            await wait_for(lease, request)
            listed = overview.steering(
                lease.served.vectors,
                max_tokens=limits.max_tokens,
                toy=lease.served.place == demo.NAME,
            )
            return JSONResponse(listed)

    async def health(request: Request) -> Response:
        """Report whether the server is up, and how many answers run and wait."""
        running, up = served.running, served.alive
        body = {
            "status": "ok" if up else "down",
            "model": served.default(),
            "version": __version__,
            "running": running,
            "waiting": served.promised - running,
            "models": served.states(),
        }
        return JSONResponse(body, 200 if up else 503)

    async def openapi(request: Request) -> Response:
        return JSONResponse(description)

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in pages:
            raise HTTPException(404)
        kind, content = pages[name]
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        served.attach(asyncio.get_running_loop())
        yield
        served.end()

    routes = [
        Route("/", page, include_in_schema=False),
        Route("/page/{name}", page, include_in_schema=False),
        Route("/openapi.json", openapi, include_in_schema=False),
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/", models, include_in_schema=False),
        Route("/v1/models/{name:path}", model),
        Route("/v1/steering", steering),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", text_completions, methods=["POST"]),
    ]
    bodies = {"chat_completions": ChatRequest, "text_completions": CompletionRequest}
    description = describe(routes, bodies, with_key=settings.access.key is not None)
    application = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: _no_such_page, Fault: _refuse, Exception: _fail},
    )
    application.router.redirect_slashes = False
    return guarded(application, settings.access, stall=limits.idle)


def describe(
    routes: Sequence[Route], bodies: dict[str, type[BaseModel]], *, with_key: bool
) -> dict[str, object]:
    """Return the OpenAPI description of the routes; ``bodies``: types of bodies by function."""
    kinds = [(kind, "validation") for kind in (*bodies.values(), ErrorBody)]
    _, made = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    components = {"schemas": made["$defs"]}
    answer = {
        "description": "The answer.",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
    paths: dict[str, dict[str, object]] = {}
    for endpoint in BaseSchemaGenerator().get_endpoints(routes):
        operation: dict[str, object] = {"summary": endpoint.func.__doc__}
        responses = {"200": answer, "default": {"description": "An error."} | _schema(ErrorBody)}
        if names := re.findall(r"{(\w+)}", endpoint.path):
            text = {"in": "path", "required": True, "schema": {"type": "string"}}
            operation["parameters"] = [{"name": name} | text for name in names]
        if endpoint.func.__name__ in bodies:
            body = _schema(bodies[endpoint.func.__name__])
            operation["requestBody"] = {"required": True} | body
            stream = {"text/event-stream": {"schema": EVENT}}
            responses["200"] = answer | {"content": answer["content"] | stream}
        paths.setdefault(endpoint.path, {})[endpoint.http_method] = operation | {
            "responses": responses
        }
    document = {
        "openapi": "3.1.0",
        "info": {"title": "mlx-densesteer", "version": __version__},
        "paths": paths,
        "components": components,
    }
    if with_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _schema(kind: type[BaseModel]) -> dict[str, object]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"content": {"application/json": {"schema": schema}}}


async def _no_such_page(request: Request, error: Exception) -> Response:
    """Return a 404 or 405 in OpenAI's shape."""
    if not isinstance(error, HTTPException) or error.status_code not in (404, 405):
        raise error
    what = NOT_HERE.get(request.url.path.removeprefix("/v1/"), "no such page")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        what = f"{request.method[:8]} is not for this page: use {allowed}"
    fault = Fault(error.status_code, f"{what}; see /openapi.json.", code="not_found")
    return JSONResponse(fault.body, fault.status, headers=error.headers)


async def _refuse(request: Request, fault: Exception) -> Response:
    if not isinstance(fault, Fault):
        raise fault
    headers = dict(fault.headers)
    if fault.status in (408, 413):  # the rest of the body is not read
        headers["Connection"] = "close"
    return JSONResponse(fault.body, fault.status, headers=headers)


async def _fail(request: Request, error: Exception) -> Response:
    """Return a 500 without details; the guard logs the error."""
    fault = internal()
    return JSONResponse(fault.body, fault.status)


def _page_files() -> dict[str, tuple[str, bytes]]:
    """Read the page's files once, so that a request cannot name any other file."""
    found = {}
    for file in PAGE.iterdir() if PAGE.is_dir() else ():
        kind = next((kind for ending, kind in TYPES.items() if file.name.endswith(ending)), None)
        if kind is not None:
            found[file.name] = (kind, file.read_bytes())
    return found
