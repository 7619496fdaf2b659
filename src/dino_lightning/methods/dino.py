"""DINO: self-distillation with no labels (Caron et al., ICCV 2021), algorithm 1.

teacher:  softmax((g_t(x) - c) / tau_t)      c: running mean of g_t (centering), tau_t: sharpening
student:  softmax(g_s(x') / tau_s)           x': any other crop of the same image
loss:     cross-entropy between the two; only the student takes its gradient
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from dino_lightning.config import ComputeConfig, DINOConfig, OptimConfig
from dino_lightning.config.duration import Duration
from dino_lightning.losses.chunked import chunked_cross_view_entropy
from dino_lightning.losses.cross_view import SoftmaxParams, cross_view_distance, cross_view_entropy
from dino_lightning.losses.koleo import koleo
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.methods.collapse_signals import log_feature_statistics, log_output_statistics
from dino_lightning.methods.dino_modules import dino_centering, dino_head, dino_predictor
from dino_lightning.methods.masked_patches import MaskedPatches
from dino_lightning.methods.student_teacher import StudentTeacher
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.models.multi_crop import MultiCropNetwork
from dino_lightning.optim.optimizers import drop_last_layer_gradients
from dino_lightning.optim.schedules import LinearWarmup


@final
class DINO(StudentTeacher):
    """Student over all crops, teacher over the two global ones, and the center."""

    def __init__(
        self,
        config: DINOConfig,
        *,
        student_backbone: nn.Module,
        teacher_backbone: nn.Module,
        feature_dim: int,
        optim: OptimConfig,
        batch_size_per_device: int,
        compute: ComputeConfig | None = None,
    ) -> None:
        how = compute or ComputeConfig()
        heads = [dino_head(config, feature_dim, train_norm=train) for train in (not config.norm_last_layer, False)]
        backbones = student_backbone, teacher_backbone
        patches = MaskedPatches(config, *backbones, compute=how) if config.patch_loss_weight else None
        super().__init__(
            config,
            MultiCropNetwork(student_backbone, heads[0], compute=how),
            MultiCropNetwork(teacher_backbone, heads[1], compute=how),
            optim=optim,
            batch_size_per_device=batch_size_per_device,
            predictor=dino_predictor(config),
        )
        self.config, self.compute = config, how
        self.center, self.patches = dino_centering(config), patches
        self.compare = {"cross_entropy": self._cross_entropy, "mse": self._distance}[config.loss]

    def loss(self, batch: list[Tensor]) -> Tensor:
        """Cross-entropy between the views (equation 3), and what else is configured."""
        crops, B = batch, len(batch[0])
        masks = None if self.patches is None else self.patches.draw(self, crops)
        with torch.no_grad():
            features_SD, teacher, teacher_patches = self.teacher.outputs(crops[:GLOBAL_CROPS], masks=masks)
            # The running mean is seen now and moves in `after_step`: the loss below still uses the old center.
            sharpness = self._sharpness(teacher)
        student_SD, student, student_patches = self.student.outputs(
            crops, predictor=self.predictor, masks=masks, replace=True
        )
        if self.is_logging_step:
            log_feature_statistics(self, features_SD)
            log_output_statistics(self, student, teacher, sharpness)
        loss = self.compare(student, teacher, sharpness, B)
        if self.config.koleo_weight:
            views = student_SD[: GLOBAL_CROPS * B].chunk(GLOBAL_CROPS)
            loss = loss + self.config.koleo_weight * torch.stack([koleo(view_BD) for view_BD in views]).sum()
        if self.patches is not None and masks is not None:
            loss = loss + self.patches.loss(self, student_patches, teacher_patches, masks)
        return loss

    def _cross_entropy(
        self, student: FactoredLogits, teacher: FactoredLogits, sharpness: SoftmaxParams, B: int
    ) -> Tensor:
        if self.compute.fused:
            return chunked_cross_view_entropy(student, teacher, sharpness, images=B, rows=self.compute.loss_rows)
        return cross_view_entropy(
            student.logits().unflatten(0, (-1, B)), teacher.logits().unflatten(0, (-1, B)), sharpness
        )

    def _distance(self, student: FactoredLogits, teacher: FactoredLogits, sharpness: SoftmaxParams, B: int) -> Tensor:
        targets_SK = teacher.logits() - sharpness.center
        return cross_view_distance(student.logits().unflatten(0, (-1, B)), targets_SK.unflatten(0, (-1, B)))

    def _sharpness(self, teacher: FactoredLogits) -> SoftmaxParams:
        temperature = self.value("teacher_temperature")
        return SoftmaxParams(
            student_temperature=self.config.student_temperature,
            teacher_temperature=temperature,
            center=self.center.center_for(teacher, temperature=temperature),
        )

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
        """Move the centers."""
        self.center.update()
        if self.patches is not None:
            self.patches.center.update()
