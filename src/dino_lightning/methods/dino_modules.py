"""The parts of DINO that its configuration chooses."""

from torch import nn

from dino_lightning.config import DINOConfig
from dino_lightning.losses.centering import Center, Centering, NoCenter, SinkhornCenter
from dino_lightning.models.heads import ACTIVATIONS, DINOHead, initialize


def dino_head(config: DINOConfig, feature_dim: int, *, train_norm: bool) -> DINOHead:
    """The head of student or teacher."""
    return DINOHead(
        feature_dim,
        out_dim=config.out_dim,
        layers=config.head_layers,
        hidden_dim=config.head_hidden_dim,
        bottleneck_dim=config.head_bottleneck_dim,
        batch_norm=config.head_batch_norm,
        train_norm=train_norm,
        activation=config.head_activation,
        normalize=config.head_l2_bottleneck,
    )


def dino_predictor(config: DINOConfig) -> nn.Module | None:
    """`method.predictor`: two layers like those of the head's MLP, or none.

    The paper names a predictor (table 7) without its place. At the bottleneck it has the width of an embedding, as in
    BYOL; behind the prototypes it would have K.
    """
    if not config.predictor:
        return None
    width, hidden = config.head_bottleneck_dim, config.head_hidden_dim
    norm = [nn.BatchNorm1d(hidden)] if config.head_batch_norm else []
    predictor = nn.Sequential(
        nn.Linear(width, hidden), *norm, ACTIVATIONS[config.head_activation](), nn.Linear(hidden, width)
    )
    # As the head's own layers. PyTorch's start has biases many times larger than what the fresh bottleneck gives: all
    # images would begin at one point, and the run would collapse to the uniform output in its first epoch.
    initialize(predictor)
    return predictor


def dino_centering(config: DINOConfig) -> Centering:
    """`method.centering`."""
    match config.centering:
        case "center":
            return Center(config.out_dim, momentum=config.center_momentum)
        case "sinkhorn":
            return SinkhornCenter(config.out_dim, iterations=config.sinkhorn_iterations)
        case "softmax":
            return SinkhornCenter(config.out_dim, iterations=1)
        case "none":
            return NoCenter(config.out_dim)
        case other:
            raise ValueError(f"no centering {other}")
