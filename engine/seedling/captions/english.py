"""English. One table for each kind of word."""

from engine.seedling.captions.core import Language, Noun


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _nouns(*names: str) -> tuple[Noun, ...]:
    """Nouns with a regular plural; one that stands first twice is heard twice as often."""
    return tuple(Noun(name, name + "s") for name in names)


NAMES = {
    "circle": _nouns("circle", "circle", "circle", "disc"),
    "square": _nouns("square"),
    "triangle": _nouns("triangle"),
    "ring": _nouns("ring", "ring", "ring", "hoop"),
    "pine": _nouns("pine", "pine", "pine tree"),
    "maple": (Noun("maple", "maples"), Noun("maple leaf", "maple leaves")),
    "cherry": _nouns("cherry blossom", "cherry blossom", "cherry flower"),
    "bamboo": (Noun("bamboo", "bamboos"), Noun("bamboo plant", "bamboo plants")),
    "moon": _nouns("moon", "moon", "moon", "crescent", "crescent moon"),
    "sun": _nouns("sun"),
    "mountain": _nouns("mountain", "mountain", "mountain", "peak"),
    "lantern": _nouns("lantern", "lantern", "lantern", "paper lantern"),
    "boat": _nouns("boat", "boat", "boat", "sailboat"),
    "crane": _nouns("crane"),
    "koi": (Noun("koi", "koi"), Noun("koi", "koi"), Noun("koi fish", "koi fish"), Noun("carp", "carp")),
    "bridge": _nouns("bridge"),
    "rock": _nouns("rock", "rock", "rock", "stone"),
    "gate": (*_nouns("gate", "gate", "torii gate"), Noun("torii", "torii")),
    "pagoda": _nouns("pagoda", "pagoda", "pagoda", "temple tower"),
    "umbrella": _nouns("umbrella", "umbrella", "umbrella", "parasol"),
}
ENGLISH = Language(
    frames=(
        *("{}",) * 7, "a picture of {}", "an image of {}", "a photo of {}", "a drawing of {}", "a painting of {}",
        "draw {}", "paint {}", "show me {}", "i want {}", "please draw {}", "here is {}", "a picture showing {}",
        "an image with {}", "can you draw {}", "make {}", "an ink drawing of {}",
    ),
    held_out_frames=(
        "a photo showing {}", "a drawing with {}", "please show me {}", "draw me a picture of {}",
        "i want an image of {}", "make me {}",
    ),
    names=NAMES,
    colors={
        "red": ("red",), "orange": ("orange",), "yellow": ("yellow",), "green": ("green",), "blue": ("blue",),
        "purple": ("purple", "purple", "violet"), "pink": ("pink",), "black": ("black",), "white": ("white",),
        "gray": ("gray", "grey"),
    },
    one=(*("a",) * 10, "one", ""),
    numbers={2: ("two", "two", "2", "a pair of"), 3: ("three", "three", "3"), 4: ("four", "four", "4")},
    between={
        "and": ("{a} and {b}", "{a} and {b}", "{a} with {b}", "{a} next to {b}", "{a} beside {b}", "{a}, {b}"),
        "left of": (
            "{a} to the left of {b}", "{a} left of {b}", "{a} on the left of {b}",
            "{a} on the left and {b} on the right",
        ),
        "right of": (
            "{a} to the right of {b}", "{a} right of {b}", "{a} on the right of {b}",
            "{a} on the right and {b} on the left",
        ),
        "above": ("{a} above {b}", "{a} above {b}", "{a} over {b}", "{a} at the top and {b} at the bottom"),
        "below": ("{a} below {b}", "{a} below {b}", "{a} under {b}", "{a} at the bottom and {b} at the top"),
    },
    papers=(
        *(("{x} on {a} background", "", "one"),) * 3, ("{x} against {a} background", "", "one"),
        ("{x} with {a} background", "", "one"), ("{x} on {c}", "", "one"), ("{x}, {c} background", "", "one"),
        ("{x} in front of {a} backdrop", "", "one"), ("{x} on {c} paper", "", "one"),
        ("{c} background, {x}", "", "one"),
    ),
    sides=("{x} {p}", "{x} {p}", "{x} {p}", "{x} {p}", "{p}, {x}"),
    times={
        "dawn": ("at dawn", "at dawn", "at sunrise"),
        "day": ("by day", "in daylight", "during the day"),
        "dusk": ("at dusk", "at dusk", "in the evening", "at sunset"),
        "night": ("at night", "at night", "by night"),
    },
    seasons={
        "spring": ("in spring",), "summer": ("in summer",), "autumn": ("in autumn", "in autumn", "in fall"),
        "winter": ("in winter",),
    },
    weathers={"rain": ("in the rain",), "snow": ("in the snow", "in the snow", "in falling snow")},
    clauses={"rain": ("it is raining", "rain is falling"), "snow": ("it is snowing", "snow is falling")},
    tags={word: word for word in "dawn day dusk night spring summer autumn winter rain snow".split()},
    attributive={season: season for season in ("spring", "summer", "autumn", "winter")},
    evenings={"dawn": ("morning", ""), "day": ("day", ""), "dusk": ("evening", ""), "night": ("night", "")},
    together="on {}",
    season_first=False,
    frame_inside=True,
    definite="the",
    article=article,
)  # fmt: skip
