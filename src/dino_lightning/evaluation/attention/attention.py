"""`eval=attention`: attention of the last block's class token, as segmentation (figure 4) and as pictures (figure 1).

For images with masks (`data=voc`, the built-in images), the thresholded attention of each head is compared with the
objects; other images, and clips, are only drawn.

The Jaccard index follows the snippet that the authors published (issue 54 of their repository): the best head of each
object, averaged over the objects of an image, then over images. It is computed at the resolution of the network's
input; the mask is resized by nearest neighbor and cropped like the image. An object of VOC is a class of an image.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dino_lightning.config import AttentionEval, BuiltinData, DataConfig, PicturesData, VOCData
from dino_lightning.data.bad_images import BadImages
from dino_lightning.data.benchmarks.pictures import Clip, open_pictures
from dino_lightning.data.benchmarks.voc import open_voc
from dino_lightning.data.module import STREAM_PREVIEW_IMAGES
from dino_lightning.data.sources import ImageSource
from dino_lightning.data.sources.base import FirstImages
from dino_lightning.errors import UserError
from dino_lightning.evaluation.attention.images import AttentionExtractor, FullImages, FullImageView, extract_attention
from dino_lightning.evaluation.attention.masks import attended_area, jaccard_indices
from dino_lightning.evaluation.attention.pictures import picture_names, save_clip, save_image_page, save_sheets
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.extract import subset_indices
from dino_lightning.evaluation.features.images import ListedFiles
from dino_lightning.evaluation.registry import register_evaluation
from dino_lightning.models.tokens import has_attention, patch_size
from dino_lightning.runtime.collectives import all_gather_concat

PAPER_SIDE = 480
"""The paper's shorter side (pixels)."""
SMALL_SIDE = 128
"""For networks trained on images with a smaller side than this (pixels), training images keep the network's size."""


@register_evaluation("attention", AttentionEval, data=(VOCData, PicturesData, BuiltinData, DataConfig))
def evaluate(config: AttentionEval, task: Task) -> Iterator[Result]:
    """With masks `jaccard_best_head_60`, `jaccard_mean_head_60`, …; for VOC also `foreground_best_head_60`, …, with all
    classes of an image as one object and without void pixels. Without masks `area_60`: the share of an image that
    contains 60 % of a head's attention, averaged over heads and images.
    """
    view = FullImageView(task.network, size=checked_side(config, task))
    match task.data:
        case VOCData() as data:
            yield from segmentation(config, task, open_voc(data), view)
        case BuiltinData():
            yield from segmentation(config, task, cast(ImageSource, task.splits.val), view)
        case PicturesData() as data:
            pictures = open_pictures(data)
            if pictures.clip is None:
                names = picture_names(pictures.images, root=pictures.root)
                yield from draw(config, task, ListedFiles(pictures.images), view, names=names)
            else:
                yield from draw_clip(config, task, pictures.clip, view)
        case _:
            yield from draw(config, task, indexed_images(task), view)


def checked_side(config: AttentionEval, task: Task) -> int:
    """The shorter side of the images. Raises `UserError` for a network without attention or too small a side."""
    network = task.network
    if not has_attention(network.backbone):
        raise UserError(
            f"checkpoint: {network.name} ({type(network.backbone).__name__}) has no class token with "
            "attention at any resolution; eval=attention needs a Vision Transformer."
        )
    side = config.image_size
    if side is None:
        is_small = isinstance(task.data, DataConfig) and network.size < SMALL_SIDE
        side = network.size if is_small or isinstance(task.data, BuiltinData) else PAPER_SIDE
    patch = patch_size(network.backbone)
    if side < patch:
        raise UserError(f"eval.image_size={side} is less than a patch of {network.name}; set it to at least {patch}.")
    return side


def segmentation(config: AttentionEval, task: Task, source: ImageSource, view: FullImageView) -> Iterator[Result]:
    """Jaccard indices of all images, and sheets of some."""
    images = FullImages(task, source, view)
    rows, indices = [], []
    for each in extract_attention(AttentionExtractor(task, config.batch_size_per_device), images, label="attention"):
        assert each.labels is not None
        jaccard = jaccard_indices(each.attention, each.labels, masses=config.masses)
        if jaccard is not None:
            best = jaccard.best[:, None].expand_as(jaccard.heads)
            rows.append(torch.stack([best, jaccard.heads, jaccard.foreground]))
            indices.append(each.index)
    # (images, 3, M, H): the best head of each object (repeated H times), all heads, all heads on the foreground.
    shape = (3, len(config.masses), int(cast(Any, task.network.backbone).blocks[-1].attn.num_heads))
    table, order = gather_rows(rows, indices, shape=shape)
    if not len(table):
        raise UserError(
            f"data: none of the {len(source)} images is readable and has an object; {images.bad.path} lists the "
            "unreadable ones."
        )
    names = [source.describe(index) for index in order]
    for m, mass in enumerate(config.masses):
        best, heads, foreground = table[:, 0, m, 0], table[:, 1, m], table[:, 2, m]
        yield jaccard_result("jaccard_best_head", mass, best, names, main=True)
        yield jaccard_result("jaccard_mean_head", mass, heads.mean(-1), names, heads=heads)
        if isinstance(task.data, VOCData):
            yield jaccard_result("foreground_best_head", mass, foreground.amax(-1), names)
            yield jaccard_result("foreground_mean_head", mass, foreground.mean(-1), names, heads=foreground)
    draw_sheets(config, task, images)


