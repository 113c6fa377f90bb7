"""What every test shares: no hub, one thread, and tiny packs with random weights."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before torch and transformers are first imported
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def tiny_packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packs `ternary`, `binary` and `dense`, for reading only: copy one to damage it."""
    from tests.packs.writers import write_packs

    return write_packs(tmp_path_factory.mktemp("packs"))
