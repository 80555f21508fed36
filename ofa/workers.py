"""Processes that work for another one."""

from __future__ import annotations

import os
import threading
import time


def end_with(parent: int) -> None:
    """End this process when the one that started it, `parent`, has ended, however that was."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
