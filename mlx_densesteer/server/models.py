"""The models of a server: which are in memory, and which request waits for which.

It lives on the asyncio loop; each model in memory has a thread of its own (``engine``). A request has a
``Lease``: its model stays in memory while the lease is held. Requests get their models in the order in which
they came. Where one waits until another model is unloaded, those behind it wait too, so that none waits
for ever; when its model is loaded, all that wait for the same one get it together.
"""

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import DenseSteerError, ModelTooLargeError
from . import overview
from .faults import Fault, bad, busy, ending, excerpt, out_of_memory
from .settings import Settings
from .vectors import NAME

if TYPE_CHECKING:
    from .start import Served

log = logging.getLogger(__name__)

_PATH = re.compile(r"(?<![\w.])[/~]\S*/\S*")  # in a message that clients get


@dataclass(eq=False)
class _Slot:
    """A model in memory, on its way there, or on its way out."""

    name: str
    served: "Served"
    state: Literal["loading", "loaded", "ending"] = "loading"
    leases: int = 0
    timer: asyncio.TimerHandle | None = None  # runs while no request has a lease
    task: asyncio.Task[None] | None = None  # loads or unloads


class Lease:
    """A request's claim on a model, held from ``with`` to its end.

    Args:
        name: the model's name.
        answers: how many the request asks for.
    """

    def __init__(self, models: "Models", name: str, answers: int):
        self.name, self.answers, self._models = name, answers, models
        self.slot: _Slot | None = None  # once it has the model
        self.given: asyncio.Future[Served] = asyncio.get_running_loop().create_future()

    @property
    def served(self) -> "Served":
        """The model; only once it is there."""
        return self.given.result()

    async def wait(self, seconds: float | None = None) -> bool:
        """Wait for the model, and return whether it is there.

        Raises:
            Fault: it cannot be loaded, or the server is ending.
        """
        done, _ = await asyncio.wait({self.given}, timeout=seconds)
        return bool(done) and self.given.result() is not None

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.given.cancel():
            self.given.exception()  # seen, even if the client is gone
        self._models.release(self)


