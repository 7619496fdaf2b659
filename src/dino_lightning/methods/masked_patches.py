"""The loss on masked patches of iBOT (Zhou et al., ICLR 2022): DINO's loss on patches within a crop.

student:  sees a global crop some of whose patches are replaced by a learned token
teacher:  sees the complete crop
loss:     cross-entropy between the two distributions over prototypes of each masked patch; the head is shared with the
          class token, the center is separate

The loss is the mean over the masked patches of a crop, then over all global crops; crops without a mask count 0. iBOT's
center averages all patches of a crop. This one averages the masked patches, as in DINOv2: the others need no head.
"""

import os

import numpy as np
import torch
from torch import Tensor, nn

from dino_lightning.config import DINOConfig
from dino_lightning.losses.chunked import chunked_row_entropy
from dino_lightning.losses.cross_view import SoftmaxParams, sharpen
from dino_lightning.methods.base import GLOBAL_CROPS, Method
from dino_lightning.methods.clock import StepClock, TrainerClock
from dino_lightning.methods.dino_modules import dino_centering
from dino_lightning.methods.parts import MethodParts
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.models.masking import Masks, draw_masks
from dino_lightning.models.vit import OriginalViT
from dino_lightning.runtime.precision import at_least_float32


class MaskedPatches(nn.Module):
    """Draws the masks and computes the loss of `method.patch_loss_weight`. Adds a mask token to both backbones."""

    def __init__(self, config: DINOConfig, parts: MethodParts) -> None:
        super().__init__()
        self.config, self.compute = config, parts.compute
        self.patch_size = 0
        for backbone in (parts.student_backbone, parts.teacher_backbone):
            assert isinstance(backbone, OriginalViT), "`DINOConfig.check` refuses other backbones"
            backbone.learn_mask_token()
            self.patch_size = int(backbone.patch_embed.patch_size[0])
        self.center = dino_centering(config)

    def draw(self, clock: StepClock | TrainerClock, crops: list[Tensor]) -> Masks:
        """Masks of the global crops of one micro-batch, drawn on the host.

        They depend on the run's seed, the step, the micro-batch and the rank, so that a resumed run draws the same.
        """
        key = [int(os.environ.get("PL_GLOBAL_SEED", 0)), clock.step, clock.micro_batch, clock.rank]
        B, _, H, W = crops[0].shape
        grid, config = (H // self.patch_size, W // self.patch_size), self.config
        generator = np.random.default_rng(key)
        mask_Shw = draw_masks(generator, GLOBAL_CROPS * B, grid, probability=config.mask_p, share=config.mask_share)
        return Masks.of(mask_Shw, like=crops[0])

    def loss(self, method: Method, student: FactoredLogits, teacher: FactoredLogits, masks: Masks) -> Tensor:
        """The weighted loss of one micro-batch; all ranks call it together, also those without a masked patch."""
        temperature = method.value("teacher_temperature")
        center = self.center.center_for(teacher, temperature=temperature)
        params = SoftmaxParams(self.config.student_temperature, temperature, center)
        if self.compute.fused:
            loss = chunked_row_entropy(student, teacher, params, masks.weights, rows=self.compute.loss_rows)
        else:
            loss = row_entropy(student.logits(), teacher.logits(), params, masks.weights)
        method.log_metric("train/patch_loss", loss)
        return self.config.patch_loss_weight * loss


def row_entropy(student_PK: Tensor, teacher_PK: Tensor, params: SoftmaxParams, weights_P: Tensor) -> Tensor:
    """The weighted sum of the cross-entropies between row p of the teacher and row p of the student; raw logits."""
    log_p_PK = (at_least_float32(student_PK) / params.student_temperature).log_softmax(dim=-1)
    return -(weights_P * torch.einsum("pk,pk->p", sharpen(teacher_PK, params), log_p_PK)).sum()
