"""MoCo: momentum contrast (He et al. 2020), versions 2 and 3 (Chen et al. 2020 and ICCV 2021).

query:  q(g_s(f_s(x)))             g: projector, q: predictor (version 3)
key:    g_t(f_t(x'))               of the moving average
loss:   -log of the softmax over the positive key and the negatives, at a temperature

Negatives are keys of previous batches (version 2), or the keys of all other images of this batch over all devices
(version 3). The batch norms of version 3's projector and predictor normalize over all crops of a batch at once, those
of the paper over one view. The shuffled batch norms of version 2, for backbones with batch norms, are not implemented.
"""

from collections.abc import Callable, Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.config import MoCoConfig
from dino_lightning.losses.contrastive import info_nce
from dino_lightning.losses.feature_queue import FeatureQueue
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.methods.collapse_signals import log_feature_statistics
from dino_lightning.methods.parts import MethodParts
from dino_lightning.methods.registry import register_method
from dino_lightning.methods.student_teacher import StudentTeacher, projectors
from dino_lightning.runtime.collectives import all_gather_concat, rank
from dino_lightning.runtime.precision import at_least_float32


@final
@register_method("moco", MoCoConfig)
class MoCo(StudentTeacher):
    """The student gives queries, the teacher keys; negatives come from a queue or from the batch."""

    def __init__(self, config: MoCoConfig, parts: MethodParts) -> None:
        super().__init__(config, parts, **projectors(config, parts.feature_dim, last_norm=config.head_batch_norm))
        if config.freeze_patch_embedding:
            parts.student_backbone.get_submodule("patch_embed").requires_grad_(False)
        self.config = config
        self.queue = (
            FeatureQueue(config.queue_length, config.out_dim, start_random=True) if config.queue_length else None
        )

    def views_of_networks(self, crops: int) -> tuple[Sequence[int], Sequence[int]]:
        """The crops that are queries, and those that are keys."""
        keys = range(GLOBAL_CROPS) if self.config.symmetric else range(GLOBAL_CROPS - 1, GLOBAL_CROPS)
        # The only crop with a key is not a query: there is no other key to compare it with.
        return [view for view in range(crops) if list(keys) != [view]], keys

    def loss(self, batch: list[Tensor]) -> Tensor:
        """InfoNCE of each key with the queries from all other crops, mean over the pairs."""
        B = len(batch[0])
        query_views, key_views = self.views_of_networks(len(batch))
        with torch.no_grad():
            features_SD = self.teacher.features([batch[view] for view in key_views])
            keys_TBE = _normalize(self.teacher.head(features_SD)).unflatten(0, (-1, B))
        if self.is_logging_step:
            log_feature_statistics(self, features_SD)
        queries_SE = self.student([batch[view] for view in query_views])
        if self.predictor is not None:
            queries_SE = self.predictor(queries_SE)
        queries_VBE = _normalize(queries_SE).unflatten(0, (-1, B))
        losses = []
        for key_view, keys_BE in zip(key_views, keys_TBE, strict=True):
            loss_of = self._loss_against(keys_BE)
            losses += [
                loss_of(query_BE) for view, query_BE in zip(query_views, queries_VBE, strict=True) if view != key_view
            ]
        # Version 3 sums over both ways to pair two views; version 2 has only one.
        return self.config.loss_scale * len(key_views) * torch.stack(losses).mean()

    def _loss_against(self, keys_BE: Tensor) -> Callable[[Tensor], Tensor]:
        """The loss of queries (B, E) against these keys."""
        temperature = self.config.temperature
        if self.queue is not None:
            self.queue.observe(keys_BE)
            negatives = self.queue.features
            return lambda query_BE: info_nce(query_BE, keys_BE, temperature=temperature, negatives_ND=negatives)
        keys_of_all_ranks = all_gather_concat(keys_BE)
        first = rank() * len(keys_BE)
        return lambda query_BE: info_nce(query_BE, keys_of_all_ranks, temperature=temperature, first=first)

    def after_step(self, step: int) -> None:
        """Update the teacher, and append the keys to the queue."""
        super().after_step(step)
        if self.queue is not None:
            self.queue.update()


def _normalize(x_SE: Tensor) -> Tensor:
    return F.normalize(at_least_float32(x_SE), dim=-1)
