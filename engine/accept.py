"""Turn "not checked" into facts where the weights are: a few minutes of questions that only a real pack can answer.

Each row asks one thing, says what it found and what it was held against, and can fail. Rows see the engine through
`Subject` alone, so they hold for every backend. The verdict lies as acceptance.json beside the pack, or in the data
folder where the pack can't be written; a feature that needs a row reads it from there. Knows no page.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine import catalog, chain, install, lowbit, products, published, records
from engine.hardware import Hardware, detect
from engine.packs import NOTES_FILE, Pack, open_pack
from engine.plan import Plan, complete, plan
from engine.types import EngineError, Picture, Request

FILE = "acceptance.json"

# The picture that the CUDA reference was measured with, and its mean and deviation; the gray-noise failure has 8.7.
PROMPT, SEED = "A bonsai tree in a quiet ceramic studio, soft morning light", 42
MEAN, DEVIATION = 115.3, 65.9
MEAN_WITHIN, DEVIATION_WITHIN = 30.0, 25.0  # other variants and kernels draw the scene anew, not another brightness
GRAY = 15.0  # a deviation below is no picture

# The same two things in four languages, which differ in the colour alone.
COLORS = {
    "en": ("a plain red wall", "a plain blue wall"),
    "hi": ("एक सादी लाल दीवार", "एक सादी नीली दीवार"),
    "mr": ("एक साधी लाल भिंत", "एक साधी निळी भिंत"),
    "ta": ("ஒரு வெற்று சிவப்பு சுவர்", "ஒரு வெற்று நீல சுவர்"),
}
WARMER = 10.0  # red minus blue, of 255, by which the red wall must be warmer than the blue one
HEARD = 0.1  # mean difference of two pictures, of 255, below which the changed word did not reach them
SPREAD = 1.0  # mean difference of two seeds' pictures, of 255
SAME = 2  # of 255: the most that a pixel of a repeated picture may differ; some kernels add in another order each time
TELLS_APART = 0.01  # relative difference of the states of two prompts, and of two depths
COMPOSES = 0.4  # correlation of a draft with what it was refined to; the seedling's lowest was 0.78 (SPEED.md)
FAITHFUL = 30.0  # dB between the pictures of two kernels: a difference that nobody sees
PRECISION = 0.02  # of a layer's product: int8 and bfloat16 stay under, a wrong code or scale does not
_ROWS_SAMPLED = 32  # outputs of each layer that are computed again
_INPUTS = 8  # vectors that each layer is multiplied with


class Subject(Protocol):
    """What the rows need of an engine. `states` float32 [states, tokens, hidden] of the prompt's own tokens; `product`
    float32 [n, out] of vectors [n, in] with one packed layer, by the kernels that pictures are made with; `plain` a
    picture without any that were chosen for speed; `measure` the facts of `bench`."""

    def picture(self, request: Request) -> Picture: ...

    def plain(self, request: Request) -> Picture: ...

    def states(self, prompt: str) -> np.ndarray: ...

    def product(self, fqn: str, x: np.ndarray) -> np.ndarray: ...

    def measure(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One answer. `passed` None: measured, but nothing is known here to hold it against. `pictures` by caption."""

    name: str
    passed: bool | None
    sentence: str
    measured: dict[str, Any]
    pictures: tuple[tuple[str, np.ndarray], ...] = ()


@dataclass(frozen=True, slots=True)
class Acceptance:
    """All rows, and on what. `passed`: no row failed."""

    model: str
    variant: str
    backend: str
    device: str
    hardware: str
    system: str
    when: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed is not False for row in self.rows)

    def facts(self) -> dict[str, Any]:
        """As JSON: everything but the pictures."""
        head = {name: getattr(self, name) for name in ("model", "variant", "backend", "device", "hardware", "system")}
        names = ("name", "passed", "sentence", "measured")
        rows = [{name: getattr(row, name) for name in names} for row in self.rows]
        return head | {"when": self.when, "passed": self.passed, "rows": rows}


@dataclass(frozen=True)
class Case:
    """What every row looks at. `expected`: mean and deviation that the pack declares for the range picture, or None."""

    model: str
    pack: Pack
    data_dir: Path
    hardware: Hardware
    decided: Plan
    subject: Subject
    expected: tuple[float, float] | None

    def request(self, prompt: str, seed: int, *, small: bool = True) -> Request:
        sizes = self.pack.notes.sizes
        width, height = min(sizes, key=lambda size: size[0] * size[1]) if small else sizes[0]
        return complete(Request(prompt, self.model, seed, width, height), self.pack)


