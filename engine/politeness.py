"""How a process that computes for minutes steps back, so that the page and everything else on the machine answer."""

import contextlib
import os
import sys
from pathlib import Path

NICE = 5  # more answers no quicker (SPEED.md), and leaves the engine less where something else computes too


def step_back() -> None:
    """Lower this process, and every thread that it starts from now on. For a process of its own; can't be undone."""
    if sys.platform == "win32":
        import ctypes
        from subprocess import BELOW_NORMAL_PRIORITY_CLASS

        this = ctypes.c_void_p(-1)  # Windows' name for the calling process
        ctypes.windll.kernel32.SetPriorityClass(this, BELOW_NORMAL_PRIORITY_CLASS)
        return
    os.nice(NICE)
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):  # forbidden in some containers
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    # Where the kernel groups processes by session, as on most desktops, nice counts within a session only: with one of
    # its own the engine's group steps back as a whole, also behind a browser that another session started.
    with contextlib.suppress(OSError):
        os.setsid()
        Path("/proc/self/autogroup").write_text(str(NICE))
