"""A menu-bar app: a slider for the dose, and an answer to the problem on the clipboard.

    pip install -e '.[menubar]'    # rumps; macOS only
    python examples/menubar.py

The model has a thread of its own; the window and the menu belong to the main thread, where a timer
looks after them. The settings are in settings.py; the slider takes the place of the strength. There
was no Mac: this was tried with a stand-in for rumps and the real model (tests/test_examples.py).
"""

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import Future

from settings import MODEL, steering

from mlx_densesteer import (
    Brake,
    DenseSteerError,
    Generation,
    Model,
    ModelThread,
    load,
    stream,
)

try:
    import rumps
except ImportError as error:
    sys.exit(f"menubar: {error}. On a Mac: pip install -e '.[menubar]'")

DOSE, LARGEST = 20, 40  # per cent of the residual stream: where the slider begins and ends


class MenuBar(rumps.App):
    """Everything but ``_load`` and ``_answer`` runs on the main thread."""

    def __init__(self) -> None:
        super().__init__("DenseSteer", title="dense …", quit_button=None)
        self.dose = DOSE
        self.label = rumps.MenuItem("")  # no callback: grey
        self.slider = rumps.SliderMenuItem(DOSE, -LARGEST, LARGEST, callback=self.slide)
        self.solve_item = rumps.MenuItem("Solve the Clipboard")
        self.stop_item = rumps.MenuItem("Stop")
        quit_item = rumps.MenuItem("Quit", callback=self.quit)
        self.menu = [
            self.label, self.slider, None, self.solve_item, self.stop_item, None, quit_item,
        ]  # fmt: skip
        self.slide(self.slider)
        self._model: Model | None = None
        self._pieces, self._stop = 0, threading.Event()
        self._thread = ModelThread()
        self._job: Future[Generation | None] | None = self._thread.submit(self._load)
        self._timer = rumps.Timer(self.tick, 0.1)
        self._timer.start()

    def slide(self, slider: rumps.SliderMenuItem) -> None:
        """Take the slider's dose; a place near the middle is the stock model."""
        self.dose = 0 if abs(slider.value) < LARGEST / 20 else round(slider.value)
        self.label.title = f"Dose {self.dose:+d}%" if self.dose else "Unsteered"

    def solve(self, _: rumps.MenuItem) -> None:
        question = from_clipboard()
        if not question.strip():
            rumps.alert("DenseSteer", "There is no text on the clipboard.")
            return
        self.solve_item.set_callback(None)
        self.stop_item.set_callback(self.stop)
        self._pieces = 0
        self._stop.clear()
        self._job = self._thread.submit(self._answer, question, self.dose)

    def stop(self, _: rumps.MenuItem) -> None:
        self._stop.set()

    def tick(self, _: rumps.Timer) -> None:
        """Show how far the thread is, and what it has found."""
        if self._job is None:
            return
        if not self._job.done():
            self.title = f"dense {self._pieces}" if self._pieces else "dense …"
            return
        job, self._job, self.title = self._job, None, "dense"
        self.stop_item.set_callback(None)
        if self._model is not None:
            self.solve_item.set_callback(self.solve)
        if error := job.exception():
            rumps.alert("DenseSteer", str(error) or repr(error))
            if not isinstance(error, DenseSteerError):
                raise error  # a bug: let its traceback be seen as well
        elif result := job.result():
            show(result)

    def quit(self, _: rumps.MenuItem) -> None:
        self._stop.set()
        self._thread.shutdown()
        rumps.quit_application()

    def _load(self) -> None:
        model = load(MODEL)
        steering(model)  # a wrong setting is told now, not with the first problem
        self._model = model

    def _answer(self, question: str, dose: int) -> Generation:
        steered = steering(self._model, f"{dose}%")
        pieces = stream(self._model, question, steering=steered, brake=Brake())
        with contextlib.closing(pieces):
            for self._pieces, _ in enumerate(pieces, 1):
                if self._stop.is_set():
                    break
        return pieces.result


def show(result: Generation) -> None:
    """Show an answer in a window that can copy it."""
    said = f"tokens: {result.tokens}, steps: {result.steps}, {result.finish_reason}"
    window = rumps.Window(said, "DenseSteer", result.text, "Copy", "Close", dimensions=(480, 240))
    response = window.run()
    if response.clicked:
        subprocess.run(["pbcopy"], input=response.text.encode(), env=UTF_8, check=True)


def from_clipboard() -> str:
    done = subprocess.run(["pbpaste"], stdout=subprocess.PIPE, env=UTF_8, check=True)
    return done.stdout.decode("utf-8", "replace")


# An app has no locale, and without one pbpaste and pbcopy do not speak UTF-8.
UTF_8 = {**os.environ, "LC_CTYPE": "UTF-8"}

if __name__ == "__main__":
    MenuBar().run()
