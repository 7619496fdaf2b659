"""DINO: self-distillation with no labels (Caron et al., ICCV 2021), algorithm 1.

teacher:  softmax((g_t(x) - c) / tau_t)      c: running mean of g_t (centering), tau_t: sharpening
student:  softmax(g_s(x') / tau_s)           x': any other crop of the same image
loss:     cross-entropy between the two; only the student takes its gradient
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from dino_lightning.config import DINOConfig
from dino_lightning.config.duration import Duration
from dino_lightning.losses.chunked import chunked_cross_view_entropy
from dino_lightning.losses.cross_view import SoftmaxParams, cross_view_distance, cross_view_entropy
from dino_lightning.losses.koleo import koleo
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.methods.collapse_signals import log_feature_statistics, log_output_statistics
from dino_lightning.methods.dino_modules import dino_centering, dino_head, dino_predictor
from dino_lightning.methods.masked_patches import MaskedPatches
from dino_lightning.methods.parts import MethodParts
from dino_lightning.methods.registry import register_method
from dino_lightning.methods.student_teacher import StudentTeacher
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.optim.optimizers import drop_last_layer_gradients
from dino_lightning.optim.schedules import LinearWarmup


@final
@register_method("dino", DINOConfig)
class DINO(StudentTeacher):
    """The student sees all crops, the teacher the two global ones; the teacher's outputs are centered."""

    def __init__(self, config: DINOConfig, parts: MethodParts) -> None:
        heads = (
            dino_head(config, parts.feature_dim, train_norm=not config.norm_last_layer),
            dino_head(config, parts.feature_dim, train_norm=False),
        )
        patches = MaskedPatches(config, parts) if config.patch_loss_weight else None
        super().__init__(config, parts, heads=heads, predictor=dino_predictor(config))
        self.config, self.compute = config, parts.compute
        self.center, self.patches = dino_centering(config), patches

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy between the views (equation 3), and the configured additional losses."""
        crops, B = batch, len(batch[0])
        masks = None if self.patches is None else self.patches.draw(self.clock, crops)
        with torch.no_grad():
            features_SD, teacher, teacher_patches = self.teacher.outputs(crops[:GLOBAL_CROPS], masks=masks)
            # The center is accumulated here and updated in `after_step`, so this loss still uses the previous center.
            params = self._softmax_params(teacher)
        student_SD, student, student_patches = self.student.outputs(
            crops, predictor=self.predictor, masks=masks, replace=True
        )
        if self.is_logging_step:
            log_feature_statistics(self, features_SD)
            log_output_statistics(self, student, teacher, params)
        loss = self._compare(student, teacher, params, B)
        if self.config.koleo_weight:
            views = student_SD[: GLOBAL_CROPS * B].chunk(GLOBAL_CROPS)
            loss = loss + self.config.koleo_weight * torch.stack([koleo(view_BD) for view_BD in views]).sum()
        if self.patches is not None and masks is not None:
            loss = loss + self.patches.loss(self, student_patches, teacher_patches, masks)
        return loss

    def _compare(self, student: FactoredLogits, teacher: FactoredLogits, params: SoftmaxParams, B: int) -> Tensor:
        if self.config.loss == "mse":
            targets_SK = teacher.logits() - params.center
            return cross_view_distance(student.logits().unflatten(0, (-1, B)), targets_SK.unflatten(0, (-1, B)))
        if self.compute.fused:
            return chunked_cross_view_entropy(student, teacher, params, images=B, rows=self.compute.loss_rows)
        return cross_view_entropy(
            student.logits().unflatten(0, (-1, B)), teacher.logits().unflatten(0, (-1, B)), params
        )

    def _softmax_params(self, teacher: FactoredLogits) -> SoftmaxParams:
        temperature = self.value("teacher_temperature")
        return SoftmaxParams(
            student_temperature=self.config.student_temperature,
            teacher_temperature=temperature,
            center=self.center.center_for(teacher, temperature=temperature),
        )

    def extra_schedules(self) -> dict[str, Callable[[int], float]]:
        """The teacher's temperature, besides its momentum."""
        config = self.config
        warmup = LinearWarmup.over(
            Duration.parse(config.teacher_temperature_warmup, key="method.teacher_temperature_warmup"),
            start=config.teacher_temperature_start,
            final=config.teacher_temperature,
            steps_per_epoch=self.clock.steps_per_epoch,
            total_steps=self.clock.total_steps,
        )
        return {**super().extra_schedules(), "teacher_temperature": warmup}

    def before_step(self, step: int) -> None:
        """Freeze the prototypes at the start of the run."""
        if step < self.duration(self.config.freeze_last_layer, key="method.freeze_last_layer"):
            drop_last_layer_gradients(self.student)
        super().before_step(step)

    def after_step(self, step: int) -> None:
        """Update the centers."""
        super().after_step(step)
        self.center.update()
        if self.patches is not None:
            self.patches.center.update()
