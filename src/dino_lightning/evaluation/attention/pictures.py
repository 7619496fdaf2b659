"""What `eval=attention` draws: sheets of some images, a picture of each, and the video of a clip."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from dino_lightning.config import AttentionEval, CropsConfig
from dino_lightning.data.benchmarks.pictures import Clip, OnBad
from dino_lightning.data.crops import denormalize
from dino_lightning.evaluation.attention.images import Looker, Sample, Seen, WholeView
from dino_lightning.evaluation.attention.masks import VOID, attended_area, mass_masks
from dino_lightning.evaluation.context import Task
from dino_lightning.evaluation.video.clips import ClipWriter, clip_writer, ending
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.report.pictures.sheets import GAP, MAX_HEADS
from dino_lightning.report.pictures.tokens import (
    AttentionFigure,
    TokenColors,
    attention_figure_sheet,
    clip_frame,
    heads_sheet,
    stack,
    token_sheet,
)
from dino_lightning.runtime.collectives import all_gather_concat, rank, world_size

SMALL = 128
"""Pixels: pictures of larger images are drawn larger."""
CLIP_CELL = {".mp4": 480, ".webp": 320, ".gif": 240}
"""Largest width of one of the pictures that stand beside each other in a clip (pixels). Formats other than video grow
large, in memory too."""


def as_shown(seen: Seen, network: FrozenNetwork, *, masses: Sequence[float]) -> AttentionFigure:
    """What the drawing functions want."""
    objects = None if seen.labels is None else (seen.labels != 0) & (seen.labels != VOID)
    return AttentionFigure(
        denormalize(seen.image, config=CropsConfig(mean=network.mean, std=network.std)),
        seen.attention,
        mass_masks(seen.attention[None], masses=masses)[:, 0],
        mask=None if objects is None else objects.numpy(),
        tokens=seen.tokens,
    )


def save_sheets(config: AttentionEval, task: Task, every: Sequence[Seen]) -> None:
    """`attention`, `heads` and `pca`, one row per image."""
    if not every:
        return
    shown = [as_shown(seen, task.network, masses=config.masses) for seen in every]
    scale = 1 if max(each.image.shape[-1] for each in shown) <= SMALL else 1.5
    task.picture(attention_figure_sheet(shown, cell=round(128 * scale)), "attention")
    task.picture(heads_sheet(shown, masses=config.masses, cell=round(224 * scale)), "heads")
    if config.pca:
        task.picture(token_sheet(shown, _colors(shown), cell=round(176 * scale)), "pca")


def save_picture(config: AttentionEval, task: Task, seen: Seen, *, name: str) -> None:
    """All about one image, whichever rank has seen it."""
    shown = as_shown(seen, task.network, masses=config.masses)
    colors = _colors([shown]) if config.pca else None
    rows = heads_sheet([shown], masses=config.masses, colors=colors)
    maps = 2 + min(MAX_HEADS, len(shown.attention))
    page = stack([attention_figure_sheet([shown], cell=min(256, (rows.width - GAP) // maps - GAP)), rows])
    task.picture(page, name, every_rank=True)


def picture_names(paths: Iterable[Path], *, root: Path) -> list[str]:
    """A file name without ending for each path below `root`, no two alike."""
    names, taken = [], {"attention", "heads", "pca"}
    for path in paths:
        plain = re.sub(r"[^\w.\-]+", "_", str(path.relative_to(root).with_suffix("")))
        name, number = plain, 1
        while name.lower() in taken:
            number += 1
            name = f"{plain}_{number}"
        taken.add(name.lower())
        names.append(name)
    return names


def save_clip(
    config: AttentionEval, task: Task, clip: Clip, view: WholeView, *, on_bad: OnBad
) -> tuple[list[float], Path]:
    """The sheets of some frames, and all of them as a video; all ranks call it.

    Returns for each mass the share of a frame that holds it, averaged over heads and frames (nothing where no frame can
    be read), and where the video is.
    """
    looker = Looker(task, config.batch_size_per_device, tokens=config.pca)
    total = clip.count()
    some = _spread(total, config.pictures)
    chosen = [seen for seen in look_at_clip(looker, clip, view, on_bad=on_bad, only=set(some))] if some else []
    shown = [as_shown(seen, task.network, masses=config.masses) for seen in chosen]
    colors = _colors(shown) if config.pca and shown else None
    if task.runtime.is_main:
        save_sheets(config, task, chosen)
    path = task.picture_path(f"{clip.name}{ending()}")
    areas: list[Tensor] = []
    looker = Looker(task, config.batch_size_per_device, tokens=colors is not None)
    with (
        clip_writer(path, frames_per_second=config.frames_per_second) as writer,
        task.runtime.progress("frames", total=total) as advance,
    ):
        for seen in look_at_clip(looker, clip, view, on_bad=on_bad):
            areas.append(attended_area(seen.attention, masses=config.masses))
            if task.runtime.is_main:
                _add(writer, as_shown(seen, task.network, masses=config.masses), colors)
            advance(1)
    return (torch.stack(areas).mean(0).tolist() if areas else []), path


def look_at_clip(
    looker: Looker, clip: Clip, view: WholeView, *, on_bad: OnBad, only: set[int] | None = None
) -> Iterator[Seen]:
    """The frames, or `only` those with these numbers, on every rank; the ranks share the work."""
    frames = (
        Sample(number, view.image(frame), None)
        for number, frame in clip.frames(on_bad)
        if only is None or number in only
    )
    while samples := list(islice(frames, looker.batch_size * world_size())):
        yield from _look_together(looker, samples)


def _look_together(looker: Looker, samples: list[Sample]) -> list[Seen]:
    """Each rank runs its share of samples of one shape; all get all."""
    each = -(-len(samples) // world_size())
    # Ranks exchange equal shapes: where frames do not suffice, the first ones are seen again.
    repeated = [samples[i % len(samples)] for i in range(each * world_size())]
    own = list(looker.look(repeated[rank() * each : (rank() + 1) * each]))
    attention = all_gather_concat(torch.stack([seen.attention for seen in own]))
    tokens: Sequence[Tensor | None] = [None] * len(samples)
    if looker.tokens:
        tokens = list(all_gather_concat(torch.stack([cast(Tensor, seen.tokens) for seen in own])))
    return [
        Seen(sample.index, cast(Tensor, sample.image), attention[i], None, tokens[i])
        for i, sample in enumerate(samples)
    ]


def _add(writer: ClipWriter, shown: AttentionFigure, colors: TokenColors | None) -> None:
    writer.add(clip_frame(shown, colors, width=min(CLIP_CELL[writer.path.suffix], shown.image.shape[-1])))


def _spread(total: int, count: int) -> list[int]:
    """`count` of the numbers 0 ... total - 1 at equal distances, the first and the last among them; or all."""
    if count >= total:
        return list(range(total))
    return sorted(set(np.linspace(0, total - 1, count).round().astype(int).tolist()))


def _colors(shown: Sequence[AttentionFigure]) -> TokenColors:
    return TokenColors.fit([cast(Tensor, each.tokens) for each in shown])
