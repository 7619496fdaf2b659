"""`eval=video`: video object segmentation on DAVIS, by propagating the masks of the first frame (table 5)."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from dino_lightning.config import DavisData, VideoEval
from dino_lightning.data.benchmarks.davis import Davis, Sequence, open_davis
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.extract import evenly_spaced
from dino_lightning.evaluation.registry import register_evaluation
from dino_lightning.evaluation.video.davis_scores import ObjectScores, mean_scores
from dino_lightning.evaluation.video.frames import SIDE_MULTIPLE, Frames, frame_size
from dino_lightning.evaluation.video.sheet import default_palette, overlay_masks, video_sheet
from dino_lightning.evaluation.video.tracking import SegmentedSequence, segment_sequences
from dino_lightning.models.frozen import rejection_as
from dino_lightning.models.tokens import is_vit, patch_size, patch_tokens
from dino_lightning.runtime.collectives import all_gather_concat, rank, world_size

SHEET_ROWS, SHEET_FRAMES = 4, 5
"""Number of sequences in the picture, and of frames per sequence."""

Scores = dict[str, list[ObjectScores]]
"""Name of a sequence -> the scores of its objects."""


@register_evaluation("video", VideoEval, data=(DavisData,))
def evaluate(config: VideoEval, task: Task) -> Iterator[Result]:
    """J&F and its parts in percent, means over all objects of all sequences."""
    data, backbone = cast(DavisData, task.data), task.network.backbone
    patch = patch_size(backbone) if is_vit(backbone) else 1
    shorter = config.image_size or task.network.size
    check_shorter_side(shorter, patch=patch)
    davis = open_davis(data)
    sizes = [frame_size(sequence.size, shorter=shorter, patch=patch) for sequence in davis.sequences]
    check_network(task, size=sizes[0])
    bad_images = task.output / f"bad_images_{data.split}.txt"
    frames = Frames(davis.sequences, sizes=sizes, bad_images=bad_images)
    if task.context.is_main:
        for path, reason in davis.broken.values():
            frames.bad.add(path, reason)
    scores = gather_scores(evaluate_share(config, task, frames), davis)
    left_out = [*davis.broken, *(sequence.name for sequence in davis.sequences if sequence.name not in scores)]
    for name in left_out:
        task.context.say(f"Left out: {name}, because a file cannot be read; see {bad_images.name}")
    if not scores:
        raise UserError(f"data.path={data.path}: none of the sequences can be read; see {bad_images}.")
    yield from results(scores, davis, left_out=left_out)


def check_shorter_side(shorter: int, *, patch: int) -> None:
    """Raise `UserError` for a side that is too small, or not a multiple of the patch size."""
    least = max(SIDE_MULTIPLE, patch)
    if shorter < least:
        raise UserError(f"eval.image_size={shorter}: expected at least {least} pixels for the shorter side of a frame.")
    if shorter % patch:
        near = max(patch, round(shorter / patch) * patch)
        raise UserError(
            f"eval.image_size={shorter} is not a multiple of the patch size {patch}; the nearest is {near}."
        )


def check_network(task: Task, *, size: tuple[int, int]) -> None:
    """Raise `UserError` if the network does not accept frames of this height and width."""
    with rejection_as(f"checkpoint: {task.network.name} does not accept frames of {size[1]} x {size[0]} pixels"):
        patch_tokens(task.network.backbone, torch.zeros(1, 3, *size, device=task.context.device))


def evaluate_share(config: VideoEval, task: Task, frames: Frames) -> dict[int, list[ObjectScores]]:
    """Index -> scores of the readable sequences of this rank's share; also writes their masks and a picture."""
    local = balance_sequences([len(sequence) for sequence in frames.sequences], ranks=world_size())[rank()]
    folder = task.output / ("masks" if task.network.trained else "masks_untrained")
    scores, rows = {}, []
    with task.context.progress("frames", total=sum(len(frames.sequences[number]) for number in local)) as advance:
        for number, done in segment_sequences(config, task, frames, local, on_frames=advance):
            sequence = frames.sequences[number]
            scores[number] = done.scores
            if config.write_masks:
                write_masks(done.masks, sequence, folder / sequence.name)
            if task.context.is_main and len(rows) < SHEET_ROWS:
                rows.append(picture_row(sequence, done))
    if rows:
        task.save_picture(video_sheet(rows), "video")
    return scores


def balance_sequences(lengths: list[int], *, ranks: int) -> list[list[int]]:
    """The sequences of each rank: from the longest on, each goes to the rank with the fewest frames so far."""
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    frames = [0] * ranks
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        target = frames.index(min(frames))
        assigned[target].append(number)
        frames[target] += lengths[number]
    return [sorted(numbers) for numbers in assigned]


def gather_scores(local: dict[int, list[ObjectScores]], davis: Davis) -> Scores:
    """The scores of all ranks, in the order of the benchmark's list."""
    width = 2 + len(ObjectScores.__dataclass_fields__)
    rows = [[number, i, *each.values()] for number, scores in local.items() for i, each in enumerate(scores)]
    gathered = all_gather_concat(torch.tensor(rows, dtype=torch.float64).reshape(-1, width))
    scores: Scores = {}
    for number, _, *values in sorted(gathered.tolist()):
        scores.setdefault(davis.sequences[int(number)].name, []).append(ObjectScores(*values))
    return scores


def results(scores: Scores, davis: Davis, *, left_out: list[str]) -> Iterator[Result]:
    """The figures, with equal weights for all objects."""
    overall = mean_scores([each for objects in scores.values() for each in objects])
    frames = {sequence.name: len(sequence) for sequence in davis.sequences}
    details: dict[str, Any] = {
        "sequences": {
            name: {
                "frames": frames[name],
                "j_and_f_mean": mean_scores(objects).j_and_f_mean,
                "objects": [asdict(each) for each in objects],
            }
            for name, objects in scores.items()
        },
        "left_out": left_out,
    }
    yield Result("j_and_f_mean", overall.j_and_f_mean, main=True, details=details)
    for name, value in asdict(overall).items():
        yield Result(name, value, main=name in ("j_mean", "f_mean"))


def write_masks(masks_THW: np.ndarray, sequence: Sequence, folder: Path) -> None:
    """Write indexed PNGs with the names and colors of the benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    palette = sequence.palette or default_palette()
    for path, mask_HW in zip(sequence.masks, masks_THW, strict=True):
        image = Image.fromarray(mask_HW)
        image.putpalette(palette)
        image.save(folder / path.name)


def picture_row(sequence: Sequence, done: SegmentedSequence) -> tuple[str, list[tuple[str, Image.Image]]]:
    """The first frame with its mask and a few later ones with theirs, for `video_sheet`."""
    j_and_f = mean_scores(done.scores).j_and_f_mean
    cells = []
    for index in evenly_spaced(len(sequence), SHEET_FRAMES):
        with Image.open(sequence.frames[index]) as frame:
            caption = f"{sequence.frames[index].stem}{', given' if index == 0 else ''}"
            cells.append((caption, overlay_masks(frame, done.masks[index])))
    return f"{sequence.name}, J&F {j_and_f:.1f} %", cells
