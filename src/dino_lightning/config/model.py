"""The network and the optimizer: `backbone`, `optim`."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from dino_lightning.config.ranges import AtLeast, Duration, OneOf, Positive, Range, ShareBelowOne

Betas = Range("two numbers from 0 and below 1", lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value))


@dataclass
class BackboneConfig:
    """The network that is trained; one of the classes below."""

    drop_path_rate: Annotated[float, ShareBelowOne] = 0.1
    """Stochastic depth of the student: drop probability of the last block. The teacher never drops."""


@dataclass
class ViTConfig(BackboneConfig):
    """The paper's Vision Transformer: timm's blocks with the original's initialization and position embedding."""

    width: Annotated[int, AtLeast(1)] = 384
    """Width D of a token (features)."""
    depth: Annotated[int, AtLeast(1)] = 12
    """Number of transformer blocks."""
    heads: Annotated[int, AtLeast(1)] = 6
    """Attention heads per block; must divide `width`."""
    patch_size: Annotated[int, AtLeast(1)] = 16
    """Side of a square patch (pixels)."""
    registers: Annotated[int, AtLeast(0)] = 0
    """Number of register tokens, which have no position and store global information (Darcet et al. 2024 use 4)."""
    drop_path: Annotated[str, OneOf("sample", "subset")] = "sample"
    """Stochastic depth: `sample` drops a branch independently for each crop, as the original does; `subset` computes
    each branch only for a fixed number of random crops, which saves time and memory but draws other random numbers."""


@dataclass
class TimmConfig(BackboneConfig):
    """Any timm network, pooled to one feature vector as timm does."""

    name: str = MISSING
    """Name in `timm.list_models()`, for example `resnet50` or `convnext_tiny`."""
    pretrained: bool = False
    """Download timm's published weights and start from them."""
    patch_size: Annotated[int | None, AtLeast(1)] = None
    """Side of a square patch (pixels); null keeps the network's default. Only for networks with patches."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Additional keyword arguments of `timm.create_model`."""


@dataclass
class OptimConfig:
    """Optimizer and its schedules; one of the classes below."""

    lr: Annotated[float, AtLeast(0)] = 0.0005
    """Learning rate after the warm-up, per 256 images of the total batch (linear scaling rule)."""
    lr_end: Annotated[float, AtLeast(0)] = 1e-6
    """Final learning rate of the cosine schedule (not scaled with the batch)."""
    lr_warmup: Annotated[str, Duration] = "10ep"
    """Linear warm-up of the learning rate from 0 (duration)."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.04
    """Weight decay at the first step. It applies to weights with two or more dimensions."""
    weight_decay_end: Annotated[float, AtLeast(0)] = 0.4
    """Final weight decay of the cosine schedule."""
    clip_grad: Annotated[float, AtLeast(0)] = 3.0
    """Largest L2 norm of the gradient of each parameter tensor; 0 disables clipping."""


@dataclass
class AdamWConfig(OptimConfig):
    """AdamW, for transformers."""

    betas: Annotated[list[float], Betas] = field(default_factory=lambda: [0.9, 0.999])
    """Decay rates of the running averages of the gradient and of its square."""


@dataclass
class SGDConfig(OptimConfig):
    """SGD with momentum, for convolutional networks."""

    momentum: Annotated[float, ShareBelowOne] = 0.9
    """Momentum of the gradient."""


@dataclass
class LARSConfig(OptimConfig):
    """LARS, for convolutional networks with large batches."""

    momentum: Annotated[float, ShareBelowOne] = 0.9
    """Momentum of the gradient."""
    trust_coefficient: Annotated[float, Positive] = 0.001
    """Ratio of update norm to weight norm."""
