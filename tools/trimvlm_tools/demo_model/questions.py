"""Questions about scenes: ten kinds, their answers, and the train, calib and test sets.

The splits draw their seeds from ranges that do not meet, so a calibration image is never a training or
test image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from PIL import Image

from trimvlm_tools.demo_model.scenes import COLORS, ROWS, SHAPES, SIZES, Scene, Thing, draw_scene, place_name

T = TypeVar("T")
Split = Literal["train", "calib", "test"]
FIRST_SEED: dict[str, int] = {"train": 0, "calib": 1 << 40, "test": 1 << 41}
SPLIT_SIZE = 1 << 40
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NOTHING = "nothing"


@dataclass(frozen=True)
class Sample:
    """One question about one image, with the seed that draws the image."""

    image: Image.Image
    question: str
    answer: str
    kind: str
    seed: int


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _thing(scene: Scene, rng: np.random.Generator) -> Thing:
    return scene.things[int(rng.integers(len(scene.things)))]


def _unique(scene: Scene, attribute: str, thing: Thing) -> bool:
    value = getattr(thing, attribute)
    return sum(getattr(other, attribute) == value for other in scene.things) == 1


def _color(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _thing(scene, rng)
    names = [f"{thing.place} object", f"object with {thing.glyph}"]
    if _unique(scene, "shape", thing):
        names.append(thing.shape)
    return f"what color is the {_pick(rng, names)} ?", thing.color


def _shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _thing(scene, rng)
    names = [f"{thing.place} object", f"object with {thing.glyph}"]
    if _unique(scene, "color", thing):
        names.append(f"{thing.color} object")
    return f"what shape is the {_pick(rng, names)} ?", thing.shape


def _read(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _thing(scene, rng)
    name = _pick(rng, [f"{thing.place} object", f"{thing.color} {thing.shape}"])
    return f"what character is on the {name} ?", thing.glyph


def _at(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    taken = {(thing.row, thing.column): thing for thing in scene.things}
    empty = [divmod(cell, 3) for cell in range(9) if divmod(cell, 3) not in taken]
    if rng.random() < 0.1:
        row, column = empty[int(rng.integers(len(empty)))]
        return f"what is at the {place_name(row, column)} ?", NOTHING
    thing = _thing(scene, rng)
    return f"what is at the {thing.place} ?", thing.phrase


def _where(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _thing(scene, rng)
    name = _pick(rng, [f"{thing.color} {thing.shape}", f"character {thing.glyph}"])
    return f"where is the {name} ?", thing.place


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    attribute, values = (("", [""]), ("color", list(COLORS)), ("shape", list(SHAPES)), ("size", list(SIZES)))[
        int(rng.integers(4))
    ]
    if not attribute:
        return "how many objects are there ?", NUMBERS[len(scene.things)]
    value = getattr(_thing(scene, rng), attribute) if rng.random() < 0.85 else _pick(rng, values)
    number = sum(getattr(thing, attribute) == value for thing in scene.things)
    return f"how many {value} objects are there ?", NUMBERS[number]


def _exist(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    present = {(thing.color, thing.shape) for thing in scene.things}
    if rng.random() < 0.5:
        thing = _thing(scene, rng)
        return f"is there a {thing.color} {thing.shape} ?", "yes"
    colors = sorted({color for color, _ in present})
    shapes = sorted({shape for _, shape in present})
    near = [(color, shape) for color in colors for shape in shapes if (color, shape) not in present]
    every = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in present]
    color, shape = _pick(rng, near if near and rng.random() < 0.7 else every)
    return f"is there a {color} {shape} ?", "no"


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    first, second = rng.permutation(len(scene.things))[:2]
    a, b = scene.things[first], scene.things[second]
    vertical = a.column == b.column or (a.row != b.row and bool(rng.random() < 0.5))
    words = ("above", "below") if vertical else ("left", "right")
    before = a.row < b.row if vertical else a.column < b.column
    question = f"is the {a.color} {a.shape} {words[0]} or {words[1]} of the {b.color} {b.shape} ?"
    return question, words[0] if before else words[1]


def _find(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = _thing(scene, rng)
    return f"which object has {thing.glyph} ?", thing.phrase


def _row(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    row = int(rng.integers(3))
    glyphs = [thing.glyph for thing in sorted(scene.things, key=lambda t: t.column) if thing.row == row]
    return f"read the {ROWS[row]} row", " ".join(glyphs) or NOTHING


ASKERS: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str]]] = {
    "colour": _color,
    "shape": _shape,
    "read": _read,
    "at": _at,
    "where": _where,
    "count": _count,
    "exist": _exist,
    "relation": _relation,
    "find": _find,
    "row": _row,
}
KINDS = tuple(ASKERS)


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """Ask one question of a kind.

    Args:
        scene: The scene asked about.
        kind: One of `KINDS`.
        rng: Chooses the object and the wording.

    Returns:
        Question and answer, words separated by single spaces.
    """
    return ASKERS[kind](scene, rng)


def prompt_of(question: str) -> str:
    """The prompt of the model for a question; `<image>` stands for the image."""
    return f"USER: <image> {question} ASSISTANT:"


def samples(split: Split, count: int, first: int = 0) -> list[Sample]:
    """Samples `first` to `first + count - 1` of a split, one image each, kinds in turn.

    Args:
        split: `train`, `calib` or `test`; their images never overlap.
        count: Number of samples.
        first: Index of the first sample.

    Returns:
        The samples; sample i asks a question of kind `KINDS[i % 10]`, so every prefix is balanced.

    Raises:
        ValueError: The split is unknown or the range leaves it.
    """
    if split not in FIRST_SEED:
        raise ValueError(f"unknown split {split!r}; use one of {sorted(FIRST_SEED)}")
    if first < 0 or count < 0 or first + count > SPLIT_SIZE:
        raise ValueError(
            f"samples {first} to {first + count} lie outside 0 to {SPLIT_SIZE}; choose a smaller range"
        )
    made = []
    for index in range(first, first + count):
        seed, kind = FIRST_SEED[split] + index, KINDS[index % len(KINDS)]
        scene = draw_scene(seed)
        # A generator of its own, so that drawing more or less for the image leaves the questions alone.
        question, answer = ask(scene, kind, np.random.Generator(np.random.PCG64([seed, 1])))
        made.append(Sample(Image.fromarray(scene.image), question, answer, kind, seed))
    return made
