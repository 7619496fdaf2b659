"""Figures that show a collapse, noted in logging steps."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.factors import Factors
from dino_lightning.losses import Sharpness, entropy_and_divergence


@torch.no_grad()
def note_feature_signals(method: Any, features_SD: Tensor) -> None:
    """Of the features of the global crops."""
    # Of normalised features: 1/sqrt(D) when they fill the sphere, 0 when all images look the same.
    method.note("collapse/feature_std", F.normalize(features_SD, dim=-1).std(dim=0).mean())


@torch.no_grad()
def note_output_signals(method: Any, student: Factors, teacher: Factors, sharpness: Sharpness) -> None:
    """Of the distributions over prototypes."""
    entropy, divergence = entropy_and_divergence(student, teacher, sharpness, rows=method.step.loss_rows)
    method.note("collapse/teacher_entropy", entropy)
    method.note("collapse/teacher_student_kl", divergence)
    method.note("collapse/center_norm", sharpness.center.norm())
