"""The predicted masks of whole videos and their scores, with a cache of finished videos.

T frames of H x W pixels as stored, h x w patches, B frames of a batch, D width, C labels.
"""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_lightning.config import VideoEval
from dino_lightning.data.benchmarks.davis import Sequence
from dino_lightning.data.sources.base import content_digest
from dino_lightning.evaluation.context import Task
from dino_lightning.evaluation.features.images import ListedFiles
from dino_lightning.evaluation.video.davis_scores import ObjectScores, object_scores
from dino_lightning.evaluation.video.frames import FrameBatch, Frames, frame_batches, resize_labels
from dino_lightning.evaluation.video.propagation import Propagation, label_maps, one_hot_labels
from dino_lightning.models.tokens import patch_tokens
from dino_lightning.runtime.files import atomic_file

RED_STD, RED_STD_TYPO = 0.229, 0.228
FORMAT = "1"
"""Part of the cache key; increase this when the same settings give other masks than before."""


@dataclass(frozen=True)
class SegmentedSequence:
    """A finished sequence."""

    masks: np.ndarray
    """(T, H, W) uint8; the first one is the given mask."""
    scores: list[ObjectScores]
    """The scores of objects 1, 2, ..."""


def segment_sequences(
    config: VideoEval,
    task: Task,
    frames: Frames,
    numbers: list[int],
    *,
    on_frames: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[int, SegmentedSequence]]:
    """Sequences with their masks and scores: first those in `task.cache`, then the others.

    `numbers` are indices in `frames.sequences`. Sequences with an unreadable file are skipped. `on_frames` is called
    with the number of finished frames.
    """
    cache = None if task.cache is None else SequenceCache(config, task, frames, folder=task.cache / "video")
    missing = []
    for number in numbers:
        sequence = cache.read(number) if cache else None
        if sequence is None:
            missing.append(number)
        else:
            on_frames(len(frames.sequences[number]))
            yield number, sequence
    loading: dict[str, Any] = {"num_workers": task.num_workers, "device": task.context.device}
    tracker: SequenceTracker | None = None
    for batch in frame_batches(frames, missing, batch_size=config.batch_size_per_device, **loading):
        if tracker is None or batch.first == 0:
            tracker = SequenceTracker(config, task, frames.sequences[batch.sequence])
        tracker.add(batch)
        on_frames(len(batch.frames))
        if len(tracker.predicted) == len(tracker.sequence):
            sequence = tracker.finish()
            if cache:
                cache.write(batch.sequence, sequence)
            yield batch.sequence, sequence


class SequenceTracker:
    """Predicts the masks of one sequence, batch by batch."""

    def __init__(self, config: VideoEval, task: Task, sequence: Sequence) -> None:
        backbone = task.network.backbone
        self.config, self.sequence, self.device = config, sequence, task.context.device
        self.forward = task.context.forward(lambda images: patch_tokens(backbone, images))
        self.mean_311, self.std_311 = (
            torch.tensor(values, device=self.device)[:, None, None]
            for values in (task.network.mean, frames_std(task.network.std, config))
        )
        self.propagation: Propagation | None = None
        self.predicted: list[np.ndarray] = []
        self.true: list[Tensor] = []
        self.is_broken = False

    @torch.no_grad()
    def add(self, batch: FrameBatch) -> None:
        """Predict the next frames; do nothing after an unreadable file."""
        self.is_broken |= not batch.readable
        if self.is_broken:
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
            self.predicted.extend(resize_labels(map_HW, size=self.sequence.size) for map_HW in maps)

    def finish(self) -> SegmentedSequence:
        """The masks and their scores."""
        masks_THW = np.stack(self.predicted)
        objects = self.sequence.objects
        scores = object_scores(torch.from_numpy(masks_THW), torch.cat(self.true), objects=objects, device=self.device)
        return SegmentedSequence(masks_THW, scores)

    def _start(self, features_hwD: Tensor, labels_HW: np.ndarray) -> Propagation:
        h, w, _ = features_hwD.shape
        labels_hw = torch.from_numpy(resize_labels(labels_HW, size=(h, w)).copy()).to(self.device)
        return Propagation(
            features_hwD,
            one_hot_labels(labels_hw, count=self.sequence.objects + 1),
            last_frames=self.config.last_frames,
            neighborhood=self.config.neighborhood,
            top=self.config.top,
            temperature=self.config.temperature,
        )


def frames_std(std: list[float], config: VideoEval) -> list[float]:
    """The standard deviation of each channel in the normalization of frames."""
    return [RED_STD_TYPO, *std[1:]] if config.std_typo and std[0] == RED_STD else std


class SequenceCache:
    """Finished sequences in a folder, so that an interrupted evaluation can resume."""

    def __init__(self, config: VideoEval, task: Task, frames: Frames, *, folder: Path) -> None:
        self.frames, self.folder, network = frames, folder, task.network
        self.key_parts = (
            FORMAT,
            network.digest,
            str(network.mean),
            str(frames_std(network.std, config)),
            str(task.context.fabric.strategy.precision.precision),
            *map(str, (config.last_frames, config.neighborhood, config.top, config.temperature)),
        )

    def read(self, number: int) -> SegmentedSequence | None:
        """A cached sequence; None if its file is missing or damaged."""
        try:
            with np.load(self._path(number), allow_pickle=False) as arrays:
                return SegmentedSequence(arrays["masks"], [ObjectScores(*map(float, row)) for row in arrays["scores"]])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, number: int, sequence: SegmentedSequence) -> None:
        """Write a sequence, completely or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._path(number), unique=True) as file:
            scores = np.array([each.values() for each in sequence.scores])
            np.savez_compressed(file, masks=sequence.masks, scores=scores)

    def _path(self, number: int) -> Path:
        sequence = self.frames.sequences[number]
        files = ListedFiles([*sequence.frames, *sequence.masks]).fingerprint()
        parts = (*self.key_parts, str(self.frames.sizes[number]), str(sequence.single_object), files)
        return self.folder / f"{content_digest(*(part.encode() for part in parts))}.npz"
