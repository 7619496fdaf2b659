"""DAVIS 2016 and 2017 (Perazzi et al., CVPR 2016; Pont-Tuset et al., 2017): videos with object masks.

    PATH/ImageSets/YEAR/SPLIT.txt                      names of the sequences
    PATH/JPEGImages/RESOLUTION/SEQUENCE/00000.jpg      frames
    PATH/Annotations/RESOLUTION/SEQUENCE/00000.png     one number per pixel: 0 background, then the objects; 255 void

2016 has a single object, the union of the objects of 2017; its original release stores it as 255.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from dino_lightning.config import DavisData
from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
from dino_lightning.data.benchmarks.files import INDEXED_MODES, existing_folder
from dino_lightning.data.sources.folder import subfolders
from dino_lightning.errors import UserError, did_you_mean

VOID = 255
SINGLE_OBJECT_YEAR = 2016
MIN_FRAMES = 3
"""The mask of the first frame is given, and the last frame is not scored."""


class BrokenSequenceError(ValueError):
    """An unreadable frame or mask: (path, reason)."""


@dataclass(frozen=True)
class Sequence:
    """A video and its masks."""

    name: str
    frames: list[Path]
    masks: list[Path]
    single_object: bool
    """Whether all objects count as one."""

    def __len__(self) -> int:
        return len(self.frames)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames (pixels)."""
        return _header(self.frames[0])[0]

    @cached_property
    def palette(self) -> list[int] | None:
        """The palette of the first mask: r, g, b of 0, then of 1, ...; None if it has no palette."""
        with Image.open(self.masks[0]) as image:
            return image.getpalette("RGB") if image.mode == "P" else None

    @cached_property
    def objects(self) -> int:
        """The largest object number in the first mask; objects that appear later do not count."""
        return int(self.labels(0).max())

    def labels(self, index: int) -> np.ndarray:
        """The object numbers of a frame (H, W) uint8; void is background, as in the official evaluation.

        Raises `BrokenSequenceError`.
        """
        values = _read_mask(self.masks[index])
        if not self.single_object:
            return np.where(values == VOID, 0, values).astype(np.uint8)
        return ((values > 0) & ((values != VOID) | self._void_is_object)).astype(np.uint8)

    @cached_property
    def _void_is_object(self) -> bool:
        return set(np.unique(_read_mask(self.masks[0])).tolist()) <= {0, VOID}


@dataclass(frozen=True)
class Davis:
    """The sequences of a split."""

    sequences: list[Sequence]
    broken: dict[str, tuple[str, str]]
    """Name of an omitted sequence -> its unreadable file and the reason. Only the headers of files have been read."""


def open_davis(config: DavisData) -> Davis:
    """The sequences of `data.split`, after checking the sizes of all frames and masks.

    Raises `UserError` if a folder, the year, the split, a sequence or a mask is missing, if the sizes of a mask and its
    frame differ, and if no sequence can be read.
    """
    root = existing_folder(config.path, key="data.path")
    split_file = _split_file(root, config)
    names = _sequence_names(split_file)
    frames_root, masks_root = (_resolution_folder(root, kind, config) for kind in ("JPEGImages", "Annotations"))
    if not names:
        raise UserError(f"data.split={config.split}: {split_file} contains no names of sequences.")
    sequences, broken = [], {}
    for name in names:
        sequence = _sequence(name, frames_root, masks_root, config)
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


def _split_file(root: Path, config: DavisData) -> Path:
    """The file with the names of the sequences."""
    sets = root / "ImageSets"
    if not sets.is_dir():
        below = next((path.parent for path in sorted(root.glob("*/ImageSets"))), None)
        hint = f"did you mean {below}?" if below else "expected the extracted folder with JPEGImages and Annotations."
        raise UserError(f"data.path={config.path} has no ImageSets; {hint}")
    year = _subfolder(sets, str(config.year), key="data.year")
    path = year / f"{config.split}.txt"
    if not path.is_file():
        splits = [file.stem for file in year.glob("*.txt")]
        raise UserError(f"data.split={config.split}: {year} has no {path.name}; {did_you_mean(config.split, splits)}")
    return path


def _sequence_names(path: Path) -> list[str]:
    """The unique names in lines like `bear` or, in the release of 2016, `/JPEGImages/480p/bear/00000.jpg /Annot…`."""
    names = {}
    for line in path.read_text().splitlines():
        first = Path(line.split()[0]) if line.split() else None
        if first is not None:
            names[first.parent.name if first.suffix == ".jpg" else first.name] = None
    return list(names)


def _resolution_folder(root: Path, kind: str, config: DavisData) -> Path:
    if not (root / kind).is_dir():
        raise UserError(f"data.path={config.path} has no {kind}; expected the extracted folder of DAVIS.")
    return _subfolder(root / kind, config.resolution, key="data.resolution")


def _subfolder(folder: Path, name: str, *, key: str) -> Path:
    if not (folder / name).is_dir():
        raise UserError(f"{key}={name} is not a folder in {folder}; {did_you_mean(name, subfolders(folder))}")
    return folder / name


def _sequence(name: str, frames_root: Path, masks_root: Path, config: DavisData) -> Sequence:
    frames = sorted((frames_root / name).glob("*.jpg"))
    if not frames:
        raise UserError(
            f"data.split={config.split}: {frames_root} has no frames of the sequence {name}; "
            f"{did_you_mean(name, subfolders(frames_root))}"
        )
    if len(frames) < MIN_FRAMES:
        raise UserError(
            f"data.split={config.split}: the sequence {name} has {len(frames)} frames; expected at least {MIN_FRAMES}."
        )
    masks = [masks_root / name / f"{frame.stem}.png" for frame in frames]
    existing = {path.name for path in (masks_root / name).glob("*.png")}
    missing = [mask for mask in masks if mask.name not in existing]
    if missing:
        raise UserError(
            f"data.split={config.split}: {len(missing)} of {len(masks)} masks of {name} are missing, such as "
            f"{missing[0]}; expected a mask for every frame."
        )
    return Sequence(name, frames, masks, single_object=config.year == SINGLE_OBJECT_YEAR)


def _check(sequence: Sequence, config: DavisData) -> None:
    for path in [*sequence.frames, *sequence.masks]:
        (height, width), mode = _header(path)
        if (height, width) != sequence.size:
            raise UserError(
                f"data.path={config.path}: {path} has {width} x {height} pixels; expected the size of "
                f"{sequence.frames[0]}, {sequence.size[1]} x {sequence.size[0]}."
            )
        if path.suffix == ".png" and mode not in INDEXED_MODES and not sequence.single_object:
            raise UserError(
                f"data.path={config.path}: {path} is a color image (mode {mode}); expected one number per "
                "pixel (mode P or L)."
            )
    if not sequence.objects:
        raise UserError(f"data.path={config.path}: {sequence.masks[0]} contains no object.")


def _header(path: Path) -> tuple[tuple[int, int], str]:
    """Height and width (pixels), and PIL's mode."""
    with _opened(path) as image:
        return (image.height, image.width), image.mode


def _read_mask(path: Path) -> np.ndarray:
    """The numbers of the pixels (H, W) uint8; colors are converted to gray."""
    with _opened(path) as image:
        return np.asarray(image if image.mode in INDEXED_MODES else image.convert("L")).astype(np.uint8)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except UNREADABLE as error:
        raise BrokenSequenceError(str(path), why_unreadable(error)) from error
