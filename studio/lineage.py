"""Where a picture comes from: the tree of a project's pictures, and the chain of one.

Knows image rows, not how they are drawn. A picture's parent may be in the bin or gone: then the nearest ancestor that
is there takes its place, and a picture without one stands at the root.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from engine.chain import values
from studio.history import History
from studio.recipe import Link, read
from studio.rows import Image


@dataclass(frozen=True, slots=True)
class Node:
    """One picture of the tree. `depth` is how many ancestors are shown above it; `children` how many it has here."""

    image: Image
    depth: int
    children: int


def tree(images: Iterable[Image]) -> tuple[Node, ...]:
    """All pictures in the order of drawing: every parent, then its children from old to new."""
    by_id = {image.id: image for image in sorted(images, key=lambda image: image.id)}
    children: dict[int | None, list[Image]] = {}
    for image in by_id.values():
        children.setdefault(image.parent if image.parent in by_id else None, []).append(image)
    nodes: list[Node] = []
    ahead = [(image, 0) for image in reversed(children.get(None, []))]
    while ahead:  # a stack of our own: chains grow longer than Python's
        image, depth = ahead.pop()
        below = children.get(image.id, [])
        nodes.append(Node(image, depth, len(below)))
        ahead += [(child, depth + 1) for child in reversed(below)]
    return tuple(nodes)


def chain(history: History, owner: str, id: int) -> tuple[Image, ...]:
    """The picture's ancestors and itself, the first one first; pictures in the bin are part of it."""
    found: list[Image] = []
    seen: set[int] = set()
    wanted: int | None = id
    while wanted is not None and wanted not in seen:
        seen.add(wanted)
        found[:0] = images = history.images(owner, [wanted])
        wanted = images[0].parent if images else None
    return tuple(found)


def past(image: Image) -> tuple[Link, ...]:
    """The ancestors that a picture from elsewhere brought along in its file, the first one first; they have no files.

    () for a picture made here: its ancestors are pictures themselves (`chain`).
    """
    carried = values(image.request) | {"ancestors": image.details.get("ancestors")}
    return read(carried, str(image.path)).origin.ancestors


def steps_between(chain: Iterable[Image]) -> tuple[Mapping[str, object], ...]:
    """What each picture of a chain changed against the one before: field of the recipe -> new value."""
    changes: list[Mapping[str, object]] = []
    before: Image | None = None
    for image in chain:
        now = {name: getattr(image.request, name) for name in type(image.request).__dataclass_fields__}
        old = {} if before is None else {name: getattr(before.request, name) for name in now}
        changes.append({name: value for name, value in now.items() if old.get(name) != value or before is None})
        before = image
    return tuple(changes)
