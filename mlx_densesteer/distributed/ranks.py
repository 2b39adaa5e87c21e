"""The processes of one ``mlx.launch``, and how they exchange values. A single process imports no
mlx.

A rank is one of these processes, on this machine or another. Ranks exchange JSON through the
collectives of ``mx.distributed``. Every rank has to take part in every call, in the same order.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DistributedError

if TYPE_CHECKING:
    import mlx.core as mx

    from ..generation.sampling import Sampler


def launched_rank() -> int | None:
    """Return this process's rank under ``mlx.launch``, ``None`` elsewhere. Reads the environment
    only.

    ``mlx.launch -n 1`` counts as elsewhere: mlx 0.32 cannot read the host file that it writes then.
    """
    rank = os.environ.get("MLX_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
    hosts = os.environ.get("MLX_HOSTFILE")
    if rank is None or not rank.isdecimal():
        return None
    if hosts and Path(hosts).is_file() and not Path(hosts).read_text("utf-8").strip():
        return None
    return int(rank)


class Ranks:
    """All ranks, seen from one of them. ``Ranks()`` is a single process, which sends nothing.

    ``size`` is the number of ranks, ``rank`` counts from 0, ``group`` is mlx's or ``None``.
    """

    def __init__(self, group: "mx.distributed.Group | None" = None):
        self.group = group
        self.rank: int = group.rank() if group else 0
        self.size: int = group.size() if group else 1

    @classmethod
    def connect(cls) -> "Ranks":
        """Connect to the other ranks of this ``mlx.launch``; without one return a single process.

        Raises:
            DistributedError: the other ranks could not be reached.
        """
        if launched_rank() is None:
            return cls()
        import mlx.core as mx

        try:
            group = mx.distributed.init(strict=True)
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                f"rank {launched_rank()}: the other ranks cannot be reached ({error}). Check the "
                "hosts of mlx.launch, its --backend, and that its ports are free (--starting-port)."
            ) from error
        return cls(group if group.size() > 1 else None)

    @property
    def speaks(self) -> bool:
        """Whether this rank writes results; rank 0 does."""
        return self.rank == 0

    def gather(self, value: object) -> list[Any]:
        """Return the values of all ranks, by rank, as JSON gives them back."""
        if self.group is None:
            return [json.loads(json.dumps(value))]
        import mlx.core as mx

        data = json.dumps(value).encode()
        lengths = self._all(mx.array([len(data)], dtype=mx.int32)).tolist()
        room = max(lengths)
        padded = mx.array(list(data + bytes(room - len(data))), dtype=mx.uint8)
        parts = bytes(memoryview(self._all(padded)))
        return [json.loads(parts[i * room : i * room + n]) for i, n in enumerate(lengths)]

    def share(self, value: object) -> Any:
        """Return rank 0's value."""
        return self.gather(value if self.rank == 0 else None)[0]

    def agree(self, sampler: "Sampler") -> "Sampler":
        """Return a sampler that gives every rank the tokens that rank 0's ``sampler`` chooses.

        Logits of unlike machines differ in the last bits; two ranks with different tokens would
        wait for each other for ever.
        """
        if self.group is None:
            return sampler
        import mlx.core as mx

        def chosen(logprobs: mx.array) -> mx.array:
            tokens = sampler(logprobs)
            return mx.distributed.all_gather(tokens, group=self.group)[: tokens.shape[0]]

        return chosen

    def same(self, value: object, what: str) -> None:
        """Raise ``DistributedError`` unless every rank gives the same ``value``."""
        found = self.gather(value)
        if any(one != found[0] for one in found):
            if isinstance(value, dict):  # show only what differs; the keys are the same
                kept = [key for key in value if any(one[key] != found[0][key] for one in found)]
                found = [", ".join(f"{key} {one[key]}" for key in kept) for one in found]
            listed = "; ".join(f"rank {i}: {one}" for i, one in enumerate(found))
            raise DistributedError(
                f"the ranks have different {what} ({listed}). Give every machine the same files."
            )

    def wait(self) -> None:
        """Wait until every rank has called this."""
        self.gather(None)

    def mine(self, things: list) -> list:
        """Return this rank's share of a list that all ranks have: every ``size``-th thing."""
        return things[self.rank :: self.size]

    def _all(self, array: "mx.array") -> "mx.array":
        import mlx.core as mx

        gathered = mx.distributed.all_gather(array, group=self.group, stream=mx.cpu)
        mx.eval(gathered)
        return gathered
