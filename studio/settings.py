"""Where things lie and how the page is served: decided here once, handed to everybody else.

Knows no model, no gradio and no HTTP. Nothing is created by asking where it is: a folder appears with its first use.
"""

import logging
import logging.handlers
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from engine.types import BadRequest

LOG_BYTES = 1_000_000  # one log file; three older ones are kept beside it


@dataclass(frozen=True, slots=True)
class Settings:
    """How this run is served. `model` None means the best one installed; `port` is the first one tried."""

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 7860
    model: str | None = None
    backend: str = "auto"
    open_browser: bool = True

    @property
    def pictures(self) -> Path:
        """Every picture the page makes, in a folder per day."""
        return self.data_dir / "pictures"

    @property
    def cache(self) -> Path:
        """The only folder the page may hand out files from; what lies in it can be deleted at any time."""
        return self.data_dir / "cache"

    @property
    def log_file(self) -> Path:
        """What went wrong, with tracebacks; the page itself shows sentences."""
        return self.data_dir / "logs" / "niwaki.log"


def data_dir(given: str | Path | None = None) -> Path:
    """Where pictures, models and logs lie: `--data`, else NIWAKI_DATA, else the platform's place. Creates nothing."""
    chosen = given or os.environ.get("NIWAKI_DATA")
    if chosen:
        return Path(os.path.abspath(Path(chosen).expanduser()))
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "Niwaki"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "Niwaki"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "niwaki"


def make_folder(folder: Path) -> Path:
    """The folder, created if need be and proven writable. Raises BadRequest with the reason and the way out."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(_unwritable(folder, error.strerror or str(error))) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadRequest(_unwritable(folder, "no permission to write"))
    return folder


def start_log(settings: Settings) -> Path:
    """Send everything our modules log to the rotating file; returns its path. A second call replaces the first."""
    make_folder(settings.log_file.parent)
    try:
        handler = logging.handlers.RotatingFileHandler(
            settings.log_file, maxBytes=LOG_BYTES, backupCount=3, encoding="utf-8"
        )
    except OSError as error:
        raise BadRequest(_unwritable(settings.log_file, error.strerror or str(error))) from error
    handler.set_name("niwaki")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in [known for known in root.handlers if known.get_name() == "niwaki"]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself for its own address at every start
    return settings.log_file


def _unwritable(path: Path, reason: str) -> str:
    return f"cannot write to {path} ({reason}): choose another data folder with --data or NIWAKI_DATA"
