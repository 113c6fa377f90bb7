"""What short measurements on this machine found, kept as one JSON file in the data folder, so each is made only once.

It knows no framework and not what is measured: who measures picks the key, which names everything the answer hangs on
(library version, device, number format), and an answer with a sentence for `doctor`.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE = "measured.json"


def recall(data_dir: Path) -> dict[str, dict[str, Any]]:
    """All findings by key, each with at least `sentence`; none where nothing was measured or the file is damaged."""
    try:
        found = json.loads((data_dir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and all(isinstance(each, dict) and "sentence" in each for each in found.values())
    return found if whole else {}


def keep(data_dir: Path, key: str, finding: dict[str, Any]) -> None:
    """Remember a finding. A folder that can't be written costs the next start a measurement, and nothing else."""
    found = recall(data_dir) | {key: finding}
    aside = data_dir / f"{FILE}.{os.getpid()}"
    with suppress(OSError):
        data_dir.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(found, indent=1), encoding="utf-8")
        aside.replace(data_dir / FILE)
