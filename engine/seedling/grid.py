"""`python -m engine.seedling.grid`: thirty prompts and what a model makes of them, as one labelled picture."""

import argparse
import shutil
import subprocess
import tempfile
import textwrap
import unicodedata
from contextlib import closing
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from engine.types import Picture, Request
from engine.worker import Worker

PROMPTS = (
    "a pine at dawn", "a red maple leaf in autumn", "three cherry blossoms in spring", "bamboo in the rain",
    "a yellow moon at night", "a sun above a mountain", "two red lanterns at dusk", "a boat on a blue background",
    "a white crane at dusk in winter, snow is falling", "four orange koi on a blue background",
    "a red bridge at dawn in spring", "a rock in the rain", "a red gate in autumn", "a pagoda at night in winter",
    "three pink umbrellas in the rain", "two red circles on a blue background",
    "an orange ring left of a purple square", "a green triangle on a yellow background",
    "a moon above a pagoda at night", "a crane left of a pine", "a boat below a sun on a yellow background",
    "a blue lantern and a yellow lantern", "a green koi and a pink maple leaf",
    "two white mountains on a black background", "शाम को दो लाल लालटेनें", "सर्दियों की रात में एक सफ़ेद सारस",
    "पावसात तीन निळ्या छत्र्या", "वसंतात एक लाल पूल", "இரவில் ஒரு மஞ்சள் நிலா", "மழையில் இரண்டு நீல குடைகள்",
)  # fmt: skip
COLUMNS, MARGIN, LABEL = 6, 12, 34


def font_for(prompt: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of this machine with the prompt's letters, which fontconfig names; Pillow's own has Latin ones alone."""
    scripts = {"DEVANAGARI": "hi", "TAMIL": "ta"}
    language = next((scripts[w] for c in prompt for w in scripts if unicodedata.name(c, "").startswith(w)), "")
    if not language or not shutil.which("fc-match"):
        return ImageFont.load_default(13)
    asked = subprocess.run(["fc-match", "-f", "%{file}", f":lang={language}"], capture_output=True, text=True)
    return ImageFont.truetype(asked.stdout, 13)


def draw(model: str, data_dir: Path, seed: int = 0) -> Image.Image:
    """The grid for one model; every prompt has the same seed."""
    with closing(Worker(data_dir=data_dir)) as worker:
        answers = (answer for prompt in PROMPTS for answer in worker.run(Request(prompt, model, seed)))
        made = [answer for answer in answers if isinstance(answer, Picture)]
    width, height = made[0].request.width or 0, made[0].request.height or 0
    rows = -(-len(made) // COLUMNS)
    size = (COLUMNS * (width + MARGIN) + MARGIN, rows * (height + LABEL + MARGIN) + MARGIN)
    sheet = Image.new("RGB", size, "#f5f3ee")
    pen = ImageDraw.Draw(sheet)
    for number, picture in enumerate(made):
        x = MARGIN + number % COLUMNS * (width + MARGIN)
        y = MARGIN + number // COLUMNS * (height + LABEL + MARGIN)
        sheet.paste(Image.fromarray(picture.pixels), (x, y))
        prompt = picture.request.prompt
        pen.multiline_text((x, y + height + 3), textwrap.fill(prompt, 36), "#333", font_for(prompt), spacing=1)
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
