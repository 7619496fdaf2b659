"""Rows: folders of images."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from wrong_files import HTML, bomb, filled, gray, image, parquet, photos, tiff, touch, zipped
from wrong_inputs import Wrong

Make = Callable[[Path], list[str]]
NOBODY = 65534
"""The user id of a user without rights."""
ENDINGS = ".jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp"
NONE = "data: none of the tested images can be read (DIR/in/0"
RANGE = "data.value_range=[0,1]"


def folder(path: Path, *words: str) -> list[str]:
    """`data=folder` of a path."""
    return ["data=folder", f"data.path={path}", *words]


def each(content: bytes, *words: str, name: str = "{}.jpg") -> Make:
    """A folder in which every image has this content."""
    return lambda path: folder(filled(path / "in", content, name=name), *words)


def one_in_five(content: bytes, *words: str) -> Make:
    """Class folders in which a fifth of the images have this content."""

    def make(path: Path) -> list[str]:
        photos(path / "in")
        filled(path / "in" / "a", content, count=4, name="bad{}.jpg")
        return folder(path / "in", *words)

    return make


def splits(train: int, val: int) -> Make:
    """`train/` and `val/` with these numbers of classes; 0 for no folder."""

    def make(path: Path) -> list[str]:
        for name, classes in (("train", train), ("val", val)):
            if classes:
                photos(path / "in" / name, classes=classes)
        return folder(path / "in")

    return make


def without_val_classes(path: Path) -> list[str]:
    photos(path / "in" / "train")
    filled(path / "in" / "val", image())
    return folder(path / "in")


def empty_class(path: Path) -> list[str]:
    photos(path / "in")
    (path / "in" / "c").mkdir()
    return folder(path / "in")


def broken_links(path: Path) -> list[str]:
    (path / "in").mkdir()
    for index in range(8):
        os.symlink(path / "gone" / f"{index}.jpg", path / "in" / f"{index}.jpg")
    return folder(path / "in")


def empty(path: Path) -> list[str]:
    (path / "in").mkdir()
    return folder(path / "in")


def unreadable(path: Path) -> list[str]:
    photos(path / "in")
    for name in "ab":
        os.chmod(path / "in" / name, 0)
    path.chmod(0o777)
    return folder(path / "in", f"data.cache_dir={path / 'cache'}")


@contextmanager
def as_nobody(path: Path) -> Iterator[None]:
    """Change to a user without rights, because root may read everything."""
    folders = [parent for parent in path.parents if parent.stat().st_mode & 0o1 == 0]
    modes = [parent.stat().st_mode for parent in folders]
    for parent in folders:
        parent.chmod(0o711)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent, mode in zip(folders, modes, strict=True):
            parent.chmod(mode)


ROWS = [
    Wrong(
        "an empty folder",
        empty,
        f"data.path: 'DIR/in' contains no image (searched recursively for {ENDINGS})",
    ),
    Wrong(
        "a folder of text files",
        each(b"hello", name="{}.txt"),
        f"data.path: 'DIR/in' contains no image (searched recursively for {ENDINGS})",
    ),
    Wrong(
        "a folder of parquet files, read by data=folder",
        lambda path: folder(parquet(path / "in")),
        f"data.path: 'DIR/in' contains no image (searched recursively for {ENDINGS})",
    ),
    Wrong(
        "an image instead of a folder",
        lambda path: folder(touch(path / "x.jpg", image())),
        "data.path=DIR/x.jpg is a file; expected the folder of the images",
    ),
    Wrong(
        "an archive instead of a folder",
        lambda path: folder(zipped(path / "x.zip")),
        "data.path=DIR/x.zip is a file; expected the folder of the images",
    ),
    Wrong(
        "a folder that does not exist, next to one with a similar name",
        lambda path: folder(photos(path / "photos").with_name("photso")),
        "data.path=DIR/photso does not exist: no 'photso' in 'DIR'; did you mean 'photos'?",
    ),
    Wrong(
        "an empty class folder",
        empty_class,
        f"data.path: the class folder 'DIR/in/c' contains no image ({ENDINGS}); add images or remove the folder",
    ),
    Wrong(
        "class folders without read permission",
        unreadable,
        "data.path: the class folder 'DIR/in/a' cannot be opened; change its permissions or remove it",
        around=as_nobody,
        needs_root=True,
    ),
    Wrong(
        "val/ without train/",
        splits(0, 2),
        "data.path=DIR/in has 'val/' but no 'train/'; add 'train/' or choose a folder of images",
    ),
    Wrong(
        "a class of train/ that is not in val/",
        splits(3, 2),
        "data.path: the class folder 'c' is in 'DIR/in/train' but not in 'DIR/in/val' (1 class); choose one of a, b",
    ),
    Wrong(
        "val/ without class folders",
        without_val_classes,
        "data.path: 'DIR/in/train' has class folders but 'DIR/in/val' has none; sort its images into the folders a, b, "
        "…",
    ),
    Wrong("images of zero bytes", each(b""), f"{NONE}.jpg: the file is empty)"),
    Wrong(
        "web pages saved as .jpg",
        each(HTML),
        f"{NONE}.jpg: not an image format that PIL supports; the file begins with b'<!DOCTYPE ht')",
    ),
    Wrong("truncated JPEGs", each(image()[:600]), f"{NONE}.jpg: …runcated…)"),
    Wrong("truncated PNGs", each(image(form="PNG")[:600], name="{}.png"), f"{NONE}.png: …truncated…)"),
    Wrong("symbolic links to deleted files", broken_links, f"{NONE}.jpg: no such file or directory)"),
    Wrong(
        "images with a single pixel",
        each(image(side=1)),
        f"{NONE}.jpg: a single pixel, so all crops would be identical)",
    ),
    Wrong(
        "a PNG with 88 bytes that claims to have 3,600 megapixels",
        each(bomb(60_000), name="{}.png"),
        f"{NONE}.png: 3600.0 megapixels; PIL's limit is 89.5)",
    ),
    Wrong(
        "a float TIFF without a range",
        each(tiff(gray()), name="{}.tif"),
        f"{NONE}.tif: float image; set data.value_range, such as [0,1])",
    ),
    Wrong(
        "a 16-bit TIFF without a range",
        each(tiff(np.full((40, 40), 500, np.uint16)), name="{}.tif"),
        f"{NONE}.tif: 16-bit image; set data.value_range, such as [0,65535])",
    ),
    Wrong(
        "a float TIFF with NaN",
        each(tiff(gray(np.nan, np.nan)), RANGE, name="{}.tif"),
        f"{NONE}.tif: 2 of 1600 values are NaN or infinite; set data.nan_value to the value that replaces them)",
    ),
    Wrong(
        "a float TIFF with infinity",
        each(tiff(gray(-np.inf)), RANGE, name="{}.tif"),
        f"{NONE}.tif: 1 of 1600 values are NaN or infinite; set data.nan_value to the value that replaces them)",
    ),
    Wrong(
        "RGB images with data.channels=4",
        each(image(), "crops=cpu", "data.channels=4", "crops.mean=[0,0,0,0]", "crops.std=[1,1,1,1]"),
        f"{NONE}.jpg: the image has 3 channels, but data.channels=4)",
    ),
    Wrong(
        "a single image",
        lambda path: folder(photos(path / "in", count=1, classes=1)),
        "data.batch_size_per_device=4 on 1 device(s) is larger than the 1 training images; set it to at most 1.",
    ),
    Wrong(
        "a fifth of the images have zero bytes",
        one_in_five(b"", "experiment=quick"),
        "data.max_bad_share=0.05: 1 of 18 images cannot be read (DIR/in/a/bad….jpg: the file is empty), see "
        "DIR/run/bad_images.txt; repair or remove them, or set data.max_bad_share=1 to continue without them",
        while_training=True,
    ),
    Wrong(
        "truncated images, with data.on_error=raise",
        one_in_five(image()[:600], "data.on_error=raise", "experiment=quick"),
        "data.on_error=raise: DIR/in/a/bad….jpg cannot be read (…runcated…)",
        while_training=True,
    ),
    Wrong(
        "data.cache_dir is a file",
        lambda path: folder(photos(path / "in"), "data.cache=disk", f"data.cache_dir={touch(path / 'c')}"),
        "data.cache_dir=DIR/c cannot be created ([Errno 20] Not a directory: 'DIR/c/images'); choose a folder that "
        "you can write to",
    ),
]
