"""`python -m tests.labelled OUT`: a hundred new pictures, as a sheet, unlabelled entries and pages to look at."""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from engine.evaluate import pictures
from engine.seedling.checker import Wanted
from engine.seedling.questions import questions
from tests.labelled import COUNT, IN_A_ROW, SIDE

PAGE, ZOOM, LABEL = 20, 1, 18


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.labelled", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="seedling-dense", help="default: %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # Not the pictures that evaluate judges: other seeds of every fourteenth of its questions, all languages among them.
    asked = [replace(question, seed=question.seed + 500_000) for question in questions()[::14]][:COUNT]
    with tempfile.TemporaryDirectory() as data_dir:
        drawn = [picture.pixels for _, picture in pictures(asked, args.model, "auto", Path(data_dir))]
    rows = [np.concatenate(drawn[i : i + IN_A_ROW], axis=1) for i in range(0, COUNT, IN_A_ROW)]
    Image.fromarray(np.concatenate(rows)).save(args.out / "sheet.webp", lossless=True, quality=60, method=4)
    entries = [{"prompt": question.prompt, "right": None} for question in asked]
    (args.out / "labels.json").write_text(json.dumps(entries, indent=0) + "\n", encoding="utf-8")
    for first in range(0, COUNT, PAGE):
        page(asked[first : first + PAGE], drawn[first : first + PAGE], first).save(args.out / f"page-{first:03}.png")


def page(asked: list, drawn: list[np.ndarray], first: int) -> Image.Image:
    """Twenty pictures, each under its number and what its prompt wants."""
    side, wide = SIDE * ZOOM, 5
    sheet = Image.new("RGB", (wide * (side + 6), -(-len(drawn) // wide) * (side + LABEL * 2)), "#888")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (question, pixels) in enumerate(zip(asked, drawn, strict=True)):
        y, x = (number // wide) * (side + LABEL * 2), (number % wide) * (side + 6)
        words = f"{first + number} {_in_english(question.wanted)}"  # the font knows no other language
        pen.text((x + 2, y + 2), words[:44] + "\n" + words[44:], "#fff", font, spacing=1)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y + LABEL * 2))
    return sheet


def _in_english(wanted: Wanted) -> str:
    things = (
        f" {wanted.relation} ".join(f"{color} {kind}" for kind, color in wanted.things)
        if wanted.relation
        else (f"{len(wanted.things)} {wanted.things[0][1]} {wanted.things[0][0]}")
    )
    backdrop = wanted.backdrop
    parts = (backdrop.color, backdrop.season, backdrop.time, backdrop.weather)
    return f"{things}; {' '.join(part for part in parts if part)}"


if __name__ == "__main__":
    main()
