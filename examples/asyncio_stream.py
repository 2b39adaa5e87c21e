"""An asyncio program that streams answers while its event loop goes on, and gives one up.

    python examples/asyncio_stream.py [QUESTION]

The model lives on a thread of its own (ModelThread); a piece of text is computed when it is asked
for. The settings are in settings.py.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncGenerator

from settings import MODEL, QUESTION, steering

from mlx_densesteer import DenseSteerError, ModelThread, load, stream


async def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly in `... | head`
    question = sys.argv[1] if len(sys.argv) > 1 else QUESTION
    with ModelThread() as thread:
        model = await asyncio.wrap_future(thread.submit(load, MODEL))
        steered = await asyncio.wrap_future(thread.submit(steering, model))

        def ask() -> AsyncGenerator[str, None]:
            return thread.iterate(
                thread.submit(stream, model, question, steering=steered, max_tokens=400)
            )

        ticks = asyncio.create_task(count_ticks())
        async for piece in ask():
            print(piece, end="", flush=True)
        ticks.cancel()
        print()
        print(f"the event loop ticked {await ticks} times meanwhile", file=sys.stderr)

        try:
            await asyncio.wait_for(collect(ask()), 0.01)  # cancels it: the thread is free again
        except TimeoutError:
            print("an answer was given up after 10 ms; the next one:", file=sys.stderr)
        print(await collect(ask()))


async def collect(pieces: AsyncGenerator[str, None]) -> str:
    return "".join([piece async for piece in pieces])


async def count_ticks() -> int:
    """Stand for all that an event loop has to do beside: sleep, wake, until cancelled."""
    ticks = 0
    with contextlib.suppress(asyncio.CancelledError):
        while True:
            await asyncio.sleep(0.001)
            ticks += 1
    return ticks


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except DenseSteerError as error:  # says what is wrong and what helps
        sys.exit(f"asyncio_stream: {error}")
