"""The head, the predictor and the centering that DINO's configuration selects."""

from torch import nn

from dino_lightning.config import DINOConfig
from dino_lightning.losses.centering import Center, Centering, NoCenter, SinkhornCenter
from dino_lightning.models.heads import ACTIVATIONS, DINOHead, initialize


def dino_head(config: DINOConfig, feature_dim: int, *, train_norm: bool) -> DINOHead:
    """The head of the student or the teacher."""
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
    """`method.predictor`: two layers like those of the head's MLP, or None.

    The paper mentions a predictor (table 7) but not where it is. At the bottleneck it has the width of an embedding, as
    in BYOL; after the prototypes its width would be K.
    """
    if not config.predictor:
        return None
    width, hidden = config.head_bottleneck_dim, config.head_hidden_dim
    norm = [nn.BatchNorm1d(hidden)] if config.head_batch_norm else []
    predictor = nn.Sequential(
        nn.Linear(width, hidden), *norm, ACTIVATIONS[config.head_activation](), nn.Linear(hidden, width)
    )
    # Initialized like the head. PyTorch's default biases are much larger than the outputs of a new bottleneck: all
    # images would start with the same output, and the run would collapse to the uniform output in its first epoch.
    initialize(predictor)
    return predictor


def dino_centering(config: DINOConfig) -> Centering:
    """The centering that `method.centering` names."""
    match config.centering:
        case "center":
            return Center(config.out_dim, momentum=config.center_momentum)
        case "sinkhorn":
            return SinkhornCenter(config.out_dim, iterations=config.sinkhorn_iterations)
        case "softmax":
            return SinkhornCenter(config.out_dim, iterations=1)
        case _:
            return NoCenter(config.out_dim)
