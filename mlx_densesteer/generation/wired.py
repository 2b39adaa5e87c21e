"""Wired memory: on a Mac, what the GPU uses stays in memory while a model answers.

mlx has one limit for the process. mlx-lm sets it for each answer and then sets it back to what it was
before, so two answers that overlap leave it wrong; it does not wire the reading of a prompt, and it
warns on standard output. Here the answers that run are counted instead.

Sources: ``mlx.core.set_wired_limit``; ``wired_limit`` and ``BatchGenerator`` of mlx-lm.
"""

import threading

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.utils import maybe_set_recommended_wired_limit

_lock = threading.RLock()  # one that a finalizer may take again
_claims: set[int] = set()  # ids of the claims that have not ended
_before: int | None = None  # the limit before the first claim; None: this device has none


class Wired:
    """A claim on wired memory: the first one wires what mlx uses, the end of the last one unwires it."""

    def __init__(self) -> None:
        global _before
        self._among = _claims
        with _lock:
            if not _claims:
                _before = maybe_set_recommended_wired_limit()
            _claims.add(id(self))

    def __del__(self) -> None:
        self.close()

    def close(self) -> bool:
        """End the claim, on the thread whose evaluations it was for; a second call does nothing.

        Return ``False`` if what mlx-lm had enqueued beyond the last token failed meanwhile: caches of this
        thread may then hold anything.
        """
        well = True
        with _lock:
            if id(self) not in self._among:
                return well
            self._among.remove(id(self))
            if not self._among and self._among is _claims:
                try:
                    # The limit must not change under an evaluation, and a process that exits under one may
                    # crash: OpenBLAS frees its buffers first.
                    mx.synchronize(generation_stream)
                except RuntimeError:
                    well = False
                finally:
                    if _before is not None:
                        mx.set_wired_limit(_before)
        return well
