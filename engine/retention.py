"""What quantisation leaves of the demo model: scores of the three packs side by side, and against their bytes.

From the answers that `evaluate` kept; asks no model anything.
"""

import math
from html import escape
from pathlib import Path
from typing import Any

from engine import catalog, evaluate, memory
from engine.bench import weights_on_disk
from engine.packs import open_pack
from engine.published import QUALITY, QUALITY_SOURCE
from engine.types import BadRequest

MODELS = ("seedling-dense", "seedling-ternary", "seedling-binary")
DTYPE = "bfloat16"  # of what is not packed, in memory: 16 bits a weight, the fair measure for the dense model
Facts = dict[str, Any]


def table(data_dir: Path) -> list[Facts]:
    """The facts of each of the three, the reference first: scored on the questions that all of them answered.

    Raises BadRequest where one of them was not asked yet.
    """
    answers = {model: evaluate.answers(model, data_dir) for model in MODELS}
    for model, right in answers.items():
        if not right:
            raise BadRequest(f"no answers of {model} are kept; run `python app.py evaluate --model {model}` first")
    asked = evaluate.answered(evaluate.PER_TASK, *answers.values())
    if not asked:
        raise BadRequest("the demo models were asked different questions; evaluate all three with the same --limit")
    rows = []
    for model, right in answers.items():
        pack = open_pack(catalog.find(model, data_dir))
        on_disk = weights_on_disk(pack)
        bytes_ = {
            "transformer": on_disk["transformer"], "pack": sum(on_disk.values()),
            "blocks_in_memory": memory.block_bytes(pack.transformer, DTYPE),
        }  # fmt: skip
        reference = {} if model == evaluate.REFERENCE else answers[evaluate.REFERENCE]
        rows.append({"model": model, "bytes": bytes_, **evaluate.scored(asked, right, reference)})
    return rows


def markdown(rows: list[Facts]) -> str:
    """A column for each model, a row for each score and size."""
    lines = [("", *(row["model"] for row in rows)), ("---", *("---:" for _ in rows))]
    for sort in ("tasks", "languages", "kinds"):
        lines += [(name, *(f"{row[sort][name]:.3f}" for row in rows)) for name in rows[0][sort]]
    lines.append(("**overall**", *(f"**{row['overall']:.3f}**" for row in rows)))
    lines.append(("95 % interval", *(_interval(row["interval"]) for row in rows)))
    ratios = [row.get("against", {}) for row in rows]
    lines.append(("ratio to dense", *(f"{each['ratio']:.3f}" if "ratio" in each else "-" for each in ratios)))
    lines.append(("its interval", *(_interval(each["interval"]) if "ratio" in each else "-" for each in ratios)))
    for name in ("transformer", "pack", "blocks_in_memory"):
        where = f"blocks in memory ({DTYPE})" if name == "blocks_in_memory" else f"{name} on disk"
        lines.append((f"{where}, MB", *(f"{row['bytes'][name] / 1e6:.2f}" for row in rows)))
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{text}\n\n{rows[0]['n']} questions, the same of each model; the ratio's interval is that of paired samples."
    )


def _interval(edges: list[float]) -> str:
    return f"{edges[0]:.3f} to {edges[1]:.3f}"


def write(path: Path, rows: list[Facts]) -> None:
    """The plot. Raises BadRequest where it cannot be written."""
    try:
        path.write_text(svg(rows), encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"can't write {path}: {error.strerror}; choose another file") from None


Dot = tuple[str, float, float, tuple[float, float] | None]
"""name, bytes, score, its 95 % interval"""
WIDE, HIGH, LEFT, TOP, ACROSS, DOWN = 380, 330, 62, 52, 290, 214  # a panel, and the plot in it, in pixels


def svg(rows: list[Facts]) -> str:
    """Quality against the transformer's bytes: these models and, in a panel of its own, the published 4B ones, which
    answer another benchmark."""
    ours: list[Dot] = [
        (row["model"], row["bytes"]["transformer"], row["overall"], (row["interval"][0], row["interval"][1]))
        for row in rows
    ]  # fmt: skip
    theirs: list[Dot] = [(each.name, each.transformer_bytes, each.overall, None) for each in QUALITY]
    panels = _panel(ours, 0, "Demo models, measured here", "right answers, ink garden")
    panels += _panel(theirs, WIDE, "4B models, as published", "GenEval overall, published")
    panels += _text(WIDE + LEFT, HIGH - 12, f"Source: {QUALITY_SOURCE}") + "\n"
    style = "text{font:11px sans-serif;fill:#222}.t{font-weight:bold}.a{stroke:#222}.g{stroke:#ddd}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDE} {HIGH}" width="{2 * WIDE}" height="{HIGH}">\n'
        f'<style>{style}</style>\n<rect width="100%" height="100%" fill="#fff"/>\n{panels}</svg>\n'
    )


def _panel(dots: list[Dot], x0: int, title: str, axis: str) -> str:
    """Bytes on a logarithmic axis from left to right, scores from 0 to 1 upwards; the dots no other beats joined."""
    least, most = math.log(min(dot[1] for dot in dots) / 1.6), math.log(max(dot[1] for dot in dots) * 1.6)

    def at(size: float, score: float) -> tuple[float, float]:
        x = x0 + LEFT + ACROSS * (math.log(size) - least) / (most - least)
        return round(x, 1), round(TOP + DOWN * (1 - score), 1)

    right, bottom = x0 + LEFT + ACROSS, TOP + DOWN
    parts = [_text(x0 + LEFT, 24, title, "t")]
    for tenths in range(0, 11, 2):
        y = at(1, tenths / 10)[1]
        parts.append(f'<line class="g" x1="{x0 + LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(_text(x0 + LEFT - 6, y + 4, f"{tenths / 10:.1f}", anchor="end"))
    parts.append(f'<path class="a" fill="none" d="M{x0 + LEFT} {TOP}V{bottom}H{right}"/>')
    parts.append(_text(x0 + LEFT + ACROSS / 2, bottom + 24, "bytes of the transformer, logarithmic", anchor="middle"))
    parts.append(
        f'<g transform="translate({x0 + 16} {TOP + DOWN / 2}) rotate(-90)">{_text(0, 0, axis, anchor="middle")}</g>'
    )
    line = " ".join(f"{x},{y}" for x, y in (at(dot[1], dot[2]) for dot in frontier(dots)))
    parts.append(f'<polyline fill="none" stroke="#8a5a2b" stroke-dasharray="4 3" points="{line}"/>')
    for name, size, score, interval in dots:
        x, y = at(size, score)
        if interval:
            low, high = (at(size, edge)[1] for edge in interval)
            parts.append(f'<line class="a" x1="{x}" y1="{low}" x2="{x}" y2="{high}"/>')
        parts.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="#b03a2e"/>')
        end = x > x0 + LEFT + ACROSS / 2
        words = f"{name} {score:.3f}, {_bytes(size)}"
        down = -10 if end else 24 if size == min(dot[1] for dot in dots) else 15  # under the line, over each other
        parts.append(_text(x + (8 if end else 4), y + down, words, anchor="end" if end else "start"))
    return "\n".join(parts) + "\n"


def frontier(dots: list[Dot]) -> list[Dot]:
    """Those that no other beats in bytes and in score, the smallest first."""
    best: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot[1], -dot[2])):
        if not best or dot[2] > best[-1][2]:
            best.append(dot)
    return best


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _text(x: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>'
