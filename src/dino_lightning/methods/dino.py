"""DINO: self-distillation with no labels (Caron et al., ICCV 2021), algorithm 1.

teacher:  softmax((g_t(x) - c) / tau_t)      c: running mean of g_t (centring), tau_t: sharpening
student:  softmax(g_s(x') / tau_s)           x': any other crop of the same image
loss:     cross-entropy between the two; only the student takes its gradient
"""

from collections.abc import Callable
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.centering import Center
from dino_lightning.config import DINOConfig, OptimConfig, StepConfig
from dino_lightning.factors import Factors
from dino_lightning.heads import DINOHead
from dino_lightning.losses import Sharpness, cross_view_entropy, entropy_and_divergence
from dino_lightning.methods.base import StudentTeacher
from dino_lightning.methods.network import MultiCropNetwork
from dino_lightning.optim import drop_last_layer_gradients
from dino_lightning.prototype_loss import chunked_cross_view_entropy
from dino_lightning.schedules import Duration, LinearWarmup

GLOBAL_CROPS = 2


@final
class DINO(StudentTeacher):
    """Student over all crops, teacher over the two global ones, and the centre."""

    def __init__(
        self,
        config: DINOConfig,
        *,
        student_backbone: nn.Module,
        teacher_backbone: nn.Module,
        feature_dim: int,
        optim: OptimConfig,
        batch_size_per_device: int,
        step: StepConfig | None = None,
    ) -> None:
        how = step or StepConfig()
        heads = [_head(config, feature_dim, train_norm=train) for train in (not config.norm_last_layer, False)]
        super().__init__(
            MultiCropNetwork(student_backbone, heads[0], step=how),
            MultiCropNetwork(teacher_backbone, heads[1], step=how),
            optim=optim,
            teacher_momentum=config.teacher_momentum,
            teacher_momentum_end=config.teacher_momentum_end,
            batch_size_per_device=batch_size_per_device,
        )
        self.config, self.step = config, how
        self.center = Center(config.out_dim, momentum=config.center_momentum)

    def loss(self, crops: list[Tensor]) -> Tensor:
        """Cross-entropy between the views (equation 3)."""
        B = len(crops[0])
        with torch.no_grad():
            features_SD = self.teacher.features(crops[:GLOBAL_CROPS])
            teacher: Factors = self.teacher.head(features_SD, factors=True)
            # Seen now, moved in `after_step`: the loss below still uses the old centre. The sum of logits is the
            # logits of the sum.
            self.center.observe(teacher.of_the_sum(), count=GLOBAL_CROPS * B)
        student: Factors = self.student.head(self.student.features(crops), factors=True)
        sharpness = self._sharpness()
        if self.is_logging_step:
            self._note_collapse_signals(features_SD, student, teacher, sharpness)
        if self.step.fused:
            return chunked_cross_view_entropy(student, teacher, sharpness, images=B, rows=self.step.loss_rows)
        return cross_view_entropy(
            student.logits().unflatten(0, (-1, B)), teacher.logits().unflatten(0, (-1, B)), sharpness
        )

    def _sharpness(self) -> Sharpness:
        return Sharpness(
            student_temperature=self.config.student_temperature,
            teacher_temperature=self.value("teacher_temperature"),
            center=self.center.center,
        )

    @torch.no_grad()
    def _note_collapse_signals(
        self, features_SD: Tensor, student: Factors, teacher: Factors, sharpness: Sharpness
    ) -> None:
        entropy, divergence = entropy_and_divergence(student, teacher, sharpness, rows=self.step.loss_rows)
        self.note("collapse/teacher_entropy", entropy)
        self.note("collapse/teacher_student_kl", divergence)
        # Of normalised features: 1/sqrt(D) when they fill the sphere, 0 when all images look the same.
        self.note("collapse/feature_std", F.normalize(features_SD, dim=-1).std(dim=0).mean())
        self.note("collapse/center_norm", self.center.center.norm())

    def method_schedules(self) -> dict[str, Callable[[int], float]]:
        """The teacher's temperature."""
        config = self.config
        key = "method.teacher_temperature_warmup"
        warmup = LinearWarmup.over(
            Duration.parse(config.teacher_temperature_warmup, key=key),
            start=config.teacher_temperature_start,
            final=config.teacher_temperature,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )
        return {"teacher_temperature": warmup}

    def after_clip(self, step: int) -> None:
        """Freeze the prototypes at the start of the run."""
        if step < self.duration(self.config.freeze_last_layer, key="method.freeze_last_layer"):
            drop_last_layer_gradients(self.student)

    def after_step(self, step: int) -> None:
        """Move the centre."""
        self.center.commit()


def _head(config: DINOConfig, feature_dim: int, *, train_norm: bool) -> DINOHead:
    return DINOHead(
        feature_dim,
        out_dim=config.out_dim,
        layers=config.head_layers,
        hidden_dim=config.head_hidden_dim,
        bottleneck_dim=config.head_bottleneck_dim,
        batch_norm=config.head_batch_norm,
        train_norm=train_norm,
    )
