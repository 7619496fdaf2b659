"""The built-in dataset: procedurally drawn pictures of twelve species, with labels and object masks.

A picture is one animal or plant in front of a mosaic, with random rotation, mirroring, bending, shading and position.
It is designed so that DINO can learn the species, and nothing simpler identifies a picture:

- A species is a combination of palette, markings and silhouette. Two crops of a picture share these, and the
  augmentation preserves them; of two species with the same main color, one has light and one has dark markings.
- A whole picture has little else in common. Each cell of the mosaic has its own color, and light and shade vary within
  the picture. Crops would also share a background palette, an exposure or a tint per picture, and the network would
  learn to distinguish pictures by it instead.
- The object has any position and direction, and covers a quarter of a picture on average. Nearest neighbors by pixels,
  or by mean color, have the correct species for about half of the pictures.

All drawing is in relative coordinates: a picture has the same content at every size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dino_lightning.config import BuiltinData
from dino_lightning.data.sources.base import Splits, content_digest
from dino_lightning.data.sources.registry import register_source

Field: TypeAlias = NDArray[np.floating]
"""One number per pixel (n, H, W), or an array that broadcasts to it. A shape is a field that is positive inside and
negative outside: about the distance to its edge, in half-lengths of the object."""
Parts: TypeAlias = list[tuple[Field, int]]
"""Shapes to paint, back to front, each with the index of its color in the species' palette."""

SPLITS = ("train", "val")
DRAWS = 176
"""Random numbers per picture; a species with five parts, the maximum so far, uses 153."""
CHUNK_PIXELS = 1 << 18
"""Pixels that are drawn together: few enough to stay in the processor's cache."""
CELLS = 6
"""Period of the mosaic; fewer cells are visible."""
OUTLINE = 0.1
"""Width of the dark line around an object (half-lengths), which is not part of its mask."""
OUTLINE_COLOR = np.array([0.08, 0.07, 0.1], np.float32)


