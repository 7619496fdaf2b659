"""The loss on masked patches of iBOT (Zhou et al., ICLR 2022): DINO's, once more, inside a crop.

student:  sees a global crop some of whose patches are replaced by a learned token
teacher:  sees all of the crop
loss:     cross-entropy between the two distributions over prototypes of each masked patch, from the head that the
          class token has, with a center of its own

The mean over the masked patches of a crop, then over all global crops, of which those without a mask count 0. iBOT's
center sees all patches of a crop; this one sees the masked ones, as in DINOv2, since the others need no head.
"""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dino_lightning.config import ComputeConfig, DINOConfig
from dino_lightning.losses.chunked import chunked_row_entropy
from dino_lightning.losses.cross_view import SoftmaxParams, sharpen
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.methods.dino_modules import dino_centering
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.models.masking import Masks, draw_masks
from dino_lightning.models.vit import OriginalViT
from dino_lightning.runtime.precision import at_least_float32


class MaskedPatches(nn.Module):
    """What is masked, and what it costs: `method.patch_loss_weight`. Gives the backbones their mask token."""

    def __init__(self, config: DINOConfig, *backbones: nn.Module, compute: ComputeConfig) -> None:
        super().__init__()
        self.config, self.compute = config, compute
        self.patch_size = 0
        for backbone in backbones:
            assert isinstance(backbone, OriginalViT), "checked: only these have patches that can be replaced"
            backbone.learn_mask_token()
            self.patch_size = int(backbone.patch_embed.patch_size[0])
        self.center = dino_centering(config)

    def draw(self, method: Any, crops: list[Tensor]) -> Masks:
        """Masks of the global crops of one micro-batch.

        They depend on the run's seed, the step, the micro-batch and the rank, so that a resumed run draws the same.
        """
        seed, micro_batch = int(os.environ.get("PL_GLOBAL_SEED", 0)), method.trainer.fit_loop.batch_idx
        key = [seed, method.global_step, micro_batch, method.global_rank]
        return self.masks(np.random.default_rng(key), crops)

    def masks(self, generator: np.random.Generator, crops: list[Tensor]) -> Masks:
        """Masks of the global crops, drawn on the host."""
        B, _, H, W = crops[0].shape
        mask_Shw = draw_masks(
            generator,
            GLOBAL_CROPS * B,
            (H // self.patch_size, W // self.patch_size),
            probability=self.config.mask_p,
            share=self.config.mask_share,
        )
        return Masks.of(mask_Shw, like=crops[0])

    def loss(self, method: Any, student: FactoredLogits, teacher: FactoredLogits, masks: Masks) -> Tensor:
        """The weighted loss of one micro-batch; all ranks call it together, also those without a masked patch."""
        temperature = method.value("teacher_temperature")
        center = self.center.center_for(teacher, temperature=temperature)
        sharpness = SoftmaxParams(self.config.student_temperature, temperature, center)
        if self.compute.fused:
            loss = chunked_row_entropy(student, teacher, sharpness, masks.weights, rows=self.compute.loss_rows)
        else:
            loss = row_entropy(student.logits(), teacher.logits(), sharpness, masks.weights)
        method.note("train/patch_loss", loss)
        return self.config.patch_loss_weight * loss


def row_entropy(student_PK: Tensor, teacher_PK: Tensor, sharpness: SoftmaxParams, weights_P: Tensor) -> Tensor:
    """The weighted sum of the cross-entropies between row p of the teacher and row p of the student; raw logits."""
    log_p_PK = (at_least_float32(student_PK) / sharpness.student_temperature).log_softmax(dim=-1)
    return -(weights_P * torch.einsum("pk,pk->p", sharpen(teacher_PK, sharpness), log_p_PK)).sum()
