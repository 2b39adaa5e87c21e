"""An answer of a session while it comes."""

from collections.abc import Callable, Iterator

from .stream import Generation, Stream


class Reply(Iterator[str]):
    """Iterate over the pieces of an answer. It joins the session's turns when it ends."""

    def __init__(self, user: str, stream: Stream, settle: Callable[["Reply"], None]):
        self.user = user
        self._stream, self._settle = stream, settle

    def __next__(self) -> str:
        try:
            return next(self._stream)
        except StopIteration:
            self._settle(self)
            raise

    def close(self) -> None:
        """End the answer now. What was said stays; if nothing was, neither does the question."""
        self._stream.close()
        self._settle(self)

    @property
    def result(self) -> Generation:
        return self._stream.result
