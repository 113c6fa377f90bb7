"""A picture as a PNG file that carries its whole recipe, and the recipe read back from such a file.

Knows files, not models. A picture is there whole or not at all: it is written aside and then renamed.
The recipe is JSON in an iTXt chunk named `niwaki` (what it says: `recipe`), beside the text block `parameters` that
other tools read.
"""

import contextlib
import os
import secrets
import shutil
import time
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from engine.types import BadRequest, Picture
from studio import recipe
from studio.recipe import UNKNOWN, Origin, Recipe
from studio.settings import make_folder

KEY = "niwaki"


def save(picture: Picture, path: str | Path, origin: Origin = UNKNOWN) -> Path:
    """Write the PNG with its recipe inside; returns the path.

    Raises BadRequest when it can't be written (no permission, full disk, not a .png name); nothing half remains then.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise BadRequest(f"cannot save {path}: pictures are PNG files, give a name that ends in .png")
    aside = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "xb") as file:
            file.write(_png(picture, origin))
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the rename leaves an empty picture
        os.replace(aside, path)
    except OSError as error:
        raise BadRequest(
            f"cannot save {path} ({error.strerror or error}): free some space or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    return path


def keep(picture: Picture, folder: Path, when: datetime | None = None, origin: Origin = UNKNOWN) -> Path:
    """Save under `folder`/<date>/<time>-<seed>.png; milliseconds keep two quick pictures apart."""
    when = when or datetime.now()
    name = f"{when:%H%M%S}.{when.microsecond // 1000:03d}-{picture.request.seed}.png"
    return save(picture, folder / f"{when:%Y-%m-%d}" / name, origin)


def reopen(path: str | Path, name: str = "") -> Recipe:
    """The recipe of a picture of ours, checked; `name` is what sentences call the file (its path where there is none).

    Raises BadRequest for any other file, and for a recipe that is damaged or of a later format.
    """
    return recipe.read(read_recipe(path, name), name or str(path))


def read_recipe(path: str | Path, name: str = "") -> dict[str, Any]:
    """The same as the bare JSON values, of which only the format was looked at.

    Raises BadRequest for any other file, and for a recipe of a later format.
    """
    path, name = Path(path), name or str(path)
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(KEY)
    except (UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise BadRequest(f"{name} is not a PNG picture") from error
    except OSError as error:
        raise BadRequest(f"cannot read {name} ({error.strerror or error})") from error
    if not isinstance(text, str):
        raise BadRequest(f"{name} carries no recipe: it was not made by Niwaki, or another program rewrote it")
    return recipe.loads(text, name)


def publish(path: Path, cache: Path) -> Path:
    """The picture under the page's cache, as a second name for the same bytes (a copy where the disk can't link).

    The page hands out nothing but its cache, so the rest of the data folder stays out of reach.
    """
    shown = make_folder(cache / "shown") / path.name
    try:
        with contextlib.suppress(FileExistsError):
            os.link(path, shown)
    except OSError:
        shutil.copyfile(path, shown)
    return shown


def sweep(cache: Path, age_seconds: float = 86_400) -> None:
    """Delete what has lain in the page's cache for a day; pictures themselves lie elsewhere and stay."""
    oldest = time.time() - age_seconds
    for file in sorted(cache.rglob("*")):
        with contextlib.suppress(OSError):  # another page of ours may be sweeping too
            if file.is_file() and file.lstat().st_ctime < oldest:
                file.unlink()


def _png(picture: Picture, origin: Origin) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(KEY, recipe.text(picture, origin))
    info.add_text("parameters", recipe.parameters(picture, origin))
    buffer = BytesIO()
    Image.fromarray(picture.pixels).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