def run(
    model: str, data_dir: Path, backend: str = "auto", subject: Subject | None = None, rows: Sequence[str] | None = None
) -> Generator[Row | Acceptance, None, None]:
    """Ask everything (or the named rows), yielding each answer and at last the Acceptance. Keeps nothing: see `write`.

    A row whose question ends in an error of the engine has failed, with that error as its sentence; BadRequest only
    where the pack cannot be opened at all.
    """
    pack, hardware = open_pack(catalog.find(model, data_dir)), detect()
    decided = plan(hardware, pack, complete(Request(PROMPT, model), pack), backend)
    if subject is None:
        from engine.accept_subject import EngineSubject

        subject = EngineSubject(model, pack, hardware, decided, backend, data_dir)
    case = Case(model, pack, data_dir, hardware, decided, subject, _declared(pack))
    answers = []
    try:
        for name, ask in ROWS.items():
            if rows is None or name in rows:
                try:
                    answers.append(ask(case))
                except EngineError as error:
                    answers.append(Row(name, False, str(error), {}))
                yield answers[-1]
    finally:
        subject.close()
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    when = time.strftime("%Y-%m-%d", time.gmtime())
    device = hardware.name if decided.device == hardware.kind else f"{decided.device} beside {hardware.name}"
    yield Acceptance(
        Path(model).name, pack.variant, decided.backend, decided.device, device, system, when, tuple(answers)
    )


def place(pack: Pack, data_dir: Path) -> Path:
    """The folder that the verdict is kept in: the pack's own, unless it is shipped or cannot be written."""
    if pack.folder.parent != catalog.SHIPPED and os.access(pack.folder, os.W_OK):
        return pack.folder
    return Path(data_dir) / "acceptance" / pack.id


def write(acceptance: Acceptance, folder: Path) -> Path:
    file = folder / FILE
    records.write_json(file, acceptance.facts())
    return file


def passed(row: str, pack: Pack, data_dir: Path) -> bool:
    """Whether a kept verdict says that `row` passed: what a feature that depends on it asks."""
    for folder in (pack.folder, Path(data_dir) / "acceptance" / pack.id):
        with suppress(OSError, ValueError, TypeError, KeyError):
            rows = json.loads((folder / FILE).read_bytes())["rows"]
            return any(each["name"] == row and each["passed"] is True for each in rows)
    return False


def _declared(pack: Pack) -> tuple[float, float] | None:
    """The range that a pack's niwaki.json declares; that of the reference for a model of the real kind, None for a demo
    model without a word about it."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        declared = json.loads((pack.folder / NOTES_FILE).read_bytes())["acceptance"]
        return float(declared["mean"]), float(declared["deviation"])
    return None if pack.notes.demo else (MEAN, DEVIATION)


# --- the rows --------------------------------------------------------------------------------------------------------


def hashes(case: Case) -> Row:
    """Every byte of the folder against what is recorded."""
    found = list(install.verify(case.model, case.data_dir))
    wrong = [f"{path}: {sentence}" for path, ok, sentence in found if not ok]
    measured = {"checked": len(found), "wrong": wrong[:10], "recorded": len(case.pack.notes.files)}
    if wrong:
        return Row("hashes", False, f"{len(wrong)} of {len(found)} checks failed: {wrong[0]}", measured)
    if not case.pack.notes.files:
        return Row("hashes", None, "no hashes are recorded for this pack; codes and scales are in range", measured)
    return Row("hashes", True, f"{len(found)} checks of sizes, SHA-256, codes and scales", measured)


def picture_range(case: Case) -> Row:
    """Brightness and contrast of the reference's picture; gray noise is the known failure."""
    pixels = case.subject.picture(case.request(PROMPT, SEED, small=False)).pixels
    mean, deviation = float(pixels.mean()), float(pixels.std())
    measured = {"mean": round(mean, 1), "deviation": round(deviation, 1), "seed": SEED, "prompt": PROMPT}
    shown = (("the reference's picture, seed 42", pixels),)
    says = f"mean {mean:.1f}, deviation {deviation:.1f}"
    if deviation < GRAY:
        return Row("range", False, f"{says}: under {GRAY:.0f}, gray noise or nothing", measured, shown)
    if case.expected is None:
        return Row("range", None, f"{says}: a picture, and no reference is known for this demo model", measured, shown)
    wanted = f"{case.expected[0]:.1f} within {MEAN_WITHIN:.0f} and {case.expected[1]:.1f} within {DEVIATION_WITHIN:.0f}"
    right = abs(mean - case.expected[0]) <= MEAN_WITHIN and abs(deviation - case.expected[1]) <= DEVIATION_WITHIN
    return Row("range", right, f"{says}; expected {wanted}", measured, shown)