class BuiltinImages:
    """`images` pictures of `image_size` pixels square, with labels and object masks.

    A picture depends only on `draw_seed`, the split and its index: number 7 of 10 equals number 7 of 6,000. Labels are
    balanced (index modulo the number of classes).
    """

    def __init__(self, split: Literal["train", "val"], *, images: int, image_size: int, draw_seed: int) -> None:
        self.split = split
        self.classes = [species.name for species in SPECIES]
        self.labels = np.arange(images, dtype=np.int64) % len(SPECIES)
        self.images = np.empty((images, image_size, image_size, 3), np.uint8)
        self.masks = np.empty((images, image_size, image_size), bool)
        chunk_size = max(1, CHUNK_PIXELS // image_size**2)
        for label, species in enumerate(SPECIES):
            indices = np.arange(label, images, len(SPECIES))
            for start in range(0, len(indices), chunk_size):
                chunk = indices[start : start + chunk_size]
                rng = PictureRNG([[draw_seed, SPLITS.index(split), int(index)] for index in chunk])
                self.images[chunk], self.masks[chunk] = draw(species, rng, image_size)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The picture (H, W, 3)."""
        return self.images[index]

    def mask(self, index: int) -> NDArray[np.bool_]:
        """The object's pixels (H, W)."""
        return self.masks[index]

    def describe(self, index: int) -> str:
        """Name of the picture for messages."""
        return f"built-in {self.split} picture {index} ({self.classes[self.labels[index]]})"

    def fingerprint(self) -> str:
        """Digest of the pixels."""
        return content_digest(self.images.tobytes())


@register_source("builtin", BuiltinData)
def open_builtin(config: BuiltinData) -> Splits:
    """Training and validation pictures."""
    options = {"image_size": config.image_size, "draw_seed": config.draw_seed}
    train = BuiltinImages("train", images=config.train_images, **options)
    return Splits(train, BuiltinImages("val", images=config.val_images, **options), None)


class PictureRNG:
    """Uniform random numbers for n pictures together; each picture has its own random stream."""

    def __init__(self, seeds: list[list[int]]) -> None:
        streams = [np.random.default_rng(seed).random(DRAWS, np.float32) for seed in seeds]
        self.columns = iter(np.stack(streams, axis=1))

    def uniform(self, low: float, high: float) -> Field:
        """One number per picture (n, 1, 1)."""
        return (low + (high - low) * next(self.columns))[:, None, None]

    def color(self, *, saturation: tuple[float, float], value: tuple[float, float]) -> Field:
        """One color of any hue per picture (n, 3)."""
        hue, s, v = (self.uniform(*span)[:, 0] for span in ((0, 6), saturation, value))
        wheel = np.abs((hue + np.array([0, 4, 2], np.float32)) % 6 - 3) - 1
        return v * (1 - s * (1 - wheel.clip(0, 1)))


@dataclass(frozen=True)
class Species:
    """A class of the data set."""

    name: str
    shape: Callable[[Field, Field], Parts]
    """Coordinates (u to the right, v upwards, the object from -1 to 1) -> parts."""
    palette: list[tuple[int, int, int]]
    """Colors (RGB, 0 to 255)."""


def draw(species: Species, rng: PictureRNG, size: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Pictures (n, size, size, 3) of one species and their masks (n, size, size)."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = axis[None, None, :], -axis[None, :, None]
    scale, u, v = object_frame(rng, x, y)
    canvas = mosaic(rng, x, y)
    parts = species.shape(u, v)
    silhouette = union(*(part for part, _ in parts))
    light = rng.uniform(0.7, 1.2) * (1 + 0.2 * v)
    pixels = scale * size / 2
    paint(canvas, (silhouette + OUTLINE) * pixels, OUTLINE_COLOR)
    for part, color_index in parts:
        noise = np.stack([rng.uniform(-0.08, 0.08) for _ in "rgb"], axis=-1)
        color = np.array(species.palette[color_index], np.float32) / 255 + noise
        paint(canvas, part * pixels, color * light[..., None])
    canvas *= shade(rng, x, y)[..., None]
    return (canvas.clip(0, 1) * 255).astype(np.uint8), silhouette > 0


def paint(canvas: Field, shape: Field, color: Field) -> None:
    """Paint the inside of a shape, in pixels, on the canvas (n, H, W, 3), with a soft edge of one pixel."""
    canvas += (shape + 0.5).clip(0, 1)[..., None] * (color - canvas)


def object_frame(rng: PictureRNG, x: Field, y: Field) -> tuple[Field, Field, Field]:
    """The object's half-length in half-pictures (n, 1, 1), and the coordinates u and v of its shape."""
    scale, angle, bend = rng.uniform(0.55, 0.9), rng.uniform(-np.pi, np.pi), rng.uniform(-0.2, 0.2)
    mirror = np.where(rng.uniform(0, 1) < 0.5, np.float32(-1), np.float32(1))
    x, y = (x - rng.uniform(-0.55, 0.55)) / scale, (y - rng.uniform(-0.55, 0.55)) / scale
    u, v = (np.cos(angle) * x + np.sin(angle) * y) * mirror, np.cos(angle) * y - np.sin(angle) * x
    stretch = rng.uniform(0.88, 1.12)
    u, v = u * stretch, v / stretch
    return scale, u, v + bend * (u * u - 0.3)


def mosaic(rng: PictureRNG, x: Field, y: Field) -> Field:
    """Wavy cells with random colors, modulated by a woven pattern (n, H, W, 3)."""
    cells = [rng.color(saturation=(0.1, 0.9), value=(0.1, 1.0)) for _ in range(CELLS**2)]
    turn, pace = rng.uniform(0, 2 * np.pi), rng.uniform(2.0, 2.6)
    along = pace * (np.cos(turn) * x + np.sin(turn) * y) + 0.35 * wave(rng, x, y, (1, 2)) + rng.uniform(0, CELLS)
    across = pace * (np.cos(turn) * y - np.sin(turn) * x) + 0.35 * wave(rng, x, y, (1, 2)) + rng.uniform(0, CELLS)
    cell = (np.floor(along) % CELLS * CELLS + np.floor(across) % CELLS).astype(int)
    weave = wave(rng, x, y, (3, 7)) * wave(rng, x, y, (3, 7))
    return np.stack(cells, axis=1)[np.arange(len(cell))[:, None, None], cell] * (1 + 0.25 * weave)[..., None]


def shade(rng: PictureRNG, x: Field, y: Field) -> Field:
    """Brightness that varies like the light under a tree, a factor for the colors."""
    return 0.85 + 0.25 * (wave(rng, x, y, (0.7, 1.6)) + wave(rng, x, y, (0.7, 1.6)))


def wave(rng: PictureRNG, x: Field, y: Field, periods: tuple[float, float]) -> Field:
    """A plane wave from -1 to 1 in a random direction, with `periods` (minimum, maximum) per side of the picture."""
    turn, pace = rng.uniform(0, 2 * np.pi), rng.uniform(*periods) * np.pi
    return np.sin(pace * (np.cos(turn) * x + np.sin(turn) * y) + rng.uniform(0, 2 * np.pi))


def ellipse(u: Field, v: Field, center: tuple[float, float], radii: tuple[float, float]) -> Field:
    """An upright ellipse."""
    (a, b), (p, q) = radii, center
    return min(a, b) * (1 - np.hypot((u - p) / a, (v - q) / b))


def petals(u: Field, v: Field, count: int, radius: float, depth: float, *, turn: float = 0.0) -> Field:
    """A star or flower, whose radius varies by ± `depth`."""
    return radius + depth * np.cos(count * (np.arctan2(v, u) - turn)) - np.hypot(u, v)


def union(*shapes: Field) -> Field:
    """The union of the shapes."""
    return np.maximum.reduce(shapes)


def common(*shapes: Field) -> Field:
    """The intersection of the shapes."""
    return np.minimum.reduce(np.broadcast_arrays(*shapes))


def bands(w: Field, *, period: float, share: float, phase: float = 0.0) -> Field:
    """Parallel bands across the coordinate `w`; `share` of each period is band."""
    return (share / 2 - np.abs((w / period + phase) % 1 - 0.5)) * period


def dots(u: Field, v: Field, centers: list[tuple[float, float]], radius: float) -> Field:
    """Discs with the same radius."""
    return union(*(ellipse(u, v, center, (radius, radius)) for center in centers))


def fish(u: Field, v: Field) -> Parts:
    """Bands across a body with a forked tail."""
    body = ellipse(u, v, (0.15, 0), (0.8, 0.52))
    tail = common(-0.4 - u, 1 + u, -0.1 - 0.9 * u - np.abs(v))
    fins = common(ellipse(u, v, (0.0, 0), (0.55, 0.8)), 0.45 - np.abs(u - 0.05))
    outline = union(body, tail, fins)
    marks = common(outline, bands(u + 0.15 * v * v, period=0.5, share=0.42, phase=0.1))
    return [(outline, 0), (marks, 1), (ellipse(u, v, (0.66, 0.12), (0.11, 0.11)), 2)]


def butterfly(u: Field, v: Field) -> Parts:
    """Four wings with veins, seen from above."""
    a = np.abs(u)
    upper, lower = ellipse(a - 0.3 * v, v, (0.4, 0.38), (0.46, 0.5)), ellipse(a, v, (0.42, -0.45), (0.4, 0.42))
    wings = union(upper, lower)
    angle = np.arctan2(v, a - 0.02)
    veins = common(wings, bands(angle, period=0.62, share=0.3) * np.hypot(u, v))
    body = ellipse(u, v, (0, 0), (0.12, 0.75))
    return [(wings, 1), (wings - 0.13, 0), (veins, 1), (body, 2)]


def toadstool(u: Field, v: Field) -> Parts:
    """A cap with spots on a stem."""
    stem = common(0.26 - np.abs(u) - 0.1 * v, 0.1 - v, v + 0.95)
    cap = common(ellipse(u, v, (0, -0.1), (0.95, 0.95)), v + 0.12)
    spots = common(cap, dots(u, v, [(-0.5, 0.15), (0.05, 0.5), (0.55, 0.1), (-0.1, 0.03)], 0.17))
    return [(stem, 2), (cap, 0), (spots, 1)]


def ladybird(u: Field, v: Field) -> Parts:
    """Round wing cases with spots, seen from above."""
    head = ellipse(u, v, (0.72, 0), (0.28, 0.36))
    wings = ellipse(u, v, (-0.08, 0), (0.8, 0.72))
    spots = [(0.3, 0.36), (0.3, -0.36), (-0.2, 0.42), (-0.2, -0.42), (-0.6, 0.25), (-0.6, -0.25)]
    return [(head, 2), (wings, 0), (common(wings, union(dots(u, v, spots, 0.16), 0.05 - np.abs(v))), 1)]


def bee(u: Field, v: Field) -> Parts:
    """A striped body under two wings."""
    wings = union(ellipse(u + 0.4 * v, v, (0.2, 0.5), (0.3, 0.45)), ellipse(u - 0.3 * v, v, (0.2, 0.5), (0.26, 0.4)))
    body = ellipse(u, v, (-0.1, -0.15), (0.8, 0.48))
    head = ellipse(u, v, (0.68, -0.12), (0.28, 0.3))
    return [(wings, 2), (body, 0), (common(body, bands(u, period=0.42, share=0.48)), 1), (head, 1)]


def turtle(u: Field, v: Field) -> Parts:
    """A shell of plates with head and legs, seen from above."""
    head = ellipse(u, v, (0.78, 0), (0.24, 0.2))
    legs = dots(np.abs(u + 0.1), np.abs(v), [(0.48, 0.55)], 0.25)
    shell = ellipse(u, v, (-0.08, 0), (0.75, 0.62))
    plates = common(shell - 0.08, *(bands(w, period=0.42, share=0.62, phase=p) for w, p in ((u, 0.0), (v, 0.5))))
    return [(union(head, legs), 2), (shell, 0), (plates, 1)]


def leaf(u: Field, v: Field) -> Parts:
    """A pointed blade with veins."""
    blade = common(ellipse(u, v, (0, -0.45), (1.02, 1.02)), ellipse(u, v, (0, 0.45), (1.02, 1.02)))
    veins = union(0.06 - np.abs(v), bands(u - 0.8 * np.abs(v), period=0.36, share=0.3))
    return [(blade, 0), (common(blade - 0.04, veins), 1)]


def starfish(u: Field, v: Field) -> Parts:
    """Five arms around a bright middle."""
    star = petals(u, v, 5, 0.68, 0.3, turn=np.pi / 2)
    inner = petals(u, v, 5, 0.35, 0.22, turn=np.pi / 2)
    return [(star, 0), (inner, 1), (ellipse(u, v, (0, 0), (0.16, 0.16)), 2)]


def jellyfish(u: Field, v: Field) -> Parts:
    """A bell with rings over wavy arms."""
    bell = common(ellipse(u, v, (0, 0.1), (0.8, 0.8)), v - 0.02 + 0.05 * np.cos(12 * u))
    arms = common(bands(u + 0.08 * np.sin(7 * v), period=0.36, share=0.5, phase=0.5), 0.1 - v, v + 0.9, 0.7 - np.abs(u))
    glow = common(bell - 0.12, bands(np.hypot(u, v - 0.1), period=0.4, share=0.5))
    return [(arms, 2), (bell, 0), (glow, 1)]


def owl(u: Field, v: Field) -> Parts:
    """Two large eyes and a barred belly."""
    a = np.abs(u)
    ears = common(a - 0.2, 1.0 - v, v - 0.2, 0.35 + 0.5 * v - a, 1.3 - a * 0.2 - v)
    body = union(ellipse(u, v, (0, -0.15), (0.62, 0.82)), ears)
    belly = ellipse(u, v, (0, -0.45), (0.4, 0.48))
    bars = common(belly, bands(v, period=0.28, share=0.4))
    eyes = dots(a, v, [(0.26, 0.32)], 0.26)
    return [(body, 0), (belly, 1), (bars, 0), (eyes, 1), (dots(a, v, [(0.24, 0.32)], 0.13), 2)]


def daisy(u: Field, v: Field) -> Parts:
    """Petals around a disc of seeds."""
    flower = petals(u, v, 11, 0.8, 0.18)
    disc = ellipse(u, v, (0, 0), (0.4, 0.4))
    seeds = common(disc, np.sin(16 * u) * np.sin(16 * v) * 0.1)
    return [(flower, 0), (disc, 1), (seeds, 2)]


SPECIES = [
    Species("clownfish", fish, [(255, 120, 10), (255, 255, 255), (15, 15, 20)]),
    Species("blue tang", fish, [(30, 80, 245), (15, 15, 40), (250, 220, 40)]),
    Species("monarch", butterfly, [(255, 135, 10), (20, 12, 10), (40, 25, 15)]),
    Species("toadstool", toadstool, [(225, 15, 20), (255, 250, 245), (245, 230, 200)]),
    Species("ladybird", ladybird, [(230, 20, 15), (15, 12, 12), (20, 15, 15)]),
    Species("bee", bee, [(255, 220, 20), (25, 18, 12), (215, 235, 250)]),
    Species("turtle", turtle, [(20, 60, 25), (70, 150, 50), (130, 200, 80)]),
    Species("leaf", leaf, [(30, 175, 40), (225, 250, 150), (30, 175, 40)]),
    Species("starfish", starfish, [(205, 30, 175), (255, 190, 225), (255, 250, 240)]),
    Species("jellyfish", jellyfish, [(30, 200, 215), (235, 255, 255), (130, 235, 240)]),
    Species("owl", owl, [(40, 38, 42), (245, 245, 245), (250, 190, 30)]),
    Species("daisy", daisy, [(250, 250, 250), (250, 180, 15), (190, 110, 10)]),
]
"""The classes, in the order of the labels."""
