"""A bound in seconds: ``asyncio.timeout`` of Python 3.11, for 3.10 too."""

import asyncio


class within:
    """``async with within(seconds)``: raise ``asyncio.TimeoutError`` if the block takes longer.

    Cheaper than ``asyncio.wait_for``, which may make a task each time: every token passes here.
    """

    def __init__(self, seconds: float):
        self._seconds, self._late = seconds, False

    async def __aenter__(self) -> None:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._late and kind is asyncio.CancelledError:
            raise asyncio.TimeoutError

    def _end(self) -> None:
        self._late = True
        self._task.cancel()
