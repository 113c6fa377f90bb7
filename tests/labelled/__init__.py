"""A hundred pictures of the dense seedling and whether each is right, by looking, before the checker was asked.

One pair of eyes labelled them, and called seven wrong.

`sheet.webp` holds the pictures, ten in a row, lossless; `labels.json` the prompt and the label of each, in that order.
`python -m tests.labelled OUT` draws a new hundred with unlabelled entries, and large pages to label them from.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent
COUNT, IN_A_ROW, SIDE = 100, 10, 256


@dataclass(frozen=True)
class Labelled:
    prompt: str
    right: bool
    pixels: np.ndarray


def labelled() -> list[Labelled]:
    sheet = np.asarray(Image.open(FOLDER / "sheet.webp").convert("RGB"))
    rows = json.loads((FOLDER / "labels.json").read_text(encoding="utf-8"))
    out = []
    for number, row in enumerate(rows):
        y, x = (SIDE * part for part in divmod(number, IN_A_ROW))
        out.append(Labelled(row["prompt"], row["right"], sheet[y : y + SIDE, x : x + SIDE]))
    return out
