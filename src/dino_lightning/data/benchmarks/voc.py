"""Pascal VOC segmentation (Everingham et al.): photographs and the classes of their pixels.

PATH/JPEGImages/NAME.jpg
PATH/SegmentationClass/NAME.png           0 background, 1 to 20 classes, 255 void
PATH/ImageSets/Segmentation/SPLIT.txt     one name per line; without the folder, all images with a mask
"""

from pathlib import Path

import numpy as np
from PIL import Image

from dino_lightning.config import VOCData
from dino_lightning.data.benchmarks.files import INDEXED_MODES, existing_folder, image_size
from dino_lightning.data.decode import UnreadableImageError
from dino_lightning.data.sources.base import content_digest
from dino_lightning.errors import UserError, did_you_mean

IMAGES, MASKS, LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"


class VOCImages:
    """An `ImageSource` of the photographs, with a `mask` for each."""

    classes: list[str] | None = None
    labels: np.ndarray | None = None

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names = root, np.array(names, dtype=np.str_)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The bytes of the file."""
        return self.image_path(index).read_bytes()

    def mask(self, index: int) -> np.ndarray:
        """The classes of the pixels (H, W) uint8: 0 background, 255 void. Raises `UnreadableImageError`."""
        with Image.open(self.mask_path(index)) as image:
            if image.mode not in INDEXED_MODES:
                raise UnreadableImageError(
                    f"the mask is a color image (mode {image.mode}); expected one number per pixel"
                )
            return np.array(image, dtype=np.uint8)

    def describe(self, index: int) -> str:
        """The name in the list."""
        return str(self.names[index])

    def fingerprint(self) -> str:
        """Digest of the paths, sizes and times of images and masks."""
        files = (path for i in range(len(self)) for path in (self.image_path(i), self.mask_path(i)))
        return content_digest(*(f"{path}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}".encode() for path in files))

    def image_path(self, index: int) -> Path:
        """Path of the photograph."""
        return self.root / IMAGES / f"{self.names[index]}.jpg"

    def mask_path(self, index: int) -> Path:
        """Path of its mask."""
        return self.root / MASKS / f"{self.names[index]}.png"


def open_voc(config: VOCData) -> VOCImages:
    """The images of `data.split`, after checking all their headers.

    Raises `UserError` if a folder, the list, an image or a mask is missing, and if the sizes of a mask and its image
    differ.
    """
    root = existing_folder(config.path, key="data.path")
    for name in (IMAGES, MASKS):
        if not (root / name).is_dir():
            below = next((path.parent for deep in ("*", "*/*") for path in root.glob(f"{deep}/{MASKS}")), None)
            hint = "expected the folder of a year, such as VOC2012" if below is None else f"did you mean '{below}'?"
            raise UserError(f"data.path={config.path} has no folder {name}; {hint}.")
    images = VOCImages(root, _names(root, config))
    missing = [
        path for i in range(len(images)) for path in (images.image_path(i), images.mask_path(i)) if not path.is_file()
    ]
    if missing:
        raise UserError(
            f"data.path={config.path} lacks {len(missing)} files of {len(images)} images, such as "
            f"{missing[0].relative_to(root)}."
        )
    for i in range(len(images)):
        image, mask = image_size(images.image_path(i)), image_size(images.mask_path(i))
        if image and mask and image != mask:
            raise UserError(
                f"data.path={config.path}: the mask {MASKS}/{images.mask_path(i).name} has {mask[0]} x {mask[1]} "
                f"pixels, but its image has {image[0]} x {image[1]}; expected masks with the sizes of their images."
            )
    return images


def _names(root: Path, config: VOCData) -> list[str]:
    lists = root / LISTS
    if not lists.is_dir():
        names = sorted(path.stem for path in (root / MASKS).glob("*.png"))
        if not names:
            raise UserError(
                f"data.path={config.path}: {MASKS} contains no masks; expected NAME.png for {IMAGES}/NAME.jpg."
            )
        return names
    file = lists / f"{config.split}.txt"
    if not file.is_file():
        hint = did_you_mean(config.split, [path.stem for path in lists.glob("*.txt")])
        raise UserError(f"data.split={config.split}: {file} does not exist; {hint}")
    names = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    if not names:
        raise UserError(f"data.split={config.split}: {file} contains no names of images.")
    return names
