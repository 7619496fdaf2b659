"""BYOL: bootstrap your own latent (Grill et al., NeurIPS 2020).

student:  q(g_s(f_s(x)))                   g: projector, q: predictor
teacher:  g_t(f_t(x'))                     its moving average, without predictor
loss:     2 - 2 cos of the two, summed over both ways to pair the views

The batch norms of projector and predictor see all crops of a batch at once, those of the paper one view.
"""

from typing import final

import torch
from torch import Tensor, nn

from dino_lightning.config import BYOLConfig, ComputeConfig, OptimConfig
from dino_lightning.losses.cross_view import cross_view_distance
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.methods.collapse_signals import log_feature_statistics
from dino_lightning.methods.student_teacher import StudentTeacher
from dino_lightning.models.heads import MLPHead
from dino_lightning.models.multi_crop import MultiCropNetwork


@final
class BYOL(StudentTeacher):
    """Student with predictor over all crops, teacher over the two global ones."""

    def __init__(
        self,
        config: BYOLConfig,
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
        self.config = config

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Distance between prediction and target. With local crops, each target is predicted from all other crops."""
        B = len(batch[0])
        with torch.no_grad():
            features_SD = self.teacher.features(batch[:GLOBAL_CROPS])
            target_TBE = self.teacher.head(features_SD).unflatten(0, (GLOBAL_CROPS, B))
        if self.is_logging_step:
            log_feature_statistics(self, features_SD)
        predicted_SE = self.student(batch)
        if self.predictor is not None:
            predicted_SE = self.predictor(predicted_SE)
        return GLOBAL_CROPS * cross_view_distance(predicted_SE.unflatten(0, (-1, B)), target_TBE)


def _projector(config: BYOLConfig, feature_dim: int) -> MLPHead:
    return MLPHead(
        feature_dim,
        config.out_dim,
        layers=config.head_layers,
        hidden_dim=config.head_hidden_dim,
        batch_norm=config.head_batch_norm,
    )


def _predictor(config: BYOLConfig) -> MLPHead:
    return MLPHead(
        config.out_dim,
        config.out_dim,
        layers=2,
        hidden_dim=config.head_hidden_dim,
        batch_norm=config.head_batch_norm,
    )