def seeds(case: Case) -> Row:
    """Other seeds are other pictures, and the same seed is the same picture."""
    made = [case.subject.picture(case.request(PROMPT, seed)).pixels for seed in range(4)]
    other = case.subject.picture(case.request(PROMPT + ".", 0))  # so that the repetition is computed again
    again = case.subject.picture(case.request(PROMPT, 0)).pixels
    distances = [_distance(a, b) for a, b in combinations(made, 2)]
    repeated = int(np.abs(again.astype(int) - made[0].astype(int)).max())
    measured = {
        "least": round(min(distances), 2), "mean": round(float(np.mean(distances)), 2), "repeated_differs_by": repeated,
        "one_more_dot": round(_distance(other.pixels, made[0]), 2),
    }  # fmt: skip
    shown = tuple((f"seed {seed}", pixels) for seed, pixels in enumerate(made))
    says = f"four seeds differ by at least {min(distances):.1f} of 255, the same seed by at most {repeated}"
    return Row("seeds", min(distances) >= SPREAD and repeated <= SAME, says, measured, shown)


def vary(case: Case) -> Row:
    """A gentle variation stays closer to its picture than a bold one, and a bold one closer than another seed."""
    first = case.request(PROMPT, 1)
    picture = case.subject.picture(first).pixels
    made = {
        name: case.subject.picture(replace(first, variations=((2, strength),))).pixels
        for name, strength in chain.STRENGTHS.items()
    }
    far = _distance(case.subject.picture(replace(first, seed=2)).pixels, picture)
    distances = {name: _distance(pixels, picture) for name, pixels in made.items()}
    near = list(distances.values())
    right = near[0] > 0 and all(a < b for a, b in zip(near, near[1:], strict=False)) and near[0] < far
    says = ", ".join(f"{name} {distance:.1f}" for name, distance in distances.items())
    measured = {name: round(distance, 2) for name, distance in distances.items()} | {"another_seed": round(far, 2)}
    shown = (("its picture", picture), *made.items())
    return Row("vary", right, f"differences of 255: {says}, another seed {far:.1f}", measured, shown)


