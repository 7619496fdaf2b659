"""SwAV: swapping assignments between views (Caron et al., NeurIPS 2020).

z = embedding of a crop, normalized;  scores = z · prototypes, also normalized
target:      Sinkhorn-Knopp assignment of a global crop's scores, batch by batch, without gradient
prediction:  softmax(scores of another crop / temperature)
loss:        cross-entropy between the two, over all pairs of a global crop and another crop
"""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.config import SwAVConfig
from dino_lightning.losses.centering import sinkhorn_center
from dino_lightning.losses.cross_view import view_entropy
from dino_lightning.losses.feature_queue import FeatureQueue
from dino_lightning.methods.base import GLOBAL_CROPS, Method
from dino_lightning.methods.collapse_signals import log_assignment_statistics, log_feature_statistics
from dino_lightning.methods.parts import MethodParts
from dino_lightning.methods.registry import register_method
from dino_lightning.models.heads import MLPHead
from dino_lightning.runtime.collectives import rank, world_size
from dino_lightning.runtime.precision import at_least_float32, without_autocast
from dino_lightning.runtime.sharding import local


@final
@register_method("swav", SwAVConfig)
class SwAV(Method):
    """One network that predicts, from each crop, the cluster of another crop of the same image."""

    def __init__(self, config: SwAVConfig, parts: MethodParts) -> None:
        projector = MLPHead(
            parts.feature_dim,
            config.head_bottleneck_dim,
            layers=config.head_layers,
            hidden_dim=config.head_hidden_dim,
            batch_norm=config.head_batch_norm,
        )
        super().__init__(parts, projector, predictor=nn.Linear(config.head_bottleneck_dim, config.out_dim, bias=False))
        self.config = config
        self.queues = nn.ModuleList(
            FeatureQueue(config.queue_length, config.head_bottleneck_dim, start_random=False)
            for _ in range(GLOBAL_CROPS if config.queue_length else 0)
        )
        self._normalize_prototypes()

    @property
    def prototypes(self) -> nn.Linear:
        """Rows of length 1 (K, E)."""
        assert isinstance(self.predictor, nn.Linear)
        return self.predictor

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy between assignments and predictions (the paper's equation 2, over all crops)."""
        B, config = len(batch[0]), self.config
        features_SD = self.student.features(batch)
        if self.is_logging_step:
            log_feature_statistics(self, features_SD[: GLOBAL_CROPS * B].detach())
        z_VBE = F.normalize(at_least_float32(self.student.head(features_SD)), dim=-1).unflatten(0, (-1, B))
        with without_autocast(z_VBE):  # a temperature of 0.05 amplifies the rounding errors of bfloat16
            scores_VBK = self.prototypes(z_VBE)
            targets = [
                self._assignment(z_VBE[view].detach(), scores_VBK[view].detach(), view) for view in range(GLOBAL_CROPS)
            ]
        target_TBK = torch.stack(targets)
        if self.is_logging_step:
            scores_SK = scores_VBK[:GLOBAL_CROPS].detach().flatten(0, 1)
            log_assignment_statistics(self, target_TBK.flatten(0, 1), scores_SK, temperature=config.temperature)
        return view_entropy(scores_VBK, target_TBK, temperature=config.temperature)

    @torch.no_grad()
    def _assignment(self, z_BE: Tensor, scores_BK: Tensor, view: int) -> Tensor:
        """The rows of this rank in the assignment of all ranks' batches and the queue (B, K)."""
        config, joined_NK = self.config, scores_BK
        if self.queues:
            queue = self.queues[view]
            assert isinstance(queue, FeatureQueue)
            if queue.is_full:
                # Each rank contributes a part of the queue, so that no row counts twice.
                part_ND = queue.features.tensor_split(world_size())[rank()]
                joined_NK = torch.cat([scores_BK, self.prototypes(part_ND)])
            if self.clock.step >= self.duration(config.queue_start, key="method.queue_start"):
                queue.observe(z_BE)
        shift_1K = sinkhorn_center(
            joined_NK, temperature=config.sinkhorn_epsilon, iterations=config.sinkhorn_iterations
        )
        return ((scores_BK - shift_1K) / config.sinkhorn_epsilon).softmax(dim=-1)

    def before_step(self, step: int) -> None:
        """Freeze the prototypes at the start of the run."""
        if step < self.duration(self.config.freeze_prototypes, key="method.freeze_prototypes"):
            self.prototypes.weight.grad = None

    def after_step(self, step: int) -> None:
        """Normalize the prototypes to length 1 again, and append the embeddings to the queues."""
        self._normalize_prototypes()
        for queue in self.queues:
            assert isinstance(queue, FeatureQueue)
            queue.update()

    @torch.no_grad()
    def _normalize_prototypes(self) -> None:
        weight_KE = local(self.prototypes.weight)  # under FSDP each rank holds complete rows
        weight_KE.copy_(F.normalize(weight_KE, dim=-1))
