"""Synthetic scenes: 3 to 8 marked objects on a 3 x 3 grid, drawn with numpy alone.

A scene is a function of its seed. Only `integers`, `random` and `permutation` of a PCG64 generator are
used and only additions and products of floats, so that the same seed gives the same bytes on every
platform.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

SIDE, CELL, PATCH = 112, 37, 8
COLORS = {
    "red": (220, 45, 40),
    "green": (60, 180, 60),
    "blue": (70, 105, 240),
    "yellow": (245, 225, 50),
    "orange": (250, 145, 30),
    "purple": (170, 75, 210),
    "cyan": (65, 215, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = ("small", "large")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
# 5 x 7 bitmaps, one number per row, the most significant of its 5 bits on the left.
GLYPHS = {
    "0": (14, 17, 19, 21, 25, 17, 14),
    "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 2, 4, 8, 31),
    "3": (30, 1, 1, 14, 1, 1, 30),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
    "A": (14, 17, 17, 31, 17, 17, 17),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "K": (17, 18, 20, 24, 20, 18, 17),
    "T": (31, 4, 4, 4, 4, 4, 4),
}
# Unit-circle vertices of a five-pointed star, written out so that no library's cosine matters.
_STAR = ((0.0, -1.0), (0.951, -0.309), (0.588, 0.809), (-0.588, 0.809), (-0.951, -0.309))
_YX = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)


@dataclass(frozen=True)
class Thing:
    """One object: its attributes, its grid cell (row, column) and where its centre was drawn (pixels)."""

    color: str
    shape: str
    size: str
    glyph: str
    row: int
    column: int
    radius: int
    y: int
    x: int

    @property
    def place(self) -> str:
        """Words for the cell, for example `top left`, `middle right`, `center`."""
        return place_name(self.row, self.column)

    @property
    def phrase(self) -> str:
        """Words for the object, for example `a small red circle`."""
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A drawn scene. `image`: uint8 [112, 112, 3]; `owner`: int8 [112, 112], index of a thing or -1."""

    seed: int
    things: tuple[Thing, ...]
    image: np.ndarray
    owner: np.ndarray


def place_name(row: int, column: int) -> str:
    """The words for a grid cell; the cell in the middle is just `center`."""
    return "center" if (row, column) == (1, 1) else f"{ROWS[row]} {COLUMNS[column]}"


@cache
def _stencil(shape: str, radius: int) -> np.ndarray:
    """Boolean [2 r + 1, 2 r + 1] mask of a shape whose centre is the middle pixel."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
    u, v = x / radius, y / radius
    if shape == "circle":
        return u * u + v * v <= 1.0
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.86
    if shape == "triangle":
        return (v <= 0.8) & (abs(u) * 1.8 <= v + 1.0)
    if shape == "diamond":
        return abs(u) + abs(v) <= 1.0
    if shape == "cross":
        return np.minimum(abs(u), abs(v)) <= 0.4
    body = u * u + v * v <= 0.27
    for px, py in _STAR:  # an arm is the set of points near the segment from the centre to the tip
        along = u * px + v * py
        across = abs(u * py - v * px)
        body |= (along > 0) & (along <= 1.0) & (across <= 0.30 * (1.0 - along) + 0.12)
    return body


@cache
def _glyph(name: str, scale: int) -> np.ndarray:
    """Boolean [7 * scale, 5 * scale] mask of a character."""
    bits = np.array([[row >> (4 - i) & 1 for i in range(5)] for row in GLYPHS[name]], dtype=bool)
    return bits.repeat(scale, 0).repeat(scale, 1)


def _place_things(rng: np.random.Generator) -> tuple[Thing, ...]:
    """Draw 3 to 8 things with unique (color, shape) pairs, unique characters and a cell each."""
    count = int(rng.integers(3, 9))
    n_colors = int(rng.integers(2, 9))
    n_shapes = int(rng.integers(max(2, -(-count // n_colors)), 7))
    colors = rng.permutation(len(COLORS))[:n_colors]
    shapes = rng.permutation(len(SHAPES))[:n_shapes]
    pairs = rng.permutation(n_colors * n_shapes)[:count]
    glyphs = rng.permutation(len(GLYPHS))[:count]
    cells = rng.permutation(9)[:count]
    large_share = rng.random()
    names, characters = tuple(COLORS), tuple(GLYPHS)
    things = []
    for pair, glyph, cell in zip(pairs, glyphs, cells, strict=True):
        large = bool(rng.random() < 0.2 + 0.6 * large_share)
        radius = int(rng.integers(13, 16) if large else rng.integers(8, 11))
        slack = min(18 - radius, 5)
        dy, dx = (int(d) for d in rng.integers(-slack, slack + 1, size=2))
        row, column = divmod(int(cell), 3)
        things.append(
            Thing(
                color=names[colors[pair % n_colors]],
                shape=SHAPES[shapes[pair // n_colors]],
                size=SIZES[large],
                glyph=characters[glyph],
                row=row,
                column=column,
                radius=radius,
                y=row * CELL + 18 + dy,
                x=column * CELL + 18 + dx,
            )
        )
    return tuple(things)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A dim colour gradient with a few thin lines and specks: float64 [112, 112, 3]."""
    base, slope = rng.integers(70, 131, size=3), rng.integers(-40, 41, size=(2, 3))
    y, x = _YX[:, :, :, None] / SIDE - 0.5
    canvas = base + y * slope[0] + x * slope[1]
    for _ in range(int(rng.integers(1, 5))):
        a, b, c = rng.random(3) * 2.0 - 1.0
        offset = a * (_YX[0] - SIDE / 2) + b * (_YX[1] - SIDE / 2) + c * 40.0
        line = abs(offset) < 0.7 * (abs(a) + abs(b))
        canvas[line] = 0.5 * canvas[line] + 0.5 * rng.integers(40, 200, size=3)
    for _ in range(int(rng.integers(2, 9))):
        sy, sx, height, width = rng.integers(0, 108, size=2).tolist() + rng.integers(1, 4, size=2).tolist()
        canvas[sy : sy + height, sx : sx + width] = rng.integers(30, 220, size=3)
    return canvas


def draw_scene(seed: int) -> Scene:
    """Draw the scene of a seed.

    Args:
        seed: Non-negative integer; equal seeds give equal bytes.

    Returns:
        The scene with its image and the map from pixels to things.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    things = _place_things(rng)
    canvas = _background(rng)
    owner = np.full((SIDE, SIDE), -1, dtype=np.int8)
    for index, thing in enumerate(things):
        mask = _stencil(thing.shape, thing.radius)
        top, left, span = thing.y - thing.radius, thing.x - thing.radius, 2 * thing.radius + 1
        shade = 0.88 + 0.12 * rng.random()
        canvas[top : top + span, left : left + span][mask] = (
            np.array(COLORS[thing.color], dtype=np.float64) * shade
        )
        owner[top : top + span, left : left + span][mask] = index
        ink = _glyph(thing.glyph, 2 if thing.size == "large" else 1)
        height, width = ink.shape
        low = 0.25 if thing.shape == "triangle" else 0.0
        gy, gx = thing.y - height // 2 + int(low * thing.radius), thing.x - width // 2
        canvas[gy : gy + height, gx : gx + width][ink] = 15.0
    canvas += rng.integers(-9, 10, size=canvas.shape, dtype=np.int8)
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return Scene(seed=seed, things=things, image=image, owner=owner)