def draft(case: Case) -> Row:
    """A draft of half the size shows in what it is refined to, more than in the full size alone; for models of the real
    kind, plainly."""
    full = case.request(PROMPT, SEED, small=False)
    assert full.width and full.height and full.steps
    small = complete(replace(full, width=full.width // 2, height=full.height // 2), case.pack)
    steps, start = chain.refinement(full.steps)
    first, refined, fresh = (
        case.subject.picture(request).pixels
        for request in (small, replace(full, draft=small, steps=steps, start=start), full)
    )
    kept, without = (_correlation(first, _halved(pixels)) for pixels in (refined, fresh))
    measured = {"refined": round(kept, 3), "without_a_draft": round(without, 3), "size": [small.width, small.height]}
    says = f"the refined picture correlates with its draft by {kept:.2f}, one without a draft by {without:.2f}"
    right = kept > without and (case.pack.notes.demo or kept >= COMPOSES)
    return Row("draft", right, says, measured, (("draft", first), ("refined", refined), ("no draft", fresh)))


def kernels(case: Case) -> Row:
    """Which kernels were chosen here for speed, layer by layer, and whether they draw the plain ones' picture."""
    request = replace(case.request(PROMPT, SEED), steps=1)
    made = case.subject.picture(request)
    if "int8" not in made.dtype:
        return Row("kernels", None, f"no kernel that rounds was chosen: {made.reason}", {"dtype": made.dtype})
    found = {part: dict(products.trial(case.data_dir, case.pack, part)) for part in products.PARTS}
    words = "; ".join(f"{part} {products.errors_in_words(errors)}" for part, errors in found.items() if errors)
    plain = case.subject.plain(request)
    decibels = _decibels(made.pixels, plain.pixels)
    measured = {"dtype": made.dtype, "decibels": round(decibels, 1), "bound": products.BOUND, "errors": found}
    says = f"{made.dtype}: {words}; {decibels:.0f} dB from the picture in {plain.dtype}"
    shown = ((made.dtype, made.pixels), (plain.dtype, plain.pixels))
    return Row("kernels", decibels >= FAITHFUL, says, measured, shown)


def languages(case: Case) -> Row:
    """The colour word reaches the picture in every language; for models of the real kind, it means that colour."""
    asked = {name: pair for name, pair in COLORS.items() if name in (case.pack.notes.languages or COLORS)}
    measured, shown, faults = {}, [], []
    for name, pair in asked.items():
        red, blue = (case.subject.picture(case.request(prompt, 0)).pixels for prompt in pair)
        warmer, apart = _warmth(red) - _warmth(blue), _distance(red, blue)
        measured[name] = {"warmer": round(warmer, 1), "apart": round(apart, 2)}
        shown += [(pair[0], red), (pair[1], blue)]
        if apart < HEARD:
            faults.append(f"{name}: red or blue makes no difference")
        elif not case.pack.notes.demo and warmer < WARMER:
            faults.append(f"{name}: the red wall is {warmer:.1f} of 255 warmer than the blue one, not {WARMER:.0f}")
    says = "; ".join(faults) or f"red and blue are told apart in {', '.join(asked)}"
    return Row("languages", not faults, says, measured, tuple(shown))


def states(case: Case) -> Row:
    """The text encoder's states: finite, different for different prompts and depths, and none under a final norm."""
    one, two = (case.subject.states(prompt) for prompt in ("two red circles", "a blue square on a table"))
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        return Row("states", False, "a state holds a value that is not a finite number", {})
    sizes = np.sqrt(np.square(one.astype(np.float64)).mean(axis=-1))  # [states, tokens]
    prompts = _relative(one[:, -1], two[:, -1])
    words = _relative(one[:, 3], one[:, 4])  # neighbours somewhere in or just before the prompt
    depths = min(_relative(one[i], one[i + 1]) for i in range(len(one) - 1)) if len(one) > 1 else 1.0
    evenness = float(sizes[-1].std() / max(sizes[-1].mean(), 1e-30))  # exactly even where a final norm was applied
    rms = [round(float(row.mean()), 4) for row in sizes]
    measured = {
        "rms": rms, "prompts_apart": round(prompts, 4),
        "words_apart": round(words, 4), "depths_apart": round(depths, 4), "last_uneven": round(evenness, 4),
    }  # fmt: skip
    checks = {
        "two prompts have the same states": prompts >= TELLS_APART,
        "two words have the same states": words >= TELLS_APART,
        "two depths have the same states": depths >= TELLS_APART,
        "all tokens of the last state are equally large, as after a final norm": evenness >= 1e-3,
    }
    faults = [fault for fault, fine in checks.items() if not fine]
    says = f"prompts differ by {prompts:.0%}, depths by {depths:.0%}, sizes {', '.join(map(str, rms))}"
    return Row("states", not faults, "; ".join([*faults, says]), measured)


def precision(case: Case) -> Row:
    """Each packed layer's product by the backend's own kernels, against float64 and the codes in the file."""
    part = case.pack.transformer
    packed = sorted(name.removesuffix(".scales") for name in part.tensors if name.endswith(".scales"))
    if not packed or part.quantization is None:
        return Row("precision", None, "no layer of this pack is packed", {"layers": 0})
    bits, group = part.quantization.bits, part.quantization.group_size
    rng = np.random.default_rng(0)
    errors: dict[str, float] = {}
    for fqn in packed:
        words = part.tensors[f"{fqn}.weight"]
        k = words.shape[1] * lowbit.WORD_BITS // bits
        x = rng.standard_normal((_INPUTS, k)).astype(np.float32)
        rows = np.unique(np.linspace(0, words.shape[0] - 1, _ROWS_SAMPLED).astype(int))
        codes = lowbit.unpack(np.ascontiguousarray(part.tensors.numpy(f"{fqn}.weight")[rows]), bits, k)
        scales, biases = (np.asarray(part.tensors.numpy(f"{fqn}.{name}"))[rows] for name in ("scales", "biases"))
        groups = codes.reshape(len(rows), -1, group) * scales[..., None].astype(np.float64) + biases[..., None]
        exact = x.astype(np.float64) @ groups.reshape(len(rows), k).T
        found = case.subject.product(fqn, x)[:, rows].astype(np.float64)
        errors[fqn] = _relative(exact, found) if np.isfinite(found).all() else float("inf")
    worst = max(errors, key=lambda fqn: errors[fqn])
    bad = [fqn for fqn, error in errors.items() if not error <= PRECISION]
    finite = [error for error in errors.values() if np.isfinite(error)]
    median = float(np.median(finite)) if finite else None
    measured = {"layers": len(errors), "median": median, "worst": worst, "beyond": bad[:10],
                "largest": errors[worst] if np.isfinite(errors[worst]) else None}  # fmt: skip
    says = f"{len(errors)} layers, largest relative error {errors[worst]:.2e} in {worst}"
    return Row("precision", not bad, says + (f"; {len(bad)} beyond {PRECISION}" if bad else ""), measured)


def speed(case: Case) -> Row:
    """Time and memory of a warm picture, against the published row of this hardware."""
    facts = case.subject.measure()
    seconds, peak = facts["seconds_per_image"]["median"], facts["peak_memory_bytes"]
    mean = facts["mean_active_memory_bytes"]
    measured = {"seconds": seconds, "peak_memory_bytes": peak, "mean_active_memory_bytes": mean} | {
        key: facts[key] for key in ("size", "steps", "load_s", "encode_s", "decode_s")
    }
    says = f"{seconds:.2f} s and {peak / 1e9:.2f} GB at most for {facts['size']} in {facts['steps']} steps"
    device = "cpu" if case.decided.device == "cpu" else case.hardware.name
    known = published.find(device, case.pack.variant, facts["size"], facts["steps"])
    if known is None or case.pack.notes.demo:
        return Row("speed", None, f"{says}; nothing is published for this model on this hardware", measured)
    faults = []
    if known.seconds is not None and seconds > published.SLACK * known.seconds:
        faults.append(f"published are {known.seconds} s")
    if known.peak_bytes is not None and peak > known.peak_bytes:
        faults.append(f"at most {known.peak_bytes / 1e9:.2f} GB are allowed")
    if known.mean_bytes is not None and mean is not None and mean > known.mean_bytes:
        faults.append(f"{mean / 1e9:.2f} GB in the mean are more than {known.mean_bytes / 1e9:.2f}")
    wanted = "; ".join(faults) or f"within {known.source}"
    return Row("speed", not faults, f"{says}; {wanted}", measured | {"held_against": known.source})


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean difference of two pictures, of 255."""
    return float(np.abs(a.astype(np.float32) - b.astype(np.float32)).mean())


def _decibels(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise of two pictures; 99 for equal ones."""
    square = float(np.square(a.astype(np.float64) - b).mean())
    return 10 * float(np.log10(255**2 / square)) if square else 99.0


def _halved(pixels: np.ndarray) -> np.ndarray:
    """Half the size, each pixel the mean of four."""
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    return pixels[: 2 * height, : 2 * width].reshape(height, 2, width, 2, -1).mean(axis=(1, 3))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of what two pictures show beside their mean colour; 0 where one of them is flat."""
    one, other = (each - each.mean(axis=(0, 1), dtype=np.float64) for each in (a, b))
    return float((one * other).sum() / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-30))


def _warmth(pixels: np.ndarray) -> float:
    return float(pixels[..., 0].mean() - pixels[..., 2].mean())


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |a|, 0 for two zeros."""
    size = float(np.linalg.norm(a.astype(np.float64)))
    return float(np.linalg.norm(a.astype(np.float64) - b)) / max(size, 1e-30)


# Pictures first, then what is asked of the weights alone: two copies of a model need not be in memory at once.
ROWS: dict[str, Callable[[Case], Row]] = {
    "hashes": hashes,
    "range": picture_range,
    "seeds": seeds,
    "vary": vary,
    "draft": draft,
    "languages": languages,
    "kernels": kernels,
    "speed": speed,
    "states": states,
    "precision": precision,
}
