"""For processes that ask a failing Hub: what huggingface_hub sleeps between two tries is cut short.

A folder of its own, put on the PYTHONPATH of such processes.
"""

import sys
import time

sleep = time.sleep


def briefly(seconds: float) -> None:
    caller = sys._getframe(1).f_globals.get("__name__", "")
    sleep(min(seconds, 0.05) if caller.startswith("huggingface_hub") else seconds)


time.sleep = briefly
