"""The models Niwaki knows by name, and where each one lies on this machine.

Knows ids, sources and folders; not what is inside a pack (`packs`) nor how to fetch one (`download`). The data
folder comes in as an argument: `studio.settings` alone decides where it is.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from engine.types import BadRequest

SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "models"


@dataclass(frozen=True, slots=True)
class Model:
    """One known model. `bytes` is the size of the download; None for what is shipped with the source.

    `repository` and `revision` name the release on the hub; `revision` None: not pinned by us. `licence` is the short
    name of what its publisher put on it.
    """

    id: str
    label: str
    variant: str
    demo: bool
    repository: str | None
    revision: str | None
    bytes: int | None
    licence: str = "Apache-2.0"

    @property
    def pin(self) -> str:
        """How far the download is fixed by this file, in words; "" for what is shipped."""
        if self.repository is None:
            return ""
        return "commit pinned, hashes not pinned by us" if self.revision else "not pinned by us"


def _seedling(variant: str, how: str) -> Model:
    return Model(f"seedling-{variant}", f"Seedling, {how} (demo model)", variant, True, None, None, None)


# Repositories, revisions and byte counts: the published MLX releases, one layout for every machine.
MODELS: dict[str, Model] = {
    model.id: model
    for model in (
        _seedling("ternary", "ternary weights"),
        _seedling("binary", "1-bit weights"),
        _seedling("dense", "16-bit reference"),
        Model(
            id="bonsai-ternary",
            label="Bonsai Image 4B, ternary weights",
            variant="ternary",
            demo=False,
            repository="prism-ml/bonsai-image-ternary-4B-mlx-2bit",
            revision="2c24c81b934a658ba5590cf39088ba929985b4a8",
            bytes=3_888_274_558,
        ),
        Model(
            id="bonsai-binary",
            label="Bonsai Image 4B, 1-bit weights",
            variant="binary",
            demo=False,
            repository="prism-ml/bonsai-image-binary-4B-mlx-1bit",
            revision=None,
            bytes=3_428_210_775,
        ),
        Model(
            id="klein-dense",
            label="FLUX.2 Klein 4B, 16-bit reference",
            variant="dense",
            demo=False,
            repository="black-forest-labs/FLUX.2-klein-4B",
            revision=None,
            bytes=15_970_000_000,  # the published payload, rounded: the exact sum is not known here
        ),
    )
}

# The biggest one that is there: a person who put 4 GB on the disk wants to see it used.
_PREFERRED = ("bonsai-ternary", "bonsai-binary", "klein-dense", "seedling-ternary", "seedling-binary", "seedling-dense")


def folder_of(model_id: str, data_dir: Path) -> Path:
    """Where the pack of a known id lies or would lie: shipped models beside the source, others in the data folder."""
    return (SHIPPED if MODELS[model_id].repository is None else Path(data_dir) / "models") / model_id


def installed(data_dir: Path) -> tuple[str, ...]:
    """Ids of the known models whose pack folder is there, in the order of `MODELS`; contents are not looked at."""
    return tuple(model_id for model_id in MODELS if (folder_of(model_id, data_dir) / "model_index.json").is_file())


def imported(data_dir: Path) -> tuple[str, ...]:
    """Ids of the models that a person brought in under names of their own."""
    folders = sorted((Path(data_dir) / "models").glob("*/model_index.json"))
    return tuple(name for file in folders if is_name(name := file.parent.name) and name not in MODELS)


def is_name(model_id: str) -> bool:
    """Whether an id can be a folder's name on every system, and is not hidden."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", model_id) is not None


def default_id(data_dir: Path) -> str:
    """The model to use when nobody names one: the biggest that is installed, else the seedling."""
    there = installed(data_dir)
    return next((model_id for model_id in _PREFERRED if model_id in there), "seedling-ternary")


def find(id_or_path: str, data_dir: Path) -> Path:
    """The pack folder of a known id, or the given folder itself.

    Raises BadRequest for an unknown name and for a known model that is not installed.
    """
    if id_or_path in MODELS:
        folder = folder_of(id_or_path, data_dir)
        if folder.is_dir():
            return folder
        source, there = MODELS[id_or_path].repository, ", ".join(installed(data_dir)) or "none"
        fetch = f"run `app.py models get {id_or_path}` ({source})"
        way_out = fetch if source else f"get a complete copy of Niwaki ({folder})"
        raise BadRequest(f"{id_or_path} is not installed: {way_out}; installed: {there}")
    if is_name(id_or_path) and (folder := Path(data_dir) / "models" / id_or_path).is_dir():
        return folder
    try:
        # Path("") is the current folder, which nobody meant.
        if id_or_path.strip() and (folder := Path(id_or_path).expanduser()).is_dir():
            return folder
    except (OSError, ValueError, RuntimeError):  # too long a name, a null character, no such user: not a folder
        pass
    raise BadRequest(f"unknown model {id_or_path!r}; known: {', '.join(MODELS)}, or the path of a pack folder")
