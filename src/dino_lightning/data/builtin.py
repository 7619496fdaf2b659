"""The built-in data set: twelve species drawn from curves, each with its label and its mask. Nothing to download.

A picture is one creature or plant, turned, mirrored, bent, lit and coloured a little differently each time, on a
background of patches, stripes or checks in colours of any hue. A species is its palette, its markings and its
silhouette together, because these are what two crops of a picture share and what the augmentation spares. The
background takes up more than half of a picture and knows nothing of the species, so the mean colour of a picture says
little, and a network has to find the object before it can name it.

All drawing is in relative coordinates, so a picture has the same content at every size.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

Field: TypeAlias = NDArray[np.float32]
"""(n, H, W): positive inside a shape, negative outside, about a distance in units of the object's half-length."""
Parts: TypeAlias = list[tuple[Field, int]]
"""What to paint, back to front: a shape and a place in the species' palette."""

CELLS, PACE, SCALE, TURN, ROAM, LIGHT, HUE = 6, (2.0, 2.6), (0.55, 0.9), np.pi, 1.15, (0.7, 1.2), 0.0
DAP = 0.25
DRAWS = 192
"""Uniform random numbers behind one picture; drawing may use fewer."""
PIXELS_AT_ONCE = 1 << 18
"""Pixels drawn in one pass: few enough to stay in the processor's cache."""
OUTLINE = 0.1
"""Width of the dark line around an object, in half-lengths."""


