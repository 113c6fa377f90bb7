"""`python -m engine.seedling.grid`: thirty prompts and what a model makes of them, as one labelled picture."""

import argparse
import tempfile
import textwrap
from contextlib import closing
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from engine.types import Picture, Request
from engine.worker import Worker

PROMPTS = (
    "a red circle", "a blue square on a yellow background", "a green triangle",
    "an orange ring on a black background", "a purple circle on a gray background",
    "a white square on a red background", "two red circles on a blue background", "two green rings",
    "two black squares on a pink background", "three blue triangles", "three yellow squares on purple",
    "four pink circles on a green background", "four orange triangles", "three red rings on a white background",
    "a red circle left of a blue square", "a yellow ring right of a green triangle on black",
    "a pink square above a circle", "a black triangle below an orange ring", "a blue circle and a red square",
    "a purple ring and a yellow triangle", "a green square on the left and a red ring on the right",
    "a white circle above a white square on a blue background", "a gray disc next to a black hoop",
    "show me a violet square against a yellow background", "a circle and a square", "a triangle above a square",
    "two discs", "four squares on an orange background", "a ring left of a triangle",
    "please draw a gray triangle on a pink background",
)  # fmt: skip
COLUMNS, MARGIN, LABEL = 6, 12, 34


def draw(model: str, data_dir: Path, seed: int = 0) -> Image.Image:
    """The grid for one model; every prompt has the same seed."""
    with closing(Worker(data_dir=data_dir)) as worker:
        answers = (answer for prompt in PROMPTS for answer in worker.run(Request(prompt, model, seed)))
        made = [answer for answer in answers if isinstance(answer, Picture)]
    width, height = made[0].request.width or 0, made[0].request.height or 0
    rows = -(-len(made) // COLUMNS)
    size = (COLUMNS * (width + MARGIN) + MARGIN, rows * (height + LABEL + MARGIN) + MARGIN)
    sheet = Image.new("RGB", size, "#f5f3ee")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, picture in enumerate(made):
        x = MARGIN + number % COLUMNS * (width + MARGIN)
        y = MARGIN + number // COLUMNS * (height + LABEL + MARGIN)
        sheet.paste(Image.fromarray(picture.pixels), (x, y))
        pen.multiline_text((x, y + height + 3), textwrap.fill(picture.request.prompt, 24), "#333", font, spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m engine.seedling.grid", description=__doc__)
    parser.add_argument("--model", default="seedling-ternary", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("assets/seedling-grid.png"), help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as data_dir:
        draw(args.model, Path(data_dir), args.seed).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
