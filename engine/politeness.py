"""How a process that computes for minutes steps back, so that the page and everything else on the machine answer."""

import contextlib
import os
import sys

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
    if sys.platform == "linux":
        # Not in a session of its own, whose autogroup could step back as a whole: where the kernel groups processes by
        # session, Linux 6.18 may let such a group wait for minutes while another one is busy (PITFALLS.md).
        with contextlib.suppress(OSError):  # forbidden in some containers
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
