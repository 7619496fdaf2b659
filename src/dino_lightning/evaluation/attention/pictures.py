"""The pictures of `eval=attention`: sheets of some images, a page per image, and the video of a clip."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from dino_lightning.config import AttentionEval, CropsConfig
from dino_lightning.data.benchmarks.pictures import Clip, OnBad
from dino_lightning.data.crops import denormalize
from dino_lightning.evaluation.attention.images import AttentionExtractor, FullImageView, ImageAttention, PreparedImage
from dino_lightning.evaluation.attention.masks import VOID, attended_area, mass_masks
from dino_lightning.evaluation.context import Task
from dino_lightning.evaluation.features.extract import evenly_spaced
from dino_lightning.evaluation.video.clips import clip_suffix, write_clip
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.report.pictures.sheets import GAP, MAX_HEADS
from dino_lightning.report.pictures.tokens import (
    AttentionFigure,
    TokenColors,
    attention_figure_sheet,
    clip_frame,
    heads_sheet,
    patch_sheet,
    stack,
)
from dino_lightning.runtime.collectives import all_gather_concat, rank, world_size

SMALL_SIDE = 128
"""Images larger than this (pixels) are drawn larger."""
CLIP_CELL = {".mp4": 480, ".webp": 320, ".gif": 240}
"""Maximum width (pixels) of each of the pictures of a clip's frame. Animations need much memory and disk space."""


def attention_figure(each: ImageAttention, network: FrozenNetwork, *, masses: Sequence[float]) -> AttentionFigure:
    """The input of the drawing functions."""
    objects = None if each.labels is None else (each.labels != 0) & (each.labels != VOID)
    return AttentionFigure(
        denormalize(each.image, config=CropsConfig(mean=network.mean, std=network.std)),
        each.attention,
        mass_masks(each.attention[None], masses=masses)[:, 0],
        mask=None if objects is None else objects.numpy(),
        tokens=each.tokens,
    )


def save_sheets(config: AttentionEval, task: Task, images: Sequence[ImageAttention]) -> None:
    """Save the sheets `attention`, `heads` and `pca`, with one row per image."""
    if not images:
        return
    figures = [attention_figure(each, task.network, masses=config.masses) for each in images]
    scale = 1 if max(each.image.shape[-1] for each in images) <= SMALL_SIDE else 1.5
    task.save_picture(attention_figure_sheet(figures, cell=round(128 * scale)), "attention")
    task.save_picture(heads_sheet(figures, masses=config.masses, cell=round(224 * scale)), "heads")
    if config.pca:
        pixels, tokens = [each.image for each in figures], [cast(Tensor, each.tokens) for each in figures]
        task.save_picture(patch_sheet(pixels, tokens, per_row=2, cell=round(176 * scale)), "pca")


def save_image_page(config: AttentionEval, task: Task, each: ImageAttention, *, name: str) -> None:
    """Save all pictures of one image as one page, on the rank that extracted it."""
    figure = attention_figure(each, task.network, masses=config.masses)
    colors = _colors([each]) if config.pca else None
    rows = heads_sheet([figure], masses=config.masses, colors=colors)
    maps = 2 + min(MAX_HEADS, len(each.attention))
    page = stack([attention_figure_sheet([figure], cell=min(256, (rows.width - GAP) // maps - GAP)), rows])
    task.save_picture(page, name, every_rank=True)


def picture_names(paths: Iterable[Path], *, root: Path) -> list[str]:
    """A unique file name without suffix for each path below `root`."""
    names, used = [], {"attention", "heads", "pca"}
    for path in paths:
        stem = re.sub(r"[^\w.\-]+", "_", str(path.relative_to(root).with_suffix("")))
        name, number = stem, 1
        while name.lower() in used:
            number += 1
            name = f"{stem}_{number}"
        used.add(name.lower())
        names.append(name)
    return names


def save_clip(
    config: AttentionEval, task: Task, clip: Clip, view: FullImageView, *, on_bad: OnBad
) -> tuple[list[float], Path]:
    """Save the sheets of some frames, and all frames as a video; called by all ranks.

    Returns the share of a frame that contains each mass, averaged over heads and frames (an empty list if no frame can
    be read), and the path of the video.
    """
    extractor = AttentionExtractor(task, config.batch_size_per_device, tokens=config.pca)
    total = clip.count()
    numbers = set(evenly_spaced(total, config.pictures))
    selected = list(extract_frames(extractor, clip, view, on_bad=on_bad, only=numbers)) if numbers else []
    colors = _colors(selected) if config.pca and selected else None
    if task.context.is_main:
        save_sheets(config, task, selected)
    path = task.picture_path(f"{clip.name}{clip_suffix()}")
    areas: list[Tensor] = []
    extractor = AttentionExtractor(task, config.batch_size_per_device, tokens=colors is not None)

    def drawn(advance: Callable[[int], None]) -> Iterator[Image.Image]:
        for each in extract_frames(extractor, clip, view, on_bad=on_bad):
            areas.append(attended_area(each.attention, masses=config.masses))
            if task.context.is_main:  # the other ranks only extract their share
                figure = attention_figure(each, task.network, masses=config.masses)
                yield clip_frame(figure, colors, width=min(CLIP_CELL[path.suffix], each.image.shape[-1]))
            advance(1)

    with task.context.progress("frames", total=total) as advance:
        write_clip(path, drawn(advance), frames_per_second=config.frames_per_second)
    return (torch.stack(areas).mean(0).tolist() if areas else []), path


def extract_frames(
    extractor: AttentionExtractor, clip: Clip, view: FullImageView, *, on_bad: OnBad, only: set[int] | None = None
) -> Iterator[ImageAttention]:
    """The attention of all frames, or `only` those with these numbers, on every rank; the ranks share the work."""
    frames = (
        PreparedImage(number, view.image(frame))
        for number, frame in clip.frames(on_bad)
        if only is None or number in only
    )
    while samples := list(islice(frames, extractor.batch_size * world_size())):
        yield from _extract_together(extractor, samples)


def _extract_together(extractor: AttentionExtractor, samples: list[PreparedImage]) -> list[ImageAttention]:
    """The attention of samples of one shape, on all ranks; each rank computes its share."""
    share = -(-len(samples) // world_size())
    # All ranks must exchange tensors of equal shapes: if there are too few frames, the first ones are repeated.
    repeated = [samples[i % len(samples)] for i in range(share * world_size())]
    local = list(extractor.extract(repeated[rank() * share : (rank() + 1) * share]))
    attention = all_gather_concat(torch.stack([each.attention for each in local]))
    tokens: Sequence[Tensor | None] = [None] * len(samples)
    if extractor.tokens:
        tokens = list(all_gather_concat(torch.stack([cast(Tensor, each.tokens) for each in local])))
    return [
        ImageAttention(sample.index, sample.image, attention=attention[i], tokens=tokens[i])
        for i, sample in enumerate(samples)
    ]


def _colors(images: Sequence[ImageAttention]) -> TokenColors:
    return TokenColors.fit([cast(Tensor, each.tokens) for each in images])
