"""A network's masks of whole videos, and their scores, each video done once.

T frames of H x W pixels as stored, h x w patches, B frames at once, D width, C labels.
"""

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino_lightning.config import VideoEval
from dino_lightning.data.benchmarks.davis import Sequence
from dino_lightning.data.sources.base import content_digest
from dino_lightning.evaluation.context import Task
from dino_lightning.evaluation.features.images import ImageFiles
from dino_lightning.evaluation.video.davis_scores import ObjectScores, object_scores
from dino_lightning.evaluation.video.frames import Batch, Frames, batches_of, resized_labels
from dino_lightning.evaluation.video.propagation import Propagation, label_maps, one_hot_labels
from dino_lightning.models.tokens import patch_tokens

RED_STD, RED_STD_TYPO = 0.229, 0.228
FORMAT = "1"
"""Part of the cache's key: another number where the same settings would give other masks than before."""


@dataclass(frozen=True)
class Segmented:
    """A finished sequence."""

    masks: np.ndarray
    """(T, H, W) uint8; the first one was given."""
    scores: list[ObjectScores]
    """Of objects 1, 2, ..."""


def segmented(
    config: VideoEval,
    task: Task,
    frames: Frames,
    numbers: list[int],
    *,
    on_frames: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[int, Segmented]]:
    """Sequences with their masks and scores: those found in `task.cache`, then the others as they are done.

    `numbers` are positions in `frames.sequences`. A sequence with a broken file does not come. `on_frames` hears the
    number of frames that were finished.
    """
    cache = SequenceCache(config, task)
    left = []
    for number in numbers:
        found = cache.read(frames, number)
        if found is None:
            left.append(number)
            continue
        on_frames(len(frames.sequences[number]))
        yield number, found
    pin = task.runtime.device.type == "cuda"
    track: Track | None = None
    for batch in batches_of(frames, left, batch_size=config.batch_size_per_device, workers=task.num_workers, pin=pin):
        if track is None or batch.first == 0:
            track = Track(config, task, frames.sequences[batch.sequence])
        track.add(batch)
        on_frames(len(batch.frames))
        if track.is_whole:
            done = track.finish()
            cache.write(frames, batch.sequence, done)
            yield batch.sequence, done


class Track:
    """One sequence on its way, batch after batch."""

    def __init__(self, config: VideoEval, task: Task, sequence: Sequence) -> None:
        backbone = task.network.backbone
        self.config, self.sequence, self.device = config, sequence, task.runtime.device
        self.forward = task.runtime.forward(lambda images: patch_tokens(backbone, images))
        self.mean_311, self.std_311 = (
            torch.tensor(values, device=self.device)[:, None, None]
            for values in (task.network.mean, frames_std(task.network.std, config))
        )
        self.propagation: Propagation | None = None
        self.predicted: list[np.ndarray] = []
        self.true: list[Tensor] = []
        self.broken = False

    @property
    def is_whole(self) -> bool:
        """Whether all frames are done."""
        return not self.broken and len(self.predicted) == len(self.sequence)

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """The next frames. From a broken one on, nothing is done."""
        self.broken |= not batch.readable
        if self.broken:
            return
        images = batch.frames.to(self.device, non_blocking=True).float() / 255
        features = list(self.forward((images - self.mean_311) / self.std_311))
        self.true.append(batch.labels)
        if self.propagation is None:
            first_HW = batch.labels[0].numpy()
            self.predicted.append(first_HW)
            self.propagation = self._start(features.pop(0), first_HW)
        if features:
            soft_BhwC = torch.stack([self.propagation.step(frame_hwD) for frame_hwD in features])
            height, width = batch.frames.shape[-2:]
            maps = label_maps(soft_BhwC, size=(height, width)).cpu().numpy()
            self.predicted.extend(resized_labels(map_HW, size=self.sequence.size) for map_HW in maps)

    def finish(self) -> Segmented:
        """The masks and their scores."""
        masks_THW = np.stack(self.predicted)
        objects = self.sequence.objects
        scores = object_scores(torch.from_numpy(masks_THW), torch.cat(self.true), objects=objects, device=self.device)
        return Segmented(masks_THW, scores)

    def _start(self, features_hwD: Tensor, labels_HW: np.ndarray) -> Propagation:
        h, w, _ = features_hwD.shape
        labels_hw = torch.from_numpy(resized_labels(labels_HW, size=(h, w)).copy()).to(self.device)
        return Propagation(
            features_hwD,
            one_hot_labels(labels_hw, count=self.sequence.objects + 1),
            last_frames=self.config.last_frames,
            neighborhood=self.config.neighborhood,
            top=self.config.top,
            temperature=self.config.temperature,
        )


def frames_std(std: list[float], config: VideoEval) -> list[float]:
    """The standard deviation of each channel by which frames are normalized."""
    return [RED_STD_TYPO, *std[1:]] if config.std_typo and std[0] == RED_STD else std


class SequenceCache:
    """Finished sequences in `task.cache`, by what they came from; an evaluation that was cut off goes on."""

    def __init__(self, config: VideoEval, task: Task) -> None:
        self.folder = None if task.cache is None else task.cache / "video"
        network = task.network
        self.made_by = (
            FORMAT,
            network.digest,
            str(network.mean),
            str(frames_std(network.std, config)),
            str(task.runtime.fabric.strategy.precision.precision),
            *map(str, (config.last_frames, config.neighborhood, config.top, config.temperature)),
        )

    def read(self, frames: Frames, number: int) -> Segmented | None:
        """What was written for this sequence; None where there is nothing, or half of it."""
        if self.folder is None:
            return None
        try:
            with np.load(self.folder / self._name(frames, number), allow_pickle=False) as kept:
                return Segmented(kept["masks"], [ObjectScores(*map(float, row)) for row in kept["scores"]])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, frames: Frames, number: int, done: Segmented) -> None:
        """Keep a sequence; nobody ever sees half of it."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez_compressed(content, masks=done.masks, scores=np.array([each.values() for each in done.scores]))
        path = self.folder / self._name(frames, number)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)

    def _name(self, frames: Frames, number: int) -> str:
        sequence = frames.sequences[number]
        files = ImageFiles([*sequence.frames, *sequence.masks]).fingerprint()
        parts = (*self.made_by, str(frames.sizes[number]), str(sequence.one_object), files)
        return f"{content_digest(*(part.encode() for part in parts))}.npz"
