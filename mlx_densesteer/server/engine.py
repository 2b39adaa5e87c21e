"""The model's thread, and how an asyncio loop reaches it."""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import mlx.core as mx

from .faults import bad, busy, ending, failed, internal
from .worker import Event, Failed, Job, Told, Worker

log = logging.getLogger(__name__)

JOIN_SECONDS = 60
ASLEEP = 0.05  # seconds for the ended thread to fall asleep, for which it needs the GIL
QUIET = 5.0  # seconds without a request until memory is freed
GATHER = 0.05  # most seconds that the first of several requests waits for the others


class Turns:
    """A lock that threads take in turns: whoever waits comes before whoever held it last."""

    def __init__(self) -> None:
        self._next, self._now = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._now.acquire()

    def __exit__(self, *_: object) -> None:
        self._now.release()


class Engine:
    """Takes jobs from the loop and returns events to it; only its thread touches the model.

    Args:
        load: called once, on the thread; mlx arrays belong to the thread that made them.
        rows: most answers that run at a time.
        waiting: most answers that wait.
        turns: shared with the engines of other models, so that mlx computes for one at a time.
    """

    def __init__(
        self, load: Callable[[], Worker], *, rows: int, waiting: int, turns: Turns | None = None
    ):
        self._load, self.rows, self._room = load, rows, rows + waiting
        self._turns = turns or Turns()
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._inboxes: dict[Job, asyncio.Queue[tuple[Job, Event]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loaded: Future[Worker] = Future()
        self._ending = False
        self.broken = False  # the thread ended because it could not go on after an error
        self._company = 0  # the most answers at a time before the thread was last idle
        self._most = 0  # the most since then
        self._ended, self._may_go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Load the model; raises what ``load`` raises."""
        loaded = self.begin()
        try:
            while True:  # in short waits, so that Ctrl-C ends them
                with contextlib.suppress(TimeoutError):
                    loaded.result(timeout=0.2)
                    return
        except BaseException:
            self.end()  # waits until the thread is out of mlx
            raise

    def begin(self) -> Future[Worker]:
        """Begin to load the model; the future raises what ``load`` raises."""
        self._loaded.set_running_or_notify_cancel()  # whoever waits for it cannot cancel it
        self._thread.start()
        return self._loaded

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send events to this loop from now on."""
        self._loop = loop

    @property
    def promised(self) -> int:
        """Answers that run or wait."""
        return sum(job.n for job in self._inboxes)

    @property
    def running(self) -> int:
        return min(self.promised, self.rows)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._ended.is_set()

    @property
    def ending(self) -> bool:
        """Whether it takes no more jobs: a model that is still loaded need not be."""
        return self._ending

    @contextlib.contextmanager
    def holding(self, jobs: Sequence[Job]) -> Iterator["asyncio.Queue[tuple[Job, Event]]"]:
        """Run these jobs and yield the queue of their events; at the end cancel unfinished ones.

        Raises:
            Fault: no room (429), or the server is ending.
        """
        if self._ending or not self.alive:
            raise ending()
        count = sum(job.n for job in jobs)
        if count > self._room:
            message = f"{count} answers in one request: this server has room for {self._room}."
            raise bad(message, "n")
        if self.promised + count > self._room:
            raise busy(self.promised, "run or wait", self.rows)
        inbox: asyncio.Queue[tuple[Job, Event]] = asyncio.Queue()
        worker = self._loaded.result()
        for job in jobs:
            self._inboxes[job] = inbox
            self._orders.put(lambda job=job: self._tell([(job, worker.take(job))]))
        try:
            yield inbox
        finally:
            for job in jobs:
                del self._inboxes[job]
                self._orders.put(lambda job=job: worker.cancel(job))

    def end_all(self) -> None:
        """End all jobs, and take no more."""
        self._ending = True
        if not self._loaded.done() or self._loaded.exception() is not None:
            return
        worker = self._loaded.result()
        self._orders.put(lambda: self._tell(worker.close()))

    def end(self) -> None:
        """End all jobs, take no more, and wait until the thread has ended its step.

        The thread then sleeps until the process ends. It must not end while the interpreter shuts
        down: mlx takes the GIL to destroy a thread's data, and a thread that asks for the GIL then
        aborts the process (github.com/ml-explore/mlx/pull/4110).
        """
        self._ending = True
        self._orders.put(None)
        self._ended.wait(JOIN_SECONDS)
        time.sleep(ASLEEP)

    def close(self) -> None:
        """End all jobs and the thread, in a process that goes on; wait however long that takes."""
        self.end()
        self._ended.wait()
        self._may_go.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with self._turns:
                worker = self._load()
            self._serve(worker)
        except BaseException as error:
            if self._loaded.done():
                self.broken = True
                log.critical("the model's thread ends: %s", type(error).__name__, exc_info=error)
            else:
                self._loaded.set_exception(error)
        finally:
            self._on_loop(self._tell_all, Failed(internal()))
        self._ended.set()
        self._may_go.wait()
        mx.clear_streams()

    def _serve(self, worker: Worker) -> None:
        self._loaded.set_result(worker)
        while self._obey(worker):
            with self._turns:
                try:
                    self._tell(worker.work())
                # An error in a step (out of memory, a bug) must not end the thread: no later request
                # would be answered. Only where recovery fails too, the thread ends, and with it the process.
                except Exception as error:
                    self._tell(worker.recover(failed("a step of the model", error)))
        with self._turns:
            self._tell(worker.close())

    def _obey(self, worker: Worker) -> bool:
        """Carry out the orders; wait for one if there is no other work. ``False``: end the thread.

        If several answers ran together before, the first request waits a moment for the others:
        such clients ask again at the same time, and reading prompts together costs less.
        """
        gathering = not worker.busy
        if gathering and self._most:
            self._company, self._most = self._most, 0
        deadline: float | None = None
        while True:
            left = QUIET if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                order = self._orders.get(block=gathering and left != 0.0, timeout=left)
            except queue.Empty:
                if gathering and deadline is None:
                    self._do(worker.rest, worker)
                break
            if order is None:
                return False
            self._do(order, worker)
            if worker.busy and deadline is None:
                deadline = time.monotonic() + GATHER
            gathering = gathering and worker.waiting < self._company
        self._most = max(self._most, worker.running + worker.waiting)
        return True

    def _do(self, order: Callable[[], None], worker: Worker) -> None:
        with self._turns:
            try:
                order()
            except Exception as error:  # as in ``_serve``
                self._tell(worker.recover(failed("an order to the model", error)))

    def _tell(self, told: Told) -> None:
        if told:
            self._on_loop(self._hand_over, told)

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(call, *arguments)

    def _tell_all(self, event: Event) -> None:
        self._hand_over([(job, event) for job in self._inboxes])

    def _hand_over(self, told: Told) -> None:
        for job, event in told:
            inbox = self._inboxes.get(job)
            if inbox is not None:
                inbox.put_nowait((job, event))
