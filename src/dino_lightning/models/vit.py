"""The paper's Vision Transformer: timm's blocks with three properties of the original, and a fast training pass.

The three are the initial class token, the resampling of the position embedding, and (in `optim/optimizers.py`) which
parameters decay. The fast pass processes the crops of all resolutions at once; see `kernels/packing.py`. Registers and
masked patches are additions to the original.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dino_lightning.config import ComputeConfig, ViTConfig
from dino_lightning.models.kernels import patches
from dino_lightning.models.kernels.packing import Shapes, drawn_subset, first_tokens, pack, sampled_scales
from dino_lightning.models.masking import Masks
from dino_lightning.models.packed_block import Drop, PackedBlock, compiled_pass


class OriginalViT(VisionTransformer):
    """timm's Vision Transformer, initialized and resampled as the original DINO does.

    Its state dict has the original's keys and loads into `timm.create_model` unchanged. With registers the class token
    has no position either (timm's `no_embed_class`): it would only be a constant vector added to the class token.
    """

    mask_token: nn.Parameter | None
    """Replaces masked patches; see `learn_mask_token`."""

    def __init__(self, config: ViTConfig, *, image_size: int, drop_path_rate: float, channels: int = 3) -> None:
        super().__init__(
            img_size=image_size,
            in_chans=channels,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            num_classes=0,
            drop_path_rate=drop_path_rate,
            dynamic_img_size=True,
            reg_tokens=config.registers,
            no_embed_class=config.registers > 0,
            block_fn=PackedBlock,
        )
        assert self.cls_token is not None
        nn.init.trunc_normal_(self.cls_token, std=0.02)  # timm starts it at std 1e-6
        if self.reg_token is not None:
            # As the class token. With timm's 1e-6 all registers would start nearly equal and learn the same for long,
            # because they have no positions that distinguish them.
            nn.init.trunc_normal_(self.reg_token, std=0.02)
        self.register_parameter("mask_token", None)
        self.drop_path_mode = config.drop_path

    def apply_compute(self, compute: ComputeConfig) -> None:
        """Set how the training pass is computed."""
        for block in cast("list[PackedBlock]", self.blocks):
            block.attention = compute.attention
            block.checkpointed = compute.gradient_checkpointing
            block.pass_function = compiled_pass() if compute.compile else None

    def learn_mask_token(self) -> None:
        """Add the token that replaces masked patches, initially 0; it is used in training only and never exported."""
        assert self.cls_token is not None
        self.mask_token = nn.Parameter(torch.zeros_like(self.cls_token))

    def forward(  # type: ignore[override]
        self, x: Tensor | list[Tensor], *args: Any, masks: Masks | None = None, replace: bool = False, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Features (B, D) of images (B, C, H, W), or (S, D) of all S images of a list of such batches, in order.

        With `masks` for the first images, which have one size, also their last patch tokens: for a list the masked ones
        (P, D); for one batch all of them (masked images, N, D), since a compiled pass needs constant shapes. With
        `replace`, the mask token replaces the masked patches.
        """
        hidden_Shw = masks.hidden if masks is not None and replace else None
        if isinstance(x, list):
            return self.packed_features(x, hidden_Shw, None if masks is None else masks.positions)
        if masks is None:
            return super().forward(x, *args, **options)
        x_BTD = self.norm_pre(self._tokens([x], hidden_Shw)[0])
        x_BTD = self.norm(checkpoint_seq(self.blocks, x_BTD) if self.grad_checkpointing else self.blocks(x_BTD))
        return x_BTD[:, 0], x_BTD[: len(masks.hidden), self.num_prefix_tokens :]

    def packed_features(
        self, views: list[Tensor], hidden_Shw: Tensor | None = None, read_P: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The features (S, D) of batches of images (B, C, H, W) of several sizes, in one pass of all layers.

        The batches are joined as tokens, not as images, which would be copied and kept for the gradient. `read_P`
        requests patch tokens (P, D), too, by their indices among the patches of the first images.
        """
        x_MD, shapes = pack(self._tokens(views, hidden_Shw))
        blocks = cast("list[PackedBlock]", self.blocks)
        for index, (block, drop) in enumerate(zip(blocks, self._drops(shapes, x_MD.device), strict=True)):
            x_MD = block(x_MD, shapes=shapes, drop=drop, last=read_P is None and index + 1 == len(blocks))
        if read_P is None:
            return self.norm(x_MD)
        prefix, N = self.num_prefix_tokens, shapes[0][1] - self.num_prefix_tokens
        rows_P = read_P + prefix * (1 + read_P // N)
        return self.norm(first_tokens(x_MD, shapes)), self.norm(x_MD[rows_P])

    def _tokens(self, views: list[Tensor], hidden_Shw: Tensor | None = None) -> list[Tensor]:
        assert self.pos_embed is not None
        tokens, tables, start = [], {}, 0
        for patches_BhwD in self._patches(views):
            size = patches_BhwD.shape[1:3]
            if size not in tables:
                tables[size] = resample_position_embedding(self.pos_embed, *size, prefix=int(not self.no_embed_class))
            if hidden_Shw is not None and start < len(hidden_Shw):
                patches_BhwD = self._replaced(patches_BhwD, hidden_Shw[start : start + len(patches_BhwD)])
            tokens.append(self._with_positions(patches_BhwD, tables[size]))
            start += len(patches_BhwD)
        return tokens

    def _patches(self, views: list[Tensor]) -> list[Tensor]:
        """Embedded patches (B, h, w, D) of each batch; on a GPU neighboring batches of one size are joined."""
        embed = cast(Any, self.patch_embed)
        if not torch.compiler.is_compiling() and patches.available(views, embed):
            return patches.embed_patches(views, embed.proj)
        return [embed(images_BCHW) for images_BCHW in views]

    def _replaced(self, patches_BhwD: Tensor, hidden_shw: Tensor) -> Tensor:
        """Replace hidden patches by the mask token; images without masks follow those with masks."""
        assert self.mask_token is not None
        rest = len(patches_BhwD) - len(hidden_shw)
        hidden_Bhw = F.pad(hidden_shw, (0, 0, 0, 0, 0, rest)) if rest else hidden_shw
        # Even if nothing is hidden, so that the token has a gradient on every rank and in each micro-batch.
        return torch.where(hidden_Bhw[..., None], self.mask_token.to(patches_BhwD.dtype), patches_BhwD)

    def _drops(self, shapes: Shapes, device: torch.device) -> list[Drop]:
        rates = tuple(_rate(block) for block in cast("list[PackedBlock]", self.blocks))
        if not self.training or not any(rates):
            return [None] * len(rates)
        if self.drop_path_mode == "subset":
            pairs = [(rate, (drawn_subset(rate, shapes, device), drawn_subset(rate, shapes, device))) for rate in rates]
            return [pair if rate else None for rate, pair in pairs]
        return [
            scales if rate else None for rate, scales in zip(rates, sampled_scales(rates, shapes, device), strict=True)
        ]

    def _pos_embed(self, x: Tensor) -> Tensor:
        assert self.pos_embed is not None
        table_1ND = resample_position_embedding(self.pos_embed, *x.shape[1:3], prefix=int(not self.no_embed_class))
        return self._with_positions(x, table_1ND)

    def _with_positions(self, patches_BhwD: Tensor, table_1ND: Tensor) -> Tensor:
        assert self.cls_token is not None
        cls_B1D, patches_BND = self.cls_token.expand(len(patches_BhwD), -1, -1), patches_BhwD.flatten(1, 2)
        if self.reg_token is None:
            return self.pos_drop(torch.cat([cls_B1D, patches_BND], dim=1) + table_1ND)
        registers_BRD = self.reg_token.expand(len(patches_BhwD), -1, -1)
        return self.pos_drop(torch.cat([cls_B1D, registers_BRD, patches_BND + table_1ND], dim=1))


def _rate(block: PackedBlock) -> float:
    return block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 0.0


def resample_position_embedding(table_1ND: Tensor, h: int, w: int, *, prefix: int = 1) -> Tensor:
    """The position embedding (1, prefix + h w, D) on a grid of h x w patches; the class token's prefix is unchanged.

    Bicubic with a *scale factor* of (h + 0.1) / side and no antialiasing. The 0.1 was meant against rounding errors,
    but it shifts every sample position, and the published weights were trained with it: `size=(h, w)` or timm's
    antialiased resampling differ by 0.2 to 0.8 of the table's norm at 14 x 14 -> 6 x 6.
    """
    side = math.isqrt(table_1ND.shape[1] - prefix)
    if (h, w) == (side, side):
        return table_1ND
    cls_1pD, patches_1ND = table_1ND[:, :prefix], table_1ND[:, prefix:]
    grid_1Dss = patches_1ND.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = ((h + 0.1) / side, (w + 0.1) / side)
    grid_1Dhw = F.interpolate(grid_1Dss, scale_factor=scale, mode="bicubic")
    return torch.cat([cls_1pD, grid_1Dhw.flatten(2).transpose(1, 2)], dim=1)
