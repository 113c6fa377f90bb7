"""How a caption is put together in any language: what is told, the tables a language fills in, the speaker.

Knows no language and no scene.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")
Table = Mapping[str, tuple[str, ...]]
# Of a noun and of what agrees with it: alone, after a number, before "left of" and its kin, with Tamil's "and".
FORMS = ("one", "many", "bound", "joined")
SOLE = ("sun", "moon")  # of which there is usually one
_FIELD = re.compile(r"\{([ab]) ?(\w*)\}")


class Pick(Protocol):
    def __call__(self, options: Sequence[T]) -> T: ...


def first(options: Sequence[T]) -> T:
    """The plainest wording: every table begins with it."""
    return options[0]


@dataclass(frozen=True, slots=True)
class Told:
    """What a caption says; "" is left unsaid. `things` (kind, colour) are one kind, or two of which `relation` holds;
    `color` is that of plain paper."""

    things: tuple[tuple[str, str], ...]
    count: int = 1
    relation: str = ""
    color: str = ""
    time: str = ""
    season: str = ""
    weather: str = ""


@dataclass(frozen=True, slots=True)
class Noun:
    """`bound` and `joined` "" are like `one`; `gender` is "m", "f", "n", or "" in a language without."""

    one: str
    many: str
    bound: str = ""
    joined: str = ""
    gender: str = ""

    def form(self, form: str) -> str:
        return {"many": self.many, "bound": self.bound, "joined": self.joined}.get(form, "") or self.one


@dataclass(frozen=True, slots=True)
class Language:
    """The tables of a language. Entries stand in them as often as they are to be heard, the plainest one first.

    `between` has {a} and {b}, or {a bound} for a's other form. `papers` (template, gender, form) has the text {x}, the
    agreeing colour {c}, and {a} for that with its article. `sides` puts a time or weather {p} to the text {x}.
    `together` is a season's adjective with an `evenings` (word, gender).
    """

    frames: tuple[str, ...]
    held_out_frames: tuple[str, ...]  # for evaluation alone; each of their words occurs in training
    names: Mapping[str, tuple[Noun, ...]]
    colors: Table
    one: tuple[str, ...]
    numbers: Mapping[int, tuple[str, ...]]
    between: Table
    papers: tuple[tuple[str, str, str], ...]
    sides: tuple[str, ...]
    times: Table
    seasons: Table
    weathers: Table
    clauses: Table
    tags: Mapping[str, str]
    attributive: Mapping[str, str]
    evenings: Mapping[str, tuple[str, str]]
    together: str = "{}"
    season_first: bool = True
    frame_inside: bool = False  # "on yellow, [draw a crane]", not "[draw on yellow a crane]"
    one_bound: tuple[str, ...] = ()  # where that differs from `one`
    definite: str = ""
    binder: str = ""  # what an English word takes in the place of a bound noun, and of a joined one
    joiner: str = ""
    article: Callable[[str], str] = lambda phrase: phrase
    agree: Callable[[str, str, str], str] = lambda adjective, gender, form: adjective

    def texts(self) -> Iterator[str]:
        """Every entry of every table, in all the forms it can take."""
        yield from (*self.frames, *self.held_out_frames, *self.one, *self.one_bound, self.definite, *self.sides)
        yield from (self.together, self.binder, self.joiner, *self.tags.values(), *(p[0] for p in self.papers))
        for table in (self.between, self.times, self.seasons, self.weathers, self.clauses):
            yield from (text for texts in table.values() for text in texts)
        yield from (text for texts in self.numbers.values() for text in texts)
        yield from (word for word, _ in self.evenings.values())
        nouns = [noun for names in self.names.values() for noun in names]
        yield from (noun.form(form) for noun in nouns for form in FORMS)
        kinds = {(noun.gender, form) for noun in nouns for form in FORMS} | {p[1:] for p in self.papers}
        for gender, form in kinds:
            yield from (self.article(self.agree(c, gender, form)) for names in self.colors.values() for c in names)
        for _, gender in self.evenings.values():
            yield from (self.article(self.agree(word, gender, "bound")) for word in self.attributive.values())


@dataclass(frozen=True, slots=True)
class Speaker:
    """One who words things in a language; `borrowed` ("thing" or "color") is said in the words of `lender`."""

    language: Language
    pick: Pick = first
    borrowed: str = ""
    lender: Language | None = None

    def say(self, told: Told, frame: str) -> str:
        open_end = frame.endswith("{}")  # nothing but a phrase may come before a closing verb
        if self.language.frame_inside:
            return self.setting(told, frame.format(self.things(told)), open_end)
        return frame.format(self.setting(told, self.things(told), open_end))

    def things(self, told: Told) -> str:
        if not told.relation:
            return self.group(*told.things[0], told.count)
        a, b = told.things
        template = self.pick(self.language.between[told.relation])
        return _FIELD.sub(lambda field: self.single(*(a if field[1] == "a" else b), field[2] or "one"), template)

    def group(self, kind: str, color: str, count: int) -> str:
        if count == 1:
            return self.single(kind, color, "one")
        return f"{self.pick(self.language.numbers[count])} {self.phrase(kind, color, 'many')}"

    def single(self, kind: str, color: str, form: str) -> str:
        language, phrase = self.language, self.phrase(kind, color, form)
        ones = (language.one_bound if form == "bound" else ()) or language.one
        if language.definite and kind in SOLE:
            ones += (language.definite,) * len(ones)
        one = self.pick(ones)
        return language.article(phrase) if one == "a" else f"{one} {phrase}".strip()

    def phrase(self, kind: str, color: str, form: str) -> str:
        """Colour, where one is told, and noun."""
        noun = self.noun(kind)
        return f"{self.color(color, noun.gender, form)} {noun.form(form)}" if color else noun.form(form)

    def noun(self, kind: str) -> Noun:
        noun = self.pick(self.language.names[kind])
        if self.borrowed != "thing" or self.lender is None:
            return noun
        loan, binder, joiner = self.lender.names[kind][0], self.language.binder, self.language.joiner
        return Noun(loan.one, loan.many, loan.one + binder, loan.one + joiner, noun.gender)

    def color(self, color: str, gender: str, form: str) -> str:
        if self.borrowed == "color" and self.lender is not None:
            return self.lender.colors[color][0]
        return self.language.agree(self.pick(self.language.colors[color]), gender, form)

    def setting(self, told: Told, text: str, open_end: bool) -> str:
        """The text with what is behind the things, where that is told."""
        if not told.color:
            return self.outdoors(told, text, open_end)
        papers = [paper for paper in self.language.papers if open_end or paper[0].endswith("{x}")]
        template, gender, form = self.pick(papers)
        color = self.color(told.color, gender, form)
        return template.format(x=text, c=color, a=self.language.article(color))

    def outdoors(self, told: Told, text: str, open_end: bool) -> str:
        language, parts = self.language, [part for part in (told.time, told.season, told.weather) if part]
        if parts and open_end and self.pick((False,) * 6 + (True,)):
            return ", ".join([text, *(language.tags[part] for part in parts)])
        phrases, clause = self.when(told), ""
        if told.weather and open_end and self.pick((False, False, True)):
            clause = ", " + self.pick(language.clauses[told.weather])
        elif told.weather:
            phrases.append(self.pick(language.weathers[told.weather]))
        if phrases:
            sides = [side for side in language.sides if open_end or side.endswith("{x}")]
            text = self.pick(sides).format(x=text, p=" ".join(phrases))
        return text + clause

    def when(self, told: Told) -> list[str]:
        """Season and time of day."""
        language = self.language
        if told.time and told.season and self.pick((False, True)):
            word, gender = language.evenings[told.time]
            season = language.agree(language.attributive[told.season], gender, "bound")
            return [language.together.format(language.article(f"{season} {word}"))]
        time = [self.pick(language.times[told.time])] if told.time else []
        season_ = [self.pick(language.seasons[told.season])] if told.season else []
        return season_ + time if language.season_first else time + season_
