"""Statistics that show a collapse, logged in logging steps.

All are means over ranks and bit-identical on all ranks, so that every rank takes the same decision.
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
    """Log the spread of the features of the global crops, and add them to the feature buffer."""
    # Of normalized features: 1/sqrt(D) if they fill the sphere, 0 if all images have the same features.
    spread = F.normalize(features_SD, dim=-1).std(dim=0).mean()
    _log_means(method, {"feature_std": spread})
    if method.feature_buffer is not None:
        method.feature_buffer.add_features(features_SD)


@torch.no_grad()
def log_output_statistics(method: Any, student: FactoredLogits, teacher: FactoredLogits, params: SoftmaxParams) -> None:
    """Log statistics of the teacher's distributions over prototypes, compared with the student's."""
    statistics = entropy_and_divergence(student, teacher, params, rows=method.compute.loss_rows)
    _log_outputs(method, statistics, crops=len(teacher), center_norm=params.center.norm())


@torch.no_grad()
def log_assignment_statistics(method: Any, target_NK: Tensor, scores_NK: Tensor, *, temperature: float) -> None:
    """Log statistics of the target distributions, compared with the predictions from scores of the same crops."""
    log_p_NK = (at_least_float32(scores_NK) / temperature).log_softmax(dim=-1)
    _log_outputs(method, output_statistics(target_NK, log_p_NK), crops=len(target_NK))


def _log_outputs(method: Any, statistics: OutputStatistics, *, crops: int, **others: Tensor) -> None:
    mean_K = all_reduce_mean(statistics.mean_output)
    entropy_of_mean = torch.special.entr(mean_K).sum()
    values = {
        "teacher_entropy": statistics.entropy,
        "teacher_student_kl": statistics.divergence,
        "mean_output_entropy": entropy_of_mean,
        "kl_to_uniform": math.log(len(mean_K)) - entropy_of_mean,
    }
    _log_means(method, {**values, **others})
    if method.feature_buffer is not None:
        method.feature_buffer.add_output(mean_K, crops=crops * world_size())


def _log_means(method: Any, statistics: dict[str, Tensor]) -> None:
    """Log the means over ranks, in one exchange."""
    means = all_reduce_mean(torch.stack([at_least_float32(value) for value in statistics.values()]))
    for name, value in zip(statistics, means, strict=True):
        method.log_metric(f"collapse/{name}", value)
