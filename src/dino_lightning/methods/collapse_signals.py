"""Figures that show a collapse, noted in logging steps.

All are means over ranks, and all ranks have the same to the last bit, so that they agree on what to do about them.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.losses.cross_view import SoftmaxParams
from dino_lightning.losses.output_statistics import OutputStatistics, entropy_and_divergence, output_statistics
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.runtime.collectives import all_reduce_mean, world_size
from dino_lightning.runtime.precision import at_least_float32


@torch.no_grad()
def log_feature_statistics(method: Any, features_SD: Tensor) -> None:
    """Of the features of the global crops."""
    # Of normalized features: 1/sqrt(D) when they fill the sphere, 0 when all images look the same.
    spread = F.normalize(features_SD, dim=-1).std(dim=0).mean()
    _note(method, {"feature_std": spread})
    if method.feature_buffer is not None:
        method.feature_buffer.add_features(features_SD)


@torch.no_grad()
def log_output_statistics(
    method: Any, student: FactoredLogits, teacher: FactoredLogits, sharpness: SoftmaxParams
) -> None:
    """Of the teacher's distributions over prototypes, and of the student's beside them."""
    figures = entropy_and_divergence(student, teacher, sharpness, rows=method.compute.loss_rows)
    _note_outputs(method, figures, crops=len(teacher), center_norm=sharpness.center.norm())


@torch.no_grad()
def log_assignment_statistics(method: Any, target_NK: Tensor, scores_NK: Tensor, *, temperature: float) -> None:
    """Of given distributions, and of those that the scores of the same crops make."""
    log_p_NK = (at_least_float32(scores_NK) / temperature).log_softmax(dim=-1)
    _note_outputs(method, output_statistics(target_NK, log_p_NK), crops=len(target_NK))


def _note_outputs(method: Any, figures: OutputStatistics, *, crops: int, **others: Tensor) -> None:
    mean_K = all_reduce_mean(figures.mean_output)
    of_the_mean = torch.special.entr(mean_K).sum()
    _note(
        method,
        {
            "teacher_entropy": figures.entropy,
            "teacher_student_kl": figures.divergence,
            "mean_output_entropy": of_the_mean,
            "kl_to_uniform": math.log(len(mean_K)) - of_the_mean,
            **others,
        },
    )
    if method.feature_buffer is not None:
        method.feature_buffer.add_output(mean_K, crops=crops * world_size())


def _note(method: Any, signals: dict[str, Tensor]) -> None:
    """Their means over ranks, in one exchange."""
    values = all_reduce_mean(torch.stack([at_least_float32(value) for value in signals.values()]))
    for name, value in zip(signals, values, strict=True):
        method.log_metric(f"collapse/{name}", value)
