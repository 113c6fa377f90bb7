"""The verdict of `accept` as one page to share: a file that asks nobody for anything, whatever a pack calls itself.

Knows no gradio. Everything is escaped, pictures are inside, and the page's own policy forbids the rest.
"""

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from engine.accept import Acceptance, Row
from engine.transfer import make_folder, writing

FILE = "acceptance.html"
_WORDS = {True: "passed", False: "failed", None: "measured"}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.4rem .6rem;"
    "border-bottom:1px solid #ccc}.failed{color:#a40000;font-weight:bold}.passed{color:#00592b}"
    "figure{display:inline-block;margin:.5rem;width:12rem}img{width:100%;border:1px solid #ccc}"
    "figcaption{font-size:.85rem;overflow-wrap:anywhere}"
)


def write(acceptance: Acceptance, folder: Path) -> Path:
    """Write the page into `folder`, whole or not at all. Raises BadRequest where that cannot be written."""
    file = make_folder(folder) / FILE
    aside = file.with_name(f".{FILE}.part")
    with writing(file):
        aside.write_text("".join(_page(acceptance)), encoding="utf-8")
        aside.replace(file)
    return file


def _page(acceptance: Acceptance) -> Iterator[str]:
    title = f"Niwaki accepts {acceptance.model}" if acceptance.passed else f"Niwaki does not accept {acceptance.model}"
    yield f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)}</title><style>{_STYLE}</style></head>
<body><h1>{_text(title)}</h1>
"""
    facts = (acceptance.variant, acceptance.backend, acceptance.device, acceptance.hardware, acceptance.system)
    yield f"<p>{_text(', '.join(facts))}; {_text(acceptance.when)}</p>\n"
    yield "<table><tr><th>What</th><th>Verdict</th><th>Found</th></tr>\n"
    for row in acceptance.rows:
        verdict = f'<td class="{_WORDS[row.passed]}">{_WORDS[row.passed]}</td>'
        yield f"<tr><td>{_text(row.name)}</td>{verdict}<td>{_text(row.sentence)}</td></tr>\n"
    yield "</table>\n"
    for row in acceptance.rows:
        yield from _pictures(row)
    yield "</body></html>\n"


def _pictures(row: Row) -> Iterator[str]:
    if row.pictures:
        yield f"<h2>{_text(row.name)}</h2>\n"
    for caption, pixels in row.pictures:
        image = f'<img alt="{_text(caption)}" src="data:image/png;base64,{_png(pixels)}">'
        yield f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>\n"


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _text(value: str) -> str:
    return html.escape(value, quote=True)
