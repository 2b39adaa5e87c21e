"""An OpenAI-compatible server on this machine, steered per request, and its page (docs/server.md).

    guard -> app -> models, answers -> engine -> worker -> prompt_cache, generation.batch

A request's JSON is checked in ``schema``; ``vectors`` makes its steering. HTTP lives on an asyncio
loop, each model on one thread of its own (``engine``); ``models`` loads and unloads them. Needs the extra ``serve`` (Starlette,
uvicorn, pydantic).
"""
