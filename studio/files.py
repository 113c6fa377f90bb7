"""Pictures over HTTP: an address names a picture by its id and a piece of its hash, never by a path.

Knows Starlette, not gradio. The hash keeps an address from being guessed and the browser's copy from growing old.
"""

import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from engine.types import EngineError
from studio import tables as t
from studio.export import FOLDER
from studio.history import IMAGES, History
from studio.rows import Image

PIECE = 20  # hex digits of the SHA-256: 80 bits
ADDRESS = r"(\d{1,15})-([0-9a-f]{20})\.\w{3,4}"
FOREVER = {"cache-control": "private, max-age=31536000, immutable"}


def picture(image: Image) -> str:
    """The address of the PNG itself, with its recipe inside."""
    return f"/niwaki/picture/{image.id}-{image.sha256[:PIECE]}.png"


def thumb(image: Image) -> str:
    """The address of the small picture; of the PNG where there is none."""
    if image.thumb is None:
        return picture(image)
    return f"/niwaki/thumb/{image.id}-{image.sha256[:PIECE]}{image.thumb.suffix}"


def parcel(path: Path) -> str:
    """The address of a zip of kept pictures; its folder's name is the key."""
    return f"/niwaki/export/{path.parent.name}/{path.name}"


def routes(history: History) -> list[Route]:
    """The two routes, for launch(app_kwargs={"routes": ..})."""

    def find(request: Request) -> Image | None:
        match = re.fullmatch(ADDRESS, request.path_params["name"])
        rows = history.select(IMAGES.where(t.image.c.id == int(match[1]))) if match else ()
        return next((image for image in rows if match and image.sha256.startswith(match[2])), None)

    def serve(request: Request) -> Response:
        small = request.url.path.startswith("/niwaki/thumb/")
        try:
            image = find(request)
        except EngineError as error:
            return PlainTextResponse(f"{error}\n", status_code=500)
        path = (small and image and image.thumb) or (image and image.path)
        if not path or not path.is_file():
            return PlainTextResponse("This picture is not here: it was deleted for good.\n", status_code=404)
        return FileResponse(path, headers=FOREVER)

    def hand_over(request: Request) -> Response:
        key, name = request.path_params["key"], request.path_params["name"]
        path = history.data_dir / "cache" / FOLDER / key / name
        ours = re.fullmatch(r"[0-9a-f]{32}/niwaki-\d+-kept\.zip", f"{key}/{name}")
        if not ours or not path.is_file():
            return PlainTextResponse("This zip is not here any more: export again.\n", status_code=404)
        return FileResponse(path, filename=name)

    return [
        Route("/niwaki/picture/{name}", serve),
        Route("/niwaki/thumb/{name}", serve),
        Route("/niwaki/export/{key}/{name}", hand_over),
    ]
