"""MoCo: momentum contrast (He et al. 2020), versions 2 and 3 (Chen et al. 2020 and ICCV 2021).

query:  q(g_s(f_s(x)))             g: projector, q: predictor (version 3)
key:    g_t(f_t(x'))               of the moving average
loss:   -log of the softmax over own key and negatives, at a temperature

Negatives are keys of former batches (version 2), or the keys of all other images of this batch over all devices
(version 3). The batch norms of version 3's projector and predictor see all crops of a batch at once, those of the paper
one view. The shuffled batch norms of version 2, for networks that have some, are left out.
"""

from collections.abc import Callable, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.config import ComputeConfig, MoCoConfig, OptimConfig
from dino_lightning.losses.contrastive import info_nce
from dino_lightning.losses.feature_queue import FeatureQueue
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.methods.collapse_signals import log_feature_statistics
from dino_lightning.methods.student_teacher import StudentTeacher
from dino_lightning.models.heads import MLPHead
from dino_lightning.models.multi_crop import MultiCropNetwork
from dino_lightning.runtime.collectives import all_gather_concat, rank
from dino_lightning.runtime.precision import at_least_float32


@final
class MoCo(StudentTeacher):
    """Queries by the student, keys by the teacher, negatives from a queue or the batch."""

    def __init__(
        self,
        config: MoCoConfig,
        *,
        student_backbone: nn.Module,
        teacher_backbone: nn.Module,
        feature_dim: int,
        optim: OptimConfig,
        batch_size_per_device: int,
        compute: ComputeConfig | None = None,
    ) -> None:
        super().__init__(
            config,
            MultiCropNetwork(student_backbone, _projector(config, feature_dim), compute=compute),
            MultiCropNetwork(teacher_backbone, _projector(config, feature_dim), compute=compute),
            optim=optim,
            batch_size_per_device=batch_size_per_device,
            predictor=_predictor(config) if config.predictor else None,
        )
        if config.freeze_patch_embedding:
            student_backbone.get_submodule("patch_embed").requires_grad_(False)
        self.config = config
        self.queue = (
            FeatureQueue(config.queue_length, config.out_dim, start_random=True) if config.queue_length else None
        )

    def seen(self, crops: int) -> tuple[Sequence[int], Sequence[int]]:
        """Queries, and keys."""
        keyed = range(GLOBAL_CROPS) if self.config.symmetric else range(GLOBAL_CROPS - 1, GLOBAL_CROPS)
        # A crop that is the only one with a key is no query: it has nothing to be compared with.
        return [view for view in range(crops) if list(keyed) != [view]], keyed

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Contrast of every key with the queries from all other crops, mean over the pairs."""
        B = len(batch[0])
        asked, keyed = self.seen(len(batch))
        with torch.no_grad():
            features_SD = self.teacher.features([batch[view] for view in keyed])
            keys_TBE = _on_the_sphere(self.teacher.head(features_SD)).unflatten(0, (-1, B))
        if self.is_logging_step:
            log_feature_statistics(self, features_SD)
        queries_SE = self.student([batch[view] for view in asked])
        if self.predictor is not None:
            queries_SE = self.predictor(queries_SE)
        queries_VBE = _on_the_sphere(queries_SE).unflatten(0, (-1, B))
        losses = []
        for view, keys_BE in zip(keyed, keys_TBE, strict=True):
            contrast = self._contrast(keys_BE)
            losses += [contrast(query) for other, query in zip(asked, queries_VBE, strict=True) if other != view]
        return self.config.loss_scale * self._ways() * torch.stack(losses).mean()

    def _ways(self) -> int:
        """Version 3 sums over both ways to pair two views, version 2 has one."""
        return GLOBAL_CROPS if self.config.symmetric else 1

    def _contrast(self, keys_BE: Tensor) -> Callable[[Tensor], Tensor]:
        """The loss of queries (B, E) against these keys."""
        temperature = self.config.temperature
        if self.queue is not None:
            self.queue.observe(keys_BE)
            negatives = self.queue.features
            return lambda query_BE: info_nce(query_BE, keys_BE, temperature=temperature, negatives_ND=negatives)
        everywhere = all_gather_concat(keys_BE)
        first = rank() * len(keys_BE)
        return lambda query_BE: info_nce(query_BE, everywhere, temperature=temperature, first=first)

    def after_step(self, step: int) -> None:
        """Let the keys enter the queue."""
        if self.queue is not None:
            self.queue.update()


def _on_the_sphere(x_SE: Tensor) -> Tensor:
    return F.normalize(at_least_float32(x_SE), dim=-1)


def _projector(config: MoCoConfig, feature_dim: int) -> MLPHead:
    return _mlp(config, feature_dim, layers=config.head_layers)


def _predictor(config: MoCoConfig) -> MLPHead:
    return _mlp(config, config.out_dim, layers=2)


def _mlp(config: MoCoConfig, in_dim: int, *, layers: int) -> MLPHead:
    norm = config.head_batch_norm
    return MLPHead(
        in_dim, config.out_dim, layers=layers, hidden_dim=config.head_hidden_dim, batch_norm=norm, last_norm=norm
    )