class BuiltinImages(Dataset):
    """Pictures of twelve species with labels and object masks, the same for the same `draw_seed`, split and index.

    `images` only says how many there are: picture 7 of 10 is picture 7 of 6,000. Labels are balanced (index modulo 12).
    """

    def __init__(self, split: Literal["train", "val"], *, images: int, image_size: int, draw_seed: int) -> None:
        self.classes = [name for name, _, _ in SPECIES]
        self.labels = np.arange(images, dtype=np.int64) % len(SPECIES)
        self.images = np.empty((images, image_size, image_size, 3), np.uint8)
        self.masks = np.empty((images, image_size, image_size), bool)
        for label in range(len(SPECIES)):
            indices = np.flatnonzero(self.labels == label)
            for some in np.array_split(indices, max(1, len(indices) * image_size**2 // PIXELS_AT_ONCE)):
                seeds = [[draw_seed, ("train", "val").index(split), int(index)] for index in some]
                self.images[some], self.masks[some] = draw(label, seeds, image_size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])

    def mask(self, index: int) -> NDArray[np.bool_]:
        """The object's pixels (H, W)."""
        return self.masks[index]


class Dice:
    """Random numbers of several pictures at a time; each picture has its own stream."""

    def __init__(self, seeds: list[list[int]]) -> None:
        table = np.array([np.random.default_rng(seed).random(DRAWS, np.float32) for seed in seeds], np.float32)
        self.columns = iter(table.reshape(len(seeds), DRAWS).T)

    def uniform(self, low: float, high: float) -> Field:
        """One number per picture (n, 1, 1)."""
        return (low + (high - low) * next(self.columns))[:, None, None]

    def colour(self, saturation: tuple[float, float], value: tuple[float, float]) -> Field:
        """One colour of any hue per picture (n, 1, 1, 3)."""
        hue, s, v = self.uniform(0, 6), self.uniform(*saturation), self.uniform(*value)
        wheel = np.abs((hue[..., None] + np.array([0, 4, 2], np.float32)) % 6 - 3) - 1
        return v[..., None] * (1 - s[..., None] * (1 - wheel.clip(0, 1)))


def draw(label: int, seeds: list[list[int]], size: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Pictures (n, size, size, 3) of one species and their masks (n, size, size)."""
    _, shape, palette = SPECIES[label]
    dice = Dice(seeds)
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1)[None]
    x, y = axis[:, None, :], -axis[:, :, None]
    scale, u, v = object_frame(dice, x, y)
    canvas = background(dice, x, y)
    # An edge is one pixel wide: `sharp` turns a distance in half-lengths into pixels.
    sharp = scale * size / 2
    parts = shape(u, v)
    silhouette = union(*(part for part, _ in parts))
    light = dice.uniform(*LIGHT) * (1 + 0.2 * v)
    paint(canvas, silhouette + OUTLINE, sharp, np.float32([0.08, 0.07, 0.1]))
    for part, slot in parts:
        noise = np.stack([dice.uniform(-0.08, 0.08) for _ in "rgb"], axis=-1)
        colour = (np.float32(palette[slot]) / 255 + noise) * light[..., None]
        paint(canvas, part, sharp, colour)
    canvas *= dapple(dice, x, y)
    return (canvas.clip(0, 1) * 255).astype(np.uint8), silhouette * sharp > -0.5


def paint(canvas: Field, shape: Field, sharp: Field, colour: Field) -> None:
    """Lay a colour over the canvas (n, H, W, 3) inside a shape, with a soft edge of one pixel."""
    alpha = (shape * sharp + 0.5).clip(0, 1)[..., None]
    canvas += alpha * (colour - canvas)


def object_frame(dice: Dice, x: Field, y: Field) -> tuple[Field, Field, Field]:
    """Half-length of the object in half-pictures, and coordinates in which it spans -1 to 1, pointing right."""
    scale, angle, bend = dice.uniform(*SCALE), dice.uniform(-TURN, TURN), dice.uniform(-0.2, 0.2)
    roam = ROAM - scale
    mirror = np.where(dice.uniform(0, 1) < 0.5, -1, 1).astype(np.float32)
    x, y = (x - roam * dice.uniform(-1, 1)) / scale, (y - roam * dice.uniform(-1, 1)) / scale
    u, v = (np.cos(angle) * x + np.sin(angle) * y) * mirror, np.cos(angle) * y - np.sin(angle) * x
    stretch = dice.uniform(0.88, 1.12)
    u, v = u * stretch, v / stretch
    return scale, u, v + bend * (u * u - 0.3)


def wave(dice: Dice, x: Field, y: Field, low: float, high: float) -> Field:
    """A plane wave of any direction and phase with `low` to `high` periods across a picture, in -1 to 1."""
    turn, pace = dice.uniform(0, 2 * np.pi), dice.uniform(low, high) * np.pi
    return np.sin(pace * (np.cos(turn) * x + np.sin(turn) * y) + dice.uniform(0, 2 * np.pi))


def dapple(dice: Dice, x: Field, y: Field) -> Field:
    """Light and shade as under a tree, to be multiplied with a picture (n, H, W, 1)."""
    shade = wave(dice, x, y, 0.7, 1.6) + wave(dice, x, y, 0.7, 1.6)
    return (0.85 + DAP * shade)[..., None]


def background(dice: Dice, x: Field, y: Field) -> Field:
    """Wavy cells, each of a colour of its own, with a weave over them (n, H, W, 3)."""
    colours = np.stack([dice.colour((0.1, 0.9), (0.1, 1.0)) for _ in range(CELLS**2)], axis=1)[:, :, 0, 0]
    turn, pace = dice.uniform(0, 2 * np.pi), dice.uniform(*PACE)
    across = pace * (np.cos(turn) * x + np.sin(turn) * y) + 0.35 * wave(dice, x, y, 1, 2) + dice.uniform(0, CELLS)
    along = pace * (np.cos(turn) * y - np.sin(turn) * x) + 0.35 * wave(dice, x, y, 1, 2) + dice.uniform(0, CELLS)
    cell = (np.floor(across).astype(int) % CELLS) * CELLS + np.floor(along).astype(int) % CELLS
    canvas = colours[np.arange(len(cell))[:, None, None], cell]
    return canvas * (1 + 0.25 * (wave(dice, x, y, 3, 7) * wave(dice, x, y, 3, 7)))[..., None]


def ellipse(u: Field, v: Field, centre: tuple[float, float], radii: tuple[float, float]) -> Field:
    """An upright ellipse."""
    (a, b), (p, q) = radii, centre
    return min(a, b) * (1 - np.hypot((u - p) / a, (v - q) / b))


def petals(u: Field, v: Field, count: int, radius: float, depth: float, *, turn: float = 0.0) -> Field:
    """A star or flower: the radius swings by `depth` to either side."""
    return radius + depth * np.cos(count * (np.arctan2(v, u) - turn)) - np.hypot(u, v)


def union(*shapes: Field) -> Field:
    """Where any of the shapes is."""
    return np.maximum.reduce(shapes)


def common(*shapes: Field) -> Field:
    """Where all of the shapes are."""
    return np.minimum.reduce(np.broadcast_arrays(*shapes))


def bands(w: Field, *, period: float, share: float, phase: float = 0.0) -> Field:
    """Parallel bands across the coordinate `w`; `share` of each period is band."""
    return (share / 2 - np.abs((w / period + phase) % 1 - 0.5)) * period


def dots(u: Field, v: Field, places: list[tuple[float, float]], radius: float) -> Field:
    """Discs of one radius."""
    return union(*(ellipse(u, v, place, (radius, radius)) for place in places))


def fish(u: Field, v: Field) -> Parts:
    body = ellipse(u, v, (0.15, 0), (0.8, 0.52))
    tail = common(-0.4 - u, 1 + u, -0.1 - 0.9 * u - np.abs(v))
    fins = common(ellipse(u, v, (0.0, 0), (0.55, 0.8)), 0.45 - np.abs(u - 0.05))
    whole = union(body, tail, fins)
    marks = common(whole, bands(u + 0.15 * v * v, period=0.5, share=0.42, phase=0.1))
    return [(whole, 0), (marks, 1), (ellipse(u, v, (0.66, 0.12), (0.11, 0.11)), 2)]


def butterfly(u: Field, v: Field) -> Parts:
    a = np.abs(u)
    upper, lower = ellipse(a - 0.3 * v, v, (0.4, 0.38), (0.46, 0.5)), ellipse(a, v, (0.42, -0.45), (0.4, 0.42))
    wings = union(upper, lower)
    inner = union(upper, lower) - 0.13
    angle = np.arctan2(v, a - 0.02)
    veins = common(wings, bands(angle, period=0.62, share=0.3) * np.hypot(u, v))
    body = ellipse(u, v, (0, 0), (0.12, 0.75))
    return [(wings, 1), (inner, 0), (veins, 1), (body, 2)]


def toadstool(u: Field, v: Field) -> Parts:
    stem = common(0.26 - np.abs(u) - 0.1 * v, 0.1 - v, v + 0.95)
    cap = common(ellipse(u, v, (0, -0.1), (0.95, 0.95)), v + 0.12)
    spots = common(cap, dots(u, v, [(-0.5, 0.15), (0.05, 0.5), (0.55, 0.1), (-0.1, 0.03)], 0.17))
    return [(stem, 2), (cap, 0), (spots, 1)]


def ladybird(u: Field, v: Field) -> Parts:
    head = ellipse(u, v, (0.72, 0), (0.28, 0.36))
    wings = ellipse(u, v, (-0.08, 0), (0.8, 0.72))
    places = [(0.3, 0.36), (0.3, -0.36), (-0.2, 0.42), (-0.2, -0.42), (-0.6, 0.25), (-0.6, -0.25)]
    return [(head, 2), (wings, 0), (common(wings, union(dots(u, v, places, 0.16), 0.05 - np.abs(v))), 1)]


def bee(u: Field, v: Field) -> Parts:
    wings = union(ellipse(u + 0.4 * v, v, (0.2, 0.5), (0.3, 0.45)), ellipse(u - 0.3 * v, v, (0.2, 0.5), (0.26, 0.4)))
    body = ellipse(u, v, (-0.1, -0.15), (0.8, 0.48))
    head = ellipse(u, v, (0.68, -0.12), (0.28, 0.3))
    return [(wings, 2), (body, 0), (common(body, bands(u, period=0.42, share=0.48)), 1), (head, 1)]


def turtle(u: Field, v: Field) -> Parts:
    head = ellipse(u, v, (0.78, 0), (0.24, 0.2))
    legs = dots(np.abs(u + 0.1), np.abs(v), [(0.48, 0.55)], 0.25)
    shell = ellipse(u, v, (-0.08, 0), (0.75, 0.62))
    plates = common(
        shell - 0.08, union(bands(u, period=0.42, share=0.62), -np.abs(v)), bands(v, period=0.42, share=0.62, phase=0.5)
    )
    return [(union(head, legs), 2), (shell, 0), (plates, 1)]


def leaf(u: Field, v: Field) -> Parts:
    blade = common(ellipse(u, v, (0, -0.45), (1.02, 1.02)), ellipse(u, v, (0, 0.45), (1.02, 1.02)))
    veins = union(0.06 - np.abs(v), bands(u - 0.8 * np.abs(v), period=0.36, share=0.3))
    stem = common(0.06 - np.abs(v), u + 1.0, 0.1 - u)
    return [(stem, 1), (blade, 0), (common(blade - 0.04, veins), 1)]


def starfish(u: Field, v: Field) -> Parts:
    star = petals(u, v, 5, 0.68, 0.3, turn=np.pi / 2)
    inner = petals(u, v, 5, 0.35, 0.22, turn=np.pi / 2)
    return [(star, 0), (inner, 1), (ellipse(u, v, (0, 0), (0.16, 0.16)), 2)]


def jellyfish(u: Field, v: Field) -> Parts:
    bell = common(ellipse(u, v, (0, 0.1), (0.8, 0.8)), v - 0.02 + 0.05 * np.cos(12 * u))
    arms = common(bands(u + 0.08 * np.sin(7 * v), period=0.36, share=0.5, phase=0.5), 0.1 - v, v + 0.9, 0.7 - np.abs(u))
    glow = common(bell - 0.12, bands(np.hypot(u, v - 0.1), period=0.4, share=0.5))
    return [(arms, 2), (bell, 0), (glow, 1)]


def owl(u: Field, v: Field) -> Parts:
    a = np.abs(u)
    ears = common(a - 0.2, 1.0 - v, v - 0.2, 0.35 + 0.5 * v - a, 1.3 - a * 0.2 - v)
    body = union(ellipse(u, v, (0, -0.15), (0.62, 0.82)), ears)
    belly = ellipse(u, v, (0, -0.45), (0.4, 0.48))
    bars = common(belly, bands(v, period=0.28, share=0.4))
    eyes = dots(a, v, [(0.26, 0.32)], 0.26)
    return [(body, 0), (belly, 1), (bars, 0), (eyes, 1), (dots(a, v, [(0.24, 0.32)], 0.13), 2)]


def daisy(u: Field, v: Field) -> Parts:
    flower = petals(u, v, 11, 0.8, 0.18)
    disc = ellipse(u, v, (0, 0), (0.4, 0.4))
    seeds = common(disc, np.sin(16 * u) * np.sin(16 * v) * 0.1)
    return [(flower, 0), (disc, 1), (seeds, 2)]


Species: TypeAlias = tuple[str, Callable[[Field, Field], Parts], list[tuple[int, int, int]]]
SPECIES: list[Species] = [
    ("clownfish", fish, [(255, 120, 10), (255, 255, 255), (15, 15, 20)]),
    ("blue tang", fish, [(30, 80, 245), (15, 15, 40), (250, 220, 40)]),
    ("monarch", butterfly, [(255, 135, 10), (20, 12, 10), (40, 25, 15)]),
    ("toadstool", toadstool, [(225, 15, 20), (255, 250, 245), (245, 230, 200)]),
    ("ladybird", ladybird, [(230, 20, 15), (15, 12, 12), (20, 15, 15)]),
    ("bee", bee, [(255, 220, 20), (25, 18, 12), (215, 235, 250)]),
    ("turtle", turtle, [(20, 60, 25), (70, 150, 50), (130, 200, 80)]),
    ("leaf", leaf, [(30, 175, 40), (225, 250, 150), (30, 175, 40)]),
    ("starfish", starfish, [(205, 30, 175), (255, 190, 225), (255, 250, 240)]),
    ("jellyfish", jellyfish, [(30, 200, 215), (235, 255, 255), (130, 235, 240)]),
    ("owl", owl, [(40, 38, 42), (245, 245, 245), (250, 190, 30)]),
    ("daisy", daisy, [(250, 250, 250), (250, 180, 15), (190, 110, 10)]),
]
"""Name, shape and palette (RGB) of each class; a class's label is its place."""
