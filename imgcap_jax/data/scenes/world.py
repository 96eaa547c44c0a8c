"""The scenes of the built-in dataset: one to four drawn objects with known attributes and positions.

A scene is sampled from (seed, split, index), so that any scene can be reproduced on its own and in any process.
Objects come in groups of equal objects ("two small red balls"). No two groups of a scene share both colour and shape,
which keeps counts unambiguous. The attribute pairs in `HELD_OUT` never occur in train, val or test. Each scene of
`test_compositional` has one group with such a pair; its other pairs also occur in training. Drawn scenes with
held-out pairs follow CLEVR-CoGenT (Johnson et al., 2017) and ShapeWorld (Kuhnle and Copestake, 2017).
"""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 36),
    "orange": (250, 130, 10),
    "yellow": (250, 226, 40),
    "green": (24, 150, 58),
    "blue": (32, 84, 222),
    "purple": (146, 40, 180),
    "black": (22, 22, 24),
    "white": (250, 250, 250),
}
# Half of an object's extent as a share of the image side. The ranges are far enough apart to be unambiguous.
RADII: dict[str, tuple[float, float]] = {"small": (0.13, 0.145), "large": (0.215, 0.24)}
_INK = (20, 20, 28)  # colour of the outlines
_LINE = 0.1  # width of the outlines as a share of the radius
TEXTURES = ("plain", "striped", "dotted")
HELD_OUT: tuple[tuple[str, str], ...] = (
    ("red", "star"),
    ("blue", "square"),
    ("yellow", "circle"),
    ("green", "triangle"),
    ("striped", "triangle"),
    ("dotted", "ring"),
)
SPLITS = ("train", "val", "test", "test_compositional")

# Sizes of the groups of a scene, with their probabilities; 2.7 objects per scene on average.
_GROUPINGS: tuple[tuple[tuple[int, ...], float], ...] = (
    ((1,), 0.05),
    ((2,), 0.09),
    ((3,), 0.09),
    ((1, 1), 0.23),
    ((2, 1), 0.27),
    ((3, 1), 0.07),
    ((2, 2), 0.07),
    ((1, 1, 1), 0.10),
    ((2, 1, 1), 0.03),
)
# Objects overlap only a little: the distance of two centres is at least this share of the sum of their radii.
_MIN_DISTANCE = 0.75
_SUPERSAMPLING = 4

T = TypeVar("T")


