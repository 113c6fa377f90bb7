"""What is behind things, and the colours of it all: plain paper, or sky over ground at a time of day, in a season.

Knows no things, captions or models.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 44),
    "orange": (242, 132, 24),
    "yellow": (250, 214, 54),
    "green": (46, 154, 70),
    "blue": (44, 98, 216),
    "purple": (126, 58, 176),
    "pink": (248, 152, 194),
    "black": (24, 24, 28),
    "white": (250, 250, 248),
    "gray": (134, 138, 142),
}
TIMES = ("dawn", "day", "dusk", "night")
SEASONS = ("spring", "summer", "autumn", "winter")
WEATHERS = ("rain", "snow")
SKY = {"dawn": (252, 206, 172), "day": (202, 226, 242), "dusk": (146, 104, 152), "night": (34, 40, 84)}
HORIZON = {"dawn": (255, 238, 212), "day": (240, 244, 240), "dusk": (240, 170, 128), "night": (66, 70, 112)}
GROUND = {"spring": (234, 244, 190), "summer": (192, 224, 166), "autumn": (234, 184, 118), "winter": (206, 222, 242)}
LIGHT = {"dawn": 0.98, "day": 1.0, "dusk": 0.74, "night": 0.4}  # that falls on the ground
INK, PALE_INK = (38, 34, 44), (226, 220, 206)  # the second where the paper is dark
DARK = 80.0  # mean of a paper's RGB below which it is
CLEAR = 85.0  # Euclidean in RGB: how far a thing's colour is from all of the paper behind it, at least


@dataclass(frozen=True, slots=True)
class Backdrop:
    """Plain `color`, or, where there is a `time`, that sky; then `season` colours the ground ("": none is said) and
    `weather` falls."""

    color: str = "white"
    time: str = ""
    season: str = ""
    weather: str = ""

    def __post_init__(self) -> None:
        if bool(self.color) == bool(self.time):
            raise ValueError(f"a backdrop is either plain or a time of day, not {self.color!r} and {self.time!r}")

    @property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """RGB at the top and at the bottom, float32 [3] each; between them it changes evenly."""
        if self.color:
            plain = np.array(COLORS[self.color], np.float32)
            return plain, plain
        bottom = np.array(HORIZON[self.time], np.float32)
        if self.season:
            bottom = np.array(GROUND[self.season], np.float32) * LIGHT[self.time]
        return np.array(SKY[self.time], np.float32), bottom

    @property
    def ink(self) -> tuple[int, int, int]:
        return PALE_INK if np.mean(self.edges) < DARK else INK

    def shows(self, color: str) -> bool:
        """Whether a thing of that colour stands out anywhere on it."""
        return _shows(self, color)


@cache  # 700 answers, and every scene asks for ten of them
def _shows(backdrop: Backdrop, color: str) -> bool:
    top, bottom = backdrop.edges
    washes = top + (bottom - top) * np.linspace(0, 1, 9)[:, None]
    return bool(np.linalg.norm(washes - COLORS[color], axis=1).min() >= CLEAR)


WHITE = Backdrop()
PLAIN = tuple(Backdrop(color) for color in COLORS)
OUTDOORS = tuple(Backdrop("", *parts) for parts in product(TIMES, ("", *SEASONS), ("", *WEATHERS)))