class Models:
    """Loads models when requests ask for them, and unloads them again.

    Args:
        settings: ``models`` is the folder with models.
        made: makes what serves the model of a name; its engine loads it.
        has_first: whether the model ``settings.name`` is loaded at the start, and the default.
    """

    def __init__(self, settings: Settings, made: "Callable[[str], Served]", *, has_first: bool):
        self._settings, self._made, self._has_first = settings, made, has_first
        self._slots: dict[str, _Slot] = {}  # the model that was used last is the last one
        self._waiting: list[Lease] = []
        self._latest: str | None = None  # the model that was loaded last
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending = self._ended = False

    def load_first(self) -> "Served":
        """Load the first model, before the loop runs; raises as ``Engine.start`` does."""
        name = self._settings.name
        served = self._made(name)
        served.engine.start()
        self._slots[name] = _Slot(name, served, "loaded")
        return served

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Load and unload on this loop from now on."""
        self._loop = loop
        for slot in self._slots.values():
            slot.served.engine.attach(loop)
            self._rest(slot)

    @property
    def alive(self) -> bool:
        return not self._ended and all(one.engine.alive for one in self._loaded())

    @property
    def broken(self) -> bool:
        """Whether a model's thread ended because it could not go on after an error."""
        return any(one.engine.broken for one in self._loaded())

    @property
    def promised(self) -> int:
        """Answers that run or wait."""
        return sum(one.engine.promised for one in self._loaded()) + self._queued

    @property
    def running(self) -> int:
        return sum(one.engine.running for one in self._loaded())

    @property
    def several(self) -> bool:
        return self._settings.models is not None

    def names(self) -> list[str]:
        """Return the names of all models, in memory or not."""
        found = [path.name for path in self._folders() if NAME.fullmatch(path.name)]
        if not self._has_first:
            return found
        return [self._settings.name, *(name for name in found if name != self._settings.name)]

    def unusable(self) -> list[str]:
        """Return the folders whose names no model can have."""
        return [path.name for path in self._folders() if not NAME.fullmatch(path.name)]

    def states(self) -> dict[str, str]:
        """Return the state of each model in memory: loading, loaded or ending."""
        return {name: slot.state for name, slot in self._slots.items()}

    def default(self) -> str | None:
        """Return the model of a request that names none, if that is clear."""
        if self._has_first:
            return self._settings.name
        names = self.names()
        if self._latest in names:
            return self._latest
        return names[0] if len(names) == 1 else None

    def name_of(self, asked: str | None) -> str:
        """Return the name of the model that a request asks for, as ``NAME`` or ``NAME@VECTOR=STRENGTH``.

        Raises:
            Fault: there is no such model, or none is named and it is not clear which one is meant.
        """
        if not self.several:
            return self._settings.name  # its vectors read the name, and refuse another one
        names = self.names()
        if not asked:
            if (name := self.default()) is not None:
                return name
            raise bad(f"no model is named: expected one of {_listed(names)}.", "model")
        base = asked.partition("@")[0]
        for name in sorted(names, key=lambda name: name != base):
            if name.casefold() == base.casefold():
                return name
        message = f"model {excerpt(base)}: this server has {_listed(names)}; see /v1/models."
        raise Fault(404, message, "model", "model_not_found")

    def listing(self) -> dict[str, object]:
        """Return all models as a list, those in memory with their presets."""
        found: list[object] = []
        for name in self.names():
            slot = self._slots.get(name)
            if slot is not None and slot.state == "loaded":
                found += overview.models(slot.served.vectors)
            else:
                found.append(overview.entry(name, loaded=False))
        return {"object": "list", "data": found}

    def lease(self, asked: str | None, answers: int = 1) -> Lease:
        """Return a claim on the model that a request asks for; enter it at once.

        Raises:
            Fault: no such model, no room to wait (429), or the server is ending.
        """
        if self._ending:
            raise ending()
        lease = Lease(self, self.name_of(asked), answers)
        self._waiting.append(lease)
        self._advance()
        rows = self._settings.limits.rows
        if lease in self._waiting[1:] and self._queued > rows + self._settings.limits.queue:
            self._waiting.remove(lease)
            raise busy(self._queued, "wait for models that are not in memory", rows)
        return lease

    def release(self, lease: Lease) -> None:
        """End a claim, whether it has its model or waits."""
        slot = lease.slot
        if lease in self._waiting:
            self._waiting.remove(lease)
        elif slot is not None:
            slot.leases -= 1
            self._slots[slot.name] = self._slots.pop(slot.name)
            self._rest(slot)
        self._advance()

    def end_all(self) -> None:
        """End all answers, and take no more."""
        self._ending = True
        for lease in self._waiting:
            lease.given.set_exception(ending())
        self._waiting.clear()
        for slot in self._slots.values():
            if slot.state != "ending":
                slot.served.engine.end_all()

    def end(self) -> None:
        """End all answers, take no more, and wait until every thread has ended its step."""
        self.end_all()
        for slot in self._slots.values():
            if slot.state == "loaded":
                slot.served.end()
            elif slot.state == "loading":
                slot.served.engine.end()
        self._ended = True

    @property
    def _queued(self) -> int:
        return sum(lease.answers for lease in self._waiting)

    def _loaded(self) -> "list[Served]":
        return [slot.served for slot in self._slots.values() if slot.state == "loaded"]

    def _folders(self) -> list[Path]:
        with contextlib.suppress(OSError):  # the folder is away
            found = sorted(self._settings.models.iterdir()) if self.several else []
            # unlike ``Path.is_file`` it does not raise for a folder that may not be read
            return [path for path in found if os.path.isfile(path / "config.json")]  # noqa: PTH113
        return []

    def _advance(self) -> None:
        """Give models to those that wait, in their order; load and unload what they need."""
        for lease in list(self._waiting):
            slot = self._slots.get(lease.name)
            if slot is None and len(self._slots) < self._settings.keep and not self._ending:
                self._load(lease.name)
            elif slot is not None and slot.state == "loaded":
                self._give(lease, slot)
            elif slot is None or slot.state == "ending":
                self._make_room()
                return  # whoever comes later waits behind

    def _give(self, lease: Lease, slot: _Slot) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
        self._waiting.remove(lease)
        slot.leases += 1
        lease.slot = slot
        lease.given.set_result(slot.served)

    def _make_room(self) -> None:
        """Unload the model that was not used for longest, if no request has it."""
        slots = self._slots.values()
        unused = [slot for slot in slots if slot.state == "loaded" and not slot.leases]
        if unused and not any(slot.state == "ending" for slot in slots):
            self._unload(unused[0])

    def _rest(self, slot: _Slot) -> None:
        """Let a model go after a while without requests."""
        if self.several and self._settings.unload is not None and not slot.leases:
            slot.timer = self._loop.call_later(self._settings.unload, self._unload, slot)

    def _load(self, name: str) -> None:
        slot = self._slots[name] = _Slot(name, self._made(name))
        slot.task = self._loop.create_task(self._loading(slot))

    async def _loading(self, slot: _Slot) -> None:
        log.info("loading %s", slot.name)
        fault: Fault | None = None
        try:
            await asyncio.wrap_future(slot.served.engine.begin())
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a panic of a Rust library is no ``Exception``
            fault = _cannot_load(slot.name, slot.served.place, error)
        leases = [lease for lease in self._waiting if lease.name == slot.name]
        if fault is not None:
            for lease in leases:
                self._waiting.remove(lease)
                lease.given.set_exception(fault)
            self._unload(slot)
            return
        slot.served.engine.attach(self._loop)
        slot.state, self._latest = "loaded", slot.name
        for lease in leases:
            self._give(lease, slot)
        self._rest(slot)
        self._advance()

    def _unload(self, slot: _Slot) -> None:
        if slot.state != "ending" and not self._ending:
            slot.state = "ending"
            slot.task = self._loop.create_task(self._unloading(slot))

    async def _unloading(self, slot: _Slot) -> None:
        log.info("unloading %s", slot.name)
        try:
            await asyncio.to_thread(slot.served.close)
        except Exception as error:
            log.error("unloading %s failed", slot.name, exc_info=error)
        finally:
            del self._slots[slot.name]
            self._advance()


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _cannot_load(name: str, place: str, error: BaseException) -> Fault:
    """Log why a model cannot be loaded, and return what clients get: a 503 if memory lacks, else a 500."""
    if isinstance(error, Fault):  # the server is ending
        return error
    reason = "the server's log says more."
    if isinstance(error, DenseSteerError):
        told = str(error).replace(place, name)
        reason = reason if _PATH.search(told) else told.removeprefix(f"{name}: ")
    lacks = isinstance(error, ModelTooLargeError) or out_of_memory(error)
    log.error("loading %s failed: %s (%s)", name, type(error).__name__, reason, exc_info=error)
    if lacks:
        return Fault(503, f"no memory for model {name}: {reason}", "model", "out_of_memory")
    return Fault(500, f"model {name} cannot be loaded: {reason}", "model", "model_not_loaded")
