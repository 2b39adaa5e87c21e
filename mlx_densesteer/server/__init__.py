"""An OpenAI-compatible server on this machine, steered per request, and its page (docs/server.md).

    guard -> app -> answers -> engine -> worker -> prompt_cache, generation.batch

A request's JSON is checked in ``schema``; ``vectors`` makes its steering. HTTP lives on an asyncio
loop, the model on one thread of its own (``engine``). Needs the extra ``serve`` (Starlette,
uvicorn, pydantic).
"""