@dataclass(frozen=True)
class SceneObject:
    """One object. x, y (of the centre, from the top left) and radius are shares of the image side."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Background:
    """A linear gradient from RGB `start` to `end` (0..255) towards `angle` (radians); plain if both are equal."""

    start: tuple[int, int, int]
    end: tuple[int, int, int]
    angle: float


@dataclass(frozen=True)
class Scene:
    """The content of an image. Later objects are drawn over earlier ones."""

    objects: tuple[SceneObject, ...]
    background: Background

    def to_json(self) -> str:
        """The scene as one short line of JSON; `from_json` restores an equal scene."""
        objects = [[o.shape, o.colour, o.size, o.texture, o.x, o.y, o.radius] for o in self.objects]
        background = [self.background.start, self.background.end, self.background.angle]
        return json.dumps({"objects": objects, "background": background}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """Parses the output of `to_json`.

        Raises:
            ValueError: the text is not a scene, or contains an unknown shape, colour, size or texture.
        """
        try:
            fields = json.loads(text)
            objects = tuple(SceneObject(*values) for values in fields["objects"])
            start, end, angle = fields["background"]
            background = Background(tuple(start), tuple(end), angle)
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a scene: {text[:80]!r}") from error
        for o in objects:
            if not (o.shape in SHAPES and o.colour in COLOURS and o.size in RADII and o.texture in TEXTURES):
                raise ValueError(f"unknown object in a scene: {o}")
        return cls(objects, background)


def is_held_out(shape: str, colour: str, texture: str) -> bool:
    """Whether this colour or this texture never occurs with this shape in training."""
    return (colour, shape) in HELD_OUT or (texture, shape) in HELD_OUT


def sample_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Samples scene number `index` of a split: one to four objects, 2.6 to 2.8 on average.

    In a test split of 1,000 scenes, the average is above 2.5 by at least five standard errors.

    The same arguments give the same scene in every process. Different splits share no random numbers.

    Raises:
        ValueError: the split is unknown, or the index or the seed is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of scenes; the splits are {', '.join(SPLITS)}")
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, SPLITS.index(split), index])))
    objects: list[SceneObject] | None = None
    while objects is None:
        counts = pick_weighted(rng, _GROUPINGS)
        kinds = _sample_kinds(rng, len(counts), compositional=split == "test_compositional")
        # Neither the group sizes nor the drawing order may reveal which group has the held-out pair.
        kinds = [kinds[i] for i in rng.permutation(len(kinds))]
        members = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
        objects = _place(rng, [members[i] for i in rng.permutation(len(members))])
    return Scene(tuple(objects), _sample_background(rng))


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def pick_weighted(rng: np.random.Generator, items: Sequence[tuple[T, float]]) -> T:
    position = rng.random() * sum(weight for _, weight in items)
    for item, weight in items:
        position -= weight
        if position < 0:
            return item
    return items[-1][0]


def _sample_kinds(rng: np.random.Generator, count: int, *, compositional: bool) -> list[SceneObject]:
    """Samples `count` kinds of objects, without positions, no two with the same colour and shape."""
    kinds: list[SceneObject] = []
    while len(kinds) < count:
        shape, colour, size = pick(rng, SHAPES), pick(rng, tuple(COLOURS)), pick(rng, tuple(RADII))
        texture = pick_weighted(rng, (("plain", 0.5), ("striped", 0.25), ("dotted", 0.25)))
        if compositional and not kinds:
            attribute, shape = pick(rng, HELD_OUT)
            if attribute in COLOURS:
                colour = attribute
            else:
                texture = attribute
        elif is_held_out(shape, colour, texture):
            continue
        if all((shape, colour) != (kind.shape, kind.colour) for kind in kinds):
            kinds.append(SceneObject(shape, colour, size, texture, 0.0, 0.0, 0.0))
    return kinds


def _place(rng: np.random.Generator, kinds: Sequence[SceneObject]) -> list[SceneObject] | None:
    """Gives the objects random positions. Returns None if an object finds no free position."""
    placed: list[SceneObject] = []
    for kind in kinds:
        low, high = RADII[kind.size]
        for _ in range(40):
            radius = round(low + (high - low) * rng.random(), 3)
            x, y = (round(radius + (1 - 2 * radius) * rng.random(), 3) for _ in range(2))
            if all(math.hypot(x - o.x, y - o.y) >= _MIN_DISTANCE * (radius + o.radius) for o in placed):
                placed.append(replace(kind, x=x, y=y, radius=radius))
                break
        else:
            return None
    return placed


def _sample_background(rng: np.random.Generator) -> Background:
    """Samples a greyish background, lighter than the outlines and darker than white, so that all objects stand out."""
    start, end = _sample_grey(rng), _sample_grey(rng)
    if rng.random() < 0.5:
        return Background(start, start, 0.0)
    return Background(start, end, round(2 * math.pi * rng.random(), 3))


def _sample_grey(rng: np.random.Generator) -> tuple[int, int, int]:
    brightness = 120 + 80 * rng.random()
    red, green, blue = (round(brightness + 24 * (rng.random() - 0.5)) for _ in range(3))
    return red, green, blue


def draw_scene(scene: Scene, size: int = 64) -> np.ndarray:
    """Draws a scene, anti-aliased: uint8 [size, size, 3]."""
    side = size * _SUPERSAMPLING
    canvas = _draw_background(scene.background, side)
    for o in scene.objects:
        radius = round(o.radius * side)
        corner = (round(o.x * side) - radius, round(o.y * side) - radius)
        canvas.paste(_INK, corner, _outline(o.shape, radius))
        canvas.paste(COLOURS[o.colour], corner, _inside(o.shape, radius))
        if o.texture != "plain":
            canvas.paste(_second_tone(o.colour), corner, _pattern(o.shape, o.texture, o.size, radius))
    return np.array(canvas.reduce(_SUPERSAMPLING))


def _draw_background(background: Background, side: int) -> Image.Image:
    if background.start == background.end:
        return Image.new("RGB", (side, side), background.start)
    start, end = np.array(background.start), np.array(background.end)
    towards = np.array([math.cos(background.angle), math.sin(background.angle)]) / math.sqrt(2)
    corners = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]]) @ towards / 2 + 0.5  # 0..1 along the gradient
    pixels = np.rint(start + corners[:, None] * (end - start)).astype(np.uint8).reshape(2, 2, 3)
    # A linear gradient is the bilinear interpolation of its four corners.
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))


def _second_tone(colour: str) -> tuple[int, int, int]:
    """The colour of stripes and dots: white, except for grey on white and black objects."""
    if colour == "white":
        return (70, 70, 74)
    if colour == "black":  # with white marks it would look like a white object with black marks
        return (176, 176, 172)
    return (250, 250, 250)  # dark marks on yellow or orange would blend into green or red


@functools.lru_cache(maxsize=2048)
def _outline(shape: str, radius: int) -> Image.Image:
    """The mask of a shape, mode L [2 radius, 2 radius]. Cached, because scenes share few shapes and radii."""
    mask = Image.new("L", (2 * radius, 2 * radius), 0)
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, 2 * radius - 1, 2 * radius - 1), fill=255)
        if shape == "ring":
            hole = 0.42 * radius
            draw.ellipse((radius - hole, radius - hole, radius + hole, radius + hole), fill=0)
    else:
        draw.polygon([(radius * (1 + x), radius * (1 + y)) for x, y in _corners(shape)], fill=255)
    return mask


def _corners(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape around the origin, within -1..1; y points downwards."""
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]
    if shape == "star":
        radii = [1.0 if i % 2 == 0 else 0.62 for i in range(10)]
        return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]
    raise ValueError(f"unknown shape {shape!r}")


