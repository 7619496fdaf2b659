"""Attention of the last block's class token as segmentation (figure 4), and as pictures (figures 1 and 3).

Where objects are known (`data=voc`, the built-in images) each head's thresholded attention is compared with them; other
images, and clips, are drawn alone.

The Jaccard index follows the snippet that the authors published (issue 54 of their repository): for each object the
head that fits best, averaged over the objects of an image, then over images. It is taken at the resolution that the
network sees, the mask resized by nearest neighbor and cut like the image. An object of VOC is a class of an image.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dino_lightning.config import AttentionEval, BuiltinData, DataConfig, PicturesData, VOCData
from dino_lightning.data.bad_images import BadImages
from dino_lightning.data.benchmarks.pictures import Clip, open_pictures
from dino_lightning.data.benchmarks.voc import open_voc
from dino_lightning.data.module import SEEN_OF_A_STREAM
from dino_lightning.data.sources import ImageSource
from dino_lightning.data.sources.base import FirstImages
from dino_lightning.errors import UserError
from dino_lightning.evaluation.attention.images import Looker, WholeImages, WholeView, look_through
from dino_lightning.evaluation.attention.masks import attended_area, image_jaccards
from dino_lightning.evaluation.attention.pictures import picture_names, save_clip, save_picture, save_sheets
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.extract import subset_indices
from dino_lightning.evaluation.features.images import ImageFiles
from dino_lightning.models.tokens import has_attention, patch_size
from dino_lightning.runtime.collectives import all_gather_concat

PHOTOGRAPHS = 480
"""The paper's shorter side (pixels)."""
SMALL = 128
"""A network trained on smaller images than this sees training images in its own size."""


def evaluate(config: AttentionEval, task: Task) -> Iterator[Result]:
    """With objects `jaccard_best_head_60`, `jaccard_mean_head_60`, …; for VOC also `foreground_best_head_60`, …, all
    classes of an image as one object and void pixels not counted. Without, `area_60`: the share of an image that 60 %
    of a head's attention takes, averaged over heads and images.
    """
    view = WholeView(task.network, size=checked_side(config, task))
    match task.data:
        case VOCData() as data:
            yield from segmentation(config, task, open_voc(data), view)
        case BuiltinData():
            yield from segmentation(config, task, cast(ImageSource, task.sources.val), view)
        case PicturesData() as data:
            found = open_pictures(data)
            if found.clip is None:
                names = picture_names(found.images, root=found.root)
                yield from drawn(config, task, ImageFiles(found.images), view, names=names)
            else:
                yield from clip(config, task, found.clip, view)
        case _:
            yield from drawn(config, task, some_source(task), view)


def checked_side(config: AttentionEval, task: Task) -> int:
    """The shorter side of the images. Raises `UserError` for a network without attention, and for too small a side."""
    network = task.network
    if not has_attention(network.backbone):
        raise UserError(
            f"checkpoint: {network.name} ({type(network.backbone).__name__}) has no class token that "
            "attends at any resolution; eval=attention needs a Vision Transformer."
        )
    side = config.image_size
    if side is None:
        training = isinstance(task.data, DataConfig)
        own = isinstance(task.data, BuiltinData) or (training and network.size < SMALL)
        side = network.size if own else PHOTOGRAPHS
    patch = patch_size(network.backbone)
    if side < patch:
        raise UserError(f"eval.image_size={side} is less than a patch of {network.name}; set it to {patch} or more.")
    return side


def segmentation(config: AttentionEval, task: Task, source: ImageSource, view: WholeView) -> Iterator[Result]:
    """Jaccard of all images, and sheets of some."""
    images = whole_images(task, source, view)
    rows, indices = [], []
    for seen in look_through(Looker(task, config.batch_size_per_device), images, what="attention"):
        assert seen.labels is not None
        found = image_jaccards(seen.attention, seen.labels, masses=config.masses)
        if found is not None:
            rows.append(torch.stack([found.best[:, None].expand_as(found.heads), found.heads, found.foreground]))
            indices.append(seen.index)
    # (images, 3, M, H): the best head of each object repeated, all heads, all heads on the foreground.
    shape = (3, len(config.masses), number_of_heads(task))
    table, order = gathered(rows, indices, shape=shape)
    if not len(table):
        raise UserError(
            f"data: none of the {len(source)} images can be read and has an object; what cannot be read is "
            f"named in {images.bad.path}."
        )
    names = [source.describe(index) for index in order]
    for m, mass in enumerate(config.masses):
        best, heads, foreground = table[:, 0, m, 0], table[:, 1, m], table[:, 2, m]
        yield jaccard_result("jaccard_best_head", mass, best, names, main=True)
        yield jaccard_result("jaccard_mean_head", mass, heads.mean(-1), names, heads=heads)
        if isinstance(task.data, VOCData):
            yield jaccard_result("foreground_best_head", mass, foreground.amax(-1), names)
            yield jaccard_result("foreground_mean_head", mass, foreground.mean(-1), names, heads=foreground)
    draw_some(config, task, images)


