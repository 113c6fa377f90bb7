"""Prompt templates: "{product} on a {colour} table", and the CSV that fills the slots, one picture a row.

Knows text and tables, not pictures.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.plan import MAX_PROMPT
from engine.types import BadRequest

MAX_ROWS = 500  # pictures of one filling; the queue holds more, but nobody means to queue more
_SLOT = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Filled:
    """The prompts of a filling in the order of the rows, and columns of the table that no slot asks for."""

    prompts: tuple[str, ...]
    unused: tuple[str, ...] = ()


def slots(template: str) -> tuple[str, ...]:
    """The names between braces, in order, each once. Raises BadRequest for braces that are no slot."""
    rest = _SLOT.sub("", template)
    if "{" in rest or "}" in rest:
        raise BadRequest("a brace in the prompt has no partner: write slots as {product}")
    names = tuple(dict.fromkeys(name.strip() for name in _SLOT.findall(template)))
    if "" in names:
        raise BadRequest("a slot has no name: write a column's name between the braces, for example {product}")
    return names


def fill(template: str, table: str) -> Filled:
    """The template once per row of the CSV, whose first line names the columns.

    Commas, semicolons or tabs may part the cells. Raises BadRequest, naming the row or the column, for a table that
    doesn't fit the template.
    """
    wanted = slots(template)
    if not wanted:
        raise BadRequest("the prompt has no slots: write for example {product} on a {colour} table")
    rows = list(_rows(table))
    if not rows:
        raise BadRequest("the table is empty: its first line names the columns, every other line is one picture")
    names, *rows = rows
    if missing := [name for name in wanted if name not in names]:
        raise BadRequest(f"the table has no column {missing[0]!r}; its columns: {', '.join(names)}")
    if not rows:
        raise BadRequest(f"the table has only its first line ({', '.join(names)}): add one line per picture")
    if len(rows) > MAX_ROWS:
        raise BadRequest(f"the table has {len(rows)} rows: at most {MAX_ROWS} at a time")
    prompts = []
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names):
            raise BadRequest(f"line {number} of the table has {len(row)} cells where {len(names)} columns are named")
        prompts.append(_filled(template, dict(zip(names, row, strict=True)), number))
    return Filled(tuple(prompts), tuple(name for name in names if name not in wanted))


def decode(data: bytes, name: str) -> str:
    """The text of an uploaded table. Raises BadRequest for anything but UTF-8 (or what Excel saves as Unicode)."""
    for encoding in ("utf-8-sig", "utf-16") if not data.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-16",):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise BadRequest(f"{name} is no UTF-8 text: save the table as CSV UTF-8")


def _filled(template: str, row: Mapping[str, str], number: int) -> str:
    def cell(match: re.Match[str]) -> str:
        name = match[1].strip()
        if not row[name]:
            raise BadRequest(f"line {number} of the table has nothing in column {name!r}")
        return row[name]

    prompt = _SLOT.sub(cell, template)
    if len(prompt) > MAX_PROMPT:
        raise BadRequest(f"line {number} of the table makes a prompt of {len(prompt)} characters: at most {MAX_PROMPT}")
    return prompt


def _rows(table: str) -> Iterable[list[str]]:
    """Rows with stripped cells, empty lines left out."""
    table = table.replace("\0", "")
    first = next((line for line in table.splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    try:
        for row in csv.reader(io.StringIO(table.strip("\ufeff"), newline=""), delimiter=delimiter):
            cells = [cell.strip() for cell in row]
            if any(cells):
                yield cells
    except csv.Error as error:
        raise BadRequest(f"the table is no CSV ({error}): save it as CSV UTF-8") from error
