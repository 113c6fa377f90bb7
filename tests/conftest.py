"""What every test shares: no hub, one thread, two workers, an end, and tiny packs with random weights."""

import faulthandler
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before torch and transformers are first imported
os.environ["OMP_NUM_THREADS"] = "1"
if shutil.which("nvidia-smi") is None and not Path("/proc/driver/nvidia/version").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton, where somebody has it: kernels run in NumPy
STDERR = pytest.StashKey[int]()  # a copy, for pytest captures what tests write
GRACE = 60.0  # seconds that pytest-timeout has before the process ends


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest -n 2`: one worker has the browser and begins with it, the other takes file after file."""
    from xdist.scheduler import LoadFileScheduling

    class BrowserFirst(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "tests/browser" if file.startswith("tests/browser/") else file

    config.option.loadscopereorder = False  # as they were collected: folders come before files
    return BrowserFirst(config, log)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What hangs ends, and says where.

    pytest-timeout ends a test by a signal. A main thread that waits inside a library never hears it, and once a test
    has failed nothing is timed any more, its fixtures' ends included. A minute later a thread outside Python ends the
    process with the stacks of all threads; under xdist that is one failed test, and another process goes on.
    """
    mark = item.get_closest_marker("timeout")
    patience = float(mark.args[0] if mark else item.config.getvalue("timeout") or item.config.getini("timeout"))
    faulthandler.dump_traceback_later(patience + GRACE, exit=True, file=item.config.stash[STDERR])


pytest_runtest_teardown = pytest_runtest_setup


def pytest_runtest_logfinish() -> None:
    faulthandler.cancel_dump_traceback_later()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Why a test was tried again: -r R gives its name alone."""
    terminalreporter.ensure_newline()
    for report in terminalreporter.stats.get("rerun", []):
        why = next((line for line in report.longreprtext.splitlines() if line.startswith("E ")), "E  no reason given")
        terminalreporter.write_line(f"tried again: {report.nodeid} in {report.when}: {why[1:].strip()}")


@pytest.fixture
def torch_products() -> None:
    """Skips what needs them where torch's integer products are wrong; the engine never chooses them there."""
    from engine.torch_backend import int8

    if not int8.exact():
        pytest.skip("torch's integer product is wrong on this processor, and never chosen")


@pytest.fixture(scope="session")
def tiny_packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packs `ternary`, `binary` and `dense`, for reading only: copy one to damage it."""
    from tests.packs.writers import write_packs

    return write_packs(tmp_path_factory.mktemp("packs"))
