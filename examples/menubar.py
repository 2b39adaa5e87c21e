"""A menu-bar app: a slider for the strength, and an answer to the problem on the clipboard.

    pip install -e '.[menubar]'    # rumps; macOS only
    python examples/menubar.py

The model has a thread of its own; the window and the menu belong to the main thread, where a timer
looks after them. The settings are in settings.py. Nobody here has a Mac: this was tried
with a stand-in for rumps and the real model (tests/test_examples.py), not in a menu bar.
"""

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import Future

import mlx.nn as nn
from settings import LAYER, MODEL, STRENGTH, VECTOR

from mlx_densesteer import (
    Brake,
    DenseSteerError,
    Generation,
    ModelThread,
    Steering,
    SteeringVector,
    load,
    stream,
)

try:
    import rumps
except ImportError as error:
    sys.exit(f"menubar: {error}. On a Mac: pip install -e '.[menubar]'")

LARGEST = 2 * abs(STRENGTH) or 10.0  # the ends of the slider


class MenuBar(rumps.App):
    """Everything but ``_load`` and ``_answer`` runs on the main thread."""

    def __init__(self) -> None:
        super().__init__("DenseSteer", title="dense …", quit_button=None)
        self.strength = STRENGTH
        self.label = rumps.MenuItem("")  # no callback: grey
        self.slider = rumps.SliderMenuItem(STRENGTH, -LARGEST, LARGEST, callback=self.slide)
        self.solve_item = rumps.MenuItem("Solve the Clipboard")
        self.stop_item = rumps.MenuItem("Stop")
        quit_item = rumps.MenuItem("Quit", callback=self.quit)
        self.menu = [
            self.label, self.slider, None, self.solve_item, self.stop_item, None, quit_item,
        ]  # fmt: skip
        self.slide(self.slider)
        self._model: nn.Module | None = None
        self._pieces, self._stop = 0, threading.Event()
        self._thread = ModelThread()
        self._job: Future[Generation | None] | None = self._thread.submit(self._load)
        self._timer = rumps.Timer(self.tick, 0.1)
        self._timer.start()

    def slide(self, slider: rumps.SliderMenuItem) -> None:
        """Take the slider's strength; a place near the middle is the stock model."""
        self.strength = 0.0 if abs(slider.value) < LARGEST / 20 else slider.value
        self.label.title = f"Strength {self.strength:+.2f}" if self.strength else "Unsteered"

    def solve(self, _: rumps.MenuItem) -> None:
        question = from_clipboard()
        if not question.strip():
            rumps.alert("DenseSteer", "There is no text on the clipboard.")
            return
        self.solve_item.set_callback(None)
        self.stop_item.set_callback(self.stop)
        self._pieces = 0
        self._stop.clear()
        self._job = self._thread.submit(self._answer, question, self.strength)

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
        self._vector = SteeringVector.load(VECTOR) if VECTOR else None
        self._model, self._tokenizer = load(MODEL)

    def _answer(self, question: str, strength: float) -> Generation:
        vector = self._vector
        steering = Steering(vector, strength, layers=(LAYER,)) if vector else None
        pieces = stream(self._model, self._tokenizer, question, steering=steering, brake=Brake())
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
