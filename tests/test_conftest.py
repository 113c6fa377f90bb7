"""What hangs after a test has failed, when pytest-timeout times nothing any more, ends with all threads' stacks."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HANGS = """
import time, pytest

@pytest.fixture
def ends():
    yield
    time.sleep(1000)

def test_that_fails(ends):
    assert False
"""
RUNS = """
import sys, pytest
from tests import conftest
conftest.GRACE = 1.0
pytest.main([sys.argv[1], "--timeout", "1", "-p", "no:cacheprovider"], plugins=[conftest])
"""


def test_a_fixture_that_hangs_after_a_failure_ends_the_process(tmp_path: Path) -> None:
    file = tmp_path / "test_hangs.py"
    file.write_text(HANGS)
    done = subprocess.run([sys.executable, "-c", RUNS, file], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "Timeout (0:00:02)!" in done.stderr and "in ends" in done.stderr
