"""The routes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .._version import __version__
from .answers import Answerer
from .body import read_json
from .description import describe
from .faults import Fault, internal
from .guard import Application, guarded
from .overview import Overview
from .schema import ChatRequest, CompletionFields, CompletionRequest

PAGE = files(__package__) / "page"
TYPES = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml",
    ".png": "image/png", ".webmanifest": "application/manifest+json",
}  # fmt: skip


def build(answering: Answerer, overview: Overview) -> Application:
    """Return the ASGI application."""
    limits, access = answering.settings.limits, answering.settings.access
    engine = answering.engine
    description = describe(access.key is not None)
    pages = _page_files()

    async def complete(request: Request, kind: type[CompletionFields]) -> Response:
        asked = await read_json(request, kind, limit=limits.body, seconds=limits.idle)
        return await answering.answer(request, asked)

    async def chat(request: Request) -> Response:
        return await complete(request, ChatRequest)

    async def text(request: Request) -> Response:
        return await complete(request, CompletionRequest)

    async def models(request: Request) -> Response:
        return JSONResponse(overview.models())

    async def model(request: Request) -> Response:
        return JSONResponse(overview.one_model(request.path_params["name"]))

    async def steering(request: Request) -> Response:
        return JSONResponse(overview.steering())

    async def health(request: Request) -> Response:
        running = engine.running
        up = engine.alive
        return JSONResponse(
            {
                "status": "ok" if up else "down", "model": answering.settings.name,
                "version": __version__, "running": running, "waiting": engine.promised - running,
            },
            200 if up else 503,
        )  # fmt: skip

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
        engine.attach(asyncio.get_running_loop())
        yield
        engine.end()
        answering.encoder.close()

    routes = [
        Route("/", page),
        Route("/page/{name}", page),
        Route("/health", health),
        Route("/openapi.json", openapi),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/steering", steering),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", text, methods=["POST"]),
    ]
    application = Starlette(
        routes=routes, lifespan=lifespan,
        exception_handlers={HTTPException: _no_such_thing, Fault: _refuse, Exception: _fail},
    )  # fmt: skip
    application.router.redirect_slashes = False
    return guarded(application, access, stall=limits.idle)


async def _no_such_thing(request: Request, error: Exception) -> Response:
    """Say 404 and 405 in OpenAI's shape."""
    if not isinstance(error, HTTPException) or error.status_code not in (404, 405):
        raise error
    what = "no such page"
    if error.status_code == 405:
        what = f"{request.method[:8]} is not for this page: use {(error.headers or {}).get('Allow', 'another')}"
    fault = Fault(error.status_code, f"{what}; see /openapi.json.", code="not_found")
    return JSONResponse(fault.body, fault.status, headers=error.headers)


async def _refuse(request: Request, fault: Exception) -> Response:
    if not isinstance(fault, Fault):
        raise fault
    headers = dict(fault.headers)
    if fault.status in (408, 413):  # what is left of the body is not read
        headers["Connection"] = "close"
    return JSONResponse(fault.body, fault.status, headers=headers)


async def _fail(request: Request, error: Exception) -> Response:
    """Tell the client nothing of an unexpected error; the guard logs it."""
    fault = internal()
    return JSONResponse(fault.body, fault.status)


def _page_files() -> dict[str, tuple[str, bytes]]:
    """Read the page once; a request only ever names one of these."""
    found = {}
    for file in PAGE.iterdir() if PAGE.is_dir() else ():
        kind = next((kind for ending, kind in TYPES.items() if file.name.endswith(ending)), None)
        if kind is not None:
            found[file.name] = (kind, file.read_bytes())
    return found
