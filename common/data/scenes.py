"""Scenes of a small world: drawing, captions and questions, each a pure function of (seed, index).

A scene is a 3×3 grid of 16-pixel cells on a grey ground, 48×48 pixels in all. Two to five cells hold
a shape in one of six colours; half of the scenes also carry a white digit.

    index 7 ──> scene_at(seed, 7) ──> draw()        [48, 48, 3] uint8
                                  ├─> caption()     "a red circle at top left , the number three at bottom ."
                                  └─> questions()   (kind, question, answer), eight kinds

Every choice comes from `Philox(key=[seed, index])` with one stream a purpose, so that drawing more
questions or adding label noise never changes a picture.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIZE = 48
CELL = 16
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
PLURALS = ("circles", "squares", "triangles", "crosses", "diamonds")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 220, 50),
    "purple": (160, 50, 200),
    "cyan": (50, 210, 220),
}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GLYPHS = (
    "111101101101111",
    "010110010010111",
    "111001111100111",
    "111001111001111",
    "101101111001001",
    "111100111001111",
    "111100111101111",
    "111001001001001",
    "111101111101111",
    "111101111001111",
)
_NAMES = tuple(COLOURS)
_LAYOUT, _DRAWING, _ASKING, _NOISE = range(4)


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape."""

    shape: str
    """One of `SHAPES`."""
    colour: str
    """A key of `COLOURS`."""
    cell: int
    """Row-major cell, 0 to 8."""

    @property
    def name(self) -> str:
        """As questions call it: `red circle`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What one image shows, and where its random choices come from."""

    seed: int
    """The set's seed."""
    index: int
    """Which image of the set."""
    things: tuple[Thing, ...]
    """The shapes, by rising cell."""
    digit: tuple[int, int] | None
    """The digit and its cell, if there is one."""

    def unique(self) -> list[Thing]:
        """Things that no other thing shares shape and colour with."""
        names = [thing.name for thing in self.things]
        return [thing for thing in self.things if names.count(thing.name) == 1]

    def count(self, shape: str) -> int:
        """How many things have this shape."""
        return sum(thing.shape == shape for thing in self.things)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a scene and its answer."""

    kind: str
    """One of `QUESTION_KINDS`."""
    text: str
    """The question."""
    answer: str
    """The true answer, unless label noise replaced it."""


Random = np.random.Generator


def _random(seed: int, index: int, stream: int) -> Random:
    return np.random.Generator(np.random.Philox(key=[seed, 4 * index + stream]))


def scene_at(seed: int, index: int) -> Scene:
    """The `index`-th scene of the set called `seed` (both non-negative)."""
    random = _random(seed, index, _LAYOUT)
    count = int(random.integers(2, 6))
    cells = [int(cell) for cell in random.permutation(9)[: count + 1]]
    things = [
        Thing(SHAPES[random.integers(len(SHAPES))], _NAMES[random.integers(len(_NAMES))], cell)
        for cell in sorted(cells[:count])
    ]
    digit = (int(random.integers(10)), cells[count]) if random.random() < 0.5 else None
    return Scene(seed, index, tuple(things), digit)


def draw(scene: Scene, *, noise: float = 14.0) -> NDArray[np.uint8]:
    """The picture, [48, 48, 3]: sizes, places and colours jittered, Gaussian noise of `noise` levels."""
    random = _random(scene.seed, scene.index, _DRAWING)
    picture = np.full((SIZE, SIZE, 3), random.integers(70, 130), np.float32)
    for thing in scene.things:
        top, left = _corner(thing.cell)
        colour = np.array(COLOURS[thing.colour]) + random.normal(0, 12, 3)
        picture[top : top + CELL, left : left + CELL][_mask(thing.shape, random)] = colour
    if scene.digit is not None:
        digit, cell = scene.digit
        top, left = _corner(cell)
        top, left = top + int(random.integers(1, 5)), left + int(random.integers(2, 7))
        glyph = np.array([bit == "1" for bit in GLYPHS[digit]]).reshape(5, 3).repeat(2, 0).repeat(2, 1)
        picture[top : top + 10, left : left + 6][glyph] = 255
    picture += random.normal(0, noise, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _corner(cell: int) -> tuple[int, int]:
    return cell // 3 * CELL, cell % 3 * CELL


def _mask(shape: str, random: Random) -> NDArray[np.bool_]:
    radius = random.uniform(5, 7)
    y, x = np.mgrid[0:CELL, 0:CELL] - (7.5 + random.uniform(-1.2, 1.2, size=(2, 1, 1)))
    inside: dict[str, NDArray[np.bool_]] = {
        "circle": x * x + y * y <= radius * radius,
        "square": (abs(x) <= radius * 0.85) & (abs(y) <= radius * 0.85),
        "triangle": (y <= radius * 0.8) & (y >= -radius) & (abs(x) <= (y + radius) * 0.55),
        "cross": (np.minimum(abs(x), abs(y)) <= radius * 0.33) & (np.maximum(abs(x), abs(y)) <= radius),
        "diamond": abs(x) + abs(y) <= radius,
    }
    return inside[shape]


def caption(scene: Scene) -> str:
    """Everything in the scene, in reading order, the digit last."""
    parts = [f"a {thing.name} at {PLACES[thing.cell]}" for thing in scene.things]
    if scene.digit is not None:
        parts.append(f"the number {NUMBERS[scene.digit[0]]} at {PLACES[scene.digit[1]]}")
    return " , ".join(parts) + " ."


Asked = tuple[str, str] | None


def _pick(random: Random, things: list[Thing]) -> Thing | None:
    return things[random.integers(len(things))] if things else None


def _ask_colour(random: Random, scene: Scene) -> Asked:
    thing = _pick(random, [thing for thing in scene.things if scene.count(thing.shape) == 1])
    return None if thing is None else (f"what colour is the {thing.shape} ?", thing.colour)


def _ask_shape(random: Random, scene: Scene) -> Asked:
    colours = [thing.colour for thing in scene.things]
    thing = _pick(random, [thing for thing in scene.things if colours.count(thing.colour) == 1])
    return None if thing is None else (f"what shape is the {thing.colour} thing ?", thing.shape)


def _ask_count(random: Random, scene: Scene) -> Asked:
    if random.random() < 0.3:
        return "how many shapes are there ?", NUMBERS[len(scene.things)]
    shape = _any_shape(random, scene, present=0.75)
    return f"how many {_plural(shape)} are there ?", NUMBERS[scene.count(shape)]


def _any_shape(random: Random, scene: Scene, *, present: float) -> str:
    if random.random() < present:
        return scene.things[random.integers(len(scene.things))].shape
    return SHAPES[random.integers(len(SHAPES))]


def _plural(shape: str) -> str:
    return PLURALS[SHAPES.index(shape)]


def _ask_exist(random: Random, scene: Scene) -> Asked:
    """Half "yes"; of the "no", 60 % combine a shape and a colour that are both there (as POPE does)."""
    things = scene.things
    if random.random() < 0.5:
        return f"is there a {things[random.integers(len(things))].name} ?", "yes"
    names = {thing.name for thing in things}
    for _ in range(20):
        if random.random() < 0.6:
            shape = things[random.integers(len(things))].shape
            colour = things[random.integers(len(things))].colour
        else:
            shape, colour = SHAPES[random.integers(len(SHAPES))], _NAMES[random.integers(len(_NAMES))]
        if f"{colour} {shape}" not in names:
            return f"is there a {colour} {shape} ?", "no"
    return None


def _ask_relation(random: Random, scene: Scene) -> Asked:
    things = scene.unique()
    if len(things) < 2:
        return None
    first, second = (things[i] for i in random.permutation(len(things))[:2])
    word = ("left of", "right of", "above", "below")[random.integers(4)]
    step = first.cell % 3 - second.cell % 3 if word.endswith("of") else first.cell // 3 - second.cell // 3
    if step == 0:
        return None
    true = step < 0 if word in ("left of", "above") else step > 0
    return f"is the {first.name} {word} the {second.name} ?", "yes" if true else "no"


def _ask_digit(random: Random, scene: Scene) -> Asked:
    if scene.digit is None:
        return ("what number is written ?", "none") if random.random() < 0.03 else None
    return "what number is written ?", NUMBERS[scene.digit[0]]


def _ask_where(random: Random, scene: Scene) -> Asked:
    thing = _pick(random, scene.unique())
    return None if thing is None else (f"where is the {thing.name} ?", PLACES[thing.cell])


def _ask_compare(random: Random, scene: Scene) -> Asked:
    first = _any_shape(random, scene, present=0.7)
    second = SHAPES[random.integers(len(SHAPES))]
    if random.random() < 0.5:
        first, second = second, first
    more, fewer = scene.count(first), scene.count(second)
    if more == fewer:
        return None
    return f"are there more {_plural(first)} than {_plural(second)} ?", "yes" if more > fewer else "no"


_ASK: dict[str, Callable[[Random, Scene], Asked]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "count": _ask_count,
    "exist": _ask_exist,
    "relation": _ask_relation,
    "digit": _ask_digit,
    "where": _ask_where,
    "compare": _ask_compare,
}
QUESTION_KINDS = tuple(_ASK)
ANSWERS: dict[str, tuple[str, ...]] = {
    "colour": _NAMES,
    "shape": SHAPES,
    "count": NUMBERS[:6],
    "exist": ("yes", "no"),
    "relation": ("yes", "no"),
    "digit": NUMBERS,
    "where": PLACES,
    "compare": ("yes", "no"),
}
"""What label noise draws from."""


def questions(scene: Scene, count: int, *, label_noise: float = 0.0) -> tuple[Question, ...]:
    """Up to `count` different questions, every kind once before any kind twice.

    Args:
        scene: What is asked about.
        count: How many; a poor scene may allow fewer.
        label_noise: Share of answers replaced by another answer of the same kind, drawn evenly.
    """
    asking = _random(scene.seed, scene.index, _ASKING)
    asked: dict[str, Question] = {}
    for _ in range(3):
        for which in asking.permutation(len(QUESTION_KINDS)):
            if len(asked) == count:
                break
            question = _new_question(asking, QUESTION_KINDS[which], scene, asked)
            if question is not None:
                asked[question.text] = question
    noise = _random(scene.seed, scene.index, _NOISE)
    return tuple(_with_noise(noise, question, label_noise) for question in asked.values())


def _new_question(random: Random, kind: str, scene: Scene, asked: dict[str, Question]) -> Question | None:
    for _ in range(6):
        found = _ASK[kind](random, scene)
        if found is not None and found[0] not in asked:
            return Question(kind, *found)
    return None


def _with_noise(random: Random, question: Question, label_noise: float) -> Question:
    replace, which = random.random(2)
    if replace >= label_noise:
        return question
    others = [answer for answer in ANSWERS[question.kind] if answer != question.answer]
    return Question(question.kind, question.text, others[int(which * len(others))])