def drawn(
    config: AttentionEval, task: Task, source: ImageSource, view: WholeView, *, names: list[str] | None = None
) -> Iterator[Result]:
    """Sheets of some images; with `names` also a picture of every one, under its name."""
    if names is None and not config.pictures:
        raise UserError(
            "eval.pictures=0: these images have no masks, so there is nothing to do but pictures; set it to 1 or more."
        )
    images = whole_images(task, source, view)
    every = chosen(config, task, source) if names is None else None
    rows, indices = [], []
    looker = Looker(task, config.batch_size_per_device, tokens=config.pca and names is not None)
    for seen in look_through(looker, images, what="attention", every=every):
        rows.append(attended_area(seen.attention, masses=config.masses))
        indices.append(seen.index)
        if names is not None:
            save_picture(config, task, seen, name=names[seen.index])
    table, order = gathered(rows, indices, shape=(len(config.masses),))
    if not len(table):
        raise UserError(f"data: none of the images can be read, see {images.bad.path}.")
    yield from area_results(config, table.mean(0).tolist(), {"images": [source.describe(i) for i in order]})
    if len(source) > 1:
        draw_some(config, task, images)


def clip(config: AttentionEval, task: Task, found: Clip, view: WholeView) -> Iterator[Result]:
    """A video, and sheets of some frames."""
    bad = BadImages(task.output / "bad_images.txt", images=1, on_error="skip", max_bad_share=1.0)
    areas, path = save_clip(config, task, found, view, on_bad=bad.add)
    if not areas:
        raise UserError(f"data.path: no frame of {found.name} can be read, see {bad.path}.")
    yield from area_results(config, areas, {"video": str(path)})


def some_source(task: Task) -> ImageSource:
    """Validation images, or training images where there are none; of a stream the first ones."""
    source = task.sources.val or task.sources.train
    return source if isinstance(source, ImageSource) else FirstImages(source, images=SEEN_OF_A_STREAM)


def whole_images(task: Task, source: ImageSource, view: WholeView) -> WholeImages:
    """The images through the view, bad ones named in the output folder."""
    config = task.data if isinstance(task.data, DataConfig) else None
    return WholeImages(source, view, config=config, bad_images=task.output / "bad_images.txt")


def chosen(config: AttentionEval, task: Task, source: ImageSource) -> list[int]:
    """The images of the sheets."""
    return subset_indices(len(source), limit=config.pictures, seed=task.seed)


def draw_some(config: AttentionEval, task: Task, images: WholeImages) -> None:
    """Sheets of the chosen images, by the main process."""
    if not task.runtime.is_main:
        return
    looker = Looker(task, config.batch_size_per_device, tokens=config.pca)
    samples = [images[index] for index in chosen(config, task, images.source)]
    save_sheets(config, task, list(looker.look(samples)))


def number_of_heads(task: Task) -> int:
    """Of the last block."""
    return int(cast(Any, task.network.backbone).blocks[-1].attn.num_heads)


def gathered(rows: Sequence[Tensor], indices: Sequence[int], *, shape: tuple[int, ...]) -> tuple[Tensor, list[int]]:
    """The rows of all ranks, float64 (images, *shape), and their indices, rising."""
    table = torch.stack(list(rows)) if rows else torch.empty(0, *shape, dtype=torch.float64)
    order, places = all_gather_concat(torch.tensor(indices, dtype=torch.int64)).sort()
    return all_gather_concat(table)[places], order.tolist()


def jaccard_result(
    name: str, mass: float, values: Tensor, names: list[str], *, main: bool = False, heads: Tensor | None = None
) -> Result:
    """The mean over images in percent, with the images' own and, of `heads` (images, H), each head's mean."""
    percent = (100 * values).tolist()
    details: dict[str, Any] = {"images": len(names), "of_image": dict(zip(names, percent, strict=True))}
    if heads is not None:
        details["of_head"] = (100 * heads.mean(0)).tolist()
    return Result(f"{name}_{100 * mass:g}", 100 * float(values.mean()), main=main, details=details)


def area_results(config: AttentionEval, areas: Sequence[float], details: dict[str, Any]) -> Iterator[Result]:
    """`area_60`, …"""
    for mass, area in zip(config.masses, areas, strict=True):
        yield Result(f"area_{100 * mass:g}", 100 * area, main=True, details=details)
