"""Classification with labels on the same crops: the supervised baseline of the paper's tables."""

from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.config import SupervisedConfig
from dino_lightning.data.batch import LabeledCrops
from dino_lightning.methods.base import GLOBAL_CROPS, Method
from dino_lightning.methods.collapse_signals import log_feature_statistics
from dino_lightning.methods.parts import MethodParts
from dino_lightning.methods.registry import register_method
from dino_lightning.runtime.precision import at_least_float32

NO_LABEL = -1


@final
@register_method("supervised", SupervisedConfig)
class Supervised(Method):
    """A linear classifier on the features of every crop, trained with its backbone."""

    def __init__(self, config: SupervisedConfig, parts: MethodParts) -> None:
        classifier = nn.Linear(parts.feature_dim, parts.num_classes)
        nn.init.trunc_normal_(classifier.weight, std=0.02)
        nn.init.zeros_(classifier.bias)
        super().__init__(parts, classifier)
        self.config = config

    def loss(self, batch: LabeledCrops) -> Tensor:
        """Cross-entropy of the label, mean over crops and images. Images without a label are ignored."""
        crops, labels_B = batch
        features_SD = self.student.features(crops)
        logits_SC = self.student.head(features_SD)
        labels_S = labels_B.repeat(len(crops))
        known_S = labels_S != NO_LABEL
        if self.is_logging_step:
            log_feature_statistics(self, features_SD[: GLOBAL_CROPS * len(labels_B)].detach())
            right_S = (logits_SC.argmax(dim=-1) == labels_S) & known_S
            self.log_metric("train/top1", 100 * right_S.sum() / known_S.sum().clamp(min=1))
        losses_S = F.cross_entropy(
            at_least_float32(logits_SC),
            labels_S,
            ignore_index=NO_LABEL,
            label_smoothing=self.config.label_smoothing,
            reduction="none",
        )
        # Not `reduction="mean"`, which is 0 / 0 in a batch without any label.
        return losses_S.sum() / known_S.sum().clamp(min=1)
