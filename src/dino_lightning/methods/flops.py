"""Floating-point operations of a training step, counted from the configuration and the heads.

Counted are the matrix products and convolutions of the model, two operations for a multiplication with its addition:
the student's forward pass three times (its backward pass has two products for each one of the forward pass), the
teacher's once, heads, predictors and prototypes included. Left out are norms, activations, softmax, the loss, the
masked patches of `method.patch_loss_weight`, and the optimizer. The count does not depend on the implementation: one
that recomputes something, or skips unused outputs, is compared with the same number.
"""

from collections import Counter
from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dino_lightning.config import BackboneConfig, CropsConfig, TimmConfig, ViTConfig
from dino_lightning.methods.base import GLOBAL_CROPS, Method
from dino_lightning.models.backbones import build_backbone

MLP_RATIO = 4
STUDENT_PASSES, TEACHER_PASSES = 3, 1

Counts = dict[str, float]
"""Operations by part."""


def step_flops(method: Method, *, backbone: BackboneConfig, crops: CropsConfig, channels: int = 3) -> float:
    """Operations of one training step per image; call it before the weights are sharded."""
    sizes = [crops.global_size] * GLOBAL_CROPS + [crops.local_size] * crops.local_count
    student, teacher = method.views_of_networks(len(sizes))
    passes: Counter[int] = Counter()
    for views, times in ((student, STUDENT_PASSES), (teacher, TEACHER_PASSES)):
        for crop in views:
            passes[sizes[crop]] += times
    total = sum(
        times * sum(backbone_flops(backbone, image_size=size, channels=channels).values())
        for size, times in passes.items()
    )
    teacher_head = matrix_flops(method.networks[-1].head) if teacher else 0.0
    outside_networks = matrix_flops(method) - sum(matrix_flops(network) for network in method.networks)  # the predictor
    student_head = outside_networks + matrix_flops(method.student.head)
    return total + STUDENT_PASSES * len(student) * student_head + TEACHER_PASSES * len(teacher) * teacher_head


def matrix_flops(module: nn.Module) -> float:
    """Operations per row of a module that uses each of its matrices once, such as a head or prototypes."""
    # Norms of prototypes have the shape (K, 1); they are no matrices.
    matrices = [weight for weight in module.parameters() if weight.ndim == 2 and 1 not in weight.shape]
    return 2.0 * sum(matrix.numel() for matrix in matrices)


def backbone_flops(backbone: BackboneConfig, *, image_size: int, channels: int = 3) -> Counts:
    """Operations of a backbone's forward pass over one crop."""
    if isinstance(backbone, ViTConfig):
        return vit_flops(backbone, image_size=image_size, channels=channels)
    network = meta_network(backbone, image_size=image_size, channels=channels)
    return {"network": counted_flops(network, image_size=image_size, channels=channels)}


def vit_flops(config: ViTConfig, *, image_size: int, channels: int = 3) -> Counts:
    """Operations of the patch embedding, the linear layers of the attention, its two products, and the MLPs."""
    patches, D = (image_size // config.patch_size) ** 2, config.width
    tokens = patches + 1 + config.registers
    return {
        "patch_embedding": 2.0 * patches * channels * config.patch_size**2 * D,
        "attention_linear": 2.0 * config.depth * tokens * 4 * D * D,
        "attention": 2.0 * config.depth * 2 * tokens * tokens * D,
        "mlp": 2.0 * config.depth * tokens * 2 * MLP_RATIO * D * D,
    }


def meta_network(config: BackboneConfig, *, image_size: int = 224, channels: int = 3) -> nn.Module:
    """The network on the meta device, without memory for its weights."""
    if isinstance(config, TimmConfig):
        config = replace(config, pretrained=False)
    with torch.device("meta"):
        return build_backbone(config, image_size=image_size, channels=channels, drop_path=False).eval()


def counted_flops(network: nn.Module, *, image_size: int, channels: int = 3) -> float:
    """Operations of a forward pass over one image, counted by PyTorch on the meta device."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.empty(1, channels, image_size, image_size, device="meta"))
    return float(counter.get_total_flops())
