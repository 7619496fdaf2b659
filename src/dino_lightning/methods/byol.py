"""BYOL: bootstrap your own latent (Grill et al., NeurIPS 2020).

student:  q(g_s(f_s(x)))                   g: projector, q: predictor
teacher:  g_t(f_t(x'))                     its moving average, without predictor
loss:     2 - 2 cos of the two, summed over both ways to pair the views

The batch norms of projector and predictor normalize over all crops of a batch at once, those of the paper over one
view.
"""

from typing import final

import torch
from torch import Tensor

from dino_lightning.config import BYOLConfig
from dino_lightning.losses.cross_view import cross_view_distance
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.methods.collapse_signals import log_feature_statistics
from dino_lightning.methods.parts import MethodParts
from dino_lightning.methods.registry import register_method
from dino_lightning.methods.student_teacher import StudentTeacher, projectors


@final
@register_method("byol", BYOLConfig)
class BYOL(StudentTeacher):
    """The student with a predictor sees all crops, the teacher the two global ones."""

    def __init__(self, config: BYOLConfig, parts: MethodParts) -> None:
        super().__init__(config, parts, **projectors(config, parts.feature_dim))
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
