"""The network and the optimizer: `backbone`, `optim`."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from dino_lightning.config.ranges import AtLeast, Duration, OneOf, Positive, Range, ShareBelowOne

Betas = Range("two numbers from 0 and below 1", lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value))


@dataclass
class BackboneConfig:
    """The network that is trained; one of the children below."""

    drop_path_rate: Annotated[float, ShareBelowOne] = 0.1
    """Stochastic depth of the student, probability at the last block (0 to 1). The teacher never drops."""


@dataclass
class ViTConfig(BackboneConfig):
    """The paper's Vision Transformer: timm's blocks, the original's initialization and position embedding."""

    width: Annotated[int, AtLeast(1)] = 384
    """Token width D (features per token)."""
    depth: Annotated[int, AtLeast(1)] = 12
    """Number of transformer blocks."""
    heads: Annotated[int, AtLeast(1)] = 6
    """Attention heads per block; must divide `width`."""
    patch_size: Annotated[int, AtLeast(1)] = 16
    """Side of a square patch (pixels)."""
    registers: Annotated[int, AtLeast(0)] = 0
    """Further tokens without position that gather what belongs to no patch (Darcet et al. 2024: 4)."""
    drop_path: Annotated[str, OneOf("sample", "subset")] = "sample"
    """Stochastic depth: `sample` drops a branch crop by crop, as the original; `subset` computes each branch for a
    fixed number of random crops only, which saves time and memory and draws other random numbers."""


@dataclass
class TimmConfig(BackboneConfig):
    """Any network of timm by name, pooled to one feature vector by timm's own rule."""

    name: str = MISSING
    """Name in `timm.list_models()`, for example `resnet50` or `convnext_tiny`."""
    pretrained: bool = False
    """Start from timm's published weights (downloads them)."""
    patch_size: Annotated[int | None, AtLeast(1)] = None
    """Side of a square patch (pixels); null keeps the network's own. Only networks that have patches take it."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of `timm.create_model`."""


@dataclass
class OptimConfig:
    """Optimizer and its schedules; one of the children below."""

    lr: Annotated[float, AtLeast(0)] = 0.0005
    """Learning rate after the warm-up, per 256 images of the total batch (linear scaling rule)."""
    lr_end: Annotated[float, AtLeast(0)] = 1e-6
    """Learning rate that the cosine goes towards (not scaled)."""
    lr_warmup: Annotated[str, Duration] = "10ep"
    """Linear warm-up of the learning rate from 0 (duration)."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.04
    """Weight decay at the first step, of weights with two or more dimensions."""
    weight_decay_end: Annotated[float, AtLeast(0)] = 0.4
    """Weight decay that the cosine goes towards."""
    clip_grad: Annotated[float, AtLeast(0)] = 3.0
    """Largest L2 norm of each parameter's gradient, tensor by tensor; 0 turns clipping off."""


@dataclass
class AdamWConfig(OptimConfig):
    """AdamW, for transformers."""

    betas: Annotated[
        list[float],
        Betas,
    ] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the running averages of the gradient and its square."""


@dataclass
class SGDConfig(OptimConfig):
    """SGD with momentum, for convolutional networks."""

    momentum: Annotated[float, ShareBelowOne] = 0.9
    """Momentum."""


@dataclass
class LARSConfig(OptimConfig):
    """LARS, for convolutional networks with large batches."""

    momentum: Annotated[float, ShareBelowOne] = 0.9
    """Momentum."""
    trust_coefficient: Annotated[float, Positive] = 0.001
    """Ratio of update norm to weight norm."""
