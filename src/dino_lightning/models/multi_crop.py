"""Backbone and head over crops of several resolutions."""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dino_lightning.config import ComputeConfig
from dino_lightning.errors import UserError
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.models.masking import Masks
from dino_lightning.models.vit import OriginalViT
from dino_lightning.runtime.precision import at_least_float32


class MultiCropNetwork(nn.Module):
    """Backbone and head: one backbone pass for all crops, or one per resolution; one head pass in all."""

    def __init__(self, backbone: nn.Module, head: nn.Module, *, compute: ComputeConfig | None = None) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.compute = compute or ComputeConfig()
        self.packed = self.compute.fused and isinstance(backbone, OriginalViT)
        has_patches = getattr(backbone, "patch_embed", None) is not None
        self.channels_last = not has_patches if self.compute.channels_last is None else self.compute.channels_last
        complete_blocks = self.compute.compile or self.compute.gradient_checkpointing
        self.in_tiles = self.packed and not complete_blocks and backbone.drop_path_mode == "sample"
        """Whether the blocks process large float32 batches in tiles on a CPU."""
        if self.channels_last:
            backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(backbone, OriginalViT) and self.packed:
            backbone.apply_compute(self.compute)
        else:
            if self.compute.gradient_checkpointing:
                _checkpoint(backbone)
            if self.compute.compile:
                backbone.compile(dynamic=False)

    def features(self, crops: list[Tensor]) -> Tensor:
        """Features (V B, D) of V crops (B, C, size, size) in their order."""
        # In full precision: so is the head's input in the original, also under mixed precision.
        if self.packed:
            return at_least_float32(self.backbone(self._in_layout(crops)))
        return torch.cat([at_least_float32(self.backbone(batch)) for batch in self._runs(crops)])

    def features_and_patches(self, crops: list[Tensor], masks: Masks, *, replace: bool) -> tuple[Tensor, Tensor]:
        """`features`, and the patch tokens (P, D) at the masked positions, after the final norm.

        With `replace`, the masked patches are replaced by the mask token.
        """
        if self.packed:
            features_SD, patches_PD = self.backbone(self._in_layout(crops), masks=masks, replace=replace)
            return at_least_float32(features_SD), at_least_float32(patches_PD)
        first, *others = self._runs(crops)
        features_BD, patches_SND = self.backbone(first, masks=masks, replace=replace)
        rest = [at_least_float32(self.backbone(batch)) for batch in others]
        patches_PD = at_least_float32(patches_SND.flatten(0, 1)[masks.positions])
        return torch.cat([at_least_float32(features_BD), *rest]), patches_PD

    def outputs(
        self,
        crops: list[Tensor],
        *,
        predictor: nn.Module | None = None,
        masks: Masks | None = None,
        replace: bool = False,
    ) -> tuple[Tensor, FactoredLogits, FactoredLogits]:
        """Features (S, D), their logits (S, K), and the logits of the masked patches (P, K), P = 0 without masks."""
        if masks is None:
            features_SD = self.features(crops)
            logits: FactoredLogits = self.head(features_SD, factored=True, predictor=predictor)
            return features_SD, logits, FactoredLogits(logits.embeddings[:0], logits.prototypes)
        features_SD, patches_PD = self.features_and_patches(crops, masks, replace=replace)
        # One pass of the head: it composes the prototypes once, and batch norms have rows even without any mask.
        both: FactoredLogits = self.head(torch.cat([features_SD, patches_PD]), factored=True, predictor=predictor)
        S = len(features_SD)
        of_crops, of_patches = (FactoredLogits(x, both.prototypes) for x in both.embeddings.tensor_split([S]))
        return features_SD, of_crops, of_patches

    def _in_layout(self, crops: list[Tensor]) -> list[Tensor]:
        return [crop.contiguous(memory_format=torch.channels_last) for crop in crops] if self.channels_last else crops

    def _runs(self, crops: list[Tensor]) -> list[Tensor]:
        """Joins neighboring crops of one size, as the original does: batch norms normalize over them together."""
        runs = groupby(self._in_layout(crops), key=lambda crop: crop.shape[-1])
        return [torch.cat(list(run)) for _, run in runs]

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Head outputs (V B, K)."""
        return self.head(self.features(crops))


def _checkpoint(backbone: Any) -> None:
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise UserError(
            f"compute.gradient_checkpointing=true: timm's {type(backbone).__name__} has none; set "
            "compute.gradient_checkpointing=false."
        ) from error
