"""DAVIS 2016 and 2017 (Perazzi et al., CVPR 2016; Pont-Tuset et al., 2017) as they unpack: videos and masks of objects.

    PATH/ImageSets/YEAR/SPLIT.txt                      names of the sequences
    PATH/JPEGImages/RESOLUTION/SEQUENCE/00000.jpg      frames
    PATH/Annotations/RESOLUTION/SEQUENCE/00000.png     a number for each pixel: 0 background, then the objects; 255 void

2016 has one object, all objects of 2017 together. Its own release paints it 255.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from dino_lightning.config import DavisData
from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.benchmarks.files import existing_folder
from dino_lightning.errors import UserError, did_you_mean

VOID = 255
NUMBERED = ("P", "L", "1")
"""PIL's modes of images with a number for each pixel."""
YEAR_OF_ONE_OBJECT = 2016
FEWEST_FRAMES = 3
"""The first frame is given and the last is not scored."""


class BrokenSequenceError(ValueError):
    """A frame or a mask that cannot be read: (path, reason)."""


@dataclass(frozen=True)
class Sequence:
    """A video and its masks."""

    name: str
    frames: list[Path]
    masks: list[Path]
    one_object: bool
    """All objects are one."""

    def __len__(self) -> int:
        return len(self.frames)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames (pixels)."""
        return _header(self.frames[0])[0]

    @cached_property
    def palette(self) -> list[int] | None:
        """The colors of the first mask, r, g, b of 0, then of 1, ...; None where it has none."""
        with Image.open(self.masks[0]) as image:
            return image.getpalette("RGB") if image.mode == "P" else None

    @cached_property
    def objects(self) -> int:
        """The largest number of an object in the first mask; objects that appear later do not count."""
        return int(self.labels(0).max())

    def labels(self, index: int) -> np.ndarray:
        """The objects of a frame (H, W) uint8; void is background, as in the official evaluation.

        Raises `BrokenSequenceError`.
        """
        values = _read_mask(self.masks[index])
        if not self.one_object:
            return np.where(values == VOID, 0, values).astype(np.uint8)
        return ((values > 0) & ((values != VOID) | self._void_is_object)).astype(np.uint8)

    @cached_property
    def _void_is_object(self) -> bool:
        values = np.unique(_read_mask(self.masks[0]))
        return set(values.tolist()) <= {0, VOID}


@dataclass(frozen=True)
class Davis:
    """The sequences of a split."""

    sequences: list[Sequence]
    broken: dict[str, tuple[str, str]]
    """Sequences that are left out: the file that cannot be read, and why. What only decoding tells is not here."""


def open_davis(config: DavisData) -> Davis:
    """The sequences of `data.split`, with the sizes of all their frames and masks looked at.

    Raises `UserError` where a folder, the year, the split, a sequence or a mask is missing, where a mask has not the
    size of its frame, and where no sequence can be read.
    """
    root = existing_folder(config.path, key="data.path")
    names = _listed(_list(root, config))
    frames_at = _resolution(root, "JPEGImages", config)
    masks_at = _resolution(root, "Annotations", config)
    if not names:
        raise UserError(f"data.split={config.split}: {_list(root, config)} names no sequences.")
    sequences, broken = [], {}
    for name in names:
        sequence = _sequence(name, frames_at, masks_at, config)
        try:
            _check(sequence, config)
        except BrokenSequenceError as error:
            broken[name] = error.args
            continue
        sequences.append(sequence)
    if not sequences:
        path, reason = next(iter(broken.values()))
        raise UserError(f"data.path={config.path}: none of the {len(names)} sequences can be read ({path}: {reason}).")
    return Davis(sequences, broken)


def _list(root: Path, config: DavisData) -> Path:
    """The file that names the sequences."""
    sets = root / "ImageSets"
    if not sets.is_dir():
        below = next((path.parent for path in sorted(root.glob("*/ImageSets"))), None)
        hint = f"did you mean {below}?" if below else "give the folder as it unpacks, with JPEGImages and Annotations."
        raise UserError(f"data.path={config.path} has no ImageSets; {hint}")
    year = sets / str(config.year)
    if not year.is_dir():
        raise UserError(
            f"data.year={config.year}: {sets} has no such folder; {did_you_mean(str(config.year), _inside(sets))}"
        )
    path = year / f"{config.split}.txt"
    if not path.is_file():
        known = [found.stem for found in year.glob("*.txt")]
        raise UserError(f"data.split={config.split}: {year} has no {path.name}; {did_you_mean(config.split, known)}")
    return path


def _listed(path: Path) -> list[str]:
    """Each name once, of lines like `bear` or, in the release of 2016, `/JPEGImages/480p/bear/00000.jpg /Annot…`."""
    names = {}
    for line in path.read_text().splitlines():
        first = Path(line.split()[0]) if line.split() else None
        if first is not None:
            names[first.parent.name if first.suffix == ".jpg" else first.name] = None
    return list(names)


def _resolution(root: Path, kind: str, config: DavisData) -> Path:
    folder = root / kind / config.resolution
    if not (root / kind).is_dir():
        raise UserError(f"data.path={config.path} has no {kind}; give the folder of DAVIS as it unpacks.")
    if not folder.is_dir():
        raise UserError(
            f"data.resolution={config.resolution}: {root / kind} has no such folder; "
            f"{did_you_mean(config.resolution, _inside(root / kind))}"
        )
    return folder


def _sequence(name: str, frames_at: Path, masks_at: Path, config: DavisData) -> Sequence:
    frames = sorted((frames_at / name).glob("*.jpg"))
    if not frames:
        raise UserError(
            f"data.split={config.split}: {frames_at} has no frames of the sequence {name}; "
            f"{did_you_mean(name, _inside(frames_at))}"
        )
    if len(frames) < FEWEST_FRAMES:
        raise UserError(
            f"data.split={config.split}: the sequence {name} has {len(frames)} frames; a score takes at "
            f"least {FEWEST_FRAMES}."
        )
    masks = [masks_at / name / f"{frame.stem}.png" for frame in frames]
    here = {path.name for path in (masks_at / name).glob("*.png")}
    lost = [mask for mask in masks if mask.name not in here]
    if lost:
        raise UserError(
            f"data.split={config.split}: {len(lost)} of {len(masks)} masks of {name} are missing, first "
            f"{lost[0]}; the figures need a mask for every frame."
        )
    return Sequence(name, frames, masks, one_object=config.year == YEAR_OF_ONE_OBJECT)


def _check(sequence: Sequence, config: DavisData) -> None:
    for path in [*sequence.frames, *sequence.masks]:
        (height, width), mode = _header(path)
        if (height, width) != sequence.size:
            raise UserError(
                f"data.path={config.path}: {path} has {width} x {height} pixels; expected those of "
                f"{sequence.frames[0]}, {sequence.size[1]} x {sequence.size[0]}."
            )
        if path.suffix == ".png" and mode not in NUMBERED and not sequence.one_object:
            raise UserError(
                f"data.path={config.path}: {path} is an image of mode {mode}; expected a number for each "
                "pixel, modes P or L."
            )
    if not sequence.objects:
        raise UserError(f"data.path={config.path}: {sequence.masks[0]} shows no object to follow.")


def _header(path: Path) -> tuple[tuple[int, int], str]:
    """Height and width (pixels), and PIL's mode."""
    try:
        with Image.open(path) as image:
            return (image.height, image.width), image.mode
    except UNREADABLE as error:
        raise BrokenSequenceError(str(path), why_unreadable(error)) from error


def _read_mask(path: Path) -> np.ndarray:
    """Numbers of pixels (H, W) uint8; colors become gray."""
    try:
        with Image.open(path) as image:
            return np.asarray(image if image.mode in NUMBERED else image.convert("L")).astype(np.uint8)
    except UNREADABLE as error:
        raise BrokenSequenceError(str(path), why_unreadable(error)) from error


def _inside(folder: Path) -> Iterable[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()]