def draw(
    config: AttentionEval, task: Task, source: ImageSource, view: FullImageView, *, names: list[str] | None = None
) -> Iterator[Result]:
    """Sheets of some images; with `names` also a picture of every image."""
    if names is None and not config.pictures:
        raise UserError(
            "eval.pictures=0: these images have no masks, so the pictures are the only result; set it to at least 1."
        )
    images = FullImages(task, source, view)
    selected = subset_indices(len(source), limit=config.pictures, seed=task.seed) if names is None else None
    rows, indices = [], []
    extractor = AttentionExtractor(task, config.batch_size_per_device, tokens=config.pca and names is not None)
    for each in extract_attention(extractor, images, label="attention", indices=selected):
        rows.append(attended_area(each.attention, masses=config.masses))
        indices.append(each.index)
        if names is not None:
            save_image_page(config, task, each, name=names[each.index])
    table, order = gather_rows(rows, indices, shape=(len(config.masses),))
    if not len(table):
        raise UserError(f"data: none of the images can be read, see {images.bad.path}.")
    yield from area_results(config, table.mean(0).tolist(), {"images": [source.describe(i) for i in order]})
    if len(source) > 1:
        draw_sheets(config, task, images)


def draw_clip(config: AttentionEval, task: Task, clip: Clip, view: FullImageView) -> Iterator[Result]:
    """A video, and sheets of some frames."""
    bad = BadImages(task.output / "bad_images.txt", images=1)
    areas, path = save_clip(config, task, clip, view, on_bad=bad.add)
    if not areas:
        raise UserError(f"data.path: no frame of {clip.name} can be read, see {bad.path}.")
    yield from area_results(config, areas, {"video": str(path)})


def indexed_images(task: Task) -> ImageSource:
    """The validation images, or the training images if there are none; of a stream the first ones."""
    source = task.splits.val or task.splits.train
    return source if isinstance(source, ImageSource) else FirstImages(source, images=STREAM_PREVIEW_IMAGES)


def draw_sheets(config: AttentionEval, task: Task, images: FullImages) -> None:
    """Draw the sheets, on the main process."""
    if not task.context.is_main:
        return
    extractor = AttentionExtractor(task, config.batch_size_per_device, tokens=config.pca)
    shown = subset_indices(len(images), limit=config.pictures, seed=task.seed)
    save_sheets(config, task, list(extractor.extract(images[index] for index in shown)))


def gather_rows(rows: Sequence[Tensor], indices: Sequence[int], *, shape: tuple[int, ...]) -> tuple[Tensor, list[int]]:
    """The rows of all ranks, float64 (images, *shape), and their image indices, ascending."""
    table = torch.stack(list(rows)) if rows else torch.empty(0, *shape, dtype=torch.float64)
    order, positions = all_gather_concat(torch.tensor(indices, dtype=torch.int64)).sort()
    return all_gather_concat(table)[positions], order.tolist()


def jaccard_result(
    name: str, mass: float, values: Tensor, names: list[str], *, main: bool = False, heads: Tensor | None = None
) -> Result:
    """The mean over images in percent; details have the value of each image and, of `heads` (images, H), each mean."""
    percent = (100 * values).tolist()
    details: dict[str, Any] = {"images": len(names), "of_image": dict(zip(names, percent, strict=True))}
    if heads is not None:
        details["of_head"] = (100 * heads.mean(0)).tolist()
    return Result(f"{name}_{100 * mass:g}", 100 * float(values.mean()), main=main, details=details)


def area_results(config: AttentionEval, areas: Sequence[float], details: dict[str, Any]) -> Iterator[Result]:
    """`area_60`, …"""
    for mass, area in zip(config.masses, areas, strict=True):
        yield Result(f"area_{100 * mass:g}", 100 * area, main=True, details=details)