@functools.lru_cache(maxsize=2048)
def _inside(shape: str, radius: int) -> Image.Image:
    """The mask of a shape without its dark outline, mode L [2 radius, 2 radius]."""
    width = max(1, round(_LINE * radius))
    # Erodes the shape by the same width on every side.
    padded = Image.new("L", (2 * radius + 2, 2 * radius + 2), 0)
    padded.paste(_outline(shape, radius), (1, 1))
    for _ in range(width):
        padded = padded.filter(ImageFilter.MinFilter(3))
    return padded.crop((1, 1, 2 * radius + 1, 2 * radius + 1))


@functools.lru_cache(maxsize=2048)
def _pattern(shape: str, texture: str, size: str, radius: int) -> Image.Image:
    """The mask of the stripes or dots within a shape's outline, mode L [2 radius, 2 radius]. Cached."""
    mask = Image.new("L", (2 * radius, 2 * radius), 0)
    draw = ImageDraw.Draw(mask)
    # Small objects have fewer and relatively wider marks: marks below two pixels would be invisible at 64 px.
    period = radius * (0.62 if size == "small" else 0.46)
    steps = range(-8, 9)
    if texture == "striped":
        for i in steps:
            top = radius + (i - 0.2) * period
            draw.rectangle((0, top, 2 * radius, top + 0.4 * period), fill=255)
    else:
        dot = 0.33 * period
        for i in steps:
            for j in steps:
                x = radius + (i + 0.5 * (j % 2)) * period
                y = radius + j * 0.87 * period
                draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=255)
    return ImageChops.multiply(mask, _inside(shape, radius))
